"""What the decoding loop asks of a layer's linear, and the dense one.

A module of another kind (4-bit, sparse) plugs in by a static method `engine_linear(modules) -> Linear` of its class;
the loop never asks what it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..._registry import OPS

_linear = OPS["linear"].call


class Linear(Protocol):
    """One or several linear layers of the same input, run as one.

    A row's result must not depend on the other rows for up to 64 rows in all; above that it must be deterministic.
    One that skips work has an attribute `dense`, a Linear that skips nothing: prompts are read by that.

    Attributes:
        sizes: outputs of each of the layers, in the order in which they lie side by side.
    """

    sizes: tuple[int, ...]

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x `[B, T, K]`, residual `[B, T, sum of sizes]` -> `[B, T, sum of sizes]`, contiguous."""
        ...


# A linear layer as `scrimp.ops.decoder_layers` takes it: weight, bias, scales, zeros, codebook, permutation; format
Part = tuple[tuple[Tensor | None, ...], tuple[int, ...]]
NO_PART: Part = ((None,) * 6, (0, 0, 0))  # of a layer whose outputs an earlier one of its input holds


class Metered(Protocol):
    """A layer that tells a meter, while there is one, of each of its calls."""

    meter: object | None


class Packed(NamedTuple):
    """Linear layers of one input as `scrimp.ops.decoder_layers` takes them.

    Attributes:
        parts: the layers, in order.
        selection: level, scale and center of the choice of channels; no level where they are not sparse.
        metered: those that must be called one by one while they have a meter.
    """

    parts: list[Part]
    selection: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    metered: Sequence[Metered] = ()


@runtime_checkable
class Packable(Linear, Protocol):
    """One that `scrimp.ops.decoder_layers` may compute too, to the bit."""

    def pack(self) -> Packed | None:
        """As the op takes it; None where the op does not compute this one."""
        ...


@runtime_checkable
class Head(Linear, Protocol):
    """A head that computes less where the largest logits are enough."""

    def largest(self, x: Tensor, k: int) -> Tensor:
        """x `[B, T, d]` -> logits `[B, T, V]`, of which those that are not among the k largest may be -inf.

        k = 1: of equal ones that of the lowest id is there. k > 1: so are all equals of the k-th, and all that become
        its equals when they are divided by a temperature. k = 0: all are wanted, to choose a token.
        """
        ...


class DenseLinear:
    """Weights as the model holds them, `[N_i, K]` each: nothing is copied or packed."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        self.sizes = tuple(weight.shape[0] for weight in weights)
        self.weights = list(weights)
        self.biases = [] if all(bias is None for bias in biases) else list(biases)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return _linear(x, self.weights, self.biases, residual)

    def pack(self) -> Packed:
        """As `Packable` says."""
        return Packed(dense_parts(self.weights, self.biases or [None] * len(self.weights)))


def dense_parts(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Part]:
    """Dense layers for `Packed`."""
    return [((weight, bias, *[None] * 4), (0, 0, 0)) for weight, bias in zip(weights, biases, strict=True)]


class SideBySide:
    """Linears of one input that cannot run as one: their results are put side by side."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self.sizes = tuple(size for part in parts for size in part.sizes)
        self.parts = list(parts)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = torch.cat([part(x) for part in self.parts], -1)
        return out if residual is None else out + residual

    @property
    def dense(self) -> SideBySide:
        """Itself where no part skips work."""
        parts = [for_prompts(part) for part in self.parts]
        alike = all(a is b for a, b in zip(parts, self.parts, strict=True))
        return self if alike else SideBySide(parts)


def for_prompts(linear: Linear) -> Linear:
    """The linear that reads prompts: itself unless it skips work."""
    found: Linear = getattr(linear, "dense", linear)
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether `fuse` can run the module; a subclass of nn.Linear may compute something else and cannot."""
    return type(module) is nn.Linear or hasattr(type(module), "engine_linear")


def fuse(modules: Sequence[nn.Module]) -> Linear:
    """The modules, which share their input, as one `Linear`; neighbours of one kind run in one call.

    Raises:
        ValueError: a module that is neither nn.Linear nor has `engine_linear`.
    """
    runs: list[list[nn.Module]] = []
    for module in modules:
        if not is_linear(module):
            raise ValueError(f"a {type(module).__name__} is not a linear layer that the decoding loop can run")
        if runs and type(runs[-1][0]) is type(module):
            runs[-1].append(module)
        else:
            runs.append([module])
    parts = [_fuse_alike(run) for run in runs]
    return parts[0] if len(parts) == 1 else SideBySide(parts)


def _fuse_alike(modules: Sequence[nn.Module]) -> Linear:
    kind = type(modules[0])
    if kind is nn.Linear:
        return DenseLinear([m.weight for m in modules], [m.bias for m in modules])  # type: ignore[misc]
    made: Linear = kind.engine_linear(modules)  # type: ignore[attr-defined]
    return made
