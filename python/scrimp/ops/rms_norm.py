"""rms_norm: rows divided by their root mean square, times a weight."""

import math

import torch
from torch import Tensor

from .._registry import register
from ._check import FLOATS, check_dtype, check_same

SCHEMA = "(Tensor x, Tensor weight, float eps) -> Tensor"


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    op = "rms_norm"
    if x.dim() == 0 or weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"{op}: weight has shape {list(weight.shape)}, but rows of x are of {list(x.shape[-1:])}")
    check_dtype(op, "x", x, FLOATS)
    check_same(op, "dtype", x=x.dtype, weight=weight.dtype)
    check_same(op, "device", x=x.device, weight=weight.device)
    if not 0 <= eps < math.inf:
        raise ValueError(f"{op}: eps={eps} must be finite and not negative")


def _fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check(x, weight, eps)
    return x.new_empty(x.shape)


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check(x, weight, eps)
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    precise = precise * torch.rsqrt(precise.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * precise.to(x.dtype)).contiguous()


_call = register("rms_norm", SCHEMA, fake=_fake, reference=reference)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Divides each row by its root mean square and multiplies it by a weight, rounding where Hugging Face's Llama does.

    y = weight * round(x / sqrt(mean(x^2) + eps)), the division in fp32, the product in the dtype of `x`

    A row's bits do not depend on the other rows, their number or the threads.

    Args:
        x: `[..., K]` fp32, bf16 or (on GPUs) fp16; any strides.
        weight: `[K]`, dtype of `x`.
        eps: added to the mean square.

    Returns:
        y, contiguous, of the shape and dtype of `x`.

    Raises:
        ValueError: a shape, device, dtype or eps that does not fit, with the value.

    Source: Zhang and Sennrich (1910.07467), as in transformers' LlamaRMSNorm.

    >>> import torch, scrimp
    >>> scrimp.ops.rms_norm(torch.tensor([3.0, 4.0]), torch.ones(2), eps=0.5)
    tensor([0.8321, 1.1094])
    """
    try:
        return _call(x, weight, eps)
    except RuntimeError:  # say what does not fit: checking every call would cost more than the op
        _check(x, weight, eps)
        raise
