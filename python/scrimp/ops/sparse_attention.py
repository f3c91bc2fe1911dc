"""sparse_attention: softmax attention over the keys of a SparsePlan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._registry import register
from ._check import before_sm_90, check_attention, check_dtype, rows_of_16_bytes

if TYPE_CHECKING:
    from ..sparse_plan import SparsePlan

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor ranges, Tensor range_slice, Tensor columns, Tensor column_slice, "
    "Tensor? row_start, int q_block, int q_offset, bool causal, float scale) -> (Tensor, Tensor)"
)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    range_slice: Tensor,
    columns: Tensor,
    column_slice: Tensor,
    row_start: Tensor | None,
    q_block: int,
    q_offset: int,
    causal: bool,
    scale: float,
) -> None:
    op = "sparse_attention"
    plan = {"ranges": ranges, "range_slice": range_slice, "columns": columns, "column_slice": column_slice}
    tensors = plan if row_start is None else plan | {"row_start": row_start}
    check_attention(op, q, {"k": k, "v": v}, tensors, scale)
    B, H, n_q, _ = q.shape
    if q_block < 1:
        raise ValueError(f"{op}: q_block={q_block} must be at least 1")
    tiles = -(-n_q // q_block)
    for name, tensor in plan.items():
        check_dtype(op, name, tensor, (torch.int32,))
        expected = {"ranges": (None, 2), "columns": (None,)}.get(name, (tiles, 2))
        fits = tensor.dim() == 2 + len(expected) and all(
            want in (None, got) for want, got in zip(expected, tensor.shape[2:], strict=True)
        )
        if not fits or tensor.shape[0] not in (1, B) or tensor.shape[1] not in (1, H):
            wanted = ", ".join("any" if want is None else str(want) for want in expected)
            raise ValueError(
                f"{op}: {name} has shape {list(tensor.shape)}, expected [1 or {B}, 1 or {H}, {wanted}] for "
                f"{n_q} queries in tiles of {q_block}"
            )
    if row_start is not None:
        check_dtype(op, "row_start", row_start, (torch.int32,))
        if row_start.dim() != 2 or row_start.shape[0] not in (1, B) or row_start.shape[1] != n_q:
            raise ValueError(f"{op}: row_start has shape {list(row_start.shape)}, expected [1 or {B}, {n_q}]")


def _fake(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    _check(q, *args)  # type: ignore[arg-type]
    B, H, n_q, D = q.shape
    return q.new_empty(B, n_q, H, D).transpose(1, 2), q.new_empty(B, H, n_q, dtype=torch.float32)


def plan_mask(ranges: Tensor, range_slice: Tensor, columns: Tensor, column_slice: Tensor, n_k: int) -> Tensor:
    """Keys that each tile sees, before causality: bool `[B, H, T, n_k]`."""
    lead = torch.broadcast_shapes(ranges.shape[:2], columns.shape[:2], range_slice.shape[:2], column_slice.shape[:2])
    edges = torch.zeros(*lead, range_slice.shape[2], n_k + 1, dtype=torch.int32, device=ranges.device)

    def add(values: Tensor, slices: Tensor, amount: int) -> None:
        """Adds `amount` at the positions that each tile's slice of `values` names."""
        values, slices = values.expand(*lead, -1), slices.expand(*lead, -1, -1).long()
        count = int(slices[..., 1].max()) if slices.numel() else 0
        step = torch.arange(count, device=values.device)
        used = step < slices[..., 1:]
        where = (slices[..., :1] + step).masked_fill(~used, 0).flatten(2)
        at = values.gather(2, where).view(used.shape).long() if count else slices[..., :0]
        edges.scatter_add_(3, at.masked_fill(~used, n_k), (amount * used).int())

    add(ranges[..., 0], range_slice, 1)
    add(ranges[..., 1], range_slice, -1)
    inside = edges.cumsum(3)[..., :n_k] > 0
    edges.zero_()
    add(columns, column_slice, 1)
    return inside | (edges[..., :n_k] > 0)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    range_slice: Tensor,
    columns: Tensor,
    column_slice: Tensor,
    row_start: Tensor | None,
    q_block: int,
    q_offset: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, ranges, range_slice, columns, column_slice, row_start, q_block, q_offset, causal, scale)
    (_, H, n_q, _), (G, n_k) = q.shape, k.shape[1:3]
    seen = plan_mask(ranges, range_slice, columns, column_slice, n_k)
    seen = seen.repeat_interleave(q_block, 2)[:, :, :n_q]
    query, key = torch.arange(n_q, device=q.device), torch.arange(n_k, device=q.device)
    if causal:
        seen = seen & (key <= query[:, None] + q_offset)
    if row_start is not None:
        seen = seen & (key >= row_start[:, None, :, None])
    repeats = H // G if G else 1
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = (scale * (q @ k.transpose(2, 3))).masked_fill(~seen, -torch.inf)
    precise = scores.to(torch.promote_types(q.dtype, torch.float32))
    lse = precise.logsumexp(3)
    weights = torch.exp(precise - lse.unsqueeze(3)).masked_fill(~seen, 0)
    out = weights.to(q.dtype) @ v
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def _cuda_takes(q: Tensor, k: Tensor, v: Tensor, *plan: object) -> bool:
    """Heads of 64 or 128 numbers in 16 bits, rows at multiples of 16 bytes, before sm_90; and what is to be refused."""
    if any(x.dim() != 4 for x in (q, k, v)):
        return True
    served = q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] in (64, 128)
    return served and before_sm_90(q) and rows_of_16_bytes(q, k, v)


