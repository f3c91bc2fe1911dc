"""DecoderModel: what the decoding loop knows of a model. `huggingface.py` makes one without copying a parameter."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .linear import Linear, for_prompts
from .packed import PackedLayers, pack

MAX_ROWS = 64  # rows in all for which every op is row-invariant
POSITION_BLOCK = 1024


class Norm(NamedTuple):
    """Weight `[d]` and epsilon of a root-mean-square norm."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class DecoderLayer:
    """One layer: x += o(attention(rotary(qkv(norm(x))))); x += down(activation(gate) * up of norm(x)).

    Attributes:
        qkv: queries, keys and values side by side, H D + 2 G D outputs.
        q_norm: of each query head's D numbers before the rotation, or None.
        k_norm: like `q_norm`, of the keys.
        gate_up: two equal halves.
        window: last tokens that a query sees, its own among them; 0 for all.
    """

    attention_norm: Norm
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    o: Linear
    mlp_norm: Norm
    gate_up: Linear
    down: Linear
    window: int

    def for_prompts(self) -> DecoderLayer:
        """The layer that reads prompts: itself unless a linear skips work."""
        found = {name: for_prompts(getattr(self, name)) for name in ("qkv", "o", "gate_up", "down")}
        alike = all(linear is getattr(self, name) for name, linear in found.items())
        return self if alike else replace(self, **found)  # type: ignore[arg-type]


class Positions:
    """Rotary cosines and sines of positions 0, 1, ..., computed by the model's own code in blocks, kept and grown.

    Args:
        compute: int64 positions `[n]` -> cosines and sines fp32 `[n, R]`, each position by itself.
    """

    def __init__(self, compute: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self._compute = compute
        self._lock = threading.Lock()
        self._tables: tuple[Tensor, Tensor] | None = None

    def tables(self, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of at least `count` positions, each fp32 `[P, R]`."""
        with self._lock:
            have = 0 if self._tables is None else self._tables[0].shape[0]
            blocks = [] if self._tables is None else [self._tables]
            for first in range(have, max(count, 1), POSITION_BLOCK):
                blocks.append(self._compute(torch.arange(first, first + POSITION_BLOCK)))
            if len(blocks) > 1 or self._tables is None:
                cos, sin = zip(*blocks, strict=True)
                self._tables = (torch.cat(cos).contiguous(), torch.cat(sin).contiguous())
            return self._tables


@dataclass(frozen=True)
class DecoderModel:
    """A Llama-like decoder.

    Attributes:
        embedding: `[V, d]`.
        head: d -> V.
        activation: "silu", "gelu" or "gelu_tanh".
        scale: factor of the attention scores.
        context: positions that the model was made for.
        eos: token ids that end a text.
        weights: every parameter and buffer with its address and version, to tell whether they are still the same.
        packing: whether layers may be computed by one call where there is one; the bits are the same.
    """

    name: str
    embedding: Tensor
    layers: tuple[DecoderLayer, ...]
    norm: Norm
    head: Linear
    activation: str
    positions: Positions
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    context: int
    eos: tuple[int, ...]
    weights: tuple[tuple[Tensor, int, int], ...]
    packing: bool = True

    @cached_property
    def for_prompts(self) -> DecoderModel:
        """The model that reads prompts: itself unless linears skip work in decoding."""
        layers = tuple(layer.for_prompts() for layer in self.layers)
        alike = all(a is b for a, b in zip(layers, self.layers, strict=True))
        return self if alike else replace(self, layers=layers)

    @cached_property
    def _packed(self) -> dict[tuple[int, ...], PackedLayers | None]:
        return {}

    def packed(self, layers: Sequence[int]) -> PackedLayers | None:
        """Some layers for one call; None where that call does not compute them."""
        if not self.packing:
            return None
        which = tuple(layers)
        if which not in self._packed:
            some = [self.layers[i] for i in which]
            self._packed[which] = pack(some, self.device, self.heads, self.activation, self.scale)
        together = self._packed[which]
        return None if together is None or together.is_metered else together

    @property
    def vocabulary(self) -> int:
        return self.embedding.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def is_still(self, other: DecoderModel) -> bool:
        """Whether both are views of the same, unchanged weights."""
        pairs = zip(self.weights, other.weights, strict=False)
        alike = all(a is b and rest == others for (a, *rest), (b, *others) in pairs)
        return len(self.weights) == len(other.weights) and alike
