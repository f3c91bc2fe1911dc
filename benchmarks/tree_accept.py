"""tree_accept: one read of the logits on the path; sampling hashes every token of them besides."""

from functools import partial

import torch
from torch import Tensor

import scrimp
from scrimp._registry import OPS

from .registry import Call, Case, Problem, Work

VOCABULARY = {"smollm2": 49_152, "8b": 128_256}
STEPS = 3  # rows on the path


def cases() -> list[Case]:
    """Greedy and drawn, fp32 and bf16, a plain step and a tree."""
    shapes = [("smollm2", 1), ("smollm2", 16), ("8b", 64)]
    fp32 = [case(model, T, heat, torch.float32) for model, T in shapes for heat in (0.0, 1.0)]
    return [*fp32, case("smollm2", 16, 0.0, torch.bfloat16)]


def case(model: str, T: int, heat: float, dtype: torch.dtype) -> Case:
    """One sequence, a tree of T rows."""
    fields = {"m": T, "batch": 1, "vocab": VOCABULARY[model]}
    name = f"{model}-{T}-{'drawn' if heat else 'greedy'}"
    return Case("tree_accept", name, dtype, fields, ("torch",), partial(problem, T, fields["vocab"], heat, dtype))


def problem(T: int, V: int, heat: float, dtype: torch.dtype) -> Problem:
    """A chain whose first rows hold the tokens that are chosen; call, check and limit."""
    logits = (3 * torch.randn(1, T, V)).to(dtype)
    parents = torch.arange(-1, T - 1, dtype=torch.int32)[None]
    tokens = torch.randint(V, (1, T))
    args = [logits, tokens, parents, torch.tensor([heat]), torch.tensor([7]), torch.tensor([100])]
    rows = min(STEPS, T)
    for row in range(1, rows):
        tokens[0, row] = OPS["tree_accept"].reference(*args)[1][0, row - 1]
    return Problem(
        inputs=tuple(args),
        ours=lambda: scrimp.ops.tree_accept(*args),
        check=lambda got: check(got, args),
        work=Work(bytes=rows * V * dtype.itemsize, flops=rows * V),
    )


def check(got: tuple[Tensor, Tensor], args: list[Tensor]) -> None:
    """Every path and token is the reference's."""
    for name, a, b in zip(("path", "chosen"), got, OPS["tree_accept"].reference(*args), strict=True):
        if not torch.equal(a, b):
            raise AssertionError(f"{name} is {a.tolist()}, not {b.tolist()}")


def tiny() -> Call:
    """A call that is all overhead."""
    logits, zero = torch.zeros(1, 1, 8), torch.zeros(1, 1, dtype=torch.int64)
    args = (logits, zero, zero.int() - 1, torch.zeros(1), zero[0], zero[0])
    return lambda: scrimp.ops.tree_accept(*args)
