"""What can be read off a SparsePlan: faults, exact counts, masks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from .build import INT32_MAX, check_int, entries, merge, pack

if TYPE_CHECKING:
    from .data import PlanData

PlanT = TypeVar("PlanT", bound="PlanData")


def check_layout(plan: PlanData) -> None:
    """Types, shapes, dtypes and devices: reads no tensor content."""
    check_int("n_q", plan.n_q, 0)
    check_int("n_k", plan.n_k, 0)
    check_int("q_block", plan.q_block, 1)
    check_int("q_offset", plan.q_offset, -INT32_MAX - 1)
    if not isinstance(plan.causal, bool):
        raise TypeError(f"SparsePlan: causal={plan.causal!r} must be a bool")
    tiles = -(-plan.n_q // plan.q_block)
    shapes: dict[str, list[str | int]] = {
        "ranges": ["B", "H", "R", 2],
        "range_slice": ["B", "H", tiles, 2],
        "columns": ["B", "H", "C"],
        "column_slice": ["B", "H", tiles, 2],
    }
    for name, axes in shapes.items():
        tensor = getattr(plan, name)
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise TypeError(f"SparsePlan: {name} must be an int32 tensor, got {kind}")
        if tensor.dtype != torch.int32:
            raise TypeError(f"SparsePlan: {name} must be int32, got {tensor.dtype}")
        if tensor.device != plan.ranges.device:
            raise ValueError(f"SparsePlan: {name} is on {tensor.device}, ranges on {plan.ranges.device}")
        fixed = zip(axes, tensor.shape, strict=False)
        if tensor.dim() != len(axes) or any(isinstance(n, int) and n != got for n, got in fixed):
            expected = "[" + ", ".join(map(str, axes)) + "]"
            raise ValueError(
                f"SparsePlan: {name} has shape {list(tensor.shape)}, expected {expected} "
                f"for n_q={plan.n_q} in tiles of q_block={plan.q_block}"
            )
        if tensor.shape[:2] != plan.ranges.shape[:2]:
            raise ValueError(
                f"SparsePlan: {name} has shape {list(tensor.shape)}, but ranges are for "
                f"B={plan.ranges.shape[0]}, H={plan.ranges.shape[1]}"
            )
    start = plan.row_start
    if start is None:
        return
    if not isinstance(start, Tensor) or start.dtype != torch.int32:
        kind = str(start.dtype) if isinstance(start, Tensor) else type(start).__name__
        raise TypeError(f"SparsePlan: row_start must be None or an int32 tensor, got {kind}")
    if start.device != plan.ranges.device:
        raise ValueError(f"SparsePlan: row_start is on {start.device}, ranges on {plan.ranges.device}")
    if start.dim() != 2 or start.shape[0] not in (1, plan.batch) or start.shape[1] != plan.n_q:
        sizes = "1" if plan.batch == 1 else f"1 or {plan.batch}"
        raise ValueError(f"SparsePlan: row_start has shape {list(start.shape)}, expected [{sizes}, n_q={plan.n_q}]")


def check_content(plan: PlanData) -> None:
    """Slices inside their buffers; their entries in bounds, sorted, disjoint."""
    for name, slices, capacity in (
        ("range_slice", plan.range_slice, plan.ranges.shape[2]),
        ("column_slice", plan.column_slice, plan.columns.shape[2]),
    ):
        first, count = slices.long().unbind(-1)
        bad = (first < 0) | (count < 0) | (first + count > capacity)
        if bool(bad.any()):
            b, h, t = bad.nonzero()[0].tolist()
            raise ValueError(
                f"SparsePlan: {name}[{b}, {h}] tile {t}: (first={int(first[b, h, t])}, "
                f"count={int(count[b, h, t])}) leaves its buffer of {capacity} entries"
            )
    start, stop = plan.ranges.unbind(-1)
    if (where := _first_fault(start >= stop, plan.range_slice, 0)) is not None:
        raise ValueError(f"{_range_text(plan, where)} is empty or reversed")
    if (where := _first_fault((start < 0) | (stop > plan.n_k), plan.range_slice, 0)) is not None:
        raise ValueError(f"{_range_text(plan, where)} is not inside [0, n_k={plan.n_k})")
    if (where := _first_fault(start[..., 1:] < stop[..., :-1], plan.range_slice, 1)) is not None:
        b, h, _, entry = where
        follower = plan.ranges[b, h, entry + 1].tolist()
        raise ValueError(
            f"{_range_text(plan, where)} is followed by [{follower[0]}, {follower[1]}): "
            "ranges of a tile must be sorted and disjoint"
        )
    columns = plan.columns
    outside = (columns < 0) | (columns >= plan.n_k)
    if (where := _first_fault(outside, plan.column_slice, 0)) is not None:
        raise ValueError(f"{_column_text(plan, where)} is not inside [0, n_k={plan.n_k})")
    if (where := _first_fault(columns[..., 1:] <= columns[..., :-1], plan.column_slice, 1)) is not None:
        b, h, _, entry = where
        raise ValueError(
            f"{_column_text(plan, where)} is followed by {int(columns[b, h, entry + 1])}: "
            "columns of a tile must be strictly increasing"
        )
    row_start = plan.row_starts()
    outside = (row_start < 0) | (row_start > plan.n_k)
    if bool(outside.any()):
        b, i = outside.nonzero()[0].tolist()
        raise ValueError(f"SparsePlan: row_start[{b}, {i}]={int(row_start[b, i])} is not inside [0, n_k={plan.n_k}]")


def _first_fault(bad: Tensor, slices: Tensor, shorter: int) -> tuple[int, int, int, int] | None:
    """First (b, h, tile, entry) with bad[b, h, entry] in the tile's slice less `shorter` entries."""
    if not bool(bad.any()):
        return None
    first, count = slices.long().unbind(-1)
    end = first + (count - shorter).clamp(min=0)
    total = torch.nn.functional.pad(bad.cumsum(-1), (1, 0))
    first = first.clamp(max=bad.shape[-1])
    hits = total.gather(-1, end.clamp(max=bad.shape[-1])) > total.gather(-1, first)
    if not bool(hits.any()):
        return None
    b, h, t = hits.nonzero()[0].tolist()
    low = int(first[b, h, t])
    return b, h, t, low + int(bad[b, h, low:].nonzero()[0])


