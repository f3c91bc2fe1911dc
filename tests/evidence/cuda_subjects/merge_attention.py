"""Evidence of merge_attention in CUDA C++."""

import functools

import torch
from mutations import Change, nth
from scrimp.benchmarks.merge_attention_cost import count_cuda
from subjects.merge_attention import make
from subjects.subject import Case, Flat, Mutant, against_oracle, pairwise

from .subject import CudaSubject

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def shifted(args: Flat) -> Flat:
    """Rows that start off the 16-byte grid."""
    wide = [torch.nn.functional.pad(out, (1, 0))[..., 1:] for out in args[::2]]
    return wide[0], args[1], wide[1], args[3]


def last_stride(args: Flat) -> Flat:
    """A last dimension that is not contiguous: the launcher copies."""
    swapped = [out.mT.contiguous().mT for out in args[::2]]
    return swapped[0], args[1], swapped[1], args[3]


def expanded(args: Flat) -> Flat:
    """Side b is the same for all heads and all rows: strides of 0."""
    return args[0], args[1], args[2][:, :1, :1].expand_as(args[0]), args[3][:, :1, :1].expand_as(args[1])


def with_lse(args: Flat, a: float, b: float) -> Flat:
    args[1][..., 1], args[3][..., 1] = a, b
    return args


def cases() -> dict[str, Case]:
    rows = pairwise(
        n=[1, 63, 65, 200], head_dim=[64, 128, 96, 40], heads=[1, 3], dtype=DTYPES, lse=["none", "one", "both"],
        strided=[False, True],
    )  # fmt: skip
    found: dict[str, Case] = {
        "-".join(str(value).removeprefix("torch.") for value in row.values()): functools.partial(make, **row)
        for row in rows
    }
    found |= {
        f"{change.__name__}-{dtype}".replace("torch.", ""): lambda change=change, dtype=dtype: change(
            make(65, 64, 3, dtype, "both", False)
        )
        for change in (shifted, last_stride, expanded)
        for dtype in DTYPES
    }
    return found | {
        "reference": functools.partial(make, 200, 128, 3, torch.bfloat16, "one", True),
        "element by element": lambda: shifted(make(3, 8, 1, torch.bfloat16, "one", False)),
        "head dim 1": functools.partial(make, 65, 1, 3, torch.float16, "both", False),
        "head dim 111": functools.partial(make, 9, 111, 3, torch.bfloat16, "both", True),
        "more vectors than threads": functools.partial(make, 3, 1028, 1, torch.float32, "one", False),
        "more elements than threads": functools.partial(make, 3, 301, 1, torch.float16, "one", False),
        "far apart": functools.partial(mutant_case, 65),
        "a second row in the last tile": functools.partial(mutant_case, 104),
        "no head dim": functools.partial(make, 5, 0, 3, torch.float16, "both", False),
    }


def mutant_case(n: int) -> Flat:
    """Tiles of 64 rows: the last one has 1 row, or for n = 104 40 rows, so that its threads have a second one."""
    return with_lse(make(n, 64, 3, torch.float16, "both", False), 200, -150)


def nothing(*shape: int) -> Flat:
    out, lse = torch.zeros(shape), torch.zeros(shape[:3])
    return out, lse, out, lse


BAD = {
    "dtype": (lambda a: (a[0].double(), a[1], a[2].double(), a[3]), "out_a must be float32, float16 or bfloat16 on C"),
    "mixed dtype": (lambda a: (a[0], a[1], a[2].float(), a[3]), "out_a and out_b differ in dtype"),
    "lse dtype": (lambda a: (a[0], a[1], a[2], a[3].half()), "lse_b must be float32"),
    "rank": (lambda a: (a[0][0], a[1], a[2], a[3]), r"out_a must be \[B, H, N, D\] and lse_a .*, got \[3, 65, 64\]"),
    "head size": (lambda a: (a[0], a[1], a[2][..., :4], a[3]), r"shape \[2, 3, 65, 4\] of out_b .* does not fit out_a"),
    "rows": (lambda a: (a[0], a[1][..., :4], a[2], a[3]), r"\[2, 3, 4\] of lse_a does not fit out_a \[2, 3, 65, 64\]"),
    "device": (lambda a: (a[0], a[1], a[2], a[3].to("meta")), "out_a, lse_a, out_b and lse_b must be on one CUDA dev"),
}


def planted(change: Change, *caught_by: str, case: str = "") -> Mutant:
    return Mutant("merge_attention_kernel<__half, 8>", change, frozenset(caught_by), case=case)


