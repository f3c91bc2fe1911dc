"""The plain torch code, fused by torch.compile."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..registry import Peer
from ..rms_norm import formula
from .flex import available
from .torch import append, merge

DISTRIBUTION = "torch"
__all__ = ["DISTRIBUTION", "available", "gelu_mul", "merge_attention", "rms_norm", "rotary_append", "silu_mul"]


def compiled(code: Callable[..., Any], *args: Any) -> Peer:
    """`code` compiled for the shapes of `args`."""
    torch._dynamo.reset()
    call = torch.compile(code, dynamic=False, fullgraph=True)
    return Peer(lambda: call(*args))


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Peer:
    """One loop over the outputs."""
    return compiled(merge, out_a, lse_a, out_b, lse_b)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Peer:
    """Llama's formula in two loops."""
    return compiled(formula, x, weight, eps)


def silu_mul(gate: Tensor, up: Tensor) -> Peer:
    """One loop."""
    return compiled(lambda gate, up: functional.silu(gate) * up, gate, up)


def gelu_mul(gate: Tensor, up: Tensor) -> Peer:
    """One loop."""
    return compiled(lambda gate, up: functional.gelu(gate, approximate="tanh") * up, gate, up)


def rotary_append(*args: Tensor) -> Peer:
    """A loop for each of the three results."""
    return compiled(append, *args)
