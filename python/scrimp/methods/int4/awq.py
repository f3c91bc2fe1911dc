"""AWQ: inputs that matter are made louder before rounding, and groups are clipped where that costs outputs least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .grid import Grid, grouped, rounded
from .statistics import InputStatistics

POINTS = 20


def find_input_scales(
    weights: Sequence[Tensor], inputs: InputStatistics, group_size: int = 64, grid: Grid | None = None
) -> Tensor:
    """The factors s `[K]` for which rounding W s and feeding it x / s loses least of the outputs W x.

    Tries s_r = a^r / b^(1 - r) for r = 0, 1/20, ..., 19/20, normalised by sqrt(max s min s), where a is the mean |x|
    of each input and b the mean over all rows of |w| / (largest |w| of the group); and s = 1.

    Args:
        weights: `[N_i, K]` each: the layers that share the inputs.
        inputs: what calibration saw.
        group_size: 16, 32, 64, 128, or -1.
        grid: symmetric or not; the range search is left out here.

    Source: Lin et al., AWQ (2306.00978), section 3.2; the exponents on weights as in AutoAWQ.
    """
    grid = replace(Grid() if grid is None else grid, steps=1)
    K = inputs.magnitude.shape[0]
    relative = torch.zeros(K, device=inputs.magnitude.device)
    for weight in weights:
        groups = grouped("awq", weight, group_size).abs()
        relative += (groups / (groups.amax(-1, keepdim=True) + 1e-6)).sum(0).flatten()
    b = relative / sum(weight.shape[0] for weight in weights)
    a = inputs.magnitude / max(1, inputs.rows)
    best, kept = torch.tensor(torch.inf), torch.ones(K, device=a.device)
    for point in range(-1, POINTS):
        s = torch.ones_like(a) if point < 0 else _scales(a, b, point / POINTS)
        lost = torch.tensor(0.0)
        for weight in weights:
            groups = grouped("awq", weight.float() * s, group_size)
            rough = rounded(groups, *grid.fit(groups)).view(weight.shape) / s
            lost = lost + inputs.energy(rough - weight.float()).cpu()
        if lost < best:
            best, kept = lost, s
    return kept


def _scales(a: Tensor, b: Tensor, ratio: float) -> Tensor:
    s = (a.pow(ratio) / (b.pow(1 - ratio) + 1e-4)).clamp(min=1e-4)
    return s / (s.max() * s.min()).sqrt()


def find_limits(weight: Tensor, inputs: InputStatistics, group_size: int = 64, grid: Grid | None = None) -> Tensor:
    """The magnitude `[N, G]` to clip each group at: of 1, 0.95, ... 0.55 times its largest, what loses least.

    The loss of a group is that of its own part of the outputs, d^T (X^T X)_gg d with d the change of its weights.

    Source: AutoAWQ's clip search.
    """
    grid = replace(Grid() if grid is None else grid, steps=1)
    groups = grouped("awq", weight, group_size)
    _, G, size = groups.shape
    gram = inputs.gram.view(G, size, G, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [G, size, size]
    largest = groups.abs().amax(-1)
    best, kept = torch.full_like(largest, torch.inf), largest
    for step in range(POINTS // 2):
        limit = largest * (1 - step / POINTS)
        change = (rounded(groups, *grid.fit(groups, limit)) - groups).transpose(0, 1)  # [G, N, size]
        lost = ((change @ gram) * change).sum(-1).T
        kept, best = torch.where(lost < best, limit, kept), lost.minimum(best)
    return kept
