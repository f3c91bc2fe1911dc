"""linear: products of a few rows with one or several weight matrices, every weight read once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._registry import register
from ._check import check_dtype, check_same

SCHEMA = "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor? residual) -> Tensor"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], residual: Tensor | None) -> list[int]:
    """The shape of the result."""
    op = "linear"
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be [.., K], got a scalar")
    if not weights:
        raise ValueError(f"{op}: there are no weights")
    if biases and len(biases) != len(weights):
        raise ValueError(f"{op}: {len(biases)} biases for {len(weights)} weights; give one (or None) for each, or none")
    dtype, device = x.dtype, x.device
    if dtype not in DTYPES:
        check_dtype(op, "x", x, DTYPES)
    *lead, K = x.shape
    N = 0
    for i, weight in enumerate(weights):
        if weight.dim() != 2 or weight.shape[1] != K:
            raise ValueError(f"{op}: weights[{i}] has shape {list(weight.shape)}, expected [N, {K}] for x {[*lead, K]}")
        if K > 1 and weight.stride(1) != 1:
            raise ValueError(
                f"{op}: weights[{i}] has strides {weight.stride()}; the elements of a row must be adjacent"
            )
        N += weight.shape[0]
    for i, bias in enumerate(biases):
        if bias is not None and (bias.dim() != 1 or bias.shape[0] != weights[i].shape[0]):
            raise ValueError(f"{op}: biases[{i}] has shape {list(bias.shape)}, expected [{weights[i].shape[0]}]")
    shape = [*lead, N]
    if residual is not None and list(residual.shape) != shape:
        raise ValueError(f"{op}: residual has shape {list(residual.shape)}, expected {shape}")
    others = [*weights, *(b for b in biases if b is not None), *([] if residual is None else [residual])]
    if any(other.dtype is not dtype or other.device != device for other in others):
        named = {"x": x} | {f"weights[{i}]": weight for i, weight in enumerate(weights)}
        named |= {f"biases[{i}]": bias for i, bias in enumerate(biases) if bias is not None}
        named |= {} if residual is None else {"residual": residual}
        check_same(op, "dtype", **{name: tensor.dtype for name, tensor in named.items()})
        check_same(op, "device", **{name: tensor.device for name, tensor in named.items()})
    return shape


def _fake(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], residual: Tensor | None) -> Tensor:
    return x.new_empty(_check(x, weights, biases, residual))


def reference(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], residual: Tensor | None) -> Tensor:
    _check(x, weights, biases, residual)
    parts = [x @ weight.T for weight in weights]
    for i, bias in enumerate(biases):
        parts[i] = parts[i] if bias is None else parts[i] + bias
    out = torch.cat(parts, -1)
    return out if residual is None else out + residual


_call = register("linear", SCHEMA, fake=_fake, reference=reference)


def linear(
    x: Tensor,
    weights: Tensor | Sequence[Tensor],
    biases: Tensor | Sequence[Tensor | None] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Applies one or several linear layers to the same rows; their outputs lie side by side.

    y = concat_i(x W_i^T + b_i) + residual

    For up to 64 rows in all, each weight is read from memory once, products are summed in fp32 and rounded once, and a
    row's result is bitwise the same whatever the other rows, their number and the number of threads are. More rows go
    through torch's matrix product, which is faster from there on and promises none of this.

    Args:
        x: `[.., K]` fp32 or bf16; any strides (cheapest where the last is 1).
        weights: one or several `[N_i, K]`, dtype of `x`, the layout of `torch.nn.Linear`; elements of a row adjacent.
        biases: one `[N_i]` or None for each weight; no biases unless given.
        residual: `[.., sum N_i]`, dtype of `x`, added last.

    Returns:
        y `[.., sum N_i]`, contiguous, dtype of `x`.

    Raises:
        ValueError: a rank, shape, stride, device or dtype that does not fit, with the value.

    Source: `torch.nn.functional.linear`, summed in an order that does not depend on the number of rows.

    >>> import torch, scrimp
    >>> x, up, down = torch.ones(2, 8), torch.ones(3, 8), -torch.ones(1, 8)
    >>> scrimp.ops.linear(x, [up, down], [None, torch.ones(1)]).tolist()
    [[8.0, 8.0, 8.0, -7.0], [8.0, 8.0, 8.0, -7.0]]
    """
    if isinstance(weights, Tensor):
        weights = [weights]
    biases = [] if biases is None else [biases] if isinstance(biases, Tensor) else biases
    try:  # decoding calls this often: the kernel's checks come first, the words of _check only where one fails
        return _call(x, weights, biases, residual)
    except RuntimeError:
        _check(x, weights, biases, residual)
        raise
