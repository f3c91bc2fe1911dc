"""vertical_slash_index: the time of the estimate as a share of dense attention's (field `share`)."""

import dataclasses
import itertools
from functools import partial

import torch
from torch import Tensor

import scrimp
from scrimp import SparsePlan
from scrimp._registry import OPS
from scrimp.ops.vertical_slash_index import column_scores

from .registry import Call, Case, Problem, Work
from .sparse_attention import ELEMENTS, Q_BLOCK

TENSORS = ("ranges", "range_slice", "columns", "column_slice")
WINDOW, COLUMNS, SINKS, SEGMENT, SAMPLES = 256, 500, 16, 512, 16


def cases() -> list[Case]:
    """8K and 16K, every head with columns to choose; the demo model's grouped heads; one bf16."""
    found = [case(n, D, max(1, ELEMENTS // (n * D))) for D in (64, 128) for n in (8192, 16384)]
    return [*found, case(8192, 64, 9, 3), case(16384, 128, 1, dtype=torch.bfloat16)]


def cuda_cases() -> list[Case]:
    """A layer of an 8B model."""
    return [case(n, 128, 32, 8, torch.bfloat16) for n in (8192, 32768, 131072)]


def case(n: int, D: int, heads: int, groups: int | None = None, dtype: torch.dtype = torch.float32) -> Case:
    """One case of q `[1, heads, n, D]` and k `[1, groups, n, D]`."""
    name = f"{n}-d{D}" + (f"-h{heads}g{groups}" if groups else "")
    shape = {"m": n, "batch": 1, "heads": heads, "kv_heads": groups or heads, "n": n, "head_dim": D}
    return Case("vertical_slash_index", name, dtype, shape, ("sdpa", "self-dense"), partial(problem, shape, dtype))


def problem(shape: dict[str, int], dtype: torch.dtype) -> Problem:
    """Inputs, call, check and limit: the sampled rows against the keys before them, one matrix product."""
    H, G, n, D = (shape[name] for name in ("heads", "kv_heads", "n", "head_dim"))
    q, k, v = (torch.randn(1, heads, n, D).to(dtype) for heads in (H, G, G))
    window, columns = (torch.full((H,), value, dtype=torch.int32) for value in (WINDOW, COLUMNS))
    dense = SparsePlan.dense(n, q_block=Q_BLOCK)
    rows = n * SAMPLES // SEGMENT

    def estimate() -> SparsePlan:
        sizes = {"sinks": SINKS, "segment": SEGMENT, "samples": SAMPLES, "max_columns": COLUMNS}
        return scrimp.ops.vertical_slash_index(q, k, window, columns, **sizes)

    return Problem(
        inputs=(q, k, v),
        ours=estimate,
        check=lambda plan: check(plan, q, k, window, columns),
        work=Work(bytes=k.nbytes + q.nbytes * rows / n, flops=2 * D * H * rows * n / 2),
        own={"self-dense": lambda: scrimp.ops.sparse_attention(q, k, v, dense)},
        standard="sdpa",
        fields={"plan": "vertical_slash", "columns": COLUMNS, "window": WINDOW},
        derive=lambda ratio: {"share": 1 / ratio["self-dense"] if "self-dense" in ratio else None},
    )


def check(plan: SparsePlan, q: Tensor, k: Tensor, window: Tensor, columns: Tensor) -> None:
    """Three segments of the first and the last head: ranges as the reference's; columns worth as much in float64.

    Which of two nearly equal columns is chosen is rounding: the mass of ours may fall short of the best mass by
    twice what the reference in the working dtype falls short, and two units in its last place.
    """
    op, last = "vertical_slash_index", q.shape[2] // SEGMENT - 1
    tiles = SEGMENT // plan.q_block
    for head, segment in itertools.product(sorted({0, q.shape[1] - 1}), sorted({0, last // 2, last})):
        place = f"head {head}, segment {segment}"
        start, group = segment * SEGMENT, head // (q.shape[1] // k.shape[1])
        part = (q[:, head : head + 1, start : start + SEGMENT], k[:, group : group + 1], window[head : head + 1])
        sizes = (COLUMNS, SINKS, SEGMENT, SAMPLES, plan.q_block, plan.q_offset + start, q.shape[3] ** -0.5)
        flat = OPS[op].reference(*part, columns[head : head + 1], *sizes)
        expected, own = dataclasses.replace(plan, **dict(zip(TENSORS, flat, strict=True))), plan.select(heads=[head])
        for tile in range(tiles):
            mine, theirs = ranges(own, segment * tiles + tile), ranges(expected, tile)
            if mine != theirs:
                raise AssertionError(f"ranges of {place}, tile {tile}: {mine}, the reference has {theirs}")
        picked, reference = chosen(own, (segment + 1) * tiles - 1), chosen(expected, tiles - 1)
        if len(set(picked.tolist())) != len(reference):
            raise AssertionError(f"{place}: {len(set(picked.tolist()))} columns, the reference has {len(reference)}")
        score = exact_scores(*part, plan, start)
        best = score.topk(len(picked)).values.sum()
        short, allowed = (best - score[some.long()].sum() for some in (picked, reference))
        if short > (bound := 2 * allowed + 2 * torch.finfo(q.dtype).eps * best):
            raise AssertionError(f"{place}: the columns' mass is {short:.3e} below the best, the bound {bound:.3e}")


def exact_scores(q: Tensor, k: Tensor, window: Tensor, plan: SparsePlan, start: int) -> Tensor:
    """float64 `[n_k]`: the mass of every column for one head and segment, whose sampled rows end each stride."""
    stride = SEGMENT // SAMPLES
    rows = torch.arange(stride - 1, SEGMENT, stride)
    low = (rows // plan.q_block * plan.q_block + start + plan.q_offset - window.long()[:, None]).clamp(min=0)
    low = low.masked_fill(low <= SINKS, 0)
    sizes = (SINKS, plan.q_offset + start, q.shape[3] ** -0.5)
    return column_scores(q.double(), k.double(), rows, low, *sizes)[0, 0]


def ranges(plan: SparsePlan, tile: int) -> list[list[int]]:
    """The ranges of one tile of a plan of one head."""
    first, count = plan.range_slice[0, 0, tile].tolist()
    pairs: list[list[int]] = plan.ranges[0, 0, first : first + count].tolist()
    return pairs


def chosen(plan: SparsePlan, tile: int) -> Tensor:
    """The columns of one tile of a plan of one head; a segment's last tile has all of them."""
    first, count = plan.column_slice[0, 0, tile].tolist()
    return plan.columns[0, 0, first : first + count]


def tiny() -> Call:
    """A call that is all overhead."""
    q, none = torch.randn(1, 1, 1, 8), torch.zeros(1, dtype=torch.int32)
    return lambda: scrimp.ops.vertical_slash_index(q, q, none, none, max_columns=0)
