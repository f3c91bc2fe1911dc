"""What calibration remembers of a layer's inputs: enough to know the error of any change of its weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class InputStatistics:
    """Sums over the rows x of all inputs seen.

    Attributes:
        gram: X^T X, fp32 `[K, K]`.
        magnitude: sum of |x|, fp32 `[K]`.
        rows: number of rows.
    """

    gram: Tensor
    magnitude: Tensor
    rows: int = 0

    @classmethod
    def empty(cls, K: int, device: torch.device | str = "cpu") -> InputStatistics:
        """No row seen yet."""
        return cls(torch.zeros(K, K, device=device), torch.zeros(K, device=device))

    def add(self, x: Tensor) -> None:
        """Takes in rows `[..., K]`."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        self.gram.addmm_(x.T, x)
        self.magnitude += x.abs().sum(0)
        self.rows += x.shape[0]

    def divided(self, s: Tensor) -> InputStatistics:
        """Those of the inputs x / s, s `[K]`."""
        return InputStatistics(self.gram / s / s[:, None], self.magnitude / s.abs(), self.rows)

    def energy(self, matrix: Tensor) -> Tensor:
        """Sum of squares of the outputs of `matrix` `[N, K]`: tr(M X^T X M^T), a scalar."""
        return ((matrix @ self.gram) * matrix).sum()
