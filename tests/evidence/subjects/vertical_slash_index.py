"""Evidence of vertical_slash_index."""

import functools
from typing import Any

import torch
from scrimp._registry import OPS
from scrimp.ops.vertical_slash_index import column_scores
from torch import Tensor

from .subject import Case, Flat, Subject, pairwise

FIELDS = ("q", "k", "window", "columns", "max_columns", "sinks", "segment", "samples", "q_block", "q_offset", "scale")


def make(
    n: int, head_dim: int, heads: int, groups: int, dtype: torch.dtype, segment: int, samples: int, q_block: int,
    columns: int, window: int, sinks: int, offset: int, kind: str = "random",
) -> Flat:
    """`offset` keys lie before the first query; the last head has other budgets than the first."""
    q, k = torch.randn(1, heads, n, head_dim), torch.randn(1, groups, n + offset, head_dim)
    if kind == "separated":  # by 3 % and more
        q, k = torch.zeros_like(q), torch.zeros_like(k)
        q[..., 0] = 1
        for head in k.flatten(0, 1):
            head[:, 0] = (torch.randperm(n + offset) / 32)
    elif kind == "equal":
        k = torch.ones_like(k)
    budgets = [torch.full((heads,), x, dtype=torch.int32) for x in (window, columns)]
    if heads > 1:
        budgets[1][0] = columns // 2
    scale = 1.0 if kind == "separated" else head_dim**-0.5
    return (q.to(dtype), k.to(dtype), *budgets, columns, sinks, segment, samples, q_block, offset, scale)


def rounding(at: dict[str, Any]) -> float:
    """Largest relative error of a score, for fp32 sums in any order of exact products of the inputs.

    A sum of m terms errs by m u of the sum of their sizes (u = 2^-23, as tensor cores cut off instead of rounding);
    an error d of a logit is one of d in its exponential, and the sum below it may err as much the other way.
    """
    q, k = at["q"].double(), at["k"].double().repeat_interleave(at["q"].shape[1] // at["k"].shape[1], 1)
    size = float((q.abs() @ k.abs().mT).max()) * abs(at["scale"]) if q.numel() and k.numel() else 0.0
    terms = (q.shape[-1] + 4) * size + k.shape[2] + at["samples"] + 8
    return 2 * terms * 2.0**-23


def check(results: Any, args: Flat) -> None:
    """Ranges, slices, counts and order as the float64 reference has them; columns of the same mass but for rounding.

    A score that errs by at most E can be taken for one that is 2 E better: so much may each exchanged column cost.
    """
    args = tuple(x.cpu() if isinstance(x, Tensor) else x for x in args)
    got = tuple(x.cpu() for x in results)
    at = dict(zip(FIELDS, args, strict=True))
    q, k = at["q"].double(), at["k"].double()
    expected = OPS["vertical_slash_index"].reference(q, k, *args[2:])
    for value, truth in zip(got, expected, strict=True):
        assert (value.shape, value.dtype) == (truth.shape, torch.int32)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[3][..., 0], expected[3][..., 0])
    n_q, q_block, width, relative = q.shape[2], at["q_block"], at["max_columns"], rounding(at)
    for s, start in enumerate(range(0, n_q, at["segment"])):
        stop, stride = min(start + at["segment"], n_q), at["segment"] // at["samples"]
        rows = torch.arange(start + stride - 1, stop + stride - 1, stride).clamp(max=stop - 1)
        first, last = start // q_block, -(-stop // q_block) - 1
        low = rows // q_block * q_block + at["q_offset"] - at["window"].long()[:, None]
        low = low.clamp(0, k.shape[2])
        score = column_scores(
            q, k, rows, low.masked_fill(low <= at["sinks"], 0), at["sinks"], at["q_offset"], at["scale"]
        )
        for b, h in torch.cartesian_prod(torch.arange(q.shape[0]), torch.arange(q.shape[1])).tolist():
            mine, theirs = (x[2][b, h, s * width : (s + 1) * width].long() for x in (got, expected))
            count = int(expected[3][b, h, last, 1])
            assert torch.equal(mine[count:], theirs[count:])
            mine, theirs = mine[:count], theirs[:count]
            assert (mine.diff() > 0).all()
            windows = expected[0][b, h, 2 * first + 1 : 2 * last + 2 : 2, 0]
            assert torch.equal(got[3][b, h, first : last + 1, 1].long(), (mine < windows[:, None]).sum(1))
            if not torch.equal(mine, theirs):
                assert at["sinks"] <= int(mine[0]) <= int(mine[-1]) < k.shape[2]
                lost, found = theirs[~torch.isin(theirs, mine)], mine[~torch.isin(mine, theirs)]
                short = float(score[b, h, lost].sum() - score[b, h, found].sum())
                bound = 2 * relative * float(score[b, h, lost].max()) * len(lost)
                assert short <= bound, f"head {h}, segment {s}: {short} over {bound} for {len(lost)} columns"


ROWS = pairwise(
    shape=[(1, 0), (63, 0), (65, 70), (200, 0), (200, 130)], head_dim=[64, 128], heads=[(1, 1), (3, 1), (3, 3), (8, 1)],
    segment=[(64, 4, 16), (128, 16, 64)], columns=[0, 7, 40, 500], window=[0, 20, 100, 1000], sinks=[0, 5],
    kind=["random", "separated", "equal"],
)  # fmt: skip


def cases(*dtypes: torch.dtype) -> dict[str, Case]:
    found: dict[str, Case] = {}
    for i, row in enumerate(ROWS):
        (n, offset), (heads, groups), (segment, samples, q_block) = row["shape"], row["heads"], row["segment"]
        dtype = dtypes[i % len(dtypes)]
        name = f"{n}+{offset}-{row['head_dim']}-{heads}:{groups}-{segment}:{samples}-{row['columns']}-{row['window']}"
        name += f"-{row['sinks']}-{row['kind']}-{str(dtype).removeprefix('torch.')}"
        found[name] = functools.partial(
            make, n=n, head_dim=row["head_dim"], heads=heads, groups=groups, dtype=dtype, segment=segment,
            samples=samples, q_block=q_block, columns=row["columns"], window=row["window"], sinks=row["sinks"],
            offset=offset, kind=row["kind"],
        )  # fmt: skip
    return found


EMULATED = cases(torch.float16, torch.bfloat16)
SUBJECT = Subject(
    op="vertical_slash_index",
    cases=EMULATED,
    warp_cases=list(EMULATED)[:4],
    interpreted=cases(torch.float16, torch.float32),
    check=check,
    reference_launch=next(iter(EMULATED)),
    shipped={},
    mutant_case=next(iter(EMULATED)),
)
