"""What sparse layers really skipped while a model ran."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...ops.channel_select import Selected
from .certificate import bounds


class Meter:
    """Sums over the rows that one layer read sparsely.

    Args:
        constant: the layer's certificate; None where no bounds are wanted.
    """

    def __init__(self, constant: float | None = None) -> None:
        self.constant = constant
        self.passes, self.rows, self.kept, self.listed, self.whole = 0, 0, 0, 0, 0
        self.dropped, self.energy = 0.0, 0.0
        self.bound, self.output, self.worst = 0.0, 0.0, 0.0

    def add(self, selected: Selected, output: Tensor | None = None) -> None:
        """Takes in one call of `channel_select`, with the layer's outputs where bounds are wanted."""
        kept, _, count, energy = selected
        self.passes += 1
        self.rows += energy[..., 0].numel()
        self.kept += int(kept.count_nonzero())
        self.listed += int(count)
        self.whole += int((energy[..., 0] == 0).sum())
        self.dropped += float(energy[..., 0].double().sum())
        self.energy += float(energy[..., 1].double().sum())
        if self.constant is not None and output is not None:
            bound = bounds(self.constant, energy[..., 0], kept.shape[-1])
            self.bound += float(bound.square().sum())
            self.worst = max(self.worst, float(bound.max()))
            self.output += float(output.double().square().sum())

    def relative_bound(self) -> float:
        """Of |Y - Y'| / |Y| over all rows, from |Y| >= |Y'| - |Y - Y'|."""
        bound, output = math.sqrt(self.bound), math.sqrt(self.output)
        return bound / (output - bound) if output > bound else math.inf


@dataclass(frozen=True)
class LayerUsage:
    """One layer, over all tokens that it read sparsely; NaN where there were none.

    Attributes:
        name: of the layer.
        sparsity: mean share of the channels that a token dropped.
        read: mean share of the weight that a pass read: the union over its rows.
        bytes_saved: of the weight, over all passes.
        error: estimated relative error of the outputs, the root of the share of the energy that was dropped.
        whole: share of the tokens that dropped nothing but zeros: those above the limit of `sparsify(max_error=...)`.
        bound: certified: over all tokens |Y - Y'| / |Y| is at most this, apart from the rounding of products; NaN
            unless certificates were asked for, infinite where nothing can be said.
        worst: certified, of single tokens: |y - y'| is at most this.
    """

    name: str
    sparsity: float
    read: float
    bytes_saved: int
    error: float
    whole: float = math.nan
    bound: float = math.nan
    worst: float = math.nan


def _sizes(layer: Any) -> tuple[int, int, float]:
    """Outputs, channels, and bytes of a channel."""
    return layer.out_features, layer.in_features, layer.channel_bytes


@dataclass(frozen=True)
class Usage:
    """The layers of a model with their meters."""

    meters: dict[str, tuple[nn.Module, Meter]]

    def layers(self) -> list[LayerUsage]:
        """What has been counted up to now."""
        found = []
        for name, (layer, meter) in self.meters.items():
            _, K, channel_bytes = _sizes(layer)
            skipped, known = meter.passes * K - meter.listed, meter.constant is not None
            found.append(
                LayerUsage(
                    name,
                    sparsity=1 - meter.kept / (meter.rows * K) if meter.rows else math.nan,
                    read=meter.listed / (meter.passes * K) if meter.passes else math.nan,
                    bytes_saved=round(skipped * channel_bytes),
                    error=math.sqrt(meter.dropped / meter.energy) if meter.energy else math.nan,
                    whole=meter.whole / meter.rows if meter.rows else math.nan,
                    bound=meter.relative_bound() if known and meter.rows else math.nan,
                    worst=meter.worst if known and meter.rows else math.nan,
                )
            )
        return found

    @property
    def dropped(self) -> float:
        """Share of the weights that tokens did not need, over all layers."""
        shapes = {name: _sizes(layer) for name, (layer, _) in self.meters.items()}
        sizes = {name: N * K for name, (N, K, _) in shapes.items()}
        return sum(layer.sparsity * sizes[layer.name] for layer in self.layers()) / sum(sizes.values())

    def __str__(self) -> str:
        lines = [f"{'layer':<36}  dropped    read   whole   MB saved   error  at most"]
        for layer in self.layers():
            shares = f"{layer.sparsity:8.1%} {layer.read:7.1%} {layer.whole:7.1%} {layer.bytes_saved / 1e6:10.1f}"
            lines.append(f"{layer.name:<36} {shares} {layer.error:7.4f} {layer.bound:8.4f}")
        return "\n".join(lines)


@contextmanager
def metered(model: nn.Module, certified: bool = False) -> Iterator[Usage]:
    """Counts what the sparse layers of a model skip inside the block, in stock generate and in the decoding loop.

    Args:
        model: of `sparsify`.
        certified: bound the error of every layer, too: an eigenvalue decomposition of each weight in float64 at the
            beginning, and a second product in each call.

    Example:
        with metered(model) as usage:
            scrimp.generate(model, "Once upon a time", tokenizer)
        print(usage)
    """
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "meter")}
    found = {name: (layer, Meter(layer.certificate() if certified else None)) for name, layer in layers.items()}
    for module, meter in found.values():
        module.meter = meter
    try:
        yield Usage(found)
    finally:
        for module, _ in found.values():
            module.meter = None
