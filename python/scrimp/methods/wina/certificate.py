"""How far a layer's outputs can be from the dense ones: a certified constant of its weight and of its scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor

UNIT = 2.0**-53  # float64
SMALLEST = 2.0**-126  # what a square may lose in fp32 where it underflows


@torch.no_grad()
def certificate(weight: Tensor, scale: Tensor | None = None) -> float:
    """kappa such that |W d|^2 <= kappa sum_i (d_i scale_i)^2 for every d.

    It is the largest eigenvalue of S^-1 W^T W S^-1, S = diag(scale), of a decomposition in float64, plus all that
    rounding can have taken away from it. (A power iteration comes from below: it would certify nothing.)

    Args:
        weight: `[N, K]`.
        scale: `[K]` at least 0, or None for 1.

    Returns:
        kappa; infinite where a scale is 0 and its column is not.

    >>> round(certificate(torch.tensor([[3.0, 0.0], [4.0, 2.0]]), torch.tensor([5.0, 2.0])), 9)  # 1 + cosine
    1.8
    """
    columns = weight.double()  # [N, K]
    if scale is not None:
        columns = (columns / scale.double()).masked_fill((scale == 0) & (columns == 0), 0)
    if not columns.numel():
        return 0.0
    if not bool(columns.isfinite().all()):
        return math.inf
    small, long = sorted(columns.shape)
    gram = columns.T @ columns if columns.shape[1] == small else columns @ columns.T
    trace = float(gram.trace())  # at least the norm of the matrix, and of its absolute values
    rounding = (long + 16 * small + 8) * 2 * UNIT * trace
    return float(torch.linalg.eigvalsh(gram)[-1]) + rounding


def bounds(kappa: float, dropped: Tensor, channels: int) -> Tensor:
    """Bounds on |y - y'| of rows, float64, apart from the rounding of the products themselves.

    Args:
        kappa: `certificate` of the layer.
        dropped: fp32, sums of squared scores over the dropped channels (`scrimp.ops.channel_select`).
        channels: K, over which fp32 sums went.
    """
    exact = dropped.double() * (1 + (channels + 8) * 2.0**-23) + channels * 2 * SMALLEST
    return (kappa * exact).sqrt()
