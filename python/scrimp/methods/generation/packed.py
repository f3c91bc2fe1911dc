"""The layers of a DecoderModel as the arguments of `scrimp.ops.decoder_layers`: one call instead of nine a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..._registry import OPS
from ...ops.decoder_layers import ACTIVATIONS
from .linear import Packable

_decoder_layers = OPS["decoder_layers"].call


@dataclass(frozen=True)
class PackedLayer:
    """A layer's part of the arguments of `scrimp.ops.decoder_layers`."""

    norms: tuple[Tensor | None, ...]
    eps: tuple[float, ...]
    linears: tuple[Tensor | None, ...]
    formats: tuple[int, ...]
    window: int


def pack(layer: Any) -> PackedLayer | None:
    """A DecoderLayer; None where a linear is of a kind that the op does not compute."""
    linears = [layer.qkv, layer.o, layer.gate_up, layer.down]
    if not all(isinstance(linear, Packable) for linear in linears):
        return None
    parts = [part for linear in linears for part in linear.pack()]
    norms = [layer.attention_norm, layer.q_norm, layer.k_norm, layer.mlp_norm]
    return PackedLayer(
        norms=tuple(norm and norm.weight for norm in norms),
        eps=tuple(norm.eps if norm else 0.0 for norm in norms),
        linears=tuple(tensor for tensors, _ in parts for tensor in tensors),
        formats=tuple(number for _, format in parts for number in format),
        window=layer.window,
    )


class PackedLayers:
    """Some layers, joined to the lists that the op takes."""

    def __init__(self, layers: Sequence[PackedLayer], heads: int, activation: str, scale: float) -> None:
        def joined(name: str) -> list[Any]:
            return [entry for layer in layers for entry in getattr(layer, name)]

        self._model = [joined(name) for name in ("norms", "eps", "linears", "formats")]
        self._last = ([layer.window for layer in layers], heads, ACTIVATIONS.index(activation), scale)

    def __call__(self, x: Tensor, *rows: Any) -> Tensor:
        """x `[B, T, d]` and the op's arguments from `cos` to `v_caches`."""
        return _decoder_layers(x, *self._model, *rows, *self._last)
