"""rms_norm in Triton: one program norms ROWS rows.

The order in which a row's squares are added is that of the tile's layout, so nothing but K may choose the layout: the
configuration is that of K, and addresses are multiples of 8 elements wherever K is, or of none.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv, power_of_two, unit_last_stride
from .tuning import config


@triton.jit(do_not_specialize=["rows", "inner", "x_outer", "x_inner"])
def rms_norm_kernel(
    x, weight, out, x_outer, x_inner, rows, inner, eps,
    K: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Row r of x lies at (r // inner * x_outer + r % inner * x_inner) * UNIT. A row that fits a tile is read once."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)[None, :]
    inside = (row < rows)[:, None]
    source = (row // inner).to(tl.int64) * x_outer + (row % inner).to(tl.int64) * x_inner
    source = x + (source * UNIT)[:, None]
    to = out + (row.to(tl.int64) * K)[:, None]
    squares = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        at = start + k
        part = tl.load(source + at, mask=inside & (at < K), other=0.0).to(tl.float32)
        squares = tl.fma(part, part, squares)
    factor = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(squares, 1), 1.0 * K) + eps))[:, None]
    for start in range(0, K, BLOCK_K):
        at = start + k
        part = tl.load(source + at, mask=inside & (at < K), other=0.0).to(tl.float32)
        scaled = (part * factor).to(out.dtype.element_ty).to(tl.float32)
        by = tl.load(weight + at, mask=at < K, other=0.0).to(tl.float32)
        tl.store(to + at, (scaled * by).to(out.dtype.element_ty), mask=inside & (at < K))


def launches(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, list[Launch]]:
    """The result, still unwritten, and what writes it."""
    if x.dtype == torch.float64:
        raise ValueError("rms_norm: x is float64; on a GPU it must be float32, bfloat16 or float16")
    out, K = x.new_empty(x.shape), x.shape[-1]
    if out.numel() == 0:
        return out, []
    unit = 8 if K % 8 == 0 else 1
    x, weight = levels(unit_last_stride(x)), unit_last_stride(weight)
    if unit > 1:
        x, weight = aligned(x, unit), aligned(weight, unit)
    outer, inner, _ = x.shape
    chosen = config("rms_norm", x.device, columns=K)
    block = min(power_of_two(K), chosen["BLOCK_K"])
    launch = Launch(
        rms_norm_kernel,
        grid=(cdiv(outer * inner, chosen["ROWS"]), 1, 1),
        args={
            "x": x, "weight": weight, "out": out,
            "x_outer": x.stride(0) // unit, "x_inner": x.stride(1) // unit,
            "rows": outer * inner, "inner": inner, "eps": eps,
        },
        constants={"K": K, "UNIT": unit, "ROWS": chosen["ROWS"], "BLOCK_K": block},
        num_warps=chosen["num_warps"],
    )  # fmt: skip
    return out, [launch]


def levels(x: Tensor) -> Tensor:
    """x as `[outer, inner, K]`, copied where its leading dimensions are more than two levels of rows in memory."""
    if x.dim() < 3:
        return x.view(1, -1, x.shape[-1])
    return x.flatten(0, -3)


def aligned(tensor: Tensor, unit: int) -> Tensor:
    """The tensor, copied where its rows do not start at multiples of 16 bytes or of `unit` elements."""
    strides = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride(), strict=False) if size > 1]
    fits = tensor.data_ptr() % 16 == 0 and all(stride % unit == 0 for stride in strides)
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)
