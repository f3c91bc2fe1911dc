"""gelu_mul: the gated activation of Gemma's feed-forward layer."""

import torch
from torch import Tensor

from .._registry import register
from ._check import check_gate

SCHEMA = "(Tensor gate, Tensor up, bool tanh) -> Tensor"


def _check(gate: Tensor, up: Tensor, tanh: bool) -> None:
    check_gate("gelu_mul", gate, up)


def _fake(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    _check(gate, up, tanh)
    return gate.new_empty(gate.shape)


def reference(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    _check(gate, up, tanh)
    return (torch.nn.functional.gelu(gate, approximate="tanh" if tanh else "none") * up).contiguous()


_call = register("gelu_mul", SCHEMA, fake=_fake, reference=reference)


def gelu_mul(gate: Tensor, up: Tensor, tanh: bool = True) -> Tensor:
    """The GELU of one tensor times another; for bf16 the GELU is rounded first, as two torch operators do.

    y = gelu(gate) * up, gelu(x) = x (1 + erf(x / sqrt 2)) / 2, or with tanh
    x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2

    An element's bits depend on its two operands alone.

    Args:
        gate: `[..., N]` fp32, bf16 or (on GPUs) fp16; any strides, such as half of one linear's output.
        up: like `gate`.
        tanh: the approximation by tanh (`gelu_pytorch_tanh`), else erf.

    Returns:
        y, contiguous, of the shape and dtype of `gate`.

    Raises:
        ValueError: a shape, device or dtype that does not fit, with the value.

    Source: Hendrycks and Gimpel (1606.08415); Shazeer, GLU variants (2002.05202).

    >>> import torch, scrimp
    >>> gate, up = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).chunk(2, -1)
    >>> scrimp.ops.gelu_mul(gate, up)
    tensor([[0.0000, 2.5236]])
    """
    try:
        return _call(gate, up, tanh)
    except RuntimeError:  # say what does not fit: checking every call would cost more than the op
        _check(gate, up, tanh)
        raise
