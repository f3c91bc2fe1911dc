"""The cross-entropy of a VQ head's logits, computed from the scores of its codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...ops._vq import check_head, check_values, token_scores

CHUNK = 4096  # tokens whose logits are in memory at a time, where tokens have several codes


def vq_cross_entropy(
    h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None = None, *, target: Tensor
) -> Tensor:
    """Cross-entropy of `scrimp.ops.vq_logits`, without a tensor of V logits a row in either direction.

    loss = log sum_k exp(h . codebook_k + log S_k) - h . codebook[codes[target]] - bias[target],
    S_k = sum of exp(bias_v) over the tokens v of code k

    Memory is O(rows x K). Tokens of several codes (`[G, V]`) have no S_k: their logits are computed in chunks of 4,096
    tokens, again in the backward, in O(rows x (K + 4096)) memory.

    Args:
        h: `[.., d]`, any float dtype; sums are taken in at least fp32.
        codebook: `[K, d]`, dtype of `h`.
        codes: int32 `[V]` or `[G, V]`, as in `vq_logits`.
        bias: `[V]`, dtype of `h`.
        target: int64 `[..]`, the token of each row.

    Returns:
        losses `[..]`, fp32 or wider, with gradients to h, codebook and bias.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, codes or targets out of range, with the value.

    >>> import torch
    >>> from scrimp.methods.heads import vq_cross_entropy
    >>> h, codebook = torch.tensor([[1.0, 2.0]]), torch.eye(2)
    >>> codes, target = torch.tensor([0, 1, 1], dtype=torch.int32), torch.tensor([2])
    >>> round(vq_cross_entropy(h, codebook, codes, target=target).item(), 4)  # of the logits 1, 2, 2
    0.862
    """
    op = "vq_cross_entropy"
    check_head(op, h, codebook, codes, bias)
    check_values(op, codebook, codes)
    check_target(op, h, codes, target)
    scores = h @ codebook.T
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    own = scores.gather(-1, torch.atleast_2d(codes)[:, target].movedim(0, -1).long()).sum(-1)
    if bias is not None:
        bias = bias.to(scores.dtype)
        own = own + bias[target]
    if codes.dim() == 1 or codes.shape[0] == 1:
        weights = code_weights(codes.view(-1), bias, codebook.shape[0])
        total = (scores.masked_fill(weights == -torch.inf, 0) + weights).logsumexp(-1)
    else:
        total = _LogSumExp.apply(scores, codes, bias)
    return total - own


def check_target(op: str, h: Tensor, codes: Tensor, target: Tensor) -> None:
    """Raises ValueError unless target has a token for each row of h."""
    if target.dtype != torch.int64 or target.shape != h.shape[:-1]:
        kind = f"{str(target.dtype).removeprefix('torch.')} {list(target.shape)}"
        raise ValueError(f"{op}: target is {kind}, expected int64 {list(h.shape[:-1])} for h {list(h.shape)}")
    outside = target[(target < 0) | (target >= codes.shape[-1])]
    if len(outside):
        raise ValueError(f"{op}: target {int(outside[0])} is not one of the {codes.shape[-1]} tokens")


def code_weights(codes: Tensor, bias: Tensor | None, K: int) -> Tensor:
    """log S_k `[K]`, S_k the sum of exp(bias), 1 without, over the tokens of code k; -inf for an empty code."""
    index = codes.long()
    if bias is None:
        return torch.bincount(index, minlength=K).log()
    high = bias.new_full((K,), -torch.inf).scatter_reduce_(0, index, bias.detach(), "amax")
    return high + bias.new_zeros(K).index_add(0, index, (bias - high[index]).exp()).log()


class _LogSumExp(torch.autograd.Function):
    """log sum_v exp(logits_v) `[..]` of scores `[.., K]`, codes `[G, V]` and bias, CHUNK tokens at a time."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
        total = scores.new_full(scores.shape[:-1], -torch.inf)
        for first in range(0, codes.shape[1], CHUNK):
            total = torch.logaddexp(total, _chunk(scores, codes, bias, first).logsumexp(-1))
        ctx.save_for_backward(scores, codes, bias, total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:
        scores, codes, bias, total = ctx.saved_tensors
        of_scores = torch.zeros_like(scores)
        of_bias = None if bias is None else torch.zeros_like(bias)
        for first in range(0, codes.shape[1], CHUNK):
            share = (_chunk(scores, codes, bias, first) - total[..., None]).exp() * grad[..., None]
            for level in codes[:, first : first + CHUNK]:
                of_scores.index_add_(-1, level, share)
            if of_bias is not None:
                of_bias[first : first + CHUNK] = share.flatten(0, -2).sum(0)
        return of_scores, None, of_bias


def _chunk(scores: Tensor, codes: Tensor, bias: Tensor | None, first: int) -> Tensor:
    """Logits of tokens from `first` on."""
    some = slice(first, first + CHUNK)
    return token_scores(scores, codes[:, some], None if bias is None else bias[some])
