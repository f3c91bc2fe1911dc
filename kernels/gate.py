"""What the kernels of gated activations share: a program's elements, the logistic function, the launch."""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv, unit_last_stride


@triton.jit
def block_of_row(N, BLOCK: tl.constexpr):
    """The program's row (int64) and its columns `[BLOCK]`; programs go through a row, then to the next."""
    blocks = tl.cdiv(N, BLOCK)
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def times_logistic(x, t):
    """x / (1 + exp(-t)): x times the logistic function of t; relative error 1e-6 where exp(-t) is finite."""
    near = tl.where(t > 88.0, 88.0, tl.where(t < -88.0, -88.0, t))
    high = near * -1.4426950408889634
    low = tl.fma(near, -1.92596303e-8, tl.fma(near, -1.4426950408889634, -high))  # what high rounded off
    power = tl.exp2(high)
    power = tl.where(t < -88.0, float("inf"), tl.fma(power, low * 0.693147181, power))
    return x / (1.0 + power)


@triton.jit
def store_gated(activated, up, to, inside):
    """round(activated) * up, as two operators round."""
    kind = to.dtype.element_ty
    tl.store(to, (activated.to(kind).to(tl.float32) * up).to(kind), mask=inside)


def gate_launches(
    op: str, kernel: Any, gate: Tensor, up: Tensor, chosen: Mapping[str, int], constants: Mapping[str, Any]
) -> tuple[Tensor, list[Launch]]:
    """The result, still unwritten, and what writes it in the `chosen` configuration."""
    if gate.dtype == torch.float64:
        raise ValueError(f"{op}: gate is float64; on a GPU it must be float32, bfloat16 or float16")
    out = gate.new_empty(gate.shape)
    if out.numel() == 0:
        return out, []
    if gate.is_contiguous() and up.is_contiguous() and out.numel() < 2**30:
        gate, up = gate.view(1, -1), up.view(1, -1)  # one long row
    gate, up = (unit_last_stride(x).flatten(0, -2) if x.dim() > 1 else x.view(1, -1) for x in (gate, up))
    rows, N = gate.shape
    launch = Launch(
        kernel,
        grid=(rows * cdiv(N, chosen["BLOCK"]), 1, 1),
        args={"gate": gate, "up": up, "out": out, "gate_m": gate.stride(0), "up_m": up.stride(0), "N": N},
        constants={**constants, "BLOCK": chosen["BLOCK"]},
        num_warps=chosen["num_warps"],
    )
    return out, [launch]
