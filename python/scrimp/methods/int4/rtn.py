"""Round to nearest: every weight by itself."""

from torch import Tensor

from ...int4_weight import Int4Weight
from .grid import Grid, codes_of, grouped, to_weight


def round_to_nearest(
    weight: Tensor, group_size: int = 64, grid: Grid | None = None, limit: Tensor | None = None
) -> Int4Weight:
    """The weight rounded to the nearest of the 16 values of its group, whose range `grid` finds.

    Args:
        weight: `[N, K]` fp32, bf16 or fp16.
        group_size: 16, 32, 64, 128, or -1 for one scale a row; it divides K.
        grid: how scales are found; the default searches the range with the least squared error.
        limit: `[N, K / group_size]`; weights beyond it are cut off (AWQ's clip).

    Raises:
        ValueError: a shape, group size or value that does not fit.

    >>> import torch
    >>> round_to_nearest(torch.tensor([[0.0, 1.0, 7.0, -8.0] * 4]), 16).dequantize()[0, :4].tolist()
    [0.0, 1.0, 7.0, -8.0]
    """
    grid = Grid() if grid is None else grid
    groups = grouped("round_to_nearest", weight, group_size)
    scale, zero = grid.fit(groups, limit)
    return to_weight(codes_of(groups, scale, zero), scale, zero, grid)
