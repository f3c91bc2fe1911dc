"""Int4Linear: a linear layer that holds its weight in 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..._registry import OPS
from ...int4_weight import Int4Weight
from ...int4_weight.check import ZERO_KINDS
from ...ops._int4 import MODES, check_mode
from ..generation.linear import Packed, Part

_int4_linear = OPS["int4_linear"].run
PARTS = ("qweight", "scales", "zeros", "codebook", "permutation")


class Int4Linear(nn.Module):
    """y = x W^T + bias with a 4-bit W; inference only.

    The state dict holds the canonical tensors of the weight and its `format`; `.half()`, `.bfloat16()` and the like
    move the bias alone, since another type of the scales would be another weight.

    Args:
        weight: the weight.
        bias: `[N]`, or None.
        mode: "exact" or "int8", as `scrimp.ops.int4_linear` explains.

    >>> layer = Int4Linear(Int4Weight.from_codes(torch.full((3, 32), 9), torch.ones(3, 1)))
    >>> layer, layer(torch.ones(2, 32))[0].tolist()
    (Int4Linear(in_features=32, out_features=3, bias=False, group_size=32, none8, mode=exact), [32.0, 32.0, 32.0])
    """

    def __init__(self, weight: Int4Weight, bias: Tensor | None = None, mode: str = "exact") -> None:
        super().__init__()
        check_mode("Int4Linear", mode)
        self.mode = mode
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)
        self.register_buffer("format", weight.state_dict()["format"])
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._take_sizes(weight)
        self._weight: Int4Weight | None = weight

    def _take_sizes(self, weight: Int4Weight) -> None:
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.group_size, self.zero_kind = weight.group_size, weight.zero_kind

    @property
    def weight(self) -> Int4Weight:
        """The weight, on the device of the buffers."""
        if self._weight is None:
            parts: dict[str, Any] = {name: self._buffers[name] for name in PARTS}
            sizes: dict[str, Any] = {"group_size": self.group_size, "zero_kind": self.zero_kind}
            self._weight = Int4Weight(**parts, **sizes, in_features=self.in_features)
        return self._weight

    def refresh(self, who: str = "Int4Linear") -> None:
        """Takes over buffers put in place from outside; ValueError, beginning with `who`, as `Int4Weight.validate`."""
        self._weight = None
        self.weight.validate(who)

    def forward(self, x: Tensor) -> Tensor:
        return _int4_linear(x, *_arguments(self))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int4Linear:
        before = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            moved = self.get_buffer(name)
            if moved.dtype != old.dtype:  # from the old values: a detour through another type would round them
                self._buffers[name] = old.to(moved.device)
        self._weight = None
        return self

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}format" in state:
            weight = Int4Weight.from_state_dict(state, prefix)
            device = self.get_buffer("qweight").device
            for name, tensor in weight.tensors().items():
                self._buffers[name] = None if tensor is None else torch.empty_like(tensor, device=device)
            self._take_sizes(weight)
        self._weight = None
        super()._load_from_state_dict(state, prefix, *args)

    @staticmethod
    def engine_linear(modules: Sequence[Int4Linear]) -> EngineInt4:
        """The layers, which share their input, for the decoding loop."""
        return EngineInt4(modules)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, group_size={self.group_size}, {self.zero_kind}, mode={self.mode}"


def _arguments(layer: Int4Linear) -> tuple[Any, ...]:
    """What the op takes after x."""
    weight = layer.weight
    numbers = (weight.group_size, ZERO_KINDS.index(weight.zero_kind), MODES.index(layer.mode))
    return (*weight.tensors().values(), layer.bias, *numbers)


class EngineInt4:
    """4-bit layers of one input as the decoding loop calls them (`scrimp.methods.generation.Linear`)."""

    def __init__(self, layers: Sequence[Int4Linear]) -> None:
        self.sizes = tuple(layer.out_features for layer in layers)
        self._arguments = [_arguments(layer) for layer in layers]

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        parts = [_int4_linear(x, *rest) for rest in self._arguments]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return out if residual is None else out + residual

    def pack(self) -> Packed:
        """As `scrimp.methods.generation.linear.Packable` says."""
        parts: list[Part] = []
        for qweight, scales, zeros, codebook, permutation, bias, *format in self._arguments:
            parts.append(((qweight, bias, scales, zeros, codebook, permutation), tuple(format)))
        return Packed(parts)


def int4_layers(model: nn.Module) -> Iterator[tuple[str, Int4Linear]]:
    """Every 4-bit layer of a model, by name."""
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            yield name, module
