"""vq_sample beside the dense head and a choice from its logits; codebook and head lie in memory, not in a cache."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

import scrimp
from scrimp._registry import OPS

from .registry import Call, Case, Problem, Work
from .vq_logits import HEADS, ROWS, SHARE, cold, cold_dense, random_head

# name: temperature, top_p
WAYS = {"greedy": (0.0, 1.0), "drawn": (1.0, 1.0), "top-p": (1.0, 0.9)}
SCALE = 3.0  # of the logits


def cases() -> list[Case]:
    """One row and a few of each head; top-p for one."""
    found = [case(head, rows, way) for head in HEADS for rows in ROWS for way in ("greedy", "drawn")]
    return [*found, case("smollm2", 1, "top-p")]


def case(head: str, rows: int, way: str) -> Case:
    """One case of h `[rows, d]` and V / 100 codes."""
    V, d = HEADS[head]
    fields = {"m": rows, "vocab": V, "d": d, "codes": V // SHARE}
    make = partial(problem, rows, V, d, *WAYS[way])
    return Case("vq_sample", f"{head}-{rows}-{way}", torch.float32, fields, ("torch", "torch_dense"), make)


def problem(rows: int, V: int, d: int, heat: float, top_p: float) -> Problem:
    """Inputs, call, check and limit."""
    h, head = SCALE * torch.randn(rows, d), random_head(V, d, torch.float32)
    turns, K = cold(*head), len(head[0])
    seed, position = torch.arange(rows), torch.arange(rows) + 1000
    numbers: tuple[Any, ...] = (torch.full((rows,), heat), seed, position, 0, top_p, 0.0)
    sample = partial(
        scrimp.ops.vq_sample, temperature=numbers[0], seed=seed, position=position, top_k=0, top_p=top_p, min_p=0.0
    )
    return Problem(
        inputs=(h, turns, cold_dense(*head), heat, top_p),
        ours=lambda: sample(h, *next(turns)),
        check=lambda got: check(got, OPS["vq_logits"].call(h, *head, None), numbers),
        work=Work(bytes=4 * (K * d + rows * d + V), flops=2 * rows * K * d),
    )


def check(got: Tensor, logits: Tensor, numbers: tuple[Any, ...]) -> None:
    """The tokens are the reference's draws from the logits, a head of one code for each token."""
    one_each = torch.arange(logits.shape[1], dtype=torch.int32)
    for m, row in enumerate(logits):
        own = [x[m : m + 1] if isinstance(x, Tensor) else x for x in numbers]
        expected = OPS["vq_sample"].reference(torch.ones(1, 1), row[:, None], one_each, None, *own)
        if int(got[m]) != int(expected):
            raise AssertionError(f"row {m}: token {int(got[m])}, not {int(expected)}")


def tiny() -> Call:
    """A call that is all overhead."""
    h, codebook, codes = torch.randn(1, 8), torch.randn(4, 8), torch.zeros(8, dtype=torch.int32)
    heat, number = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    return lambda: scrimp.ops.vq_sample(h, codebook, codes, temperature=heat, seed=number, position=number)
