"""Evidence of vq_logits."""

import functools
from typing import Any

import torch
from mutations import BARRIER, MMA_A, MMA_B, SWAPPED, WAIT, Change, at_line, nth, weaker
from scrimp.kernels import linear, vq_logits
from torch import Tensor

from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle

from .subject import Case, Flat, Mutant, Subject

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def make(
    rows: int, d: int, K: int, V: int, levels: int, dtype: torch.dtype, bias: bool = False, outside: bool = False
) -> Flat:
    """Random codes; `outside`: some are no rows of the codebook."""
    h, codebook = torch.randn(rows, d).to(dtype), torch.randn(K, d).to(dtype)
    codes = torch.randint(max(K, 1), (levels, V), dtype=torch.int32)
    if outside:
        codes[0, ::5], codes[-1, 1::7] = -1, K
    return h, codebook, codes if levels > 1 else codes[0], torch.randn(V).to(dtype) if bias else None


def strided(dtype: torch.dtype) -> Flat:
    """Nothing lies close."""
    h, codebook = torch.randn(6, 3, 2).to(dtype).permute(2, 1, 0), torch.randn(9, 20).to(dtype)[:, 3:9]
    codes = torch.randint(9, (35, 4), dtype=torch.int32).T[1:3]
    return h, codebook, codes, torch.randn(35, 2).to(dtype)[:, 1]


