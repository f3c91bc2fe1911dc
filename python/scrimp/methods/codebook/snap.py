"""The gradients of a replaced activation: straight through to the activation, and to the chosen codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class StraightThrough(torch.autograd.Function):
    """(x, chosen) -> chosen, whose gradient both get."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chosen: Tensor) -> Tensor:
        return chosen.view_as(chosen)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


class Chosen(torch.autograd.Function):
    """`out` of `codebook_topk`, which has been computed, as a function of the codebook.

    The backward adds a row's gradient to its codes, one rank of codes after the other: nothing is k times as large as
    the rows.
    """

    @staticmethod
    def forward(ctx: Any, codebook: Tensor, index: Tensor, out: Tensor, mean: bool) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape, ctx.dtype, ctx.mean = codebook.shape, codebook.dtype, mean
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (index,) = ctx.saved_tensors
        *groups, C, D = ctx.shape
        G = groups[0] if groups else 1
        k = index.shape[-1]
        places = index.reshape(-1, G, k).long()
        share = grad.reshape(-1, G, D).to(torch.promote_types(grad.dtype, torch.float32))
        if ctx.mean:
            share = share / (places >= 0).sum(-1, keepdim=True).clamp(min=1)
        first = C * torch.arange(G, device=index.device)[:, None]
        places = torch.where(
            places < 0, G * C, places + first
        )  # a place without a code adds to a row behind the others
        total = share.new_zeros(G * C + 1, D)
        for rank in range(k):
            total.index_add_(0, places[..., rank].reshape(-1), share.reshape(-1, D))
        return total[:-1].view(ctx.shape).to(ctx.dtype), None, None, None
