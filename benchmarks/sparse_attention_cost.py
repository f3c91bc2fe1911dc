"""What sparse_attention's kernel does: keys loaded and products issued, from the plan and the kernel's tile sizes.

Everything is summed over programs (a block of rows of a plan tile) and their ranges; nothing has the size n x n.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from scrimp.kernels.sparse_attention import launches
from torch import Tensor

from scrimp import SparsePlan
from scrimp.sparse_plan import measure

from . import minference_count
from .roofline import Count, CountedCase
from .sparse_attention import blocks, scattered

LOOKED_UP = 1024  # columns whose bits a program holds at once
LANES = 32  # ranges that it holds at once
TOGETHER = 512  # programs that run at a time on a large GPU


def ceil_div(a: Tensor, b: int) -> Tensor:
    return -(-a // b)


def repeated(counts: Tensor) -> tuple[Tensor, Tensor]:
    """counts [N] -> for each of the counts.sum() items: its owner, and its rank in its owner."""
    owner = torch.arange(len(counts)).repeat_interleave(counts)
    return owner, torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]


def lower_bound(values: Tensor, first: Tensor, count: Tensor, at: Tensor) -> Tensor:
    """How many of values[first : first + count], sorted, are below `at`."""
    low, high, values = first, first + count, torch.nn.functional.pad(values, (0, 1))
    for _ in range(len(values).bit_length()):
        middle = (low + high) >> 1
        below = (low < high) & (values[middle] < at)
        low, high = torch.where(below, middle + 1, low), torch.where(below, high, middle)
    return low - first


def covered(start: Tensor, stop: Tensor, size: int) -> Tensor:
    """bool [size]: what lies in one of the intervals; empty ones hold nothing."""
    start, stop = start[start < stop], stop[start < stop]
    change = torch.zeros(size + 1, dtype=torch.int64)
    change.index_add_(0, start, torch.ones_like(start)).index_add_(0, stop, -torch.ones_like(stop))
    return change.cumsum(0)[:size] > 0


@dataclass(frozen=True)
class Programs:
    """The programs of one head (or group of heads) in one sample, int64 [P] each."""

    tile: Tensor
    rows: Tensor  # of the block that are no padding
    low: Tensor  # keys in [low, high) are seen by some row,
    safe_low: Tensor  # those in [safe_low, safe_high) by every row
    safe_high: Tensor
    high: Tensor

    @classmethod
    def of(cls, args: Any, block: int, n_rows: int, row_start: Tensor | None) -> Programs:
        q_block, group, n_q, n_k = (args[name] for name in ("q_block", "group", "n_q", "n_k"))
        n_tiles, of_tile = -(-n_q // q_block), -(-n_rows // block)
        tile = torch.arange(n_tiles).repeat_interleave(of_tile)
        first_row = torch.arange(of_tile).repeat(n_tiles) * block
        left = (n_q - tile * q_block).clamp(max=q_block) * group - first_row
        tile, first_row, rows = tile[left > 0], first_row[left > 0], left[left > 0].clamp(max=block)
        first, last = tile * q_block + first_row // group, tile * q_block + (first_row + rows - 1) // group
        safe_high, high = ((token + args["q_offset"] + 1).clamp(0, n_k) for token in (first, last))
        low = safe_low = torch.zeros_like(tile)
        if row_start is not None:
            token, rank = repeated(last - first + 1)
            starts = row_start.long()[first[token] + rank]
            low = torch.full_like(tile, n_k).scatter_reduce(0, token, starts, "amin")
            safe_low = safe_low.scatter_reduce(0, token, starts, "amax")
        return cls(tile, rows, low, safe_low, safe_high, high)


@dataclass(frozen=True)
class Work:
    """Sums over the programs of one head."""

    pieces: int  # steps of the three loops
    keys: int  # rows of K (and of V) that are loaded
    range_loads: int
    column_loads: int
    touched: Tensor  # bool [n_k]


def work(
    p: Programs, ranges: Tensor, range_slice: Tensor, columns: Tensor, column_slice: Tensor, piece: int, n_k: int
) -> Work:
    """Of one head: ranges [R, 2], range_slice [T, 2], columns [C], column_slice [T, 2]; a step takes `piece` keys."""
    ranges, range_slice, columns, column_slice = (x.long() for x in (ranges, range_slice, columns, column_slice))
    first, n_ranges = range_slice[p.tile].unbind(1)
    owner, rank = repeated(n_ranges)
    low, safe_low, safe_high, high = (x[owner] for x in (p.low, p.safe_low, p.safe_high, p.high))
    start, stop = ranges[first[owner] + rank].unbind(1)
    start = start.maximum(low)
    stop = stop.minimum(high).maximum(start)
    whole = start.maximum(safe_low).minimum(stop)
    pieces = (stop.minimum(safe_high) - whole).clamp(min=0) // piece
    whole = torch.where(pieces > 0, whole, start)
    rest = whole + pieces * piece
    edges = ceil_div(whole - start, piece // 4) + ceil_div(stop - rest, piece // 4)
    rounds = ceil_div(n_ranges, LANES)
    packed = torch.zeros(int(rounds.sum()), dtype=torch.int64)
    packed.index_add_(0, (rounds.cumsum(0) - rounds)[owner] + rank // LANES, edges)
    steps = int(pieces.sum() + ceil_div(packed, 4).sum())
    touched = covered(start, stop, n_k)

    first, n_columns = column_slice[p.tile].unbind(1)
    seen_from, seen_to = (lower_bound(columns, first, n_columns, at) for at in (p.low, p.high))
    inside = [lower_bound(columns, first[owner], n_columns[owner], at) for at in (start, stop)]
    kept = int((seen_to - seen_from).sum() - (inside[1] - inside[0]).sum())
    touched[columns[covered(first + seen_from, first + seen_to, len(columns))]] = True
    owner, rank = repeated(ceil_div(n_columns, LOOKED_UP))
    size = (n_columns[owner] - rank * LOOKED_UP).clamp(max=LOOKED_UP)
    begin, end = ((x[owner] - rank * LOOKED_UP).clamp(min=0).minimum(size) for x in (seen_from, seen_to))
    steps += int((ceil_div(end, piece) - begin // piece).clamp(min=0).sum())
    indices = n_columns.sum() + (end - begin // piece * piece).clamp(min=0).sum()
    return Work(steps, int((stop - start).sum()) + kept, int(n_ranges.sum()), int(indices), touched)


def count(*flat: Any) -> Count:
    """Of one call. Bisections of columns among ranges, and columns near the diagonal read per row, are left out."""
    q, k, *plan, row_start, _, q_offset, causal, _ = (*flat[:2], *flat[3:])
    _, (launch,) = launches(*flat)
    args, constants = launch.args, launch.constants
    (B, H, n_q, D), (G, n_k), size = q.shape, k.shape[1:3], q.element_size()
    group, block, piece = args["group"], constants["BLOCK_M"], constants["BLOCK_N"]
    samples = max(x.shape[0] for x in (*plan, *([] if row_start is None else [row_start])))
    lanes = max(x.shape[1] for x in plan)
    same = B // samples * (H // group // lanes)  # calls of a lane
    n_rows = min(args["q_block"], max(n_q, 1)) * group
    at_once = max(
        512 // max(constants["PART"] * size, 1), 1
    )  # rows of q that a warp loads at once, alike past the last
    moved = steps = programs = 0
    keys_of: dict[tuple[int, int], Tensor] = {}
    for b in range(samples):
        starts = None if row_start is None else row_start[min(b, len(row_start) - 1)]
        p = Programs.of(args, block, n_rows, starts)
        for lane in range(lanes):
            own = [x[min(b, x.shape[0] - 1), min(lane, x.shape[1] - 1)] for x in plan]
            w = work(p, *own, piece, n_k)
            at = (b, lane // args["shared_by"])
            keys_of[at] = keys_of[at] | w.touched if at in keys_of else w.touched
            repeats = int((block // at_once - ceil_div(p.rows, at_once)).sum())
            bytes_of_rows = int(p.rows.sum()) * (2 * D * size + 4) + repeats * D * size
            starts_read = 0 if row_start is None else 4 * int((p.rows + group - 1).sum()) // group
            plan_read = 16 * len(p.tile) + 8 * w.range_loads + 4 * w.column_loads
            moved += same * (bytes_of_rows + starts_read + plan_read + 2 * D * size * w.keys)
            steps += same * w.pieces
            programs += same * len(p.tile)
    touched = sum(int(keys.sum()) for keys in keys_of.values()) * (B * G // len(keys_of)) * 2 * D * size
    together = min(B * G, -(-TOGETHER * B * G // max(programs, 1)))  # key/value heads whose programs run at a time
    width = constants["PART"] * (D // constants["PART"]) + constants["REST"]
    return Count(
        bytes=moved,
        unique_bytes=touched + B * H * n_q * (2 * D * size + 4) + unique_plan(*plan, row_start),
        flops_issued=4 * block * piece * width * steps,
        flops_useful=4 * D * pairs(n_q, n_k, plan, row_start, flat[8], q_offset, causal, B, H),
        exps=steps * block * (piece + 1),
        resident_bytes=touched // max(B * G, 1) * together,
    )


def work_of_cuda(
    p: Programs, ranges: Tensor, range_slice: Tensor, columns: Tensor, column_slice: Tensor, piece: int, n_k: int
) -> tuple[Work, Tensor]:
    """`work` of the kernel in CUDA C++: the keys of 32 ranges lie side by side, whatever gaps are between them.

    And the steps [P] that its programs share out among splits: all columns of the list count.
    """
    ranges, range_slice, columns, column_slice = (x.long() for x in (ranges, range_slice, columns, column_slice))
    first, n_ranges = range_slice[p.tile].unbind(1)
    owner, rank = repeated(n_ranges)
    start, stop = ranges[first[owner] + rank].unbind(1)
    start = start.maximum(p.low[owner])
    stop = stop.minimum(p.high[owner]).maximum(start)
    rounds = ceil_div(n_ranges, LANES)
    keys = torch.zeros(int(rounds.sum()), dtype=torch.int64)
    keys.index_add_(0, (rounds.cumsum(0) - rounds)[owner] + rank // LANES, stop - start)
    steps, touched = int(ceil_div(keys, piece).sum()), covered(start, stop, n_k)
    shared = torch.zeros_like(p.tile).index_add_(0, repeated(rounds)[0], ceil_div(keys, piece))

    first, n_columns = column_slice[p.tile].unbind(1)
    seen_from, seen_to = (lower_bound(columns, first, n_columns, at) for at in (p.low, p.high))
    begin, end = (lower_bound(columns, first[owner], n_columns[owner], at) for at in (start, stop))
    place = n_columns.cumsum(0) - n_columns  # of a program's first column among all programs'
    kept = covered(place + seen_from, place + seen_to, int(n_columns.sum()))
    kept &= ~covered(place[owner] + begin, place[owner] + end, len(kept))
    owner, rank = repeated(n_columns)
    touched[columns[(first[owner] + rank)[kept]]] = True
    groups = ceil_div(n_columns, piece)
    group = (groups.cumsum(0) - groups)[owner] + rank // piece
    steps += len(group[kept].unique())
    looked_at = (ceil_div(seen_to + 1, piece) * piece).minimum(n_columns)  # up to the one that nobody sees
    loaded = int((stop - start).sum()) + int(kept.sum())
    return Work(steps, loaded, int(n_ranges.sum()), int(looked_at.sum()), touched), shared + groups


def order_bytes(blocks: int, programs: int, range_loads: int) -> tuple[int, int]:
    """Of the two kernels that sort blocks; those that are no programs have no rows. Row starts are left out."""
    return 16 * programs + 8 * range_loads + 4 * blocks, 12 * blocks


def count_cuda(*flat: Any) -> Count:
    """Of one call to the kernel in CUDA C++. What is read again is left out: ranges, for each step of columns."""
    q, k, *plan, row_start, q_block, q_offset, causal, _ = (*flat[:2], *flat[3:])
    (B, H, n_q, D), (G, n_k) = q.shape, k.shape[1:3]
    samples = max(x.shape[0] for x in (*plan, *([] if row_start is None else [row_start])))
    lanes = max(x.shape[1] for x in plan)
    group, q_block, piece = H // G if lanes == 1 else 1, min(q_block, n_q), 4096 // D
    block = 128 if 0 <= -q_block * group % 128 < 64 else 64
    args = {"q_block": q_block, "group": group, "n_q": n_q, "n_k": n_k}
    args["q_offset"] = min(max(q_offset, -n_q), n_k) if causal else n_k
    same = B // samples * (H // group // lanes)
    blocks = B * H // group * -(-n_q // q_block) * -(-q_block * group // block)
    splits = min(512 // blocks, -(-(n_k + min(plan[2].shape[2], n_k)) // piece) // 8)  # at least 8 steps each
    splits = min(max(splits, 1), 32)
    moved = steps = programs = partial = range_loads = 0
    keys_of: dict[tuple[int, int], Tensor] = {}
    for b in range(samples):
        p = Programs.of(
            args, block, q_block * group, None if row_start is None else row_start[min(b, len(row_start) - 1)]
        )
        for lane in range(lanes):
            own = [x[min(b, x.shape[0] - 1), min(lane, x.shape[1] - 1)] for x in plan]
            w, shared = work_of_cuda(p, *own, piece, n_k)
            at = (b, lane // (H // G))
            keys_of[at] = keys_of[at] | w.touched if at in keys_of else w.touched
            repeats = int((block * D // 256 - ceil_div(p.rows * D, 256)).sum())  # 256 numbers of q at once
            rows, walks = int(p.rows.sum()), 2 * splits if splits > 1 else 1  # a split counts its keys first
            read = 4 * (8 * walks * w.range_loads + 4 * w.column_loads)  # of each of four warps
            read += 2 * D * splits * (rows + repeats)
            if splits > 1:  # all are written, those with keys are read
                with_keys = ceil_div(shared, ceil_div(shared, splits).clamp(min=8))
                partial += same * (rows * splits * (4 * D + 8) + 4 * D * int((p.rows * with_keys).sum()))
            moved += same * (rows * (2 * D + 4) + read + 4 * D * w.keys)
            steps += same * w.pieces
            programs += same * len(p.tile)
            range_loads += same * w.range_loads
    touched = sum(int(keys.sum()) for keys in keys_of.values()) * (B * G // len(keys_of)) * 4 * D
    in_order = blocks if splits == 1 and n_k >= 1024 and 256 < blocks <= 4096 else 0
    if in_order:  # their steps counted, sorted, and the place of its block read by each of four warps
        moved += sum(order_bytes(blocks, programs, range_loads)) + 16 * blocks
    together = min(B * G, -(-TOGETHER * B * G // max(programs, 1)))
    return Count(
        bytes=moved + partial,
        unique_bytes=touched + B * H * n_q * (4 * D + 4) + partial + 8 * in_order + unique_plan(*plan, row_start),
        flops_issued=4 * block * piece * D * steps,
        flops_useful=4 * D * pairs(n_q, n_k, plan, row_start, q_block, q_offset, causal, B, H),
        exps=steps * block * (piece + 4) + (32 * B * H * n_q if splits > 1 else 0),
        resident_bytes=touched // max(B * G, 1) * together,
    )


def pairs(
    n_q: int, n_k: int, tensors: list[Tensor], row_start: Tensor | None, q_block: int, q_offset: int, causal: bool,
    B: int, H: int,
) -> int:  # fmt: skip
    """(query, key) pairs that all heads see."""
    ranges, range_slice, columns, column_slice = tensors
    plan = SparsePlan(ranges, range_slice, columns, column_slice, q_block, n_q, n_k, q_offset, causal, row_start)
    plan = plan.expand(batch=plan.batch, heads=plan.heads)
    found = measure.tile_counts(plan)[0].sum(-1)
    return int(found.sum()) * (B * H // found.numel())


def unique_plan(
    ranges: Tensor, range_slice: Tensor, columns: Tensor, column_slice: Tensor, row_start: Tensor | None
) -> int:
    """Bytes of the plan that some program reads."""
    total = range_slice.nbytes + column_slice.nbytes + (0 if row_start is None else row_start.nbytes)
    for values, slices, width in ((ranges, range_slice, 8), (columns, column_slice, 4)):
        if slices.shape[:2] != values.shape[:2]:
            slices = slices.expand(*values.shape[:2], -1, -1) if slices.shape[:2] == (1, 1) else slices[:1, :1]
        for own in slices.flatten(0, 1).long():
            total += width * int(covered(own[:, 0], own[:, 0] + own[:, 1], values.shape[2]).sum())
    return total


def plan_case(
    name: str, make: Callable[[], SparsePlan], n: int, heads: tuple[int, int] = (32, 8), D: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> CountedCase:  # fmt: skip
    """A case with query and key/value heads `heads`."""
    H, G = heads
    plan = make()
    q, k = (torch.empty(1, some, n, D, dtype=dtype, device="meta") for some in (H, G))
    tensors = (plan.ranges, plan.range_slice, plan.columns, plan.column_slice, plan.row_start)
    flat = (q, k, k, *tensors, plan.q_block, plan.q_offset, plan.causal, D**-0.5)
    fields = {
        "batch": 1, "heads": H, "kv_heads": G, "n": n, "head_dim": D, "plan": name.split("-")[0],
        "plan_per_head": plan.heads > 1, "density": float(f"{plan.density():.4g}"),
    }  # fmt: skip
    return CountedCase(f"{name}-{n}-d{D}", "bf16" if dtype == torch.bfloat16 else "fp32", partial(count, *flat), fields)


def cases() -> list[CountedCase]:
    """Heads of Llama-3-8B under one plan; a quarter of them where each has its own (blocks, columns, patterns)."""
    return list(_cases())


def _cases() -> Iterator[CountedCase]:
    torch.manual_seed(0)
    for n in (4096, 32768):
        yield plan_case("dense", partial(SparsePlan.dense, n), n)
    yield plan_case("dense", partial(SparsePlan.dense, 4096), 4096, (32, 8), 64)
    yield plan_case("dense", partial(SparsePlan.dense, 4096), 4096, dtype=torch.float32)
    n = 16384
    for share in (0.5, 0.25, 0.1, 0.05):
        yield plan_case(f"blocks-{share}", partial(blocks, share, n, 8), n, (8, 2))
    for window in (128, 1024, 4096):
        yield plan_case(f"window-{window}", partial(SparsePlan.sliding_window, n, window), n)
    for columns in (100, 1000, 4000):
        make = partial(SparsePlan.vertical_slash, n, scattered(columns, n, 8), bands=[(0, 256)])
        yield plan_case(f"columns-{columns}", make, n, (8, 2))
    for name, make in PATTERNS.items():
        yield plan_case(name, partial(make, n, 8), n, (8, 2))


def a_shape(n: int, heads: int) -> SparsePlan:
    """1,024 sink keys and a window of 4,096, as a plan per head."""
    return SparsePlan.a_shape(n, [1024] * heads, 4096)


def vertical_slash(n: int, heads: int) -> SparsePlan:
    """Per head the columns and diagonals of `minference_count.slashes`, which says how they cluster."""
    columns, bands = zip(*(minference_count.slashes(n, head) for head in range(heads)), strict=True)
    return SparsePlan.vertical_slash(n, [c.tolist() for c in columns], bands=[b.tolist() for b in bands])


def top_blocks(n: int, heads: int) -> SparsePlan:
    """Per head 100 blocks of 64 keys for each 64 queries (all, where there are fewer), at random."""
    mask = torch.stack([minference_count.top_blocks(n, head) for head in range(heads)])
    return SparsePlan.from_block_mask(mask[None], 64, 64, n_q=n, n_k=n)


PATTERNS = {"a_shape": a_shape, "vertical_slash": vertical_slash, "top_blocks": top_blocks}


def minference() -> dict[str, tuple[Count, Count]]:
    """One key/value head of Llama-3-8B with its four query heads, each with a plan of its own, at 128K tokens."""
    n, heads = 131072, 4
    found = {}
    for name, make in PATTERNS.items():
        ours = plan_case(name, partial(make, n, heads), n, (heads, 1)).count()
        found[f"{name}-{n}-d128"] = ours, getattr(minference_count, f"{name}_count")(n, heads, 128, ours.flops_useful)
    return found


def against_cuda() -> dict[str, tuple[Count, Count]]:
    """Triton's kernel and the one in CUDA C++, which takes 16 bits."""
    cases = [case for case in _cases() if case.dtype == "bf16"]
    return {case.name: (case.count(), count_cuda(*case.count.args)) for case in cases}


AGAINST = {"minference": minference, "cuda-c++": against_cuda}
