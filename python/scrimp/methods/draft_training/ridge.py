"""The start of training: ridge regressions between states, from sums that are gathered text by text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tree_decoding.maps import units

RIDGE = 1e-2  # of each input's variance


class Moments:
    """Sums over rows x of some layers, and over the rows y that stand 1 .. k positions after them, in float64.

    States are taken in units of their root mean squares. Two regressions come of one set of sums: to the same layer's
    states (the rest of the layers follows) and to those after the last layer (only the head follows).

    Args:
        layers: where x is taken.
        depth: layers of the model.
        width: numbers of a state.
        count: positions ahead, k.
    """

    def __init__(self, layers: Sequence[int], depth: int, width: int, count: int) -> None:
        self.rows = 0
        self._depth, self._count = depth, count
        sizes = (width + 1, width + 1 + count * width)  # x and one, against themselves and y of each position
        self._sums = {pair: torch.zeros(sizes, dtype=torch.float64) for pair in self._pairs(layers)}

    def _pairs(self, layers: Sequence[int]) -> list[tuple[int, int]]:
        return sorted({(layer, target) for layer in layers for target in (layer, self._depth)})

    def add(self, states: Sequence[Tensor]) -> None:
        """Takes in a text: states `[n, d]` before the first layer and after each."""
        rows = states[0].shape[0] - self._count
        if rows < 1:
            return
        self.rows += rows
        for (layer, target), total in self._sums.items():
            x = torch.nn.functional.pad(units(states[layer])[0][:rows], (0, 1), value=1.0)
            y = units(states[target])[0]
            after = [y[i : i + rows] for i in range(1, self._count + 1)]
            total += (x.T @ torch.cat([x, *after], 1)).double().to(total.device)

    def solve(self, layer: int, target: int, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
        """Maps that minimise |y - W x - b|^2 + ridge sum_j var(x_j) |W_j|^2: weight `[k, d, d]`, bias `[k, d]`, fp32.

        Args:
            target: whose states y are: those of `layer`, or of the last layer.

        Raises:
            ValueError: no rows have been added.
        """
        if not self.rows:
            raise ValueError(f"the texts are too short to look {self._count} tokens ahead")
        mean = self._sums[layer, target] / self.rows
        inputs = mean.shape[0] - 1
        at, mean_x, mean_y = mean[:-1], mean[-1, :inputs], mean[-1, inputs + 1 :]
        covariance = at[:, :inputs] - mean_x[:, None] * mean_x
        across = at[:, inputs + 1 :] - mean_x[:, None] * mean_y
        variance = covariance.diagonal()
        held = ridge * variance + 1e-6 * variance.mean() + 1e-12
        weight = torch.linalg.solve(covariance + held.diag(), across)  # [d, k d]
        bias = mean_y - mean_x @ weight
        return weight.T.float().unflatten(0, (self._count, inputs)), bias.float().unflatten(0, (self._count, inputs))
