"""merge_attention in Triton: one program merges a block of rows of one head."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv, power_of_two, unit_last_stride
from .tuning import config


@triton.jit(do_not_specialize=["H", "N"])
def merge_attention_kernel(
    out_a, lse_a, out_b, lse_b, out, lse,
    out_a_b, out_a_h, out_a_n, lse_a_b, lse_a_h, lse_a_n,
    out_b_b, out_b_h, out_b_n, lse_b_b, lse_b_h, lse_b_n,
    H, N, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BLOCK_N)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head // H, head % H
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    rows = n < N
    n = n.to(tl.int64)
    # Sums of exponentials relative to the larger one; a row without keys on both sides keeps 0 and -inf.
    a = tl.load(lse_a + b * lse_a_b + h * lse_a_h + n * lse_a_n, mask=rows, other=0.0)
    c = tl.load(lse_b + b * lse_b_b + h * lse_b_h + n * lse_b_n, mask=rows, other=0.0)
    high = tl.maximum(a, c)
    base = tl.where(high == -float("inf"), 0.0, high)
    sum_a, sum_b = tl.exp(a - base), tl.exp(c - base)
    total = sum_a + sum_b
    inverse = tl.where(total > 0, 1.0 / total, 0.0)
    tl.store(lse + (b * H + h) * N + n, base + tl.log(total), mask=rows)

    inside = rows[:, None] & (d < D)[None, :]
    x = tl.load(out_a + b * out_a_b + h * out_a_h + n[:, None] * out_a_n + d[None, :], mask=inside, other=0.0)
    y = tl.load(out_b + b * out_b_b + h * out_b_h + n[:, None] * out_b_n + d[None, :], mask=inside, other=0.0)
    merged = (sum_a * inverse)[:, None] * x + (sum_b * inverse)[:, None] * y
    to = out + ((b * N + n[:, None]) * H + h) * D + d[None, :]
    tl.store(to, merged.to(out.dtype.element_ty), mask=inside)


def launches(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The results, still unwritten, and what writes them."""
    B, H, N, D = out_a.shape
    out_a, out_b = unit_last_stride(out_a), unit_last_stride(out_b)
    out = out_a.new_empty(B, N, H, D)
    lse = lse_a.new_empty(B, H, N)
    chosen = config("merge_attention", out_a.device, rows=max(N, 1), head_dim=max(D, 1))
    inputs = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    strides = {f"{name}_{axis}": x.stride(i) for name, x in inputs.items() for i, axis in enumerate("bhn")}
    launch = Launch(
        merge_attention_kernel,
        grid=(cdiv(N, chosen["BLOCK_N"]) * H * B, 1, 1),
        args={**inputs, "out": out, "lse": lse, **strides, "H": H, "N": N},
        constants={"D": D, "BLOCK_N": chosen["BLOCK_N"], "BLOCK_D": power_of_two(D)},
        num_warps=chosen["num_warps"],
    )
    return (out.transpose(1, 2), lse), [launch]
