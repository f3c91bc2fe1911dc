"""silu_mul in Triton: one program takes a block of a row."""

import triton
import triton.language as tl
from torch import Tensor

from .gate import block_of_row, gate_launches, store_gated, times_logistic
from .launch import Launch
from .tuning import config


@triton.jit
def silu_mul_kernel(gate, up, out, gate_m, up_m, N, BLOCK: tl.constexpr):
    row, n = block_of_row(N, BLOCK)
    x = tl.load(gate + row * gate_m + n, mask=n < N, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_m + n, mask=n < N, other=0.0).to(tl.float32)
    store_gated(times_logistic(x, x), factor, out + row * N + n, n < N)


def launches(gate: Tensor, up: Tensor) -> tuple[Tensor, list[Launch]]:
    """The result, still unwritten, and what writes it."""
    chosen = config("silu_mul", gate.device, elements=max(gate.numel(), 1))
    return gate_launches("silu_mul", silu_mul_kernel, gate, up, chosen, {})
