"""gelu_mul: the activation between two linears; its rows are still in the cache."""

from functools import partial

import torch

import scrimp
from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle

from .registry import Call, Case, Problem, Work

# rows of so many columns: one token, one tree and a prompt of SmolLM2-135M; an 8B model's
SHAPES = {
    "token": (1, 1536),
    "tree": (64, 1536),
    "prompt": (2048, 1536),
    "token-8b": (1, 14336),
    "tree-8b": (64, 14336),
}


def cases() -> list[Case]:
    """Every shape in fp32 and bf16."""
    return [case(name, *shape, dtype) for name, shape in SHAPES.items() for dtype in (torch.float32, torch.bfloat16)]


def case(name: str, rows: int, columns: int, dtype: torch.dtype) -> Case:
    """One case of gate and up `[rows, columns]`."""
    fields = {"m": rows, "n": columns}
    return Case("gelu_mul", name, dtype, fields, ("torch", "inductor"), partial(problem, rows, columns, dtype))


def problem(rows: int, columns: int, dtype: torch.dtype) -> Problem:
    """Inputs (halves of one linear's output), call, check and limit."""
    gate, up = torch.randn(rows, 2 * columns).to(dtype).chunk(2, 1)
    return Problem(
        inputs=(gate, up),
        ours=lambda: scrimp.ops.gelu_mul(gate, up),
        check=lambda got: assert_matches_oracle(got, OPS["gelu_mul"].reference, gate, up, True),
        work=Work(bytes=3 * gate.numel() * gate.element_size(), flops=20 * gate.numel()),
    )


def tiny() -> Call:
    """A call that is all overhead."""
    x = torch.randn(1, 8)
    return lambda: scrimp.ops.gelu_mul(x, x)
