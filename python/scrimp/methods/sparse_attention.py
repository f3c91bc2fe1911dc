"""Sparse prefill (after MInference 1.0, 2407.02490): estimate which keys matter, then attend to those only."""

from collections.abc import Callable, Sequence

from torch import Tensor

from .. import ops
from ..sparse_plan import SparsePlan
from .head_patterns import HeadPatterns


def sparse_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    patterns: HeadPatterns,
    layer: int,
    scale: float | None = None,
    starts: Sequence[int] | None = None,
    observers: Sequence[Callable[[int, SparsePlan], None]] = (),
) -> Tensor:
    """Causal attention of one layer's prompt over the keys that its heads' budgets choose.

    Args:
        q: `[B, H, n_q, D]`, the last n_q positions of the sequence.
        k: `[B, G, n_k, D]`, dtype of `q`.
        v: like `k`.
        patterns: budgets of every head.
        layer: which layer's budgets.
        scale: factor of the scores; 1 / sqrt(D) unless given.
        starts: first real key of each sequence of a left-padded batch.
        observers: called with (layer, plan) before attention runs.

    Returns:
        `[B, H, n_q, D]` in the dtype of `q`; rows of padding are 0.

    >>> import torch, scrimp
    >>> from scrimp.methods.sparse_attention import sparse_prefill
    >>> q, k = torch.randn(1, 4, 300, 64), torch.randn(1, 2, 300, 64)
    >>> patterns = scrimp.HeadPatterns(torch.full((1, 4), 64).int(), torch.full((1, 4), 32).int())
    >>> tuple(sparse_prefill(q, k, k, patterns, layer=0).shape)
    (1, 4, 300, 64)
    """
    if starts is None or not any(starts):
        plan = patterns.plan(layer, q, k, scale)
        for observe in observers:
            observe(layer, plan)
        return ops.sparse_attention(q, k, v, plan, scale)[0]
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
    for b, start in enumerate(starts):
        first = max(0, start - (k.shape[2] - q.shape[2]))  # first real query
        one = slice(b, b + 1)
        part = sparse_prefill(
            q[one, :, first:], k[one, :, start:], v[one, :, start:], patterns, layer, scale, None, observers
        )
        out[one, :, first:] = part
    return out
