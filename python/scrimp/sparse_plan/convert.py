"""Converters between SparsePlan and other libraries' descriptions of a sparse mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import build, measure
from .build import Geometry

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from .plan import SparsePlan

MINFERENCE_BLOCK = 64
MINFERENCE_NAMES = ("block_count", "block_offset", "column_count", "column_index")

Entries = tuple[Tensor, Tensor]


def mask_to_keys(mask: Tensor, geo: Geometry) -> tuple[Tensor, Tensor | None]:
    """bool [B, H, n_q, n_k] -> keys bool [B, H, T, n_k] of each tile and the row_start they need, or ValueError."""
    batch, heads = mask.shape[:2]
    spare = geo.tiles * geo.q_block - geo.n_q
    rows = torch.nn.functional.pad(mask, (0, 0, 0, spare))
    keys = rows.view(batch, heads, geo.tiles, geo.q_block, geo.n_k).any(3)
    rows = torch.arange(geo.n_q, device=mask.device)
    wanted = keys[:, :, rows // geo.q_block]
    if geo.causal:
        wanted &= torch.arange(geo.n_k, device=mask.device) <= rows[:, None] + geo.q_offset
    if torch.equal(wanted, mask):
        return keys, None
    seen = mask.any(1).cummax(-1).values  # from the first key of each row on, whichever head sees it
    bad = (wanted & seen[:, None]) != mask
    if bool(bad.any()):
        b, h, i, j = bad.nonzero()[0].tolist()
        raise ValueError(f"SparsePlan: mask[{b}, {h}]: " + _row_fault(geo, bool(mask[b, h, i, j]), i, j))
    return keys, (~seen).sum(-1, dtype=torch.int32)


def _row_fault(geo: Geometry, seen: bool, i: int, j: int) -> str:
    if seen:
        return (
            f"query {i} sees key {j}, beyond its causal limit {i + geo.q_offset} "
            f"(q_offset={geo.q_offset}); causal=False allows it"
        )
    return (
        f"query {i} does not see key {j}, but another row of tile {i // geo.q_block} does; rows of a tile may "
        "differ by causality only (and by their first key if that is alike in all heads of a mask): "
        f"use a smaller q_block than {geo.q_block} (1 always works)"
    )


def keys_to_entries(keys: Tensor, min_run: int) -> tuple[Entries, Entries]:
    """Keys bool [B, H, T, n_k] -> ranges (counts, values) of long runs, columns of the short ones."""
    counts, ends = build.runs(keys)
    tile = _repeated(counts.flatten())[0]
    length = ends[:, 1] - ends[:, 0]
    long = length >= min_run
    run, step = _repeated(length[~long])
    tokens = ends[~long, 0][run] + step
    ranges, columns = tile[long], tile[~long][run]
    some, scattered = (x.bincount(minlength=counts.numel()).view_as(counts) for x in (ranges, columns))
    return (some, ends[long]), (scattered, tokens)


def block_map(plan: SparsePlan, k_block: int, what: str) -> Tensor:
    """bool [B, H, T, ceil(n_k / k_block)], or ValueError where a tile sees part of a block.

    Keys that causality or row_start hides from the whole tile do not matter.
    """
    k_block = build.check_int("k_block", k_block, 1)
    blocks = -(-plan.n_k // k_block)
    batch, heads = plan.ranges.shape[:2]
    position = torch.arange(blocks * k_block, device=plan.ranges.device)
    limit = plan.geometry.limit()
    low = measure.starts_of_tiles(plan)[0]
    step = max(1, 2**26 // max(1, batch * heads * plan.n_k))
    parts = [limit.new_zeros((batch, heads, 0, blocks), dtype=torch.bool)]
    for begin in range(0, plan.tiles, step):
        end = min(plan.tiles, begin + step)
        visible = ((position < limit[begin:end, None]) & (position >= low[:, begin:end, None]))[:, None]
        keys = measure.tile_keys(plan, begin, end)
        keys = torch.nn.functional.pad(keys, (0, blocks * k_block - plan.n_k)) & visible
        seen = keys.view(batch, heads, end - begin, blocks, k_block).sum(-1)
        partly = (seen > 0) & (seen < visible.view(len(low), 1, end - begin, blocks, k_block).sum(-1))
        if bool(partly.any()):
            b, h, t, k = partly.nonzero()[0].tolist()
            raise ValueError(
                f"SparsePlan: {what}: [{b}, {h}] tile {begin + t} sees only {int(seen[b, h, t, k])} keys of "
                f"block {k} ([{k * k_block}, {k * k_block + k_block})): not aligned to k_block={k_block}"
            )
        parts.append(seen > 0)
    return torch.cat(parts, 2)


def to_flex_block_mask(plan: SparsePlan, k_block: int, eager: bool) -> BlockMask:
    from torch.nn.attention.flex_attention import BlockMask

    blocks = block_map(plan, k_block, "to_flex_block_mask")
    first, end = plan.geometry.bounds()
    block_end = (torch.arange(blocks.shape[-1], device=blocks.device) + 1) * k_block
    whole = (block_end <= plan.n_k) & (end - first == plan.q_block)[:, None]
    if plan.causal:
        whole &= block_end <= (first + plan.q_offset + 1)[:, None]
    whole = whole & (block_end - k_block >= measure.starts_of_tiles(plan)[1][:, None, :, None])
    batch, heads = blocks.shape[:2]
    offset, causal, q_block = plan.q_offset, plan.causal, plan.q_block
    row_start = None if plan.row_start is None else plan.row_start.expand(batch, -1)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = k <= q + offset if causal else k >= 0
        b, h = b if batch > 1 else b * 0, h if heads > 1 else h * 0
        if row_start is not None:
            seen = seen & (k >= row_start[b, q])
        if eager:
            seen = seen & blocks[b, h, q // q_block, k // k_block]
        return seen

    return BlockMask.from_kv_blocks(
        *_counted(blocks & ~whole),
        *_counted(blocks & whole),
        BLOCK_SIZE=(plan.q_block, k_block),
        mask_mod=mask_mod,
        seq_lengths=(plan.n_q, plan.n_k),
        compute_q_blocks=plan.tiles > 0 and plan.n_k > 0,
    )


def _counted(bits: Tensor) -> tuple[Tensor, Tensor]:
    """bool [..., K] -> how many are set, and their places first: int32 [...], [..., K]."""
    places = (~bits).long().sort(dim=-1, stable=True).indices
    return bits.sum(-1, dtype=torch.int32), places.to(torch.int32)


def flex_keys(block_mask: BlockMask, geo: Geometry) -> Tensor:
    """Keys bool [B, H, T, n_k] of a BlockMask, whose mask_mod is run on every partial block."""
    _, k_block = block_mask.BLOCK_SIZE
    blocks = -(-geo.n_k // k_block)
    whole = torch.zeros((), dtype=torch.bool, device=geo.device)
    partial = _scattered(block_mask.kv_num_blocks, block_mask.kv_indices, geo.tiles, blocks)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        whole = _scattered(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, geo.tiles, blocks)
    whole = whole.expand_as(partial)
    keys = whole.repeat_interleave(k_block, -1)[..., : geo.n_k].clone()
    first = geo.bounds()[0]
    block_end = ((torch.arange(blocks, device=geo.device) + 1) * k_block).clamp(max=geo.n_k)
    crossing = whole & (block_end > (first + geo.q_offset + 1)[:, None])
    if geo.causal and bool(crossing.any()):
        b, h, t, k = crossing.nonzero()[0].tolist()
        raise ValueError(
            f"SparsePlan: from_flex_block_mask: [{b}, {h}] tile {t} holds block {k} in full, which "
            f"crosses the diagonal (q_offset={geo.q_offset}); causal=False keeps it"
        )
    partial &= ~whole
    places = partial.nonzero()
    area = geo.q_block * k_block
    cell = torch.arange(area, device=geo.device)
    for chunk in places.split(max(1, 2**22 // area)) if len(places) else ():
        b, h, t, k = (x[:, None].expand(-1, area).flatten() for x in chunk.unbind(-1))
        inner = cell.repeat(len(chunk))
        i, j = t * geo.q_block + inner // k_block, k * k_block + inner % k_block
        inside = (i < geo.n_q) & (j < geo.n_k)
        b, h, t, i, j = b[inside], h[inside], t[inside], i[inside], j[inside]
        seen = torch.vmap(block_mask.mask_mod)(b, h, i, j)
        keys[b[seen], h[seen], t[seen], j[seen]] = True
        wanted = keys[b, h, t, j]
        if geo.causal:
            wanted &= j <= i + geo.q_offset
        bad = (wanted != seen).nonzero()
        if len(bad):
            at = int(bad[0])
            where = f"SparsePlan: from_flex_block_mask: [{int(b[at])}, {int(h[at])}]: "
            raise ValueError(where + _row_fault(geo, bool(seen[at]), int(i[at]), int(j[at])))
    return keys


def _scattered(count: Tensor, index: Tensor, tiles: int, blocks: int) -> Tensor:
    """Listed blocks ([B, H, T] and [B, H, T, K]) as bool [B, H, T, blocks]."""
    if count.dim() != 3 or count.shape[2] != tiles:
        raise ValueError(
            f"SparsePlan: from_flex_block_mask: kv_num_blocks has shape {list(count.shape)}, expected [B, H, {tiles}]"
        )
    used = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    build.check_inside("kv_indices", index.flatten(2), used.flatten(2), 0, blocks)
    bits = torch.zeros((*index.shape[:3], blocks + 1), dtype=torch.bool, device=index.device)
    return bits.scatter_(-1, index.long().masked_fill(~used, blocks), True)[..., :blocks]


def to_bsr(plan: SparsePlan, k_block: int) -> tuple[Tensor, Tensor]:
    blocks = block_map(measure.without_row_start(plan, "to_bsr"), k_block, "to_bsr")
    counts = blocks.sum(-1)
    crow = torch.nn.functional.pad(counts.cumsum(-1), (1, 0)).to(torch.int32)
    return crow, build.csr(counts, blocks.nonzero()[:, -1])[0]


def bsr_map(crow: Tensor, col: Tensor, blocks: int) -> Tensor:
    """BSR rows (crow [B, H, T + 1], col [B, H, N], or without leading axes) as bool [B, H, T, blocks]."""
    for name, tensor in (("crow_indices", crow), ("col_indices", col)):
        build.check_ints(name, tensor)
        if not 1 <= tensor.dim() <= 3:
            raise ValueError(f"SparsePlan: {name} has shape {list(tensor.shape)}, expected 1 to 3 axes")
    crow = crow.long().reshape((1,) * (3 - crow.dim()) + crow.shape)
    col = col.long().reshape((1,) * (3 - col.dim()) + col.shape)
    if crow.shape[:2] != col.shape[:2] or crow.shape[2] < 1:
        raise ValueError(
            f"SparsePlan: from_bsr: crow_indices {list(crow.shape)} and col_indices {list(col.shape)} differ"
        )
    counts = crow.diff(dim=-1)
    if bool((counts < 0).any()) or bool((crow[..., 0] != 0).any()) or bool((crow[..., -1] > col.shape[2]).any()):
        raise ValueError(
            f"SparsePlan: from_bsr: crow_indices must rise from 0 to at most {col.shape[2]} "
            f"(the length of col_indices), got {crow.flatten(0, 1)[0, :8].tolist()}..."
        )
    slices = torch.stack([crow[..., :-1], counts], -1)
    tile, entry = build.entries(slices, col.shape[2])
    block = col.reshape(-1)[entry]
    if bool(((block < 0) | (block >= blocks)).any()):
        wrong = int(block[(block < 0) | (block >= blocks)][0])
        raise ValueError(f"SparsePlan: from_bsr: block column {wrong} is outside [0, {blocks})")
    bits = torch.zeros((counts.numel(), blocks), dtype=torch.bool, device=col.device)
    bits[tile, block] = True
    return bits.view(*counts.shape, blocks)


def minference_entries(
    block_count: Tensor,
    block_offset: Tensor,
    column_count: Tensor,
    column_index: Tensor,
    geo: Geometry,
) -> tuple[Entries, Entries]:
    """MInference's four tensors -> (counts, values) of ranges and of columns."""
    for name, count, index in (
        ("block", block_count, block_offset),
        ("column", column_count, column_index),
    ):
        if count.dim() != 3 or index.dim() != 4 or count.shape != index.shape[:3] or count.shape[2] != geo.tiles:
            raise ValueError(
                f"SparsePlan: from_minference: {name} tensors have shapes {list(count.shape)} and {list(index.shape)}, "
                f"expected [B, H, {geo.tiles}] and [B, H, {geo.tiles}, K] for n={geo.n_q}"
            )
        if bool(((count < 0) | (count > index.shape[3])).any()):
            wrong = int(count[(count < 0) | (count > index.shape[3])][0])
            raise ValueError(f"SparsePlan: from_minference: {name}_count {wrong} is outside [0, {index.shape[3]}]")
    if block_count.shape != column_count.shape:
        raise ValueError(
            f"SparsePlan: from_minference: block_count {list(block_count.shape)} and column_count "
            f"{list(column_count.shape)} differ"
        )
    used = torch.arange(block_offset.shape[3], device=geo.device) < block_count[..., None]
    build.check_inside("block_offset", block_offset.flatten(2), used.flatten(2), 0, geo.n_k)
    start = block_offset.long()
    stop = torch.where(used, start + MINFERENCE_BLOCK, start).minimum(geo.limit()[:, None])
    ranges = build.merge(start, stop)
    used = torch.arange(column_index.shape[3], device=geo.device) < column_count[..., None]
    build.check_inside("column_index", column_index.flatten(2), used.flatten(2), 0, geo.n_k)
    return ranges, build.sorted_columns(column_index.long(), used)


