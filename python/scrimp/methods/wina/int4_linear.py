"""Int4SparseLinear: a 4-bit linear layer that multiplies, for each new token, the input channels which matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..._registry import OPS
from ...int4_weight import Int4Channels, Int4Weight
from ...ops.channel_select import Selected
from ...ops.int4_linear import MODES
from ..generation.linear import Linear, Packed, Part, SideBySide
from ..int4.blocks import replace_module
from ..int4.linear import Int4Linear, int4_layers
from .calibration import Group
from .certificate import certificate
from .linear import Selection, is_prompt
from .usage import Meter

_int4_sparse_linear = OPS["int4_sparse_linear"].run
PARTS = ("codes", "scales", "zeros", "codebook", "permutation")


class Int4SparseLinear(nn.Module):
    """y = x W^T + bias with a 4-bit W, where a token that is read alone takes the channels of its `Selection`.

    Prompts (more than one token of a sequence at once) take all channels, from the same memory. The state dict is that
    of the `Int4Linear` whose place it takes.

    Args:
        weight: the weight; it is turned, which copies it.
        bias: `[N]`, or None.
        selection: which channels a token takes.
        mode: "exact" or "int8", as `scrimp.ops.int4_linear` explains.
        dtype: of the activations.

    >>> weight = Int4Weight.from_codes(torch.full((1, 16), 9), torch.ones(1, 1))
    >>> layer, x = Int4SparseLinear(weight, None, Selection(torch.tensor([1.0]))), torch.tensor([[1.0, 2.0] * 8])
    >>> layer(x).item(), layer(torch.stack([x, x], 1)).flatten().tolist()
    (16.0, [24.0, 24.0])
    """

    offset: Tensor | None

    def __init__(
        self,
        weight: Int4Weight,
        bias: Tensor | None,
        selection: Selection,
        mode: str = "exact",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.group_size, self.zero_kind = weight.group_size, weight.zero_kind
        self.selection, self.mode = selection, mode
        self.meter: Meter | None = None
        self._channels: Int4Channels | None = Int4Channels.of(weight)
        for name, tensor in self._channels.tensors().items():
            self.register_buffer(name, tensor, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        offset = None if bias is None else bias.detach()
        if selection.center is not None:  # W (x - center) + (W center + bias)
            of_center = (weight.dequantize() @ selection.center).to(dtype)
            offset = of_center if offset is None else of_center + offset
        self.register_buffer("offset", offset, persistent=False)

    @property
    def channels(self) -> Int4Channels:
        """The weight, on the device of the buffers."""
        if self._channels is None:
            parts: dict[str, Any] = {name: self._buffers[name] for name in PARTS}
            sizes: dict[str, Any] = {"group_size": self.group_size, "zero_kind": self.zero_kind}
            self._channels = Int4Channels(**parts, **sizes, in_features=self.in_features)
        return self._channels

    def forward(self, x: Tensor) -> Tensor:
        if is_prompt(x):
            return product(everything(x), self, self.bias)
        selected = self.selection(x)
        self.note(selected)
        return product(selected, self, self.offset)

    def note(self, selected: Selected) -> None:
        """Tells the meter, if there is one, what was read for these rows."""
        if self.meter is not None:
            certified = self.meter.constant is not None
            self.meter.add(selected, product(selected, self, self.offset) if certified else None)

    @property
    def channel_bytes(self) -> float:
        """Of the codes of an input channel."""
        return self.get_buffer("codes").nbytes / max(self.in_features, 1)

    def certificate(self) -> float:
        """What bounds this layer's error by the dropped energy of its input; the rounding of int8 mode is left out."""
        return certificate(self.channels.weight().dequantize(), self.selection.scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int4SparseLinear:
        before = {name: self._buffers[name] for name in PARTS}
        super()._apply(fn, recurse)
        device = self.get_buffer("codes").device
        for name, old in before.items():  # from the old values: a detour through another type would round them
            self._buffers[name] = None if old is None else old.to(device)
        self.selection.move(device, torch.float32)
        self._channels = None
        return self

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(self.channels.weight().state_dict(prefix))

    @staticmethod
    def engine_linear(modules: Sequence[Int4SparseLinear]) -> Linear:
        """The layers, which share their input, for the decoding loop."""
        alike = all(module.selection is modules[0].selection for module in modules)
        return EngineInt4Sparse(modules) if alike else SideBySide([EngineInt4Sparse([module]) for module in modules])

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, group_size={self.group_size}, {self.zero_kind}, mode={self.mode}"


def everything(x: Tensor) -> Selected:
    """All channels of rows `[.., K]`, as `channel_select` would say it; the energies are left out."""
    index = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
    count = torch.tensor([x.shape[-1]], dtype=torch.int32, device=x.device)
    return x, index, count, x


def product(selected: Selected, layer: Int4SparseLinear, bias: Tensor | None) -> Tensor:
    """Selected rows `[.., K]` times the layer's weight."""
    kept, index, count, _ = selected
    channels = layer.channels
    parts = (*channels.tensors().values(), index, count, bias)
    out: Tensor = _int4_sparse_linear(kept, *parts, *channels.numbers(), MODES.index(layer.mode))
    return out


class EngineInt4Sparse:
    """Layers of one input and one selection, as the decoding loop calls them (`scrimp.methods.generation.Linear`).

    Attributes:
        dense: the same layers with all channels, for prompts.
    """

    def __init__(self, layers: Sequence[Int4SparseLinear]) -> None:
        self.sizes = tuple(layer.out_features for layer in layers)
        self.layers, self.selection = list(layers), layers[0].selection
        self.dense = EngineInt4Whole(layers)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        selected = self.selection(x)
        for layer in self.layers:
            layer.note(selected)
        return side_by_side([product(selected, layer, layer.offset) for layer in self.layers], residual)

    def pack(self) -> Packed | None:
        """As `scrimp.methods.generation.linear.Packable` says."""
        return self.selection.pack([_part(layer, layer.offset) for layer in self.layers], self.layers)


class EngineInt4Whole:
    """The layers of an EngineInt4Sparse without any selection, on the same memory."""

    def __init__(self, layers: Sequence[Int4SparseLinear]) -> None:
        self.sizes, self.layers = tuple(layer.out_features for layer in layers), list(layers)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        whole = everything(x)
        return side_by_side([product(whole, layer, layer.bias) for layer in self.layers], residual)

    def pack(self) -> Packed | None:
        """As `scrimp.methods.generation.linear.Packable` says."""
        whole = self.layers[0].selection.everything()
        return whole.pack([_part(layer, layer.bias) for layer in self.layers])


def _part(layer: Int4SparseLinear, bias: Tensor | None) -> Part:
    channels = layer.channels
    codes, *rest = channels.tensors().values()
    return (codes, bias, *rest), (*channels.numbers(), MODES.index(layer.mode))


def side_by_side(parts: Sequence[Tensor], residual: Tensor | None) -> Tensor:
    """Results `[.., N_i]` as one, with the residual."""
    out = parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)
    return out if residual is None else out + residual


