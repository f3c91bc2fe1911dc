"""The layers of a DecoderModel as the arguments of `scrimp.ops.decoder_layers`: one call instead of nine a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._registry import OPS, has_kernel
from ...ops.decoder_layers import ACTIVATIONS
from .linear import Packable

_decoder_layers = OPS["decoder_layers"].call


class PackedLayers:
    """Layers whose linears are all `Packable`, as the lists that the op takes."""

    def __init__(self, layers: Sequence[Any], heads: int, activation: str, scale: float) -> None:
        norms = [norm for layer in layers for norm in _norms(layer)]
        parts = [part for layer in layers for linear in _linears(layer) for part in linear.pack()]
        self._model = (
            [norm and norm.weight for norm in norms],
            [norm.eps if norm else 0.0 for norm in norms],
            [tensor for tensors, _ in parts for tensor in tensors],
            [number for _, numbers in parts for number in numbers],
        )
        self._last = ([layer.window for layer in layers], heads, ACTIVATIONS.index(activation), scale)

    def __call__(self, x: Tensor, *rows: Any) -> Tensor:
        """x `[B, T, d]` and the op's arguments from `cos` to `v_caches`."""
        return _decoder_layers(x, *self._model, *rows, *self._last)


def can_pack(layers: Sequence[Any], device: torch.device) -> bool:
    """Whether one call computes the DecoderLayers on a device, sooner than their ops one by one."""
    linears = [linear for layer in layers for linear in _linears(layer)]
    return has_kernel("decoder_layers", device) and all(isinstance(linear, Packable) for linear in linears)


def _norms(layer: Any) -> list[Any]:
    return [layer.attention_norm, layer.q_norm, layer.k_norm, layer.mlp_norm]


def _linears(layer: Any) -> list[Any]:
    return [layer.qkv, layer.o, layer.gate_up, layer.down]
