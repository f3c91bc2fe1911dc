"""Tensor pieces that SparsePlan is built from: geometry, intervals, per-head lists of indices."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1
FAR = 2**62

Device = torch.device | str | None


@dataclass(frozen=True)
class Geometry:
    """Sizes that every tile of a plan shares; `bounds` and `limit` are int64 tensors [T]."""

    n_q: int
    n_k: int
    q_offset: int
    causal: bool
    q_block: int
    device: torch.device

    @property
    def tiles(self) -> int:
        return -(-self.n_q // self.q_block)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """First query row of each tile and one past its last."""
        first = torch.arange(self.tiles, device=self.device) * self.q_block
        return first, (first + self.q_block).clamp(max=self.n_q)

    def limit(self) -> Tensor:
        """One past the last key that any row of the tile may see."""
        end = self.bounds()[1]
        if not self.causal:
            return torch.full_like(end, self.n_k)
        return (end + self.q_offset).clamp(0, self.n_k)


def check_int(name: str, value: Any, low: int, high: int = INT32_MAX) -> int:
    """`value` as a Python int in [low, high], or an error that names it."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        kind = type(value).__name__
        raise TypeError(f"SparsePlan: {name}={value!r} must be an int, got {kind}") from None
    if not low <= number <= high:
        raise ValueError(f"SparsePlan: {name}={number} is outside [{low}, {high}]")
    return number


def geometry(n_q: int, n_k: int | None, q_offset: int | None, causal: bool, q_block: int, device: Device) -> Geometry:
    """Checked sizes; `n_k=None` means n_q, `q_offset=None` means n_k - n_q."""
    n_q = check_int("n_q", n_q, 0)
    n_k = n_q if n_k is None else check_int("n_k", n_k, 0)
    low = -INT32_MAX - 1
    q_offset = n_k - n_q if q_offset is None else check_int("q_offset", q_offset, low)
    if not isinstance(causal, bool):
        raise TypeError(f"SparsePlan: causal={causal!r} must be a bool")
    q_block = check_int("q_block", q_block, 1)
    where = torch.device(device if device is not None else torch.get_default_device())
    return Geometry(n_q, n_k, q_offset, causal, q_block, where)


