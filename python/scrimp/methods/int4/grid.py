"""The scale and zero of each group: the range of its weights, or the shrunk range that rounds with least error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...int4_weight import Int4Weight
from ...int4_weight.check import GROUP_SIZES, check_finite
from ...int4_weight.pack import pack_nibbles

LEVELS = 15


@dataclass(frozen=True)
class Grid:
    """How scales are found. Zero is always on the grid.

    symmetric: w = (q - 8) s, where the weight of largest magnitude becomes -8 (so s may be negative);
    else: w = (q - z) s with an integer z of 0 to 15, over the range of the group and zero.

    Of `steps` ranges, from the whole one down to the fraction `smallest` of it, the one with the least
    sum |w - rounded w|^norm is taken (with the scale already rounded to `dtype`); steps=1 is plain min-max.
    OSP (2506.19697) uses steps=80, smallest=0.2, norm=2.4.

    Raises: ValueError for steps below 1, smallest outside (0, 1], norm not above 0 or a dtype that is not floating.
    """

    symmetric: bool = False
    steps: int = 40
    smallest: float = 0.5
    norm: float = 2.0
    dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.smallest <= 1 or self.norm <= 0:
            raise ValueError(
                f"Grid: steps={self.steps}, smallest={self.smallest}, norm={self.norm} must be at least 1, "
                "in (0, 1] and above 0"
            )
        if self.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"Grid: dtype={self.dtype} must be float16, bfloat16 or float32")

    def fit(self, groups: Tensor, limit: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale and zero, fp32 `[...]` each, of groups fp32 `[..., g]`.

        Args:
            groups: the weights.
            limit: `[...]`; weights beyond it are cut off before the range is taken.
        """
        high, low = groups.amax(-1).clamp(min=0), groups.amin(-1).clamp(max=0)
        if limit is not None:
            high, low = high.minimum(limit), low.maximum(-limit)
        best = torch.full_like(high, torch.inf)
        scale, zero = torch.ones_like(high), torch.full_like(high, 8)
        for step in range(self.steps):
            part = 1 - step * (1 - self.smallest) / self.steps
            s, z = self._range(part * low, part * high)
            error = (rounded(groups, s, z) - groups).abs()
            total = (error * error if self.norm == 2 else error**self.norm).sum(-1)
            better = total < best
            best = torch.where(better, total, best)
            scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
        if not bool(torch.isfinite(best).all()):
            widest = float(torch.maximum(high, -low).max())
            raise ValueError(f"Grid: weights up to {widest} need a scale that {self.dtype} cannot hold")
        return scale, zero

    def _range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.where(-low >= high, low, high) / -8 if self.symmetric else (high - low) / LEVELS
        scale = scale.to(self.dtype).float()
        scale = torch.where(scale == 0, 1.0, scale)  # nothing there, or nothing that the dtype can hold
        if self.symmetric:
            return scale, torch.full_like(scale, 8)
        return scale, torch.round(-low / scale).clamp(0, LEVELS)


def codes_of(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest codes, fp32 `[..., g]` of 0 to 15."""
    return torch.round(groups / scale.unsqueeze(-1) + zero.unsqueeze(-1)).clamp(0, LEVELS)


def rounded(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The weights that the nearest codes stand for."""
    return (codes_of(groups, scale, zero) - zero.unsqueeze(-1)) * scale.unsqueeze(-1)


def to_weight(codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid, permutation: Tensor | None = None) -> Int4Weight:
    """The validated weight of codes `[N, G, g]`, scales and integer zeros `[N, G]`."""
    return Int4Weight(
        pack_nibbles(codes.flatten(1).to(torch.uint8)),
        scale.to(grid.dtype),
        None if grid.symmetric else zero.to(torch.uint8),
        permutation=permutation,
        group_size=codes.shape[2],
        zero_kind="none8" if grid.symmetric else "uint8",
    ).validate()


def grouped(method: str, weight: Tensor, group_size: int) -> Tensor:
    """fp32 `[N, G, group_size]` of a weight `[N, K]`; -1 is the whole row.

    Raises: ValueError for a weight that is no finite matrix, or a group size that is not allowed or does not divide K.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"{method}: the weight must be floating [N, K], got {weight.dtype} {list(weight.shape)}")
    check_finite(method, "weight", weight)
    K = weight.shape[1]
    size = K if group_size == -1 else group_size
    if (size not in GROUP_SIZES and size != K) or size < 1 or K % size or K % 2:
        raise ValueError(
            f"{method}: group_size={group_size} must be 16, 32, 64, 128 or -1 and divide K={K}, which must be even"
        )
    return weight.float().view(weight.shape[0], K // size, size)


def largest_group_size(K: int, wanted: int) -> int:
    """The largest allowed group size up to `wanted` that divides K; -1 (the row) where none does.

    >>> largest_group_size(576, 128), largest_group_size(4096, 128), largest_group_size(100, 64)
    (64, 128, -1)
    """
    return next((size for size in reversed(GROUP_SIZES) if size <= wanted and K % size == 0), -1)
