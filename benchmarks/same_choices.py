"""Two loops with sparse layers, held to each other by the choices of one.

Loops round differently. Where a score lies at the cut, one keeps the channel and the other drops it, and from there on
their logits differ by what the channel is worth and not by rounding. So the other loop is made to take our choices:
then what is left of the difference is rounding again.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.methods.wina import Selection
from scrimp.methods.wina.linear import ALL
from scrimp.ops.channel_select import Selected

Chosen = tuple[Tensor, Tensor]  # index int32 `[K]`, count int32 `[1]`, as channel_select gives them


@dataclass
class Recorder:
    """Stands in a layer's meter and keeps its choices, call by call."""

    constant = None
    calls: list[Chosen] = field(default_factory=list)

    def add(self, selected: Selected, output: Tensor | None = None) -> None:
        self.calls.append(selected[1:3])


@dataclass
class Replay:
    """Stands in a layer's selection and makes the recorded choices in turn, for one row a call."""

    selection: Selection
    calls: Iterator[Chosen]

    def __call__(self, x: Tensor) -> Selected:
        index, count = next(self.calls)
        dropped = torch.ones_like(x, dtype=torch.bool)
        dropped[..., index[: int(count)]] = False
        all_of_them = replace(self.selection, level=torch.full_like(self.selection.level, ALL), limit=None)
        kept, _, _, energy = all_of_them(x)
        return kept.masked_fill(dropped, 0), index, count, energy

    def turned(self, x: Tensor) -> Tensor:
        """Rows `[.., K]` in the layers' basis."""
        return self.selection.turned(x)


def layers(model: nn.Module) -> dict[str, Any]:
    """The sparse layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "meter")}


@contextmanager
def recorded_choices(model: nn.Module) -> Iterator[dict[str, Recorder]]:
    """Keeps what every sparse layer chooses inside the block; our loop calls the ops one by one there."""
    found = layers(model)
    recorders = {name: Recorder() for name in found}
    for name, layer in found.items():
        layer.meter = recorders[name]
    try:
        yield recorders
    finally:
        for layer in found.values():
            layer.meter = None


@contextmanager
def replayed_choices(model: nn.Module, recorders: Mapping[str, Recorder]) -> Iterator[None]:
    """Every sparse layer makes the recorded choices inside the block, from the first on."""
    found = layers(model)
    own = {name: layer.selection for name, layer in found.items()}
    for name, layer in found.items():
        layer.selection = Replay(own[name], iter(recorders[name].calls))
    try:
        yield
    finally:
        for name, layer in found.items():
            layer.selection = own[name]