def csr(counts: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Entries `values` [E, ...] in tile order, `counts` [B, H, T] of them a tile -> (buffer, slices).

    buffer: int32 [B, H, max entries of a head, ...], zero padded; slices: int32 [B, H, T, 2].
    """
    slices = torch.stack([counts.cumsum(-1) - counts, counts], -1).to(torch.int32)
    totals = counts.sum(-1)
    capacity = int(totals.max()) if totals.numel() else 0
    used = torch.arange(capacity, device=counts.device) < totals[..., None]
    buffer = values.new_zeros((*used.shape, *values.shape[1:]), dtype=torch.int32)
    buffer.masked_scatter_(used.view(used.shape + (1,) * (values.dim() - 1)), values.to(torch.int32))
    return buffer, slices


def entries(slices: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """All (tile, entry) pairs of `slices` [B, H, T, 2], flat: tile in B*H*T, entry in B*H*capacity."""
    tiles_of_head = slices.shape[2]
    first, count = slices.long().flatten(0, 2).unbind(-1)
    tile = torch.arange(len(count), device=count.device).repeat_interleave(count)
    before = count.cumsum(0) - count
    base = torch.arange(len(count), device=count.device) // max(tiles_of_head, 1) * capacity
    entry = torch.arange(len(tile), device=count.device) + (base + first - before)[tile]
    return tile, entry


def padded(buffer: Tensor, slices: Tensor) -> Tensor:
    """Each tile's entries side by side, int64 [B, H, T, K, ...], zeros after its last."""
    batch, heads, tiles = slices.shape[:3]
    count = slices[..., 1].long()
    width = int(count.max()) if count.numel() else 0
    entry = entries(slices, buffer.shape[2])[1]
    out = buffer.new_zeros((batch, heads, tiles, width, *buffer.shape[3:]), dtype=torch.int64)
    used = torch.arange(width, device=count.device) < count[..., None]
    out[used] = buffer.flatten(0, 1).flatten(0, 1)[entry].long()
    return out


def merge(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """Union of the intervals [start, stop) of the last axis, as (counts [...], values [E, 2]).

    Empty intervals are dropped, overlapping and touching ones joined; the input may be unsorted.
    """
    if start.shape[-1] == 0:
        return start.new_zeros(start.shape[:-1]), start.new_zeros((0, 2))
    empty = start >= stop
    start, order = start.masked_fill(empty, FAR).sort(-1)
    reach = stop.masked_fill(empty, FAR).gather(-1, order).cummax(-1).values
    inside = start < FAR
    opens = inside.clone()
    opens[..., 1:] &= start[..., 1:] > reach[..., :-1]
    closes = inside.clone()
    closes[..., :-1] &= opens[..., 1:] | ~inside[..., 1:]
    return opens.sum(-1), torch.stack([start[opens], reach[closes]], -1)


def pack(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """Like `merge` for intervals already sorted and disjoint: drops the empty ones."""
    keep = start < stop
    return keep.sum(-1), torch.stack([start.masked_select(keep), stop.masked_select(keep)], -1)


def runs(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Runs of True along the last axis of bool [..., K], as (counts [...], values [E, 2])."""
    opens, closes = bits.clone(), bits.clone()
    opens[..., 1:] &= ~bits[..., :-1]
    closes[..., :-1] &= ~bits[..., 1:]
    width = max(bits.shape[-1], 1)
    begin, last = (x.flatten().nonzero()[:, 0] % width for x in (opens, closes))
    return opens.sum(-1), torch.stack([begin, last + 1], -1)


def sorted_columns(columns: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Kept entries of `columns` [..., K], sorted, each once, as (counts [...], values [E])."""
    columns = columns.masked_fill(~keep, FAR).sort(-1).values
    fresh = columns < FAR
    fresh[..., 1:] &= columns[..., 1:] != columns[..., :-1]
    return fresh.sum(-1), columns[fresh]


def shared_columns(geo: Geometry, columns: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Kept `columns` [B, H, K], sorted once a head -> (buffer [B, H, C], slices [B, H, T, 2]).

    Each tile's slice stops before the first column that none of its rows may see.
    """
    counts, values = sorted_columns(columns, keep)
    buffer, slices = csr(counts[..., None], values)
    used = torch.arange(buffer.shape[2], device=geo.device) < slices[..., 1]
    limit = geo.limit().int().expand(*buffer.shape[:2], -1).contiguous()
    seen = torch.searchsorted(buffer.masked_fill(~used, INT32_MAX), limit, out_int32=True)
    return buffer, torch.stack([torch.zeros_like(seen), seen], -1)


def head_ints(name: str, value: int | Sequence[int] | Tensor, device: torch.device, high: int = INT32_MAX) -> Tensor:
    """One int in [0, high], or one per head -> int64 [1, H, 1]."""
    values = value.tolist() if isinstance(value, Tensor) else value
    items = list(values) if isinstance(values, Sequence) else [values]
    if not items:
        raise ValueError(f"SparsePlan: {name} is empty: it needs one int or a list of them")
    label = name if len(items) == 1 else name + "[{}]"
    checked = [check_int(label.format(h), item, 0, high) for h, item in enumerate(items)]
    return torch.tensor(checked, dtype=torch.int64, device=device).view(1, -1, 1)


def index_lists(name: str, value: Any, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """One list of `width`-tuples of ints for all heads, or one list per head, or a tensor.

    Returns int64 [B, H, K, width] and the bool [B, H, K] of entries that are real.
    """
    if not isinstance(value, Sequence):
        table = _int_tensor(name, value)
        table = table.unsqueeze(-1) if width == 1 else table
        if not 2 <= table.dim() <= 4 or table.shape[-1] != width:
            axes = "" if width == 1 else f", {width}"
            raise ValueError(
                f"SparsePlan: {name} has shape {list(torch.as_tensor(value).shape)}, expected "
                f"[K{axes}], [H, K{axes}] or [B, H, K{axes}]"
            )
        table = table.reshape((1,) * (4 - table.dim()) + table.shape).to(device)
        return table, torch.ones(table.shape[:3], dtype=torch.bool, device=device)
    per_head = len(value) > 0 and all(_is_list(item, width) for item in value)
    heads = value if per_head else [value]
    rows = [_int_tensor(name, head).reshape(-1, width) for head in heads]
    table = torch.zeros((1, len(rows), max(map(len, rows)), width), dtype=torch.int64)
    keep = torch.zeros(table.shape[:3], dtype=torch.bool)
    for head, row in enumerate(rows):
        table[0, head, : len(row)] = row
        keep[0, head, : len(row)] = True
    return table.to(device), keep.to(device)


def _is_list(item: Any, width: int) -> bool:
    """Is `item` a head's list (and not one entry of a list)?"""
    if isinstance(item, Tensor):
        return item.dim() == width or item.numel() == 0
    if not isinstance(item, Sequence):
        return False
    return width == 1 or len(item) == 0 or isinstance(item[0], Sequence)


def _int_tensor(name: str, value: Any) -> Tensor:
    try:
        table = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"SparsePlan: {name}={value!r:.80} is not a list of ints: {error}") from None
    if table.numel() == 0:
        return table.to(torch.int64)
    if table.dtype == torch.bool or table.is_floating_point() or table.is_complex():
        raise TypeError(f"SparsePlan: {name} must hold ints, got {table.dtype}")
    return table.to(torch.int64)


def check_bool(name: str, value: Any, axes: str) -> None:
    """`value` is a bool tensor of four axes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"SparsePlan: {name} must be bool {axes}, got {type(value).__name__}")
    if value.dtype != torch.bool:
        raise TypeError(f"SparsePlan: {name} must be bool {axes}, got {value.dtype}")
    if value.dim() != 4:
        raise ValueError(f"SparsePlan: {name} has shape {list(value.shape)}, expected {axes}")


def check_ints(name: str, value: Any) -> None:
    """`value` is a tensor of integers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"SparsePlan: {name} must be an int tensor, got {type(value).__name__}")
    if value.dtype == torch.bool or value.is_floating_point() or value.is_complex():
        raise TypeError(f"SparsePlan: {name} must be an int tensor, got {value.dtype}")


def check_inside(name: str, values: Tensor, keep: Tensor, low: int, high: int) -> None:
    """Every kept entry of `values` [B, H, K] is in [low, high)."""
    bad = keep & ((values < low) | (values >= high))
    if bool(bad.any()):
        b, h, _ = bad.nonzero()[0].tolist()
        value = int(values[bad][0])
        raise ValueError(f"SparsePlan: {name}[{b}, {h}]: {value} is outside [{low}, {high})")


def common_heads(**tables: Tensor) -> tuple[int, int]:
    """Batch and head count that tensors [B|1, H|1, ...] share."""
    sizes = [1, 1]
    for axis, word in enumerate(("sequences", "heads")):
        given = {name: table.shape[axis] for name, table in tables.items()}
        many = {size for size in given.values() if size != 1}
        if len(many) > 1:
            listed = ", ".join(f"{name} for {size}" for name, size in given.items())
            raise ValueError(f"SparsePlan: numbers of {word} differ: {listed}")
        sizes[axis] = many.pop() if many else 1
    return sizes[0], sizes[1]


def rows_from(geo: Geometry, begin: Tensor, stop: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """Row i sees [begin[b, i], stop[b, t]); begin int64 [B, n_q] never falls -> (ranges (counts, values), row_start).

    A tile's range starts where its first row does; row_start is None if that is where all its rows do.
    """
    start = begin[:, geo.bounds()[0]]
    ranges = pack(start[:, None, :, None], stop[:, None, :, None].expand(len(begin), 1, -1, 1))
    alike = begin == start[:, torch.arange(geo.n_q, device=geo.device) // geo.q_block]
    return ranges, None if bool(alike.all()) else begin.to(torch.int32)


def sink_window_last(geo: Geometry, sinks: Tensor, windows: Tensor, lasts: Tensor) -> tuple[Tensor, Tensor]:
    """Ranges (counts [1, H, T], values [E, 2]) of the A-shape and tri-shape; inputs int64 [1, H, 1]."""
    first, end = geo.bounds()
    limit = geo.limit()
    start = (first + geo.q_offset + 1 - windows).clamp(min=0)
    stop = limit if geo.causal else (end - 1 + geo.q_offset + windows).minimum(limit)
    start = torch.where(windows > 0, start, stop)
    sink_stop = torch.where(end > geo.n_q - lasts, limit, sinks.minimum(limit))
    start, stop, sink_stop = torch.broadcast_tensors(start, stop, sink_stop)
    starts = torch.stack([torch.zeros_like(start), start], -1)
    return merge(starts, torch.stack([sink_stop, stop], -1))


def diagonal_ranges(geo: Geometry, bands: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Bands [B, H, K, 2] of (distance, width) -> ranges (counts [B, H, T], values [E, 2]).

    Relative to a tile's first query a band covers the same keys in every tile of as many rows, so
    bands are merged once for whole tiles and once for a shorter last one, then shifted and cut.
    """
    first, end = geo.bounds()
    short = geo.n_q - (geo.tiles - 1) * geo.q_block
    rows = torch.tensor([[geo.q_block], [short]], device=geo.device)
    near, width = bands[:, :, None].unbind(-1)
    start = (1 - near - width).clamp(min=-geo.n_q - abs(geo.q_offset))
    stop = torch.where(kept[:, :, None], rows - near, start)
    merged = padded(*csr(*merge(start.expand_as(stop), stop)))
    which = (end - first < geo.q_block).long()
    start, stop = (merged[:, :, which] + (first + geo.q_offset)[:, None, None]).unbind(-1)
    return pack(start.clamp(min=0), stop.minimum(geo.limit()[:, None]))


def documents(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [B, n] with one run a document -> begin and end of each token's document, int64 [B, n]."""
    check_ints("ids", ids)
    if ids.dim() not in (1, 2):
        raise ValueError(f"SparsePlan: ids has shape {list(ids.shape)}, expected [n] or [B, n]")
    ids = ids[None] if ids.dim() == 1 else ids
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    ordered = ids.sort(-1).values
    kinds = ordered.diff(dim=-1).ne(0).sum(-1) + 1
    again = begins.sum(-1) > kinds
    if ids.shape[1] and bool(again.any()):
        b = int(again.nonzero()[0])
        heads = ids[b][begins[b]].tolist()
        back = next(x for i, x in enumerate(heads) if x in heads[:i])
        raise ValueError(f"SparsePlan: ids[{b}]: document {back} comes back after another one")
    position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if not ids.shape[1]:
        return position, position
    closes = begins.roll(-1, 1)
    closes[:, -1] = True
    begin = torch.where(begins, position, 0).cummax(-1).values
    end = torch.where(closes, position + 1, ids.shape[1]).flip(-1).cummin(-1).values.flip(-1)
    return begin, end


def join(parts: list[Tensor], axis: int) -> Tensor:
    """Tensors [B, H, N, ...] one after the other along `axis`, zero padded to the largest N."""
    sizes = list(parts[0].shape)
    sizes[2] = max(part.shape[2] for part in parts)
    sizes[axis] = sum(part.shape[axis] for part in parts)
    out, at = parts[0].new_zeros(sizes), 0
    for part in parts:
        out.narrow(axis, at, part.shape[axis])[:, :, : part.shape[2]] = part
        at += part.shape[axis]
    return out