def check(results: Any, args: Flat) -> None:
    """That of the reference where the codes are rows of the codebook, NaN elsewhere."""

    def reference(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
        outside = (codes < 0) | (codes >= len(codebook))
        if len(codebook) == 0:
            return h.new_full((*h.shape[:-1], codes.shape[-1]), torch.nan)
        logits = OPS["vq_logits"].reference(h, codebook, codes.masked_fill(outside, 0), bias)
        return logits.masked_fill(torch.atleast_2d(outside).any(0), torch.nan)

    assert_matches_oracle(results, reference, *args)


# One tuple for each compiled kernel: dtype, levels, bias; d; codes, tokens and rows.
EMULATED: dict[str, Case] = {
    f"{dtype}-{levels}-{rows}-{K}-{V}".removeprefix("torch."): functools.partial(
        make, rows, d, K, V, levels, dtype, bias, outside
    )
    for dtype, levels, bias, outside, d, Ks, Vs, some_rows in [
        (HALF, 1, False, False, 48, (16, 160), (1024, 2064), (1, 5, 16)),
        (BRAIN, 2, True, True, 80, (37, 130), (77, 1501), (1, 5)),
        (BRAIN, 1, False, False, 64, (16,), (64, 3072), (70,)),  # of more than 64 rows the scores are torch's
    ]
    for K in Ks for V in Vs for rows in some_rows
} | {"one sector of scores": functools.partial(make, 16, 1024, 16, 4096, 1, HALF)}  # fmt: skip
INTERPRETED: dict[str, Case] = {
    f"{name}-{word}": functools.partial(case, dtype=dtype)
    for word, dtype in (("half", HALF), ("single", SINGLE))
    for name, case in {
        "one row": functools.partial(make, 1, 20, 40, 3000, 1),
        "rows": functools.partial(make, 9, 20, 40, 700, 3, bias=True),
        "more rows": functools.partial(make, 70, 8, 9, 50, 1),
        "one token": functools.partial(make, 3, 8, 1, 1, 1, bias=True),
        "codes outside": functools.partial(make, 3, 8, 5, 90, 2, outside=True),
        "no codes": functools.partial(make, 3, 8, 0, 20, 1),
        "strided": strided,
    }.items()
}


def shipped() -> dict[str, Case]:
    """Every configuration, without and with residual codes and a bias."""

    def meta(rows: int, levels: int, dtype: torch.dtype) -> Flat:
        empty = functools.partial(torch.empty, dtype=dtype, device="meta")
        V, K, d = 131_072, 1312, 2048
        codes = torch.empty((V,) if levels == 1 else (levels, V), dtype=torch.int32, device="meta")
        return empty(rows, d), empty(K, d), codes, None if levels == 1 else empty(V)

    return {
        f"{rows}-{levels}-{str(dtype).removeprefix('torch.')}": functools.partial(meta, rows, levels, dtype)
        for rows, levels, dtype in ((1, 1, BRAIN), (16, 2, BRAIN), (1, 2, SINGLE), (16, 1, SINGLE))
    }


def planted(change: Change, *caught_by: str) -> Mutant:
    return Mutant("vq_logits_kernel", change, frozenset(caught_by))


def product(change: Change, *caught_by: str) -> Mutant:
    return Mutant("linear_kernel", change, frozenset(caught_by))


def short(kernel: str, **buffers: int) -> Mutant:
    return Mutant(kernel, caught_by=frozenset({"out_of_bounds"}), short=buffers)


COPY = ("race", "async_race", "uninitialised", "value")
WRONG = ("value", "out_of_bounds")
LESS, LESS_EQUAL = r"setp\.lt\.s32", "setp.le.s32"
SCORE, SUM = "total += tl.load(scores + code", r"add\.f32(\s+%r\d+), (%r\d+), %r\d+;"
BYTES = r"shl\.b64(\s+%rd\d+, %rd\d+), 1;"  # of elements
line = functools.partial(at_line, vq_logits.vq_logits_kernel)
matrix = functools.partial(at_line, linear.linear_kernel)
MUTANTS = {
    **{f"barrier {k} of products removed": product(nth(BARRIER, k, ""), *COPY) for k in (0, 1)},
    "wait of products weakened": product(weaker(0), *COPY),
    "wait of products removed": product(nth(WAIT, 0, ""), *COPY),
    "operand A swapped": product(nth(MMA_A, 0, SWAPPED), "value"),
    "operand B swapped": product(nth(MMA_B, 0, SWAPPED), "value"),
    "rows past the end": product(matrix("rows = tl.load(x + at", LESS, 0, LESS_EQUAL), *WRONG),
    "inputs past the end": product(matrix("inside = (k < K - at)", LESS, 0, LESS_EQUAL), *WRONG),
    **{f"{name} short": short("linear_kernel", **{name: 2}) for name in ("x", "weight0", "out")},
    "store's barrier removed": planted(nth(BARRIER, 1, ""), *COPY),
    "next row's barrier removed": planted(nth(BARRIER, 0, ""), *COPY),
    "codes past the end": planted(line("code = tl.load(codes", LESS, None, LESS_EQUAL), "out_of_bounds"),
    "a negative code": planted(line(SCORE, r"(setp\.gt\.s32\s+%p\d+, %r\d+), -1;", 0, r"\1, -2;"), *WRONG),
    "a code past the end": planted(line(SCORE, LESS, 9, LESS_EQUAL), *WRONG),
    "outside is nothing": planted(line(SCORE, "32704", 0, "0"), "value"),
    "second code is the first": planted(
        line("code = tl.load(codes", r"(ld\.global\.b32 \{ %r\d+ \}, \[ %rd\d+ )\+ 4", 0, r"\1+ 0"), *WRONG
    ),
    "a code left out": planted(line(SCORE, SUM, 0, r"mov.b32\1, \2;"), "value"),
    "no bias": planted(line("total += tl.load(bias + v", SUM, 0, r"mov.b32\1, \2;"), "value"),
    "bias of the neighbour": planted(line("total += tl.load(bias + v", r"\+ 2 \]", 0, "+ 4 ]"), *WRONG),
    "rows of scores overlap": planted(line("for m in range(first", BYTES, -1, r"shl.b64\1, 0;"), *WRONG, "misaligned"),
    "rows of logits overlap": planted(line("for m in range(first", BYTES, 1, r"shl.b64\1, 0;"), *WRONG, "misaligned"),
    "first row": planted(
        line("first = tl.program_id(1)", r"mul\.lo\.s32(\s+%r\d+, %r\d+), %r\d+;", 0, r"mul.lo.s32\1, 3;"), *WRONG
    ),
    "stored without a mask": planted(nth(r"@%p\d+( st\.global\.b16)", 0, r"\1"), *WRONG),
    **{f"{name} of the tokens short": short("vq_logits_kernel", **{name: size}) for name, size in
       {"scores": 2, "codes": 4, "bias": 2, "out": 2}.items()},
}  # fmt: skip
SHIPPED = shipped()
SUBJECT = Subject(
    op="vq_logits",
    cases=EMULATED,
    warp_cases=[
        "float16-1-5-160-2064", "float16-1-16-16-1024", "bfloat16-2-5-37-77", "bfloat16-2-1-130-1501",
    ],
    interpreted=INTERPRETED,
    check=check,
    reference_launch="one sector of scores",
    shipped=SHIPPED,
    defaults=["1-1-bfloat16", "16-2-bfloat16"],
    mutant_case="bfloat16-2-5-37-77",
    mutants=MUTANTS,
    tensor_kernels={"linear_kernel": 0},
    without_tensors=[name for name in SHIPPED if "float32" in name],
    exact_bytes=False,  # a warp that looks up a score twice asks for it once
)  # fmt: skip
