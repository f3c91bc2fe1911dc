"""SparsePlan: which keys each tile of queries looks at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import build, convert
from .build import Device, Geometry
from .data import PlanData

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, eq=False, repr=False)
class SparsePlan(PlanData):
    """For each (batch, head, tile of q_block queries): the keys that its queries may see.

    Row i of tile t sees key j iff (j is in one of the tile's ranges or columns) and
    (not causal or j <= i + q_offset) and j >= row_start[i]. A plan is a set: a key named twice counts once.

    ranges        int32 [B|1, H|1, R, 2]  token ranges [start, stop), sorted and disjoint in a tile
    range_slice   int32 [B|1, H|1, T, 2]  (first, count) of each tile in ranges
    columns       int32 [B|1, H|1, C]     scattered keys, strictly increasing in a tile
    column_slice  int32 [B|1, H|1, T, 2]  (first, count) of each tile in columns
    row_start     int32 [B|1, n_q]        first key of each row, in any order, alike in all heads; or None: 0

    T = ceil(n_q / q_block); R and C are capacities, entries of no slice are ignored; slices may
    overlap. Kernels skip what lies before the lowest row_start of a tile. Windows, documents and padding are exact
    by it; the other pattern constructors round up to whole tiles: a key that one row of a tile asks for is given
    to all its rows (causality stays exact), so use a smaller q_block where that is too coarse.
    The plain initialiser checks nothing and never waits for a device; `from_tensors` checks all.

    >>> SparsePlan.a_shape(1024, sink=4, window=128)
    SparsePlan(B=1, H=1, n_q=1024, n_k=1024, causal, q_block=64, ranges=29, columns=0)
    """

    @classmethod
    def dense(
        cls,
        n_q: int,
        n_k: int | None = None,
        *,
        causal: bool = True,
        q_offset: int | None = None,
        q_block: int = 64,
        device: Device = None,
    ) -> SparsePlan:
        """Every key that causality allows; n_k defaults to n_q, q_offset to n_k - n_q.

        >>> SparsePlan.dense(4).to_mask()[0, 0].int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
        """
        geo = build.geometry(n_q, n_k, q_offset, causal, q_block, device)
        stop = geo.limit()[None, None, :, None]
        return cls._of(geo, build.pack(torch.zeros_like(stop), stop))

    @classmethod
    def a_shape(
        cls,
        n_q: int,
        sink: int | Sequence[int] | Tensor,
        window: int | Sequence[int] | Tensor,
        *,
        n_k: int | None = None,
        causal: bool = True,
        q_offset: int | None = None,
        q_block: int = 64,
        device: Device = None,
    ) -> SparsePlan:
        """The first `sink` keys and the last `window` keys up to each query itself (StreamingLLM).

        Query i stands at key p = i + q_offset and asks for j < sink and p - window < j <= p (not causal:
        |p - j| < window). `sink` and `window` are one int, or one per head; both may pass n_k.

        >>> SparsePlan.a_shape(6, sink=1, window=2, q_block=1).to_mask()[0, 0, 5].int().tolist()
        [1, 0, 0, 0, 1, 1]
        """
        geo = build.geometry(n_q, n_k, q_offset, causal, q_block, device)
        return cls._sink_window_last(geo, sink, window, 0)

    @classmethod
    def tri_shape(
        cls,
        n_q: int,
        sink: int | Sequence[int] | Tensor,
        window: int | Sequence[int] | Tensor,
        last: int | Sequence[int] | Tensor,
        *,
        n_k: int | None = None,
        causal: bool = True,
        q_offset: int | None = None,
        q_block: int = 64,
        device: Device = None,
    ) -> SparsePlan:
        """`a_shape`, and the last `last` queries see every key (SCBench's tri-shape).

        >>> SparsePlan.tri_shape(256, sink=4, window=64, last=1).tile_cost().tolist()
        [[[64, 128, 131, 256]]]
        """
        geo = build.geometry(n_q, n_k, q_offset, causal, q_block, device)
        return cls._sink_window_last(geo, sink, window, last)

    @classmethod
    def sliding_window(
        cls,
        n_q: int,
        window: int,
        *,
        n_k: int | None = None,
        causal: bool = True,
        q_offset: int | None = None,
        q_block: int = 64,
        device: Device = None,
    ) -> SparsePlan:
        """Exactly the last `window` keys up to each query itself, alike in all heads (`a_shape` takes one a head).

        Query i stands at key p = i + q_offset and sees p - window < j <= p; not causal: |p - j| < window, which is
        a causal plan whose q_offset is larger by window - 1.

        >>> SparsePlan.sliding_window(5, 2).to_mask()[0, 0].int().tolist()
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
        """
        geo = build.geometry(n_q, n_k, q_offset, causal, q_block, device)
        window = build.check_int("window", window, 0)
        begin = (torch.arange(geo.n_q, device=geo.device) + geo.q_offset + 1 - window).clamp(0, geo.n_k)
        if not causal:
            geo = replace(geo, causal=True, q_offset=min(geo.q_offset + window - 1, geo.n_k))
        ranges, row_start = build.rows_from(geo, begin[None], geo.limit()[None])
        return cls._of(geo, ranges, row_start=row_start)

    @classmethod
    def _sink_window_last(
        cls,
        geo: Geometry,
        sink: int | Sequence[int] | Tensor,
        window: int | Sequence[int] | Tensor,
        last: int | Sequence[int] | Tensor,
    ) -> SparsePlan:
        sinks = build.head_ints("sink", sink, geo.device)
        windows = build.head_ints("window", window, geo.device)
        lasts = build.head_ints("last", last, geo.device)
        build.common_heads(sink=sinks, window=windows, last=lasts)
        return cls._of(geo, build.sink_window_last(geo, sinks, windows, lasts))

    @classmethod
    def vertical_slash(
        cls,
        n_q: int,
        columns: Any = (),
        diagonals: Any = (),
        bands: Any = (),
        *,
        n_k: int | None = None,
        causal: bool = True,
        q_offset: int | None = None,
        q_block: int = 64,
        device: Device = None,
    ) -> SparsePlan:
        """Key columns seen by all queries, and diagonals (MInference 1.0's vertical-slash).

        Query i asks for every key in `columns`, for key i + q_offset - d for each d in `diagonals` (0 =
        its own), and for d = start, ..., start + width - 1 for each (start, width) in `bands`.
        Each is one list for all heads, a list with one list per head, or an int tensor [K], [H, K]
        or [B, H, K] (bands [..., K, 2]); any order, repeats allowed. A band may reach past the first key.
        The tiles of a head share one column list; a diagonal is a token range in each tile, merged with others it
        meets.

        Raises: ValueError for a column outside [0, n_k) or a diagonal that meets no key.

        >>> plan = SparsePlan.vertical_slash(6, columns=[0], diagonals=[0, 2], q_block=1)
        >>> plan.to_mask()[0, 0, 5].int().tolist()
        [1, 0, 0, 1, 0, 1]
        """
        geo = build.geometry(n_q, n_k, q_offset, causal, q_block, device)
        column, column_kept = build.index_lists("columns", columns, 1, geo.device)
        single, single_kept = build.index_lists("diagonals", diagonals, 1, geo.device)
        band, band_kept = build.index_lists("bands", bands, 2, geo.device)
        batch, heads = build.common_heads(columns=column, diagonals=single, bands=band)
        low = 0 if geo.causal else geo.q_offset - geo.n_k + 1
        high = geo.n_q + geo.q_offset
        build.check_inside("columns", column[..., 0], column_kept, 0, geo.n_k)
        build.check_inside("diagonals", single[..., 0], single_kept, low, high)
        build.check_inside("bands (start)", band[..., 0], band_kept, low, high)
        build.check_inside("bands (width)", band[..., 1], band_kept, 1, build.INT32_MAX)

        single = torch.cat([single, torch.ones_like(single)], -1)
        both = [x.expand(batch, heads, -1, 2) for x in (single, band)]
        kept = [x.expand(batch, heads, -1) for x in (single_kept, band_kept)]
        ranges = build.diagonal_ranges(geo, torch.cat(both, 2), torch.cat(kept, 2))
        tokens = column[..., 0].expand(batch, heads, -1)
        shared = build.shared_columns(geo, tokens, column_kept.expand(batch, heads, -1))
        return cls._of(geo, ranges, shared)

    @classmethod
    def from_block_mask(
        cls,
        mask: Tensor,
        q_block: int = 64,
        k_block: int = 64,
        *,
        n_q: int | None = None,
        n_k: int | None = None,
        causal: bool = True,
        q_offset: int | None = None,
    ) -> SparsePlan:
        """Blocks of keys that each tile sees: bool [B|1, H|1, Tq, Tk]; neighbours become one range.

        n_q and n_k default to whole blocks; Tq = ceil(n_q / q_block), Tk = ceil(n_k / k_block).

        >>> mask = torch.tensor([[[[True, False], [True, True]]]])
        >>> SparsePlan.from_block_mask(mask, 64, 64).tile_cost().tolist()
        [[[64, 128]]]
        """
        build.check_bool("block mask", mask, "[B|1, H|1, Tq, Tk]")
        k_block = build.check_int("k_block", k_block, 1)
        q_block = build.check_int("q_block", q_block, 1)
        n_q = mask.shape[2] * q_block if n_q is None else n_q
        n_k = mask.shape[3] * k_block if n_k is None else n_k
        geo = build.geometry(n_q, n_k, q_offset, causal, q_block, mask.device)
        blocks = -(-geo.n_k // k_block)
        if tuple(mask.shape[2:]) != (geo.tiles, blocks):
            raise ValueError(
                f"SparsePlan: block mask is {list(mask.shape[2:])}, but n_q={n_q} in q_block={q_block} "
                f"and n_k={n_k} in k_block={k_block} make [{geo.tiles}, {blocks}]"
            )
        counts, ends = build.runs(mask)
        return cls._of(geo, (counts, (ends * k_block).clamp(max=geo.n_k)))

    @classmethod
    def from_documents(
        cls,
        lengths: Sequence[int] | Tensor | None = None,
        *,
        ids: Tensor | None = None,
        causal: bool = True,
        q_block: int = 64,
        device: Device = None,
    ) -> SparsePlan:
        """Packed documents: a token sees exactly its own document (and only backwards if causal).

        Give the documents' `lengths` in order, or `ids`, an int tensor [n] or [B, n] with one run of
        equal ids a document. Not causal, no tile may hold two documents: q_block shrinks to the largest
        divisor of itself that fits all of them (lengths that are multiples of it keep it).

        Raises: ValueError if an id comes back.

        >>> SparsePlan.from_documents([100, 28, 128]).tile_cost().tolist()
        [[[64, 128, 64, 128]]]
        """
        if (lengths is None) == (ids is None):
            raise TypeError("SparsePlan: from_documents needs either lengths or ids")
        if lengths is not None:
            sizes = [build.check_int(f"lengths[{i}]", size, 0) for i, size in enumerate(lengths)]
            ids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
        begin, end = build.documents(torch.as_tensor(ids, device=device))
        if not causal:
            q_block = math.gcd(build.check_int("q_block", q_block, 1), *begin.unique().tolist())
        geo = build.geometry(begin.shape[1], None, 0, causal, q_block, begin.device)
        stop = geo.limit()[None] if causal else end[:, geo.bounds()[0]]
        ranges, row_start = build.rows_from(geo, begin, stop)
        return cls._of(geo, ranges, row_start=row_start)

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        *,
        causal: bool = True,
        q_offset: int | None = None,
        q_block: int = 64,
        min_run: int = 16,
    ) -> SparsePlan:
        """The plan of a bool mask [B|1, H|1, n_q, n_k], True where query i sees key j.

        Runs of at least `min_run` keys become ranges, shorter ones columns; where rows of a tile differ and all heads
        agree on the first key of each row, it becomes row_start.

        Raises: ValueError where rows of one tile differ by more than that and causality, or (causal) a row sees a
        key past its limit: the message names both indices.

        >>> mask = torch.ones(1, 1, 100, 100, dtype=torch.bool).tril()
        >>> bool((SparsePlan.from_mask(mask).to_mask() == mask).all())
        True
        """
        build.check_bool("mask", mask, "[B|1, H|1, n_q, n_k]")
        n_q, n_k = mask.shape[2:]
        geo = build.geometry(n_q, n_k, q_offset, causal, q_block, mask.device)
        return cls._of_keys(geo, *convert.mask_to_keys(mask, geo), min_run)

    @classmethod
    def _of_keys(cls, geo: Geometry, keys: Tensor, row_start: Tensor | None, min_run: int) -> SparsePlan:
        ranges, columns = convert.keys_to_entries(keys, build.check_int("min_run", min_run, 1))
        return cls._of(geo, ranges, build.csr(*columns), row_start)

    @classmethod
    def from_flex_block_mask(
        cls, block_mask: BlockMask, *, causal: bool = True, q_offset: int | None = None
    ) -> SparsePlan:
        """The plan of a FlexAttention BlockMask; its tile height is the mask's.

        The mask_mod is run on every partial block; rows of a tile may differ by causality only.

        Raises: ValueError as `from_mask`, and for a full block that crosses the diagonal if causal.

        >>> flex = SparsePlan.dense(256).to_flex_block_mask()
        >>> SparsePlan.from_flex_block_mask(flex).same_pairs(SparsePlan.dense(256))
        True
        """
        (n_q, n_k), where = block_mask.seq_lengths, block_mask.kv_indices.device
        geo = build.geometry(n_q, n_k, q_offset, causal, block_mask.BLOCK_SIZE[0], where)
        return cls._of_keys(geo, convert.flex_keys(block_mask, geo), None, 1)

    def to_flex_block_mask(self, k_block: int = 64, *, eager: bool = False) -> BlockMask:
        """A FlexAttention BlockMask with blocks of q_block x k_block; mask_mod is causality and row_start.

        Uncompiled flex_attention ignores the block lists: `eager=True` puts them into mask_mod too.

        Raises: ValueError naming the tile and block if a tile sees part of a block (of its visible keys).

        >>> SparsePlan.sliding_window(256, 65).to_flex_block_mask().kv_num_blocks.tolist()
        [[[1, 2, 2, 2]]]
        """
        return convert.to_flex_block_mask(self, k_block, eager)

    @classmethod
    def from_bsr(
        cls,
        crow_indices: Tensor,
        col_indices: Tensor,
        q_block: int = 64,
        k_block: int = 64,
        *,
        n_q: int | None = None,
        n_k: int,
        causal: bool = True,
        q_offset: int | None = None,
    ) -> SparsePlan:
        """Block rows as in torch.sparse_bsr: crow_indices [B, H, T + 1], col_indices [B, H, N].

        Leading axes may be missing; entries of col_indices past crow_indices[..., -1] are ignored.

        >>> crow, col = torch.tensor([0, 1, 3]), torch.tensor([0, 0, 1])
        >>> SparsePlan.from_bsr(crow, col, n_k=128).same_pairs(SparsePlan.dense(128))
        True
        """
        blocks = -(-build.check_int("n_k", n_k, 0) // build.check_int("k_block", k_block, 1))
        mask = convert.bsr_map(crow_indices, col_indices, blocks)
        sizes = {"n_q": n_q, "n_k": n_k, "q_offset": q_offset}
        return cls.from_block_mask(mask, q_block, k_block, causal=causal, **sizes)

    def to_bsr(self, k_block: int = 64) -> tuple[Tensor, Tensor]:
        """(crow_indices int32 [B, H, T + 1], col_indices int32 [B, H, N], zero padded).

        Raises: ValueError naming the tile and block if a tile sees part of a block, or if row_start hides a key.

        >>> [x.tolist() for x in SparsePlan.dense(128).to_bsr()]
        [[[[0, 1, 3]]], [[[0, 0, 1]]]]
        """
        return convert.to_bsr(self, k_block)

    @classmethod
    def from_minference(
        cls,
        block_count: Tensor,
        block_offset: Tensor,
        column_count: Tensor,
        column_index: Tensor,
        *,
        n: int,
    ) -> SparsePlan:
        """MInference's [B, H, R], [B, H, R, K], [B, H, R], [B, H, R, K] with R = ceil(n / 64).

        Offsets are tokens; each stands for 64 keys (csrc/vertical_slash_index.cu of MInference).

        >>> SparsePlan.from_minference(*SparsePlan.dense(256).to_minference(), n=256).density()
        1.0
        """
        tensors = (block_count, block_offset, column_count, column_index)
        for name, tensor in zip(convert.MINFERENCE_NAMES, tensors, strict=True):
            build.check_ints(name, tensor)
        geo = build.geometry(n, None, 0, True, convert.MINFERENCE_BLOCK, block_count.device)
        ranges, columns = convert.minference_entries(*tensors, geo)
        return cls._of(geo, ranges, build.csr(*columns))

    def to_minference(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """block_count, block_offset, column_count, column_index: all int32, as `from_minference`.

        What is left of a range after its blocks of 64 becomes columns.

        Raises: ValueError for a plan that is not causal and square in tiles of 64, whose row_start hides a key, or
        with a key between a tile's first and last query that is in no whole block: MInference applies causality to
        blocks only.

        >>> SparsePlan.dense(128).to_minference()[1].tolist()
        [[[[0, 0], [0, 64]]]]
        """
        return convert.to_minference(self)
