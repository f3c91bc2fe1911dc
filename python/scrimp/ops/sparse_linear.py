"""sparse_linear: a linear layer of which only the listed input channels are read."""

from __future__ import annotations

import torch
from torch import Tensor

from .._registry import register
from ._check import FLOATS, GPU_ROWS, check_dtype, check_same

SCHEMA = "(Tensor x, Tensor weight, Tensor index, Tensor count, Tensor? bias, Tensor? residual) -> Tensor"


def _check(
    x: Tensor, weight: Tensor, index: Tensor, count: Tensor, bias: Tensor | None, residual: Tensor | None
) -> list[int]:
    """The shape of the result."""
    op = "sparse_linear"
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be [.., K], got a scalar")
    check_dtype(op, "x", x, FLOATS)
    *lead, K = x.shape
    if weight.dim() != 2 or weight.shape[0] != K:
        raise ValueError(f"{op}: weight has shape {list(weight.shape)}, expected [{K}, N] for x {[*lead, K]}")
    N = weight.shape[1]
    if N > 1 and weight.stride(1) != 1:
        raise ValueError(f"{op}: weight has strides {weight.stride()}; the outputs of a channel must be adjacent")
    if index.dim() != 1 or index.shape[0] > K:
        raise ValueError(f"{op}: index has shape {list(index.shape)}, expected [at most {K}]")
    if tuple(count.shape) != (1,):
        raise ValueError(f"{op}: count must be one number, [1], got shape {list(count.shape)}")
    for name, tensor in (("index", index), ("count", count)):
        check_dtype(op, name, tensor, (torch.int32,))
    if bias is not None and tuple(bias.shape) != (N,):
        raise ValueError(f"{op}: bias has shape {list(bias.shape)}, expected [{N}]")
    shape = [*lead, N]
    if residual is not None and list(residual.shape) != shape:
        raise ValueError(f"{op}: residual has shape {list(residual.shape)}, expected {shape}")
    named = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    check_same(op, "dtype", **{name: tensor.dtype for name, tensor in named.items() if tensor is not None})
    named |= {"index": index, "count": count}
    check_same(op, "device", **{name: tensor.device for name, tensor in named.items() if tensor is not None})
    return shape


def _fake(
    x: Tensor, weight: Tensor, index: Tensor, count: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    return x.new_empty(_check(x, weight, index, count, bias, residual))


def reference(
    x: Tensor, weight: Tensor, index: Tensor, count: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    _check(x, weight, index, count, bias, residual)
    listed = torch.arange(index.shape[0], device=x.device) < count
    channels = torch.where(listed, index, 0)
    out = x[..., channels].masked_fill(~listed, 0) @ weight[channels].masked_fill(~listed[:, None], 0)
    out = out if bias is None else out + bias
    return out if residual is None else out + residual


def _cuda_takes(x: Tensor, weight: Tensor, *_: object) -> bool:
    """Whether CUDA C++ does a call: outputs of each channel in whole vectors of 16 bytes, 16- or 32-bit floats.

    Up to 64 rows their number has no say in it, so that a row's bits do not depend on it; more are torch's product.
    """
    near = weight.dim() == 2 and weight.data_ptr() % 16 == 0
    whole = near and all(n * weight.element_size() % 16 == 0 for n in (weight.stride(0), weight.shape[1]))
    return whole and x.dtype != torch.float64 and x.shape[:-1].numel() <= GPU_ROWS


_call = register("sparse_linear", SCHEMA, fake=_fake, reference=reference, cuda_takes=_cuda_takes)


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    count: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Applies a linear layer to rows of which only some channels count; the weights of the others are not read.

    y = sum over j < count of x[.., index_j] weight[index_j, :] + bias + residual

    `channel_select` makes x, index and count. Where a row has zeros in listed channels (other rows need them), its
    result has the same bits as with a list of its own: products are summed in fp32 in an order that depends on the
    channels alone, and rounded once. So a row's result does not depend on the other rows, their number or the number
    of threads, as long as the weights are finite. Meant for few rows: more than 64 are taken 64 at a time.

    Args:
        x: `[.., K]` fp32, bf16 or fp16; any strides (cheapest where the last is 1).
        weight: `[K, N]`, dtype of `x`: the transpose of `torch.nn.Linear`'s, the outputs of a channel adjacent.
        index: int32 `[at most K]`; its first `count` are ascending channels, the rest is not looked at.
        count: int32 `[1]`.
        bias: `[N]`, dtype of `x`.
        residual: `[.., N]`, dtype of `x`, added last.

    Returns:
        y `[.., N]`, contiguous, dtype of `x`.

    Raises:
        ValueError: a rank, shape, stride, device or dtype that does not fit, with the value.
        RuntimeError: (CPU) a count outside the list, or channels that do not ascend within K.

    Source: the column-skipping product of TEAL (2408.14690) section 4.3, summed without atomics.

    >>> import torch, scrimp
    >>> x, weight = torch.tensor([[1.0, -4.0, 2.0, 0.0]]), torch.arange(8.0).view(4, 2)
    >>> kept, index, count, _ = scrimp.ops.channel_select(x, 1.5)
    >>> scrimp.ops.sparse_linear(kept, weight, index, count).tolist()
    [[0.0, -2.0]]
    """
    try:  # as in `linear`: the kernel's checks come first, the words of _check only where one fails
        return _call(x, weight, index, count, bias, residual)
    except RuntimeError:
        _check(x, weight, index, count, bias, residual)
        raise
