"""linear: few rows are bound by reading the weights, which lie in memory, not in a cache; many by arithmetic."""

from functools import partial
from itertools import cycle

import torch
from torch import Tensor

import scrimp
from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle

from .registry import Call, Case, Problem, Work

COLD_BYTES = 2**28  # every call, ours or a peer's, takes the next copy of the weights; the copies have so many bytes
CHECKED_OUTPUTS = 500
# name: K, the outputs of each weight, whether a residual is added; a layer of an 8B model, then SmolLM2-135M's
SHAPES = {
    "large": (4096, (14336,), False),
    "qkv": (576, (576, 192, 192), False),
    "o": (576, (576,), True),
    "gate_up": (576, (1536, 1536), False),
    "down": (1536, (576,), True),
    "head": (576, (49152,), False),
}
ROWS = {"large": (1, 8, 16, 64), "gate_up": (1, 16, 64, 512)}


def cases() -> list[Case]:
    """One row, a few, the most that are row-invariant, and a prompt."""
    return [
        case(f"{name}-{rows}", rows, *shape, dtype)
        for name, shape in SHAPES.items()
        for dtype in (torch.float32, torch.bfloat16)
        for rows in ROWS.get(name, (1, 16))
    ]


def case(name: str, rows: int, K: int, outputs: tuple[int, ...], residual: bool, dtype: torch.dtype) -> Case:
    """One case of x `[rows, K]` and a weight `[N, K]` for each number of outputs."""
    fields = {"m": rows, "n": sum(outputs), "k": K}
    # "self-1-row": below 1 by what more rows cost; the case with one row says how fast that row is beside torch's
    peers = ("torch",) if rows == 1 else ("torch", "self-1-row")
    return Case("linear", name, dtype, fields, peers, partial(problem, rows, K, outputs, residual, dtype))


def problem(rows: int, K: int, outputs: tuple[int, ...], residual: bool, dtype: torch.dtype) -> Problem:
    """Inputs, call, check and limit."""
    N = sum(outputs)
    x, added = torch.randn(rows, K).to(dtype), torch.randn(rows, N).to(dtype) if residual else None
    weights = [torch.randn(n, K).to(dtype) for n in outputs]
    copies = -(-COLD_BYTES // (N * K * dtype.itemsize)) + 1
    turns = cycle([[weight.clone() for weight in weights] for _ in range(copies)])

    def ours(rows: int) -> Call:
        some, beside = x[:rows], None if added is None else added[:rows]
        return lambda: scrimp.ops.linear(some, next(turns), residual=beside)

    return Problem(
        inputs=(x, turns, added),
        ours=ours(rows),
        check=lambda got: check(got, x, weights, added),
        work=Work(bytes=(N * K + rows * (K + (2 if residual else 1) * N)) * dtype.itemsize, flops=2 * rows * N * K),
        own={"self-1-row": ours(1)},
    )


def check(got: Tensor, x: Tensor, weights: list[Tensor], added: Tensor | None) -> None:
    """Some hundred outputs against the oracle: outputs do not depend on each other."""
    whole = torch.cat(weights)
    some = torch.linspace(0, len(whole) - 1, min(CHECKED_OUTPUTS, len(whole))).long()
    beside = None if added is None else added[:, some]
    assert_matches_oracle(got[:, some], OPS["linear"].reference, x, [whole[some]], [], beside)


def tiny() -> Call:
    """A call that is all overhead."""
    x, weight = torch.randn(1, 8), torch.randn(8, 8)
    return lambda: scrimp.ops.linear(x, weight)
