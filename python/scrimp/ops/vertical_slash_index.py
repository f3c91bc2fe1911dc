"""vertical_slash_index: which keys matter, estimated from a few query rows; the plan of sparse_attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .._registry import register
from ..sparse_plan import SparsePlan
from ._check import check_attention, check_dtype

SCHEMA = (
    "(Tensor q, Tensor k, Tensor window, Tensor columns, int max_columns, int sinks, int segment, int samples, "
    "int q_block, int q_offset, float scale) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _check(
    q: Tensor,
    k: Tensor,
    window: Tensor,
    columns: Tensor,
    max_columns: int,
    sinks: int,
    segment: int,
    samples: int,
    q_block: int,
    q_offset: int,
    scale: float,
) -> None:
    op = "vertical_slash_index"
    check_attention(op, q, {"k": k}, {"window": window, "columns": columns}, scale)
    H = q.shape[1]
    for name, budget in (("window", window), ("columns", columns)):
        check_dtype(op, name, budget, (torch.int32,))
        if tuple(budget.shape) != (H,):
            raise ValueError(f"{op}: {name} must be [H={H}], one number a head, got shape {list(budget.shape)}")
    for name, value, low in (("max_columns", max_columns, 0), ("sinks", sinks, 0), ("samples", samples, 1)):
        if value < low:
            raise ValueError(f"{op}: {name}={value} must be at least {low}")
    if q_block < 1 or segment < 1 or segment % q_block:
        raise ValueError(f"{op}: segment={segment} must be a positive multiple of q_block={q_block}")
    if segment % samples:
        raise ValueError(f"{op}: segment={segment} must be a multiple of samples={samples}")


def _empty(q: Tensor, max_columns: int, segment: int, q_block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ranges `[B, H, 2T, 2]`, range_slice `[B, H, T, 2]`, columns `[B, H, S max_columns]`, column_slice."""
    B, H, n_q, _ = q.shape
    T, S = -(-n_q // q_block), -(-n_q // segment)
    return (
        q.new_empty(B, H, 2 * T, 2, dtype=torch.int32),
        q.new_empty(B, H, T, 2, dtype=torch.int32),
        q.new_empty(B, H, S * max_columns, dtype=torch.int32),
        q.new_empty(B, H, T, 2, dtype=torch.int32),
    )


def _fake(
    q: Tensor,
    k: Tensor,
    window: Tensor,
    columns: Tensor,
    max_columns: int,
    sinks: int,
    segment: int,
    samples: int,
    q_block: int,
    q_offset: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(q, k, window, columns, max_columns, sinks, segment, samples, q_block, q_offset, scale)
    return _empty(q, max_columns, segment, q_block)


def column_scores(q: Tensor, k: Tensor, rows: Tensor, low: Tensor, sinks: int, q_offset: int, scale: float) -> Tensor:
    """Attention mass that sampled rows give each key outside the sinks and their own windows: `[B, H, n_k]`.

    Args:
        q: `[B, H, n_q, D]`.
        k: `[B, G, n_k, D]`.
        rows: int64 `[R]`, the sampled query rows.
        low: int64 `[H, R]`, first key of each row's local window.
    """
    k = k.repeat_interleave(q.shape[1] // max(k.shape[1], 1), 1)
    key = torch.arange(k.shape[2], device=q.device)
    logits = (scale * (q[:, :, rows] @ k.transpose(2, 3))).to(torch.promote_types(q.dtype, torch.float32))
    mass = logits.masked_fill(key > (rows + q_offset)[:, None], -torch.inf).softmax(-1)
    return mass.masked_fill((key < sinks) | (key >= low[..., None]), 0).nan_to_num(nan=0.0).sum(2)


def reference(
    q: Tensor,
    k: Tensor,
    window: Tensor,
    columns: Tensor,
    max_columns: int,
    sinks: int,
    segment: int,
    samples: int,
    q_block: int,
    q_offset: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(q, k, window, columns, max_columns, sinks, segment, samples, q_block, q_offset, scale)
    n_q, n_k = q.shape[2], k.shape[2]
    ranges, range_slice, chosen, column_slice = (t.zero_() for t in _empty(q, max_columns, segment, q_block))
    width = window.long()[:, None]

    def window_start(rows: Tensor) -> Tensor:
        """First key of the window of each row's tile, `[H, rows]`; 0 where it would touch the sinks."""
        low = (rows // q_block * q_block + q_offset - width).clamp(0, n_k)
        return low.masked_fill(low <= sinks, 0)

    tile = torch.arange(range_slice.shape[2], device=q.device)
    low = window_start(tile * q_block)  # [H, T]
    high = (((tile + 1) * q_block).clamp(max=n_q) + q_offset).clamp(0, n_k).expand_as(low)
    has_sinks, has_window = (low > 0) & (sinks > 0), high > low
    sink_range = torch.stack([torch.zeros_like(low), torch.full_like(low, sinks)], -1)
    window_range = torch.stack([low, high], -1)
    first = torch.where(has_sinks[..., None], sink_range, window_range)
    ranges.copy_(torch.stack([first, window_range], 2).flatten(1, 2))
    range_slice[..., 0], range_slice[..., 1] = 2 * tile, has_sinks.int() + has_window.int()

    for s in range(-(-n_q // segment)):
        start, stop = s * segment, min((s + 1) * segment, n_q)
        stride = segment // samples
        rows = torch.arange(start + stride - 1, stop + stride - 1, stride, device=q.device).clamp(max=stop - 1)
        score = column_scores(q, k, rows, window_start(rows), sinks, q_offset, scale)
        order = torch.sort(score, dim=-1, descending=True, stable=True)
        wanted = torch.arange(n_k, device=q.device) < columns[:, None].clamp(max=max_columns)
        kept = torch.where(wanted & (order.values > 0), order.indices, n_k).sort(-1).values[..., :max_columns]
        chosen[..., s * max_columns : s * max_columns + kept.shape[-1]] = kept.masked_fill(kept == n_k, 0)
        tiles = slice(start // q_block, -(-stop // q_block))
        column_slice[:, :, tiles, 0] = s * max_columns
        column_slice[:, :, tiles, 1] = (kept[:, :, None] < low[:, tiles, None]).sum(-1).int()
    return ranges, range_slice, chosen, column_slice


_call = register("vertical_slash_index", SCHEMA, fake=_fake, reference=reference)


def vertical_slash_index(
    q: Tensor,
    k: Tensor,
    window: Tensor,
    columns: Tensor,
    *,
    sinks: int = 16,
    segment: int = 512,
    samples: int = 16,
    q_block: int = 64,
    q_offset: int | None = None,
    scale: float | None = None,
    max_columns: int | None = None,
) -> SparsePlan:
    """Plans sinks, a local window and the columns that a few rows of each segment attend to most.

    score[s, j] = sum over sampled rows i of segment s of softmax_j(scale q_i . k), for j outside the sinks and the
    window of i;  a tile of segment s sees the sinks, its window and the best columns[h] keys before its window.

    Args:
        q: `[B, H, n_q, D]` fp32 or bf16, D at most 256; any strides.
        k: `[B, G, n_k, D]`, dtype of `q`; H is a multiple of G.
        window: `[H]` int32, tokens before each tile's first query that the tile sees; n_k or more makes a head dense.
        columns: `[H]` int32, scattered keys per segment; 0 makes a head static (A-shape), which costs nothing.
        sinks: first tokens that every query sees.
        segment: queries that share one list of columns; a multiple of `q_block` and of `samples`.
        samples: rows of a segment that are scored, evenly spaced; its last row is always among them.
        q_block: queries of a tile.
        q_offset: position of the first query among the keys; n_k - n_q unless given.
        scale: factor of the scores; 1 / sqrt(D) unless given.
        max_columns: upper bound of `columns`, known to the host; read from `columns` (which waits for the device)
            unless given.

    Returns:
        The SparsePlan; equal scores prefer the lower key. Its cost is bounded by what was asked: at most
        sinks + window + q_block + columns keys a tile.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit, with the value.

    Source: MInference 1.0 (2407.02490), section 3.2, with one estimate per segment instead of one per prompt.

    >>> import torch, scrimp
    >>> q, k = torch.randn(1, 2, 1024, 64), torch.randn(1, 1, 1024, 64)
    >>> budget = torch.tensor([128, 1024], dtype=torch.int32), torch.tensor([32, 0], dtype=torch.int32)
    >>> plan = scrimp.ops.vertical_slash_index(q, k, *budget)
    >>> [round(d, 2) for d in plan.density(per_head=True)[0].tolist()]
    [0.36, 1.0]
    """
    offset = k.shape[2] - q.shape[2] if q_offset is None and q.dim() == k.dim() == 4 else q_offset or 0
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if max_columns is None:
        max_columns = int(columns.max()) if columns.numel() else 0
    args = (q, k, window, columns, max_columns, sinks, segment, samples, q_block, offset, factor)
    _check(*args)
    ranges, range_slice, chosen, column_slice = _call(*args)
    return SparsePlan(
        ranges,
        range_slice,
        chosen,
        column_slice,
        q_block=q_block,
        n_q=q.shape[2],
        n_k=k.shape[2],
        q_offset=offset,
        causal=True,
    )
