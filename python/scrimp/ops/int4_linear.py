"""int4_linear: activations times a matrix of 4-bit codes with group scales."""

from __future__ import annotations

import torch
from torch import Tensor

from .._registry import register
from ..int4_weight import Int4Weight
from ..int4_weight.check import ZERO_KINDS, check_layout
from ._check import check_same
from ._int4 import MODES, check_input, check_mode, check_numbers

SCHEMA = (
    "(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? codebook, Tensor? permutation, Tensor? bias, "
    "int group_size, int zero_kind, int mode) -> Tensor"
)
LARGEST_BLOCK = 128  # inputs that share a scale of the activations, at most
ROWS_INVARIANT = 64  # up to so many rows a row's result is bitwise the same on a GPU
SMALLEST = 2.0**-100  # a block of activations below it counts as zero: 127 / SMALLEST is finite


def _check(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor | None,
    permutation: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    zero_kind: int,
    mode: int,
) -> None:
    op = "int4_linear"
    check_numbers(op, zero_kind, mode)
    check_layout(
        op,
        qweight=qweight,
        scales=scales,
        zeros=zeros,
        codebook=codebook,
        permutation=permutation,
        group_size=group_size,
        zero_kind=ZERO_KINDS[zero_kind],
    )
    _check_input(x, qweight, codebook, permutation, bias, mode)


def _check_input(
    x: Tensor, qweight: Tensor, codebook: Tensor | None, permutation: Tensor | None, bias: Tensor | None, mode: int
) -> None:
    """What a weight that was checked when it was made does not know."""
    check_same("int4_linear", "device", x=x.device, qweight=qweight.device)
    check_input("int4_linear", x, qweight.shape[0], 2 * qweight.shape[1], codebook, permutation, bias, mode)


def _fake(x: Tensor, qweight: Tensor, *rest: object) -> Tensor:
    _check(x, qweight, *rest)  # type: ignore[arg-type]
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