def _range_text(plan: PlanData, where: tuple[int, int, int, int]) -> str:
    b, h, tile, entry = where
    start, stop = plan.ranges[b, h, entry].tolist()
    return f"SparsePlan: ranges[{b}, {h}] tile {tile}: range [{start}, {stop})"


def _column_text(plan: PlanData, where: tuple[int, int, int, int]) -> str:
    b, h, tile, entry = where
    return f"SparsePlan: columns[{b}, {h}] tile {tile}: column {int(plan.columns[b, h, entry])}"


def tile_counts(plan: PlanData) -> tuple[Tensor, Tensor]:
    """Exact (query, key) pairs and keys that some row sees, each int64 [B, H, T].

    A range counts as the difference of two triangular sums; the columns inside it are taken off by
    binary search, so nothing of size n x n or T x C is made.
    """
    if plan.row_start is not None:
        return _row_counts(plan)
    shape = plan.range_slice.shape[:3]
    rows, reach = (x.repeat(shape[0] * shape[1]) for x in _rows_and_reach(plan))
    tile, entry = entries(plan.range_slice, plan.ranges.shape[2])
    at = plan.ranges.reshape(-1, 2).index_select(0, entry).long().t().reshape(-1)  # all starts, then all stops
    whole = torch.arange(len(rows), device=tile.device)
    tiles = torch.cat([whole, tile, tile])
    columns = _columns_below(plan, tiles, torch.cat([torch.full_like(whole, plan.n_k), at]), rows, reach)
    tiles = tiles[len(whole) :]
    below = (-_pairs_from(at, rows[tiles], reach[tiles]), at.minimum(reach[tiles]))
    counts = []
    for in_columns, in_range in zip(columns, below, strict=True):
        start, stop = (in_range - in_columns[len(whole) :]).view(2, -1)
        counts.append(in_columns[: len(whole)].index_add(0, tile, stop - start).view(shape))
    return counts[0], counts[1]


def _row_counts(plan: PlanData) -> tuple[Tensor, Tensor]:
    """`tile_counts` with row_start: row i counts the keys of its tile in [row_start[i], its causal limit)."""
    row = torch.arange(plan.n_q, device=plan.ranges.device)
    limit = (row + plan.q_offset + 1).clamp(0, plan.n_k) if plan.causal else torch.full_like(row, plan.n_k)
    both = _by_tile(plan, plan.row_starts().long(), plan.n_k), _by_tile(plan, limit[None], 0)
    start, limit = (x[:, None].expand(plan.batch, plan.heads, -1, -1) for x in both)
    return _keys_inside(plan, *pack(start, limit)), _keys_inside(plan, *merge(start, limit))


