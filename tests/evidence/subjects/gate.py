"""What the evidence of silu_mul and gelu_mul shares."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from mutations import at_line, nth

from .subject import Case, Flat, Mutant, pairwise

WILD = [torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 12.0, -12.0]


def make(rows: int, columns: int, dtype: torch.dtype, layout: str, wild: bool, extra: tuple[Any, ...]) -> Flat:
    """Operands as halves of one linear's output, close to each other, or in an order that has to be copied."""
    both = torch.randn(3, rows, 2 * columns)
    both[..., :columns] *= 3
    if wild:
        both[..., : len(WILD)] = torch.tensor(WILD)
    gate, up = both.to(dtype).chunk(2, -1)
    if layout == "close":
        gate, up = gate.contiguous(), up.contiguous()
    elif layout == "turned":
        gate, up = gate.transpose(0, 1), up.transpose(0, 1)
    return gate, up, *extra


def cases(dtypes: Sequence[torch.dtype], extras: Sequence[tuple[Any, ...]]) -> dict[str, Case]:
    rows = pairwise(
        rows=[1, 5, 21], columns=[64, 601, 1200], dtype=list(dtypes), layout=["halves", "close", "turned"],
        wild=[False, True], extra=list(extras),
    )  # fmt: skip
    return {
        "-".join(str(value).removeprefix("torch.").strip("(),") for value in row.values()).rstrip("-"):
        functools.partial(make, **row) for row in rows
    }  # fmt: skip


def shipped(extras: Sequence[tuple[Any, ...]]) -> dict[str, Case]:
    """The configuration in three dtypes, on halves of a linear's output."""

    def meta(dtype: torch.dtype, extra: tuple[Any, ...]) -> Flat:
        gate, up = torch.empty(64, 2 * 14336, dtype=dtype, device="meta").chunk(2, 1)
        return gate, up, *extra

    return {
        "-".join(["14336", str(dtype).removeprefix("torch."), *map(str, extra)]): functools.partial(meta, dtype, extra)
        for dtype in (torch.bfloat16, torch.float16, torch.float32) for extra in extras
    }  # fmt: skip


EX2, DIVISION = r"ex2\.approx(\.ftz)?\.f32(\s+%r\d+, )(%r\d+)", r"div\.full\.f32(\s+%r\d+, )(%r\d+), (%r\d+)"


def mutants(op: str, kernel: Any) -> dict[str, Mutant]:
    """Faults of a gated activation's kernel, on a case of 601 columns with infinities in each row."""

    def planted(change: Any, *caught_by: str) -> Mutant:
        return Mutant(f"{op}_kernel", change, frozenset(caught_by))

    def short(name: str) -> Mutant:
        return Mutant(f"{op}_kernel", caught_by=frozenset({"out_of_bounds"}), short={name: 2})

    return {
        "bound off by one": planted(
            at_line(kernel, "tl.load(gate", r"setp\.lt\.s32", None, "setp.le.s32"), "out_of_bounds"
        ),
        "up loaded without a mask": planted(
            at_line(kernel, "tl.load(up", r"@%p\d+( ld\.global)", -1, r"\1"), "out_of_bounds"
        ),
        "stored without a mask": planted(nth(r"@%p\d+( st\.global)", -1, r"\1"), "out_of_bounds"),
        "up is gate": planted(nth(rf"{op}_kernel_param_1\]", 0, f"{op}_kernel_param_0]"), "value"),
        "row and block exchanged": planted(
            nth(r"div\.s32(\s+%r\d+, %r\d+, %r\d+;)", 0, r"rem.s32\1"), "value", "out_of_bounds"
        ),
        "no exponential": planted(nth(EX2, 0, r"mov.b32\2\3"), "value"),
        "wrong base of the exponential": planted(nth("0fBFB8AA3B", 0, "0fBF800000"), "value"),
        "rest of the exponent added": planted(nth(r"neg\.f32(\s+%r\d+, %r\d+;)", -1, r"mov.b32\1"), "value"),
        "two instead of one": planted(nth(r"(add\.f32\s+%r\d+, %r\d+), 0f3F800000;", 0, r"\1, 0f40000000;"), "value"),
        "large exponents not cut": planted(
            nth(r"selp\.f32(\s+%r\d+), 0f42B00000, (%r\d+), %p\d+;", 0, r"mov.b32\1, \2;"), "value"
        ),
        "minus infinity is finite": planted(
            nth(r"selp\.f32(\s+%r\d+), 0f7F800000, (%r\d+), %p\d+;", 0, r"mov.b32\1, \2;"), "value"
        ),
        "divided the wrong way": planted(nth(DIVISION, 0, r"div.full.f32\1\3, \2"), "value"),
        **{f"{name} short": short(name) for name in ("gate", "up", "out")},
    }
