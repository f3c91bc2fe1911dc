"""CATS: channels of a gated MLP are dropped where the activation of their gate is small."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..._registry import OPS
from ..generation.forward import GATES
from ..generation.huggingface import activation_of
from ..generation.linear import DenseLinear
from .linear import RULE, is_prompt

_channel_select = OPS["channel_select"].run
_linear = OPS["linear"].run

Activation = Callable[[Tensor], Tensor]


def activation(mlp: nn.Module, who: str) -> Activation:
    """The activation of a gated MLP, row-invariant.

    Raises:
        ValueError: beginning with `who`; neither SiLU nor GELU.
    """
    act = mlp.get_submodule("act_fn")
    name = activation_of(act)
    if name is None:
        raise ValueError(f"{who}: method='cats' knows the activations SiLU and GELU, not {type(act).__name__}")
    gated = GATES[name]
    return lambda gate: gated(gate, torch.ones_like(gate))


class CatsGate(nn.Module):
    """A gate's layer whose small outputs become 0, for tokens that are read alone; act(0) = 0 drops their channel.

    Args:
        dense: the gate's layer, whose parameters this one takes over.
        level: fp32 `[1]`, above which |act(gate)| is kept, in units of its mean over the token's channels.
        act: the activation behind it, 0 at 0.

    Source: CATS (2404.08763), with a threshold that goes with the token's mean.
    """

    def __init__(self, dense: nn.Linear, level: Tensor, act: Activation) -> None:
        super().__init__()
        self.weight, self.bias = dense.weight, dense.bias
        self.level, self.act = level, act

    def forward(self, x: Tensor) -> Tensor:
        gate = functional.linear(x, self.weight, self.bias)
        return gate if is_prompt(x) else self.cut(gate)

    def cut(self, gate: Tensor) -> Tensor:
        """Gates `[.., N]` with 0 for those that are dropped."""
        kept = _channel_select(self.act(gate), self.level, None, None, None, RULE, False)[0]
        return gate.masked_fill(kept == 0, 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CatsGate:
        super()._apply(fn, recurse)
        self.level = self.level.to(self.weight.device)
        return self

    @staticmethod
    def engine_linear(modules: Sequence[CatsGate]) -> EngineGate:
        """The layer for the decoding loop; a gate stands alone."""
        (layer,) = modules
        return EngineGate(layer)


class EngineGate:
    """A CatsGate as the decoding loop calls it (`scrimp.methods.generation.Linear`).

    Attributes:
        dense: the same layer with all its outputs, for prompts.
    """

    def __init__(self, layer: CatsGate) -> None:
        self.layer = layer
        self.dense = DenseLinear([layer.weight], [layer.bias])
        self.sizes = self.dense.sizes

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = self.layer.cut(self.dense(x))
        return out if residual is None else out + residual