def _by_tile(plan: PlanData, rows: Tensor, fill: int) -> Tensor:
    """Values of rows [N, n_q] as [N, T, rows of a tile], with `fill` after the last row."""
    block = min(plan.q_block, max(plan.n_q, 1))
    rows = torch.nn.functional.pad(rows, (0, plan.tiles * block - plan.n_q), value=fill)
    return rows.view(len(rows), plan.tiles, block)


def _keys_inside(plan: PlanData, counts: Tensor, ends: Tensor) -> Tensor:
    """Keys of each tile in its intervals `ends` [E, 2], counts [B, H, T] of them a tile: int64 [B, H, T]."""
    tile = torch.arange(counts.numel(), device=ends.device).repeat_interleave(counts.flatten())
    start, stop = ends.unbind(-1)
    inside = _keys_below(plan, tile, stop) - _keys_below(plan, tile, start)
    return torch.zeros_like(counts).flatten().index_add(0, tile, inside).view(counts.shape)


def _keys_below(plan: PlanData, tile: Tensor, at: Tensor) -> Tensor:
    """Distinct keys of each tile less than `at`; all int64 [E]."""
    count = plan.range_slice[..., 1].long().flatten()
    first = count.cumsum(0) - count
    owner, entry = entries(plan.range_slice, plan.ranges.shape[2])
    start, stop = plan.ranges.reshape(-1, 2)[entry].long().unbind(-1)
    rows, reach = torch.ones_like(count), torch.full_like(count, plan.n_k)

    def columns(tile: Tensor, at: Tensor) -> Tensor:
        return _columns_below(plan, tile, at, rows, reach)[1]

    # Keys of the ranges that start below `at` and are no columns, less the end of the last one past `at`.
    length = stop - start - columns(owner, stop) + columns(owner, start)
    total = torch.nn.functional.pad(length.cumsum(0), (1, 0))
    next_range = _lower_bound(start, first[tile], count[tile], at)
    last = torch.nn.functional.pad(stop, (1, 0))[next_range]
    last = torch.where(next_range > first[tile], last, 0).maximum(at)
    past = last - at - columns(tile, last) + columns(tile, at)
    return columns(tile, at) + total[next_range] - total[first[tile]] - past


def dense_counts(plan: PlanData) -> tuple[Tensor, Tensor]:
    """`tile_counts` of the dense plan with the same sizes and causality, int64 [T] each."""
    rows, reach = _rows_and_reach(plan)
    zero = torch.zeros_like(reach)
    pairs = _pairs_from(zero, rows, reach) - _pairs_from(zero + plan.n_k, rows, reach)
    return pairs, plan.geometry.limit()


def _rows_and_reach(plan: PlanData) -> tuple[Tensor, Tensor]:
    """Rows of each tile, and one past the last key its last row may see (unclipped)."""
    first, end = plan.geometry.bounds()
    return end - first, end + (plan.q_offset if plan.causal else plan.n_k)


def _pairs_from(at: Tensor, rows: Tensor, reach: Tensor) -> Tensor:
    """Pairs of a tile with key >= `at`: reach - at of its last row, one fewer each row up."""
    seen_rows = (reach - at).clamp(min=0).minimum(rows)
    return seen_rows * (reach - at) - seen_rows * (seen_rows - 1) // 2