def to_minference(plan: SparsePlan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "SparsePlan: to_minference"
    if not plan.causal or plan.n_q != plan.n_k or plan.q_offset or plan.q_block != MINFERENCE_BLOCK:
        raise ValueError(
            f"{op}: needs a causal plan with n_q == n_k, q_offset=0 and q_block={MINFERENCE_BLOCK}, got "
            f"causal={plan.causal}, n_q={plan.n_q}, n_k={plan.n_k}, q_offset={plan.q_offset}, q_block={plan.q_block}"
        )
    plan = measure.without_row_start(plan, "to_minference")
    shape, tiles = plan.range_slice.shape[:3], max(plan.tiles, 1)
    limit = plan.geometry.limit()
    start, stop = build.padded(plan.ranges, plan.range_slice).unbind(-1)
    counts, ends = build.merge(start, stop.minimum(limit[:, None]))
    tile = _repeated(counts.flatten())[0]
    start, stop = ends.unbind(-1)
    spare = torch.where(stop < limit[tile % tiles], (stop - start) % MINFERENCE_BLOCK, 0)
    run, step = _repeated((stop - start - spare + MINFERENCE_BLOCK - 1) // MINFERENCE_BLOCK)
    blocks = (tile[run], start[run] + step * MINFERENCE_BLOCK)

    owner, entry = build.entries(plan.column_slice, plan.columns.shape[2])
    column = plan.columns.reshape(-1)[entry].long()
    wide = plan.n_k + 1
    place = torch.searchsorted(tile * wide + start, owner * wide + column, right=True)
    reach = torch.nn.functional.pad(tile * wide + stop, (1, 0))[place]
    alone = (owner * wide + column >= reach) & (column < limit[owner % tiles])
    run, step = _repeated(spare)
    owner = torch.cat([owner[alone], tile[run]])
    column = torch.cat([column[alone], (stop - spare)[run] + step])
    late = column > owner % tiles * MINFERENCE_BLOCK
    if bool(late.any()):
        raise ValueError(
            f"{op}: {_tile_name(shape, owner[late][0])}: key {int(column[late][0])} lies on the diagonal "
            "and in no whole block, and MInference's kernel masks no columns"
        )
    order = (owner * wide + column).argsort()
    return (*_padded_rows(shape, *blocks), *_padded_rows(shape, owner[order], column[order]))


def _repeated(counts: Tensor) -> tuple[Tensor, Tensor]:
    """counts [N] -> for each of the counts.sum() items: its owner, and its rank in its owner."""
    owner = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    rank = torch.arange(len(owner), device=counts.device) - (counts.cumsum(0) - counts)[owner]
    return owner, rank


def _padded_rows(shape: torch.Size, tile: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Values sorted by tile -> their number int32 [B, H, T] and themselves int32 [B, H, T, K]."""
    counts = tile.bincount(minlength=shape.numel()).view(shape)
    return counts.to(torch.int32), build.padded(*build.csr(counts, value)).to(torch.int32)


def _tile_name(shape: torch.Size, tile: Tensor) -> str:
    head, t = divmod(int(tile), shape[2])
    b, h = divmod(head, shape[1])
    return f"[{b}, {h}] tile {t}"