def is_int4(model: nn.Module, names: Sequence[str], method: str) -> bool:
    """Whether the layers of one input are 4-bit ones.

    Raises:
        ValueError: some are and some are not, or `method` needs dense ones.
    """
    kinds = [isinstance(model.get_submodule(name), Int4Linear) for name in names]
    if not any(kinds):
        return False
    if not all(kinds):
        raise ValueError(f"sparsify: of {', '.join(names)}, which share an input, some are 4-bit and some dense")
    if method == "cats" or method.endswith("-rotated"):
        raise ValueError(f"sparsify: method={method!r} needs dense layers; {names[0]} is 4-bit")
    return True


@torch.no_grad()
def swap_int4(model: nn.Module, group: Group, method: str, sparsity: float, limit: float | None) -> None:
    """Puts sparse 4-bit layers in the place of those of a group, one after the other."""
    device, dtype = model.get_submodule(group.names[0]).get_buffer("qweight").device, next(model.parameters()).dtype
    selection = Selection(
        level=torch.tensor([group.level(method, sparsity)], device=device),
        scale=None if method == "teal" else group.norms.to(device),
        center=group.centers.to(device) if method == "wina-centred" else None,
        limit=limit,
    )
    for name in group.names:
        layer: Any = model.get_submodule(name)
        replace_module(model, name, Int4SparseLinear(layer.weight, layer.bias, selection, layer.mode, dtype))


@contextmanager
def dequantized(model: nn.Module) -> Iterator[bool]:
    """The 4-bit layers of a model are dense ones inside the block; yields whether there are any."""
    layers, dtype = dict(int4_layers(model)), next(model.parameters()).dtype
    try:
        for name, layer in layers.items():
            dense: Any = nn.Linear(1, 1, device="meta")
            dense.in_features, dense.out_features = layer.in_features, layer.out_features
            dense.weight = nn.Parameter(layer.weight.dequantize(dtype), requires_grad=False)
            dense.bias = layer.bias
            replace_module(model, name, dense)
        yield bool(layers)
    finally:
        for name, layer in layers.items():
            replace_module(model, name, layer)