_call = register("sparse_attention", SCHEMA, fake=_fake, reference=reference, cuda_takes=_cuda_takes)


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over the keys that `plan` shows it.

    out_i = sum_j softmax_j(scale q_i . k_j) v_j over j seen by i;  lse_i = log sum_j exp(scale q_i . k_j)

    Args:
        q: `[B, H, n_q, D]` fp32 or bf16, D at most 256; any strides.
        k: `[B, G, n_k, D]`, dtype of `q`; H is a multiple of G and query head h reads head h // (H / G).
        v: like `k`.
        plan: the keys each tile of queries sees, for `n_q` queries and `n_k` keys.
        scale: factor of the scores; 1 / sqrt(D) unless given.

    Returns:
        out `[B, H, n_q, D]` in the dtype of `q` (memory order B, n_q, H, D), lse `[B, H, n_q]` fp32, natural log.
        Queries that see no key give 0 and -inf.

    Raises:
        ValueError: a rank, shape, device, dtype or scale that does not fit, or a plan for another shape.
        RuntimeError: indices or row starts of a hand-made plan that leave its buffers or the keys.

    Source: MInference 1.0 (2407.02490), section 3; FlashAttention-2 (2307.08691), section 3.1.

    >>> import torch, scrimp
    >>> q, k = torch.randn(1, 4, 100, 64), torch.randn(1, 2, 100, 64)
    >>> plan = scrimp.SparsePlan.a_shape(100, sink=4, window=64)
    >>> out, lse = scrimp.ops.sparse_attention(q, k, k, plan)
    >>> tuple(out.shape), tuple(lse.shape)
    ((1, 4, 100, 64), (1, 4, 100))
    """
    if q.dim() == 4 and k.dim() == 4 and (plan.n_q, plan.n_k) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"sparse_attention: the plan is for {plan.n_q} queries and {plan.n_k} keys, "
            f"but q has {q.shape[2]} and k {k.shape[2]}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    args = (
        *(q, k, v, plan.ranges, plan.range_slice, plan.columns, plan.column_slice, plan.row_start),
        *(plan.q_block, plan.q_offset, plan.causal, scale),
    )
    _check(*args)
    return _call(*args)
