"""exact_head: bound by reading the screen, which is a fraction of the dense head."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

import scrimp
from scrimp import HeadScreen
from scrimp.demo import text
from scrimp.demo.model import dithered_model_path
from scrimp.testing.rows import MAX_ROWS

from .registry import Call, Case, Problem, Work

COLD_BYTES = 2**28  # every call, ours or a peer's, takes the next copy of what it streams
STATES = 4  # windows of the calibration documents that make the basis
WINDOW = 512  # tokens
CHECKED = 256  # hidden states beside the dense head
FP32 = torch.float32
# name: V, K of random heads, whose screens are 8 bits throughout; "demo" is that of the dithered demo model
RANDOM = {"random-128k": (128 * 1024, 2048), "random-256k": (256 * 1024, 640)}


def cases() -> list[Case]:
    """One hidden state and eight; the largest logit and the 64 largest."""
    return [
        Case("exact_head", f"{name}-{rows}-top{k}", FP32, fields(name, rows, k), ("self-dense", "torch"), make)
        for name in ("demo", *RANDOM)
        for rows in (1, 8)
        for k in ((1, 64) if rows == 1 else (1,))
        for make in [partial(problem, name, rows, k)]
    ]


def fields(name: str, rows: int, k: int) -> dict[str, int]:
    """The shape fields of a row."""
    vocab, d = RANDOM.get(name, (49152, 576))
    return {"m": rows, "vocab": vocab, "d": d, "k": k}


@cache
def demo() -> tuple[Tensor, HeadScreen, Tensor]:
    """The head of the dithered demo model, its screen, and hidden states of held-out text."""
    model, tokenizer = scrimp.load(dithered_model_path())
    parts = [
        hidden_states(model, text.windows(tokenizer, WINDOW, split, STATES)) for split in ("calibration", "heldout")
    ]
    weight = model.lm_head.weight.detach()
    return weight, HeadScreen.build(weight, parts[0]), parts[1]


@torch.no_grad()
def hidden_states(model: Any, ids: Tensor) -> Tensor:
    """What the head is given for ids `[B, n]`: fp32 `[B n, d]`."""
    return torch.cat([model.model(row[None]).last_hidden_state[0] for row in ids])


@cache
def random_head(name: str) -> tuple[Tensor, HeadScreen, Tensor]:
    """A random head, its screen and random hidden states."""
    vocab, d = RANDOM[name]
    weight = torch.randn(vocab, d)
    return weight, HeadScreen.build(weight), torch.randn(64, d)


def problem(name: str, rows: int, k: int) -> Problem:
    """Inputs, call, check and limit."""
    weight, screen, states = random_head(name) if name in RANDOM else demo()
    turns = cycle([replace(screen, codes=screen.codes.clone()) for _ in range(copies(screen.codes.nbytes))])
    heads = cycle([weight.clone() for _ in range(copies(weight.nbytes))])
    x = states[len(states) // 2 :][:rows]
    return Problem(
        inputs=(x, heads, k),
        ours=lambda: scrimp.ops.exact_head(x, weight, next(turns), k),
        check=lambda got: check(weight, x, k, got),
        work=Work(bytes=screen.nbytes + rows * k * weight.shape[1] * weight.element_size(), flops=0),
        own={"self-dense": lambda: scrimp.ops.linear(x, next(heads)).topk(k)},
        standard="torch",
        fields=counts(weight, screen, states, k),
    )


def copies(size: int) -> int:
    """How many of so many bytes make a call find its own cold."""
    return -(-COLD_BYTES // size) + 1


def check(weight: Tensor, x: Tensor, k: int, got: tuple[Tensor, Tensor, Tensor]) -> None:
    """The logits and ids are those of the dense head."""
    if wrong := differing(scrimp.ops.linear(x, weight), k, got):
        raise AssertionError(f"{wrong} of {len(x)} hidden states have other logits or ids than the dense head gives")


def differing(dense: Tensor, k: int, got: tuple[Tensor, Tensor, Tensor]) -> int:
    """Hidden states whose k largest logits or ids are not those of the dense head's logits."""
    values, ids, _ = got
    same = (values == dense.topk(k).values) & (values == dense.gather(1, ids))
    in_order = (values[:, 1:] < values[:, :-1]) | (ids[:, 1:] > ids[:, :-1])  # of equal logits the lower id first
    first = ids[:, 0] == (dense == values[:, :1]).int().argmax(1)
    return int((~(same.all(-1) & in_order.all(-1) & first)).sum())


def compared(weight: Tensor, screen: HeadScreen, states: Tensor, ks: Sequence[int]) -> list[tuple[int, Tensor]]:
    """For each k the states whose top-k differs from the dense head's in a bit, and the rows computed for each."""
    wrong, scored = [0 for _ in ks], [[torch.empty(0, dtype=torch.int32)] for _ in ks]
    for part in states.split(MAX_ROWS):
        dense = scrimp.ops.linear(part, weight)
        for i, k in enumerate(ks):
            got = scrimp.ops.exact_head(part, weight, screen, k)
            wrong[i] += differing(dense, k, got)
            scored[i].append(got[2])
    return list(zip(wrong, map(torch.cat, scored), strict=True))


def counts(weight: Tensor, screen: HeadScreen, states: Tensor, k: int) -> dict[str, float]:
    """Of some hidden states: mismatches, the share that fell back, the rows computed (median)."""
    ((wrong, scored),) = compared(weight, screen, states[:CHECKED], [k])
    rate = float((scored == len(weight)).float().mean())
    return {"mismatches": wrong, "fallback_rate": rate, "scored": int(scored.median())}


def tiny() -> Call:
    """A call that is all overhead."""
    x, weight = torch.randn(1, 8), torch.randn(8, 8)
    screen = HeadScreen.build(weight)
    return lambda: scrimp.ops.exact_head(x, weight, screen)
