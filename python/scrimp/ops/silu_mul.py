"""silu_mul: the gated activation of Llama's feed-forward layer."""

import torch
from torch import Tensor

from .._registry import register
from ._check import check_gate

SCHEMA = "(Tensor gate, Tensor up) -> Tensor"


def _check(gate: Tensor, up: Tensor) -> None:
    check_gate("silu_mul", gate, up)


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    _check(gate, up)
    return gate.new_empty(gate.shape)


def reference(gate: Tensor, up: Tensor) -> Tensor:
    _check(gate, up)
    return (torch.nn.functional.silu(gate) * up).contiguous()


_call = register("silu_mul", SCHEMA, fake=_fake, reference=reference)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """The SiLU of one tensor times another; for bf16 the SiLU is rounded first, as two torch operators do.

    y = silu(gate) * up, silu(x) = x / (1 + exp(-x))

    An element's bits depend on its two operands alone (torch's own silu changes with the number of rows).

    Args:
        gate: `[..., N]` fp32, bf16 or (on GPUs) fp16; any strides, such as half of one linear's output.
        up: like `gate`.

    Returns:
        y, contiguous, of the shape and dtype of `gate`.

    Raises:
        ValueError: a shape, device or dtype that does not fit, with the value.

    Source: Shazeer, GLU variants (2002.05202).

    >>> import torch, scrimp
    >>> gate, up = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).chunk(2, -1)
    >>> scrimp.ops.silu_mul(gate, up)
    tensor([[0.0000, 2.1932]])
    """
    try:
        return _call(gate, up)
    except RuntimeError:  # say what does not fit: checking every call would cost more than the op
        _check(gate, up)
        raise
