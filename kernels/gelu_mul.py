"""gelu_mul in Triton: one program takes a block of a row."""

import triton
import triton.language as tl
from torch import Tensor

from .gate import block_of_row, gate_launches, store_gated, times_logistic
from .launch import Launch
from .tuning import config


@triton.jit
def gelu_tanh(x):
    """(1 + tanh u) / 2 is the logistic function of 2 u."""
    return times_logistic(x, x * 1.5957691216 * tl.fma(x * x, 0.044715, 1.0))


@triton.jit
def gelu_erf(x):
    """By erfc(|x| / sqrt 2), relative error 1.2e-7: Numerical Recipes, section 6.2.2."""
    z = tl.abs(x) * 0.70710678
    t = tl.div_rn(1.0, tl.fma(z, 0.5, 1.0))
    p = tl.fma(t, 0.17087277, -0.82215223)
    p = tl.fma(p, t, 1.48851587)
    p = tl.fma(p, t, -1.13520398)
    p = tl.fma(p, t, 0.27886807)
    p = tl.fma(p, t, -0.18628806)
    p = tl.fma(p, t, 0.09678418)
    p = tl.fma(p, t, 0.37409196)
    p = tl.fma(p, t, 1.00002368)
    p = tl.fma(p, t, -1.26551223)
    far = 0.5 * t * tl.exp2(tl.fma(-z, z, p) * 1.4426950408889634)  # the weight of the tail behind |x|
    return x * tl.where(x < 0.0, far, 1.0 - far)


@triton.jit
def gelu_mul_kernel(gate, up, out, gate_m, up_m, N, TANH: tl.constexpr, BLOCK: tl.constexpr):
    row, n = block_of_row(N, BLOCK)
    x = tl.load(gate + row * gate_m + n, mask=n < N, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_m + n, mask=n < N, other=0.0).to(tl.float32)
    store_gated(gelu_tanh(x) if TANH else gelu_erf(x), factor, out + row * N + n, n < N)


def launches(gate: Tensor, up: Tensor, tanh: bool) -> tuple[Tensor, list[Launch]]:
    """The result, still unwritten, and what writes it."""
    chosen = config("gelu_mul", gate.device, elements=max(gate.numel(), 1))
    return gate_launches("gelu_mul", gelu_mul_kernel, gate, up, chosen, {"TANH": tanh})
