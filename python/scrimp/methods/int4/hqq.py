"""HQQ: half-quadratic quantization, which needs no data."""

import torch
from torch import Tensor

from ...int4_weight import Int4Weight
from ...int4_weight.pack import pack_nibbles
from .grid import LEVELS, grouped


def half_quadratic(
    weight: Tensor,
    group_size: int = 64,
    *,
    norm: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    steps: int = 20,
    dtype: torch.dtype = torch.float16,
) -> Int4Weight:
    """The weight with floating zeros that minimise sum |w - (q - z) s|^norm, a norm that forgives outliers.

    The scale stays that of min-max. Each step shrinks the error, e <- sign(e) max(0, |e| - |e|^(norm - 1) / beta),
    sets z to the mean of q - (w - e) / s over the group, and raises beta by kappa. Of every group the zero with the
    least mean |w - (q - z) s| is kept.

    Args:
        weight: `[N, K]` fp32, bf16 or fp16.
        group_size: 16, 32, 64, 128, or -1 for one scale a row; it divides K.
        norm: exponent of the error, above 0 and at most 1.
        beta: initial weight of the quadratic term.
        kappa: growth of beta each step.
        steps: steps to take.
        dtype: of scales and zeros.

    Raises:
        ValueError: a shape, group size or value that does not fit.

    Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023).

    >>> half_quadratic(torch.randn(8, 64), 32)
    Int4Weight(N=8, K=64, group_size=32, float, scales=float16)
    """
    if not 0 < norm <= 1 or beta <= 0 or kappa < 1 or steps < 0:
        raise ValueError(f"half_quadratic: norm={norm}, beta={beta}, kappa={kappa}, steps={steps} are out of range")
    groups = grouped("half_quadratic", weight, group_size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / LEVELS).to(dtype).float()
    flat = scale < 5e-5  # as HQQ: 1 / scale stays within half precision
    scale = torch.where(flat, torch.where(scale == 0, 1.0, 5e-5), scale)
    zero = torch.round(-low / scale)
    best, kept = torch.full_like(zero, torch.inf), zero
    for step in range(steps + 1):
        zero = zero.to(dtype).float()  # judged as it will be stored
        q = torch.round(groups / scale + zero).clamp(0, LEVELS)
        error = groups - (q - zero) * scale
        mean = error.abs().mean(-1, keepdim=True)
        kept, best = torch.where(mean < best, zero, kept), mean.minimum(best)
        size = error.abs()
        threshold = size.pow(norm - 1) / (beta * kappa**step)  # infinite at 0: the error stays 0
        shrunk = error.sign() * (size - threshold).clamp(min=0)
        zero = (q - (groups - shrunk) / scale).mean(-1, keepdim=True)
    codes = torch.round(groups / scale + kept).clamp(0, LEVELS)
    return Int4Weight(
        pack_nibbles(codes.flatten(1).to(torch.uint8)),
        scale.squeeze(-1).to(dtype),
        kept.squeeze(-1).to(dtype),
        group_size=groups.shape[2],
        zero_kind="float",
    ).validate()
