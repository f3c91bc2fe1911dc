"""The layers of a DecoderModel as the arguments of `scrimp.ops.decoder_layers`: one call instead of nine a layer."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..._registry import OPS, has_kernel
from ...ops.decoder_layers import ACTIVATIONS
from .linear import Packable, Packed

_decoder_layers = OPS["decoder_layers"].call
_meter = attrgetter("meter")


class PackedLayers:
    """Layers as the lists that the op takes.

    Args:
        layers: DecoderLayers.
        packed: their linears, four a layer.
        heads: of the queries.
        activation: one of the op's.
        scale: of the attention scores.
    """

    def __init__(
        self, layers: Sequence[Any], packed: Sequence[Packed], heads: int, activation: str, scale: float
    ) -> None:
        norms = [norm for layer in layers for norm in _norms(layer)]
        parts = [part for linear in packed for part in linear.parts]
        sparse = any(linear.selection[0] is not None for linear in packed)
        self._model = (
            [norm and norm.weight for norm in norms],
            [norm.eps if norm else 0.0 for norm in norms],
            [tensor for tensors, _ in parts for tensor in tensors],
            [number for _, numbers in parts for number in numbers],
            [tensor for linear in packed for tensor in linear.selection] if sparse else [],
        )
        self._last = ([layer.window for layer in layers], heads, ACTIVATIONS.index(activation), scale)
        self._metered = [layer for linear in packed for layer in linear.metered]

    @property
    def is_metered(self) -> bool:
        """Whether a meter wants to be told of each call of a linear: then they must be made one by one."""
        return any(map(_meter, self._metered))

    def __call__(self, x: Tensor, *rows: Any) -> Tensor:
        """x `[B, T, d]` and the op's arguments from `cos` to `v_caches`."""
        return _decoder_layers(x, *self._model, *rows, *self._last)


def pack(layers: Sequence[Any], device: torch.device, heads: int, activation: str, scale: float) -> PackedLayers | None:
    """DecoderLayers for one call; None where it does not compute them, or not sooner than their ops one by one."""
    if not has_kernel("decoder_layers", device):
        return None
    linears = [linear for layer in layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    found = [linear.pack() if isinstance(linear, Packable) else None for linear in linears]
    packed = [linear for linear in found if linear is not None]
    return PackedLayers(layers, packed, heads, activation, scale) if len(packed) == len(found) else None


def _norms(layer: Any) -> list[Any]:
    return [layer.attention_norm, layer.q_norm, layer.k_norm, layer.mlp_norm]