def _columns_below(plan: PlanData, tile: Tensor, at: Tensor, rows: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs and keys of the tile's own columns less than `at`; all int64 [E]."""
    capacity = plan.columns.shape[2]
    tiles = max(plan.range_slice.shape[2], 1)
    if capacity == 0:
        return torch.zeros_like(tile), torch.zeros_like(tile)
    first, count = plan.column_slice.long().flatten(0, 2).index_select(0, tile).unbind(-1)
    first = first + tile // tiles * capacity
    flat = plan.columns.reshape(-1).long()
    total = torch.nn.functional.pad(flat.cumsum(0), (1, 0))
    rows, reach = rows[tile], reach[tile]
    all_rows = _lower_bound(flat, first, count, at.minimum(reach - rows + 1))
    some_rows = _lower_bound(flat, first, count, at.minimum(reach))
    triangle = reach * (some_rows - all_rows) - (total[some_rows] - total[all_rows])
    return rows * (all_rows - first) + triangle, some_rows - first


def _lower_bound(values: Tensor, first: Tensor, count: Tensor, at: Tensor) -> Tensor:
    """First index in [first, first + count] whose value is not below `at` (values sorted there)."""
    low, high = first, first + count
    values = torch.nn.functional.pad(values, (0, 1))
    for _ in range((len(values) - 1).bit_length()):
        middle = (low + high) >> 1
        below = (low < high) & (values.index_select(0, middle) < at)
        low, high = torch.where(below, middle + 1, low), torch.where(below, high, middle)
    return low


def tile_keys(plan: PlanData, begin: int, end: int) -> Tensor:
    """bool [B, H, end - begin, n_k]: keys of tiles begin to end, before causality."""
    batch, heads = plan.ranges.shape[:2]
    capacity, spread = plan.ranges.shape[2], plan.columns.shape[2]
    tile, entry = entries(plan.range_slice[:, :, begin:end], capacity)
    start, stop = plan.ranges.reshape(-1, 2)[entry].long().unbind(-1)
    width = plan.n_k + 1
    step = torch.zeros(batch * heads * (end - begin) * width, dtype=torch.int8, device=tile.device)
    one = torch.ones_like(tile, dtype=torch.int8)
    step.index_add_(0, tile * width + start, one).index_add_(0, tile * width + stop, -one)
    keys = step.view(-1, width).cumsum(-1, dtype=torch.int8)[:, : plan.n_k] > 0
    tile, entry = entries(plan.column_slice[:, :, begin:end], spread)
    keys[tile, plan.columns.reshape(-1)[entry].long()] = True
    return keys.view(batch, heads, end - begin, plan.n_k)


def row_mask(plan: PlanData, begin: int, end: int) -> Tensor:
    """bool [B, H, end - begin, n_k]: which keys query rows begin to end see."""
    rows = torch.arange(begin, end, device=plan.ranges.device)
    first_tile = begin // plan.q_block
    keys = tile_keys(plan, first_tile, -(-end // plan.q_block))
    mask = keys[:, :, rows // plan.q_block - first_tile]
    key = torch.arange(plan.n_k, device=rows.device)
    if plan.causal:
        mask &= key <= rows[:, None] + plan.q_offset
    if plan.row_start is not None:
        mask &= key >= plan.row_start[:, None, begin:end, None]
    return mask


def starts_of_tiles(plan: PlanData) -> tuple[Tensor, Tensor]:
    """Smallest and largest row_start of each tile, int32 [B or 1, T]."""
    start = plan.row_starts()
    return _by_tile(plan, start, INT32_MAX).amin(-1), _by_tile(plan, start, 0).amax(-1)


def without_row_start(plan: PlanT, what: str) -> PlanT:
    """The same pairs without row_start, or ValueError if it hides a key that ranges or columns show."""
    bare = dataclasses.replace(plan, row_start=None)
    hidden = tile_counts(bare)[0] - tile_counts(plan)[0]
    if bool(hidden.any()):
        b, h, t = hidden.nonzero()[0].tolist()
        raise ValueError(
            f"SparsePlan: {what}: row_start hides {int(hidden[b, h, t])} pairs of [{b}, {h}] tile {t}, "
            "which this format cannot say"
        )
    return bare


def same_pairs(plan: PlanData, other: PlanData) -> bool:
    """Compared tile by tile where both have the same tiles, else row by row; 2^26 bits at a time."""
    if (plan.n_q, plan.n_k) != (other.n_q, other.n_k):
        return False
    for mine, theirs in zip(plan.ranges.shape[:2], other.ranges.shape[:2], strict=True):
        if mine != theirs and 1 not in (mine, theirs):
            return False
    by_tile = plan.geometry == other.geometry and plan.row_start is None and other.row_start is None
    heads = max(p.ranges.shape[0] * p.ranges.shape[1] for p in (plan, other))
    step = max(1, 2**26 // max(1, heads * plan.n_k))
    end = plan.range_slice.shape[2] if by_tile else plan.n_q
    for at in range(0, end, step):
        last = min(end, at + step)
        if by_tile:
            differ = tile_keys(plan, at, last) != tile_keys(other, at, last)
            key = torch.arange(plan.n_k, device=plan.ranges.device)
            differ &= key < plan.geometry.limit()[at:last, None]
        else:
            differ = row_mask(plan, at, last) != row_mask(other, at, last)
        if bool(differ.any()):
            return False
    return True
