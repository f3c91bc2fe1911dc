"""What sparse layers really skipped while a model ran."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from ...ops.channel_select import Selected


class Meter:
    """Sums over the rows that one layer read sparsely."""

    def __init__(self) -> None:
        self.passes, self.rows, self.kept, self.listed = 0, 0, 0, 0
        self.dropped, self.energy = 0.0, 0.0

    def add(self, selected: Selected) -> None:
        """Takes in one call of `channel_select`."""
        kept, _, count, energy = selected
        self.passes += 1
        self.rows += energy[..., 0].numel()
        self.kept += int(kept.count_nonzero())
        self.listed += int(count)
        self.dropped += float(energy[..., 0].double().sum())
        self.energy += float(energy[..., 1].double().sum())


@dataclass(frozen=True)
class LayerUsage:
    """One layer, over all tokens that it read sparsely; NaN where there were none.

    Attributes:
        name: of the layer.
        sparsity: mean share of the channels that a token dropped.
        read: mean share of the weight that a pass read: the union over its rows.
        bytes_saved: of the weight, over all passes.
        error: estimated relative error of the outputs, the root of the share of the energy that was dropped.
    """

    name: str
    sparsity: float
    read: float
    bytes_saved: int
    error: float


@dataclass(frozen=True)
class Usage:
    """The layers of a model with their meters."""

    meters: dict[str, tuple[nn.Module, Meter]]

    def layers(self) -> list[LayerUsage]:
        """What has been counted up to now."""
        found = []
        for name, (layer, meter) in self.meters.items():
            weight = layer.get_parameter("weight")
            N, K = weight.shape
            skipped = meter.passes * K - meter.listed
            found.append(
                LayerUsage(
                    name,
                    sparsity=1 - meter.kept / (meter.rows * K) if meter.rows else math.nan,
                    read=meter.listed / (meter.passes * K) if meter.passes else math.nan,
                    bytes_saved=skipped * N * weight.element_size(),
                    error=math.sqrt(meter.dropped / meter.energy) if meter.energy else math.nan,
                )
            )
        return found

    @property
    def dropped(self) -> float:
        """Share of the weights that tokens did not need, over all layers."""
        sizes = {name: layer.get_parameter("weight").numel() for name, (layer, _) in self.meters.items()}
        return sum(layer.sparsity * sizes[layer.name] for layer in self.layers()) / sum(sizes.values())

    def __str__(self) -> str:
        lines = ["layer                                 dropped    read   MB saved   error"]
        for layer in self.layers():
            shares = f"{layer.sparsity:8.1%} {layer.read:7.1%} {layer.bytes_saved / 1e6:10.1f} {layer.error:7.4f}"
            lines.append(f"{layer.name:<36} {shares}")
        return "\n".join(lines)


@contextmanager
def metered(model: nn.Module) -> Iterator[Usage]:
    """Counts what the sparse layers of a model skip inside the block, in stock generate and in the decoding loop.

    Example:
        with metered(model) as usage:
            scrimp.generate(model, "Once upon a time", tokenizer)
        print(usage)
    """
    found = {name: (module, Meter()) for name, module in model.named_modules() if hasattr(module, "meter")}
    for module, meter in found.values():
        module.meter = meter
    try:
        yield Usage(found)
    finally:
        for module, _ in found.values():
            module.meter = None
