"""torch's scaled_dot_product_attention: dense, causal."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from scrimp import SparsePlan

from ..registry import Call, Peer

DISTRIBUTION = "torch"


def available() -> str | None:
    """Always there."""
    return None


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan) -> Peer:
    """Dense attention of the same causality, whatever the plan leaves out."""
    if plan.causal and plan.q_offset != 0:
        raise ValueError(f"sdpa has no causal mask with q_offset={plan.q_offset}")
    return Peer(attention(q, k, v, plan.causal), same=bool(plan.density() == 1.0))


def vertical_slash_index(q: Tensor, k: Tensor, v: Tensor) -> Peer:
    """The dense attention that the estimate is to save."""
    return Peer(attention(q, k, v, causal=True), same=False)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
    """Dense attention of `[B, H, n, D]` over `[B, G, n, D]`."""
    grouped = q.shape[1] != k.shape[1]
    return lambda: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


def tree_attention(q: Tensor, turns: Iterator[tuple[Tensor, Tensor]], prefix: int, words: Tensor) -> Peer:
    """A bool mask over the prefix and the tree; none for one row."""
    T, grouped = q.shape[2], q.shape[1] != next(turns)[0].shape[1]
    seen = (words.unsqueeze(2) >> torch.arange(T)) & 1
    mask = torch.cat((torch.ones(1, T, prefix, dtype=torch.bool), seen.bool()), 2) if T > 1 else None

    def call() -> Tensor:
        k, v = next(turns)
        return scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped)

    return Peer(call)
