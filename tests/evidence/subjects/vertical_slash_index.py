"""Evidence of vertical_slash_index."""

import functools
import re
from typing import Any

import torch
from mutations import BARRIER, COMMIT, MMA_A, MMA_B, SWAPPED, WAIT, Change, at_line, nth, shuffle, weaker
from scrimp.kernels import vertical_slash_index as kernels
from torch import Tensor

from scrimp._registry import OPS
from scrimp.ops.vertical_slash_index import column_scores

from .subject import Case, Flat, Mutant, Subject, pairwise

FIELDS = ("q", "k", "window", "columns", "max_columns", "sinks", "segment", "samples", "q_block", "q_offset", "scale")


def make(
    shape: tuple[int, int, int], batch: int, heads: int, groups: int, head_dim: int, dtype: torch.dtype, segment: int,
    samples: int, q_block: int, columns: int, most: int, window: int, sinks: int, kind: str, strided: bool = False,
) -> Flat:  # fmt: skip
    """`shape` is (n_q, n_k, q_offset). Heads differ in their budgets: every third has half of it, every third none.

    Scores are random, `separated` by 3 % and more so that rounding cannot exchange them, all `equal`, or separated with
    a `wild` key and a wild row that are not finite. `tempted`: random, but each sampled row meets, right behind its
    causal end, a key that would leave no weight to any other.
    """
    n_q, n_k, q_offset = shape
    q, k = torch.randn(batch, heads, n_q, head_dim), torch.randn(batch, groups, n_k, head_dim)
    if kind == "equal":
        k = torch.ones_like(k)
    elif kind == "tempted":
        q[..., :32], k[..., :32] = 0, 0  # a dimension for each sampled row and its key
        rows = sampled(n_q, segment, samples)
        q[..., rows, range(len(rows))] = 64
        k[..., [row + q_offset + 1 for row in rows], range(len(rows))] = 64
    elif kind != "random":
        q, k = torch.zeros_like(q), torch.zeros_like(k)
        q[..., 0] = 1
        for head in k.flatten(0, 1):
            head[:, 0] = torch.randperm(n_k) / 32
    if kind == "wild":
        k[-1, -1, n_k * 2 // 3] = torch.nan
        q[0, 0, n_q * 3 // 4] = torch.inf
    widths, counts = ([(x // (2 - h % 2) if h % 3 < 2 else 0) for h in range(1, heads + 1)] for x in (window, columns))
    budgets = [torch.tensor(x, dtype=torch.int32) for x in (widths, counts)]
    if strided:
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    scale = max(head_dim, 1) ** -0.5 if kind in ("random", "equal", "tempted") else 1.0
    return (q.to(dtype), k.to(dtype), *budgets, most, sinks, segment, samples, q_block, q_offset, scale)


def sampled(n_q: int, segment: int, samples: int) -> list[int]:
    """The rows that are scored."""
    step = segment // samples
    starts = range(0, n_q, segment)
    return [min(row, n_q - 1) for s in starts for row in range(s + step - 1, min(s + segment, n_q) + step - 1, step)]


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


SHAPES = [(1, 1, 0), (63, 63, 0), (65, 135, 70), (200, 200, 0), (200, 330, 130), (65, 100, -20), (63, 90, 1000)]
# (head_dim, samples, 16-bit dtype, dtype of the interpreter): every two of them meet, and only four kernels are built.
KERNELS = [
    (64, 4, torch.float16, torch.float32), (64, 16, torch.bfloat16, torch.float16),
    (128, 4, torch.bfloat16, torch.float16), (128, 16, torch.float16, torch.float32),
]  # fmt: skip
PAIRS = pairwise(
    shape=SHAPES, kernel=KERNELS, heads=[(1, 1, 1), (1, 3, 1), (2, 3, 3), (1, 8, 1)], tiles=[(64, 16), (128, 64)],
    columns=[(0, 0), (7, 7), (40, 30), (500, 500)], window=[20, 0, 1000], sinks=[0, 5],
    kind=["random", "separated", "equal"], strided=[False, True],
)  # fmt: skip


def cases(interpreted: bool) -> dict[str, Case]:
    found: dict[str, Case] = {}
    for row in PAIRS:
        if interpreted and row["heads"][1] > 3:
            continue
        (head_dim, samples, *dtypes), (batch, heads, groups) = row["kernel"], row["heads"]
        (segment, q_block), (columns, most) = row["tiles"], row["columns"]
        case = {
            "shape": row["shape"], "batch": batch, "heads": heads, "groups": groups, "head_dim": head_dim,
            "dtype": dtypes[interpreted], "segment": segment, "samples": samples, "q_block": q_block,
            "columns": columns, "most": most, "window": row["window"], "sinks": row["sinks"], "kind": row["kind"],
            "strided": row["strided"],
        }  # fmt: skip
        words = (str(value).removeprefix("torch.") for value in case.values())
        found["-".join(words).replace(" ", "")] = functools.partial(make, **case)
    return found


def case(**changes: Any) -> Case:
    """A case of three heads of which one is scored, changed."""
    base = {
        "shape": (200, 200, 0), "batch": 1, "heads": 3, "groups": 1, "head_dim": 64, "dtype": torch.float16,
        "segment": 64, "samples": 32, "q_block": 32, "columns": 24, "most": 24, "window": 20, "sinks": 5,
        "kind": "random",
    }  # fmt: skip
    return functools.partial(make, **base | changes)


TEMPTED = "a forbidden key behind each row"
EMULATED = cases(interpreted=False) | {
    "more samples than rows": case(),
    "not finite": case(samples=4, kind="wild"),
    TEMPTED: case(samples=4, kind="tempted", shape=(200, 240, 30)),
    "not finite, more samples than rows": case(kind="wild"),
    # The configuration of many segments: four of them in 64 rows of a tile.
    "many segments": case(
        shape=(2000, 2000, 0), head_dim=128, dtype=torch.bfloat16, segment=16, samples=16, q_block=16, window=1700
    ),
}


def shipped() -> dict[str, Case]:
    """One case for every entry of the configuration file, in bfloat16: few segments (4K tokens) and many (128K)."""

    def meta(head_dim: int, n: int) -> Flat:
        q, k = (torch.empty(1, heads, n, head_dim, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
        budget = torch.empty(32, dtype=torch.int32, device="meta")
        return q, k, budget, budget, 1024, 16, 512, 16, 64, 0, head_dim**-0.5

    return {
        f"{head_dim}-{n}": functools.partial(meta, head_dim, n) for head_dim in (64, 128, 256) for n in (512, 131072)
    }


MAIN, SMALL = kernels.vertical_slash_index_kernel, kernels.vertical_slash_ranges_kernel
MAIN_NAME = "vertical_slash_index_kernel"
RACE = ("race", "async_race", "uninitialised")


def planted(change: Change, *caught_by: str) -> Mutant:
    return Mutant(MAIN_NAME, change, frozenset(caught_by))


def line(words: str, pattern: str, index: int | None, replacement: str, *caught_by: str) -> Mutant:
    return planted(at_line(MAIN, words, pattern, index, replacement), *caught_by)


def tempted(change: Change) -> Mutant:
    """A fault of which only a key behind the causal end tells."""
    return Mutant(MAIN_NAME, change, frozenset({"value"}), case=TEMPTED)


def small(words: str, pattern: str, replacement: str, *caught_by: str) -> Mutant:
    change = at_line(SMALL, words, pattern, 0, replacement)
    return Mutant("vertical_slash_ranges_kernel", change, frozenset(caught_by))


MUTANTS = {
    **{f"barrier {k} removed": planted(nth(BARRIER, k, ""), *RACE) for k in (2, 6, 8, 12, 16, 20, 24, 28)},
    **{f"wait {k} weakened": planted(weaker(k), *RACE) for k in range(4)},
    **{f"wait {k} removed": planted(nth(WAIT, k, ""), *RACE) for k in range(4)},
    **{f"commit {k} removed": planted(nth(COMMIT, k, ""), *RACE) for k in range(6)},
    "operand A of the last product swapped": planted(nth(MMA_A, -1, SWAPPED), "value"),
    **{f"operand B of product {k} swapped": planted(nth(MMA_B, k, SWAPPED), "value") for k in (0, -1)},
    **{f"last shuffle over {new}": planted(shuffle(-1, old, new), "value") for old, new in ((16, 8), (8, 4), (2, 1))},
    "a key behind the end in the first pass": tempted(
        at_line(MAIN, "(start + n)[:, None] < end", r"setp\.lt\.s32", None, "setp.le.s32")
    ),
    "no end in the first pass": tempted(
        at_line(
            MAIN, "if start + BLOCK_K > least_end", r"setp\.le\.s32(\s+%p\d+, %r\d+), %r\d+;", 0,
            r"setp.le.s32\1, 2147483647;",
        )
    ),
    "ends one too far": tempted(
        lambda text: re.sub(r"(max\.s64[^;]*, -1;\s+add\.s64[^;]*), 1;", r"\1, 2;", text)
    ),
    "sinks scored": line("(key >= sinks)[:, None]", r"setp\.ge\.s32", 0, "setp.gt.s32", "value"),
    "window scored": line("(key >= sinks)[:, None]", r"setp\.lt\.s32", None, "setp.le.s32", "value"),
    "no exponential of the gap": line(
        "weight = tl.exp2(", r"ex2\.approx(\.ftz)?\.f32(\s+%r\d+, )(%r\d+)", 0, r"mov.b32\2\3", "value"
    ),
    "no exponential of a share": line(
        "share = tl.exp2(", r"ex2\.approx(\.ftz)?\.f32(\s+%r\d+, )(%r\d+)", 0, r"mov.b32\2\3", "value"
    ),
    "maximum and new score exchanged": line("tl.where(gap > 0", r"setp\.gt\.f32", None, "setp.lt.f32", "value"),
    "counts of half a range": line("least - 1 - x) >> 31", r"(shr\.\w32\s+%r\d+, %r\d+), 31;", 0, r"\1, 30;", "value"),
    "highest threshold not taken": line("if n_c > wanted", r"setp\.\w+\.s32", 0, "setp.eq.s32", "out_of_bounds"),
    "middle threshold not taken": line("elif n_b > wanted", r"setp\.\w+\.s32", 0, "setp.eq.s32", "value"),
    "window's first key counted": line("below += tl.sum(", r"setp\.lt\.s32", None, "setp.le.s32", "value"),
    "slices past the segment": line(
        "mask=(tile < last_tile)", r"setp\.lt\.s32", None, "setp.le.s32", "value", "out_of_bounds"
    ),
    **{
        f"{name} short": Mutant(MAIN_NAME, caught_by=frozenset({"out_of_bounds"}), short={name: size})
        for name, size in {"k": 4, "columns": 4}.items()
    },
    "end of a tile": small("high = tl.minimum((tile + 1)", r"min\.s32", "max.s32", "value"),
    "sinks where there are none": small("has_sinks = (low > 0)", r"setp\.gt\.s32", "setp.ge.s32", "value"),
    "a tile too many": small("inside = (tile < T)", r"setp\.lt\.s32", "setp.le.s32", "out_of_bounds"),
    "window added": small("q_offset - window", r"sub\.s64", "add.s64", "value"),
    "window not clamped below": small("tl.maximum(low, 0), n_k", r"max\.s64", "min.s64", "value"),
    "window not clamped above": small("tl.maximum(low, 0), n_k", r"min\.s64", "max.s64", "value"),
    "slice's start and count exchanged": small(
        "tl.where(part == 0, 2 * tile", r"selp\.b32(\s+%r\d+), (%r\d+), (%r\d+)", r"selp.b32\1, \3, \2", "value"
    ),
    "a zero too many": small("mask=c < S * max_columns", r"setp\.lt\.s32", "setp.le.s32", "out_of_bounds"),
    "segment of a tile": small("first = tile * q_block // segment", r"div\.s32", "rem.s32", "value"),
    "head of another sequence": small(
        "head = (tl.program_id(2) * H", r"mad\.lo\.s32(\s+%r\d+, %r\d+), (%r\d+), %r\d+;", r"mad.lo.s32\1, \2, \2;",
        "out_of_bounds",
    ),
    **{
        f"{name} short in the small kernel": Mutant(
            "vertical_slash_ranges_kernel", caught_by=frozenset({"out_of_bounds"}), short={name: 4}
        )
        for name in ("ranges", "column_slice")
    },
}  # fmt: skip
SUBJECT = Subject(
    op="vertical_slash_index",
    cases=EMULATED,
    warp_cases=[*list(EMULATED)[6:9], "many segments"],
    interpreted=cases(interpreted=True) | {"not finite": case(kind="wild"), "no head size": case(head_dim=0)},
    check=check,
    reference_launch="many segments",
    shipped=shipped(),
    defaults=["64-131072", "128-131072"],
    mutant_case="more samples than rows",
    mutants=MUTANTS,
    tensor_kernels={"vertical_slash_index_kernel": 0},
    exact_bytes=False,
)