def quantize_rows(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """int8 mode's activations: x fp32 `[M, K]` -> integers (held as fp32) `[B, M, block]`, scales fp32 `[B, M]`.

    B = ceil(K / block); zeros fill the last block. Of each block with a = max|x|, every operation rounded to fp32:
    a < 2^-100: scale 0 and integers 0; a not finite: scale NaN and integers 0; else scale a / 127 and integers
    round(x (127 / a)), ties to even.
    """
    M, K = x.shape
    B = -(-K // block)
    x = torch.nn.functional.pad(x, (0, B * block - K)).view(M, B, block).transpose(0, 1)
    largest = x.abs().amax(-1)
    most = torch.full_like(largest, 127)  # a tensor: dividing by a number may multiply by its inverse
    usable = (largest >= SMALLEST) & torch.isfinite(largest)
    integers = torch.round(x * (most / largest).unsqueeze(-1)).where(usable.unsqueeze(-1), 0)
    scale = (largest / most).where(largest >= SMALLEST, 0).where(torch.isfinite(largest), torch.nan)
    return integers, scale


def _int8_product(x: Tensor, weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """`[M, N]`: the sum, block by block in order, of (integer dot) x (weight scale) x (activation scale)."""
    block = min(weight.group_size, LARGEST_BLOCK)
    integers, scale = quantize_rows(x.float(), block)
    q = weight.codes().float() if weight.codebook is None else weight.codebook[weight.codes().int()].float()
    total = torch.zeros(x.shape[0], weight.out_features, dtype=dtype, device=x.device)
    for b, (a, a_scale) in enumerate(zip(integers, scale.to(dtype), strict=True)):
        columns, group = q[:, b * block : (b + 1) * block], b * block // weight.group_size
        s = weight.scales[:, group].to(dtype)
        dot = (a[:, : columns.shape[1]] @ columns.T).to(dtype)  # integers below 2^24: exact in any order
        sum_a = a.sum(1, keepdim=True).to(dtype)
        if weight.zeros is not None:
            z = weight.zeros[:, group].to(dtype)
            term = dot * s + z * sum_a if weight.zero_kind == "offset" else (dot - z * sum_a) * s
        else:
            term = (dot - 8 * sum_a if weight.codebook is None else dot) * s
        total = total + term * a_scale.unsqueeze(-1)
    return total


def reference(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor | None,
    permutation: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    zero_kind: int,
    mode: int,
) -> Tensor:
    _check(x, qweight, scales, zeros, codebook, permutation, bias, group_size, zero_kind, mode)
    weight = Int4Weight(qweight, scales, zeros, codebook, None, group_size, ZERO_KINDS[zero_kind])  # type: ignore[arg-type]
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_zeros(x.shape[:-1].numel(), 0)
    if permutation is not None:
        rows = rows[:, permutation]
    if MODES[mode] == "int8":
        y = _int8_product(rows, weight, dtype)
    else:
        y = rows.to(dtype) @ weight.dequantize_columns(dtype).T
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype).view(*x.shape[:-1], qweight.shape[0])


def _cuda_takes(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor | None,
    permutation: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    zero_kind: int,
    mode: int,
) -> bool:
    """Whether CUDA C++ does a call: exact products of 16-bit x and codes that are exact in 16 bits, in groups of words.

    Up to 64 rows their number has no say in it, so that a row's bits do not depend on it. More rows belong to Triton,
    whose tiles read a weight less often.
    """
    return (
        mode == MODES.index("exact")
        and x.dtype in (torch.float16, torch.bfloat16)
        and x.shape[:-1].numel() <= ROWS_INVARIANT
        and scales.dtype != torch.float64
        and (codebook is None or codebook.dtype == torch.int8)
        and group_size % 32 == 0
        and qweight.data_ptr() % 16 == 0
    )


_call = register("int4_linear", SCHEMA, fake=_fake, reference=reference, cuda_takes=_cuda_takes)


def int4_linear(x: Tensor, weight: Int4Weight, bias: Tensor | None = None, *, mode: str = "exact") -> Tensor:
    """A linear layer whose weight is 4-bit codes: y = x W^T + bias, with W as `weight.dequantize()` would give it.

    mode "exact": equal to the product with the dequantized matrix but for the rounding of fp32 sums. (A CPU with VNNI
    adds integers of 24 bits where there is no codebook: x is rounded to multiples of a power of two, of at most
    1.01 2^-22 a or 2^-126, with a = max|x| of each min(group_size, 32) columns, and their sum over these is exact.)
    mode "int8": activations are rounded, row by row and block by block of b = min(group_size, 128) columns, to
    integers X = round(127 x / a) of -127 to 127 with a = max|x| of the block (`quantize_rows` has the corner cases):

        y_n = sum_blocks (a / 127) t_n + bias_n,   D = sum_k q_nk X_k and S = sum_k X_k, exact integers
        none8 t = (D - 8 S) s    uint8, float t = (D - z S) s    offset t = D s + z S    codebook t = (sum c[q] X) s

    with blocks added in order and every operation rounded to fp32 by itself (no fused multiply-add): every
    implementation gives the same bits. Both modes: a row's result does not depend on the other rows.

    Args:
        x: `[..., in_features]` fp32, bf16 or fp16; any strides.
        weight: `[N, in_features]`.
        bias: `[N]` in the dtype of `x`, added in fp32.
        mode: "exact" or "int8"; a codebook must be int8 for the latter.

    Returns:
        `[..., N]` contiguous in the dtype of `x`, rounded once. A row that holds an infinity or a NaN has no finite
        output; in int8 mode, NaNs only.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or an unknown mode, with the value.

    Source: group-wise 4-bit weights as in GPTQ (2210.17323) and AWQ (2306.00978); dynamic integer activations as in
        llama.cpp's Q8_0.

    >>> import torch, scrimp
    >>> weight = scrimp.Int4Weight.from_codes(torch.full((3, 32), 9), torch.tensor([[1.0], [0.5], [0.25]]))
    >>> scrimp.ops.int4_linear(torch.ones(2, 32), weight).tolist()
    [[32.0, 16.0, 8.0], [32.0, 16.0, 8.0]]
    """
    check_mode("int4_linear", mode)
    if x.dim() and x.shape[-1] != weight.in_features:
        raise ValueError(f"int4_linear: x has {x.shape[-1]} inputs, but the weight {weight.in_features}")
    zero_kind, which = ZERO_KINDS.index(weight.zero_kind), MODES.index(mode)
    _check_input(x, weight.qweight, weight.codebook, weight.permutation, bias, which)
    return _call(x, *weight.tensors().values(), bias, weight.group_size, zero_kind, which)