LSE, WIDE = r"ld\.global\.f32(\s+%f\d+, \[%rd\d+)\]", r"ld\.global\.v4\.u32(\s+\{[^}]*\}, \[%rd\d+)\]"
STORE, WEIGHT = r"st\.global\.v4\.u32(\s+\[%rd\d+)\]", r"ld\.shared\.v2\.f32(\s+)\{(%f\d+), (%f\d+)\}"
BARRIER, BOUND = r"bar\.sync\s+0;", r"setp\.ge\.s32(\s+%p\d+, %r\d+, %r\d+);"
EMPTY, PAIR = r"setp\.leu\.f32(\s+%p\d+, %f\d+), 0f00000000", r"mov\.b32(\s+%r\d+), \{(%rs\d+), (%rs\d+)\};"
TILE = r"min\.s64(\s+%rd\d+), (%rd\d+), (%rd\d+);"
SELECT = r"selp\.f32(\s+%f\d+), 0f00000000, (%f\d+), \S+;"
SECOND = "a second row in the last tile"
RACE = ("race", "uninitialised")
MUTANTS = {
    "no barrier": planted(nth(BARRIER, 0, ""), *RACE),
    "barrier of a warp": planted(nth(BARRIER, 0, "bar.warp.sync -1;"), *RACE),
    "one tile too far": planted(nth(TILE, 0, r"mov.b64\1, \3;"), "out_of_bounds"),
    "weights off by one row": planted(nth(BOUND, 0, r"setp.gt.s32\1;"), "out_of_bounds"),
    "first row off by one": planted(nth(BOUND, 1, r"setp.gt.s32\1;"), "uninitialised"),
    "second row off by one": planted(nth(BOUND, 2, r"setp.gt.s32\1;"), "out_of_bounds", case=SECOND),
    "second row stored off by one": planted(nth(BOUND, 3, r"setp.gt.s32\1;"), "uninitialised", case=SECOND),
    "all blocks do the first tile": planted(nth(r"mov\.u32(\s+%r\d+), %ctaid\.x;", 0, r"mov.u32\1, 0;"), "value"),
    "lse of the next row": planted(nth(LSE, 0, r"ld.global.f32\1+4]"), "out_of_bounds"),
    "smaller lse as the base": planted(nth(r"max\.f32", 0, "min.f32"), "value"),
    "no guard against -inf": planted(nth(SELECT, 0, r"mov.f32\1, \2;"), "value"),
    "no guard against an empty row": planted(nth(EMPTY, 0, r"setp.lt.f32\1, 0f00000000"), "value"),
    "no normalisation": planted(nth(r"rcp\.rn\.f32(\s+%f\d+), %f\d+;", 0, r"mov.f32\1, 0f3F800000;"), "value"),
    "logarithm to base 2": planted(nth(r"0f3F317218", 0, "0f3F800000"), "value"),
    "weights exchanged": planted(nth(WEIGHT, 0, r"ld.shared.v2.f32\1{\3, \2}"), "value"),
    "weights of one row for both": planted(
        nth(r"(shl\.b32\s+%r\d+), %r\d+, 3;", -1, r"\1, %r5, 3;"), "value", case=SECOND
    ),
    "vector of the next lane": planted(nth(WIDE, 1, r"ld.global.v4.u32\1+16]"), "out_of_bounds"),
    "misaligned vector": planted(nth(WIDE, 0, r"ld.global.v4.u32\1+8]"), "misaligned"),
    "store to the next vector": planted(nth(STORE, -1, r"st.global.v4.u32\1+16]"), "out_of_bounds", "value"),
    "halves of a word exchanged": planted(nth(PAIR, 0, r"mov.b32\1, {\3, \2};"), "value"),
    # Sums of exponentials are never negative, so "not above 0" is "equal to 0" (and NaN goes the same way).
    "guard by equality": planted(nth(EMPTY, 0, r"setp.equ.f32\1, 0f00000000")),
}
CASES = cases()
SUBJECT = CudaSubject(
    op="merge_attention",
    cases=CASES,
    warp_cases=list(CASES)[:4],
    check=against_oracle("merge_attention"),
    reference_launch="reference",
    least_bytes=lambda args: count_cuda(*args).unique_bytes,
    count=count_cuda,
    exact_bytes=lambda args: 0 not in args[2].stride(),
    mutant_case="far apart",
    mutants=MUTANTS,
    idle={str(shape): functools.partial(nothing, *shape) for shape in ((0, 2, 3, 8), (2, 0, 3, 8), (1, 2, 0, 8))},
    bad=BAD,
)
