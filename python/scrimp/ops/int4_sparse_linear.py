"""int4_sparse_linear: activations times 4-bit codes of which only the listed input channels are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._registry import OPS, register
from ..int4_weight.channels import Int4Channels, unpack_channels
from ..int4_weight.check import ZERO_KINDS, check_channels
from ..int4_weight.pack import pack_nibbles
from ._check import GPU_ROWS, check_dtype, check_same
from ._int4 import MODES, check_input, check_mode, check_numbers

SCHEMA = (
    "(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? codebook, Tensor? permutation, Tensor index, "
    "Tensor count, Tensor? bias, int group_size, int zero_kind, int mode) -> Tensor"
)


def _check(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor | None,
    permutation: Tensor | None,
    index: Tensor,
    count: Tensor,
    bias: Tensor | None,
    group_size: int,
    zero_kind: int,
    mode: int,
) -> None:
    op = "int4_sparse_linear"
    check_numbers(op, zero_kind, mode)
    check_channels(
        op,
        codes=codes,
        scales=scales,
        zeros=zeros,
        codebook=codebook,
        permutation=permutation,
        group_size=group_size,
        zero_kind=ZERO_KINDS[zero_kind],
    )
    check_input(op, x, scales.shape[1], codes.shape[0], codebook, permutation, bias, mode)
    inputs = x.shape[-1]
    if index.dim() != 1 or index.shape[0] > inputs:
        raise ValueError(f"{op}: index has shape {list(index.shape)}, expected [at most {inputs}]")
    if tuple(count.shape) != (1,):
        raise ValueError(f"{op}: count must be one number, [1], got shape {list(count.shape)}")
    for name, tensor in (("index", index), ("count", count)):
        check_dtype(op, name, tensor, (torch.int32,))
    check_same(op, "device", x=x.device, codes=codes.device, index=index.device, count=count.device)


def _fake(x: Tensor, codes: Tensor, scales: Tensor, *rest: object) -> Tensor:
    _check(x, codes, scales, *rest)  # type: ignore[arg-type]
    return x.new_empty(*x.shape[:-1], scales.shape[1])


def reference(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor | None,
    permutation: Tensor | None,
    index: Tensor,
    count: Tensor,
    bias: Tensor | None,
    group_size: int,
    zero_kind: int,
    mode: int,
) -> Tensor:
    _check(x, codes, scales, zeros, codebook, permutation, index, count, bias, group_size, zero_kind, mode)
    inputs = x.shape[-1]
    listed = torch.where(torch.arange(index.shape[0], device=x.device) < count, index, inputs).long()
    others = torch.ones(inputs + 1, dtype=torch.bool, device=x.device).index_fill_(0, listed, False)[:inputs]
    qweight, turned = pack_nibbles(unpack_channels(codes, scales.shape[1])), None if zeros is None else zeros.T
    rest = (codebook, permutation, bias, group_size, zero_kind, mode)
    out: Tensor = OPS["int4_linear"].reference(x.masked_fill(others, 0), qweight, scales.T, turned, *rest)
    return out


def _cuda_takes(x: Tensor, codes: Tensor, *rest: Any) -> bool:
    """Whether CUDA C++ does a call: exact mode, columns as inputs come, in groups of 32 and more, or one group.

    Up to 64 rows their number has no say in it, so that a row's bits do not depend on it. More rows belong to Triton,
    whose tiles read a weight less often.
    """
    permutation, (group_size, _, mode) = rest[3], rest[-3:]
    return (
        mode == MODES.index("exact")
        and permutation is None
        and x.dtype != torch.float64
        and x.shape[:-1].numel() <= GPU_ROWS
        and (group_size % 32 == 0 or group_size == codes.shape[0])
        and codes.data_ptr() % 16 == 0
        and codes.dim() == 2
        and (codes.stride(1), codes.stride(0) % 16) == (1, 0)
    )


_call = register("int4_sparse_linear", SCHEMA, fake=_fake, reference=reference, cuda_takes=_cuda_takes)


def int4_sparse_linear(
    x: Tensor, weight: Int4Channels, index: Tensor, count: Tensor, bias: Tensor | None = None, *, mode: str = "exact"
) -> Tensor:
    """A linear layer of 4-bit codes of which only some input channels are read: y = x' W^T + bias.

    x' is x in the inputs index_j, j < count, and 0 elsewhere; W is what `weight` stands for. Each is defined as
    `int4_linear` of x' is, scales applied once a group: mode "exact" equals the product with the dequantized matrix but
    for the rounding of fp32 sums; mode "int8" rounds the listed activations to 8 bits for each row and block of
    min(group_size, 128) columns, and has the bits of `int4_linear`.

    `channel_select` makes x, index and count. Where a row has zeros in listed channels (other rows need them), its
    result has the same bits as with a list of its own, so a row's result does not depend on the other rows, their
    number or the number of threads. Meant for few rows: more than 64 are taken 64 at a time.

    Args:
        x: `[.., in_features]` fp32, bf16 or fp16; any strides.
        weight: `[N, in_features]`, turned (`Int4Channels.of` an `Int4Weight`).
        index: int32 `[at most in_features]`; its first `count` are ascending inputs, the rest is not looked at. A
            permutation of the weight is followed: they are inputs of x, whatever the order of the columns.
        count: int32 `[1]`.
        bias: `[N]`, dtype of `x`, added in fp32.
        mode: "exact" or "int8"; a codebook must be int8 for the latter.

    Returns:
        y `[.., N]`, contiguous, dtype of `x`, rounded once.

    Raises:
        ValueError: a rank, shape, device or dtype that does not fit, or an unknown mode, with the value.
        RuntimeError: (CPU) a count outside the list, or inputs that do not ascend.

    Source: column skipping as in TEAL (2408.14690) on groups along the inputs as GPTQ (2210.17323) makes them.

    >>> import torch, scrimp
    >>> weight = scrimp.Int4Weight.from_codes(torch.arange(16).repeat(2, 1), torch.tensor([[1.0], [0.5]]))
    >>> index, count = torch.tensor([0, 10], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    >>> turned = scrimp.int4_weight.Int4Channels.of(weight)
    >>> scrimp.ops.int4_sparse_linear(torch.ones(1, 16), turned, index, count).tolist()
    [[-6.0, -3.0]]
    """
    check_mode("int4_sparse_linear", mode)
    if x.dim() and x.shape[-1] != weight.in_features:
        raise ValueError(f"int4_sparse_linear: x has {x.shape[-1]} inputs, but the weight {weight.in_features}")
    args: tuple[Any, ...] = (x, *weight.tensors().values(), index, count, bias, *weight.numbers(), MODES.index(mode))
    try:  # as in `linear`: the kernel's checks come first, the words of _check only where one fails
        return _call(*args)
    except RuntimeError:
        _check(*args)
        raise
