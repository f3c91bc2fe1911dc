"""Evidence of vq_logits in CUDA C++. The scores of the codes are those of the op linear, which has its own."""

import functools

import torch
from mutations import BARRIER, Change, nth
from scrimp.benchmarks.vq_logits_cost import in_shared, looked_up
from subjects.subject import Case, Flat, Mutant, pairwise
from subjects.vq_logits import check, make, strided

from .subject import CudaSubject, source

HALF, BRAIN, SINGLE = DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def cases() -> dict[str, Case]:
    rows = pairwise(
        rows=[1, 3, 4, 9], K=[1, 37, 130], V=[1, 77, 1024, 1100], levels=[1, 2, 3], dtype=DTYPES,
        bias=[False, True], outside=[False, True],
    )  # fmt: skip
    found: dict[str, Case] = {
        "-".join(str(value).removeprefix("torch.") for value in row.values()): functools.partial(make, d=8, **row)
        for row in rows
    }
    return found | {
        MUTATED: functools.partial(make, 5, 8, 37, 1100, 2, HALF, bias=True, outside=True),
        WHOLE: functools.partial(make, 4, 8, 64, 4096, 1, HALF),
        "fewer rows at once": functools.partial(make, 3, 2, 3000, 100, 1, SINGLE),
        "more codes than shared memory holds": functools.partial(make, 2, 2, 4097, 100, 1, SINGLE),
        "codes off the grid": lambda: shifted(2),
        "bias off the grid": lambda: shifted(3),
        "strided": functools.partial(strided, BRAIN),
        "no inputs": functools.partial(make, 3, 0, 5, 20, 1, BRAIN, bias=True),
    }


def shifted(which: int) -> Flat:
    """An argument that begins off the 16-byte grid."""
    args = list(make(5, 8, 9, 1024, 2, HALF, bias=True))
    some = args[which]
    args[which] = torch.cat([some.flatten()[:1], some.flatten()])[1:].view(some.shape)
    return tuple(args)


BAD = {
    "dtype": (lambda a: (*(x.double() for x in a[:2]), *a[2:]), "h must be float32, float16 or bfloat16 on CUDA"),
    "dtype of codebook": (lambda a: (a[0], a[1].float(), *a[2:]), "h and codebook differ in dtype"),
    "dtype of codes": (lambda a: (*a[:2], a[2].long(), a[3]), "codes must be int32"),
    "width": (lambda a: (a[0], a[1][:, :7], *a[2:]), r"codebook \[37, 7\] does not fit h \[5, 8\]"),
    "no level": (lambda a: (*a[:2], a[2][:0], a[3]), r"codes has shape \[0, 1100\], expected \[V\] or \[G, V\]"),
    "dtype of bias": (lambda a: (*a[:3], a[3].float()), "h and bias differ in dtype"),
    "bias": (lambda a: (*a[:3], a[3][1:]), r"bias has shape \[1099\], expected \[1100\]"),
    "device": (lambda a: (*a[:2], a[2].to("meta"), a[3]), "h, codebook, codes and bias must be on one CUDA device"),
}
line, shared = source("vq_logits"), source("vq_tokens", "common")
MUTATED, WHOLE, WRONG = "5-37-1100", "64 codes", ("value", "out_of_bounds", "misaligned")


def planted(change: Change, *caught_by: str, case: str = "") -> Mutant:
    return Mutant("vq_logits_kernel<__half, 4>", change, frozenset(caught_by), case=case)


def short(**buffers: int) -> Mutant:
    return Mutant("vq_logits_kernel<__half, 4>", caught_by=frozenset({"out_of_bounds"}), short=buffers)


ZERO, NEXT = (r"mul\.lo\.s64(\s+%rd\d+), %rd\d+, %rd\d+;", 0, r"mov.b64\1, 0;"), r"(\s+\{[^}]*\}, \[%rd\d+)\]"
MUTANTS = {
    "no barrier": planted(nth(BARRIER, 0, ""), "race", "uninitialised"),
    "barrier of a warp": planted(nth(BARRIER, 0, "bar.warp.sync -1;"), "race", "uninitialised"),
    "scores off the grid": planted(
        shared("reinterpret_cast<uintptr_t>(from)", r"and\.b64(\s+%rd\d+, %rd\d+), 15", 0, r"and.b64\1, 0"),
        "misaligned",
    ),
    "vectors of scores past the end": planted(
        shared("i < vectors", r"setp\.ge\.s32", 0, "setp.gt.s32"), "race", *WRONG
    ),
    "scores past the end": planted(shared("i < count", r"setp\.ge\.s32", 0, "setp.gt.s32"), "race", *WRONG),
    "scores of the first rows": planted(line("const T* scores", *ZERO), "value"),
    "first rows alone": planted(line("const int64_t first", *ZERO), *WRONG),
    "rows past the last": planted(nth(r"min\.s64(\s+%rd\d+), (%rd\d+), %rd\d+;", 0, r"mov.b64\1, \2;"), *WRONG),
    "tokens past the last": planted(line("if (v >= V) return", r"setp\.ge\.s64", 0, "setp.gt.s64"), *WRONG),
    "tokens of the first block": planted(
        line("const int64_t v =", r"mul\.wide\.u32(\s+%rd\d+), %r\d+, 256;", 0, r"mov.b64\1, 0;"), *WRONG
    ),
    "first codes again": planted(shared("const auto codes", *ZERO), "value"),
    "a negative code": planted(
        shared("known[i] = codes.x[i] >= 0", r"setp\.gt\.s32(\s+%p\d+, %r\d+), -1;", 0, r"setp.gt.s32\1, -2;"), *WRONG
    ),
    "a code past the last": planted(
        shared("known[i] = codes.x[i] >= 0", r"setp\.gt\.s64", 0, "setp.ge.s64"), "uninitialised", *WRONG
    ),
    "unknown codes looked up": planted(
        shared("at[i] = known[i]", r"selp\.b32(\s+%r\d+), (%r\d+), 0, %p\d+;", 0, r"mov.b32\1, \2;"),
        "uninitialised",
        *WRONG,
    ),
    "unknown codes are nothing": planted(shared("? score : NAN", "0f7FC00000", 0, "0f00000000"), "value"),
    "a level left out": planted(
        shared("? score : NAN", r"add\.f32(\s+%f\d+), %f\d+, (%f\d+);", 0, r"mov.f32\1, \2;"), "value"
    ),
    "no bias": planted(
        shared("total[i / kWidth]", r"add\.f32(\s+%f\d+), %f\d+, (%f\d+);", 0, r"mov.f32\1, \2;"), "value"
    ),
    "bias of the next tokens": planted(nth(r"ld\.global\.v4\.u16" + NEXT, 0, r"ld.global.v4.u16\1+8]"), *WRONG),
    "codes misaligned": planted(nth(r"ld\.global\.v4\.u32" + NEXT, -1, r"ld.global.v4.u32\1+8]"), "misaligned"),
    "rows of logits overlap": planted(line("auto* logits", *ZERO), "value"),
    "logits of the next tokens": planted(
        nth(r"st\.global\.v4\.u16(\s+\[%rd\d+)\]", -1, r"st.global.v4.u16\1+8]"), *WRONG
    ),
    "codes short": short(codes=4),
    "bias short": short(bias=2),
}
CASES = cases()
SUBJECT = CudaSubject(
    op="vq_logits",
    cases=CASES,
    warp_cases=[*list(CASES)[:3], MUTATED],
    check=check,
    reference_launch=WHOLE,
    least_bytes=lambda args: looked_up(*args).unique_bytes,
    count=looked_up,
    exact_bytes=lambda args: in_shared(*args[1:]),
    mutant_case=MUTATED,
    mutants=MUTANTS,
    idle={
        "no codes": functools.partial(make, 3, 8, 0, 20, 1, HALF, bias=True),
        "no rows": functools.partial(make, 0, 8, 5, 8, 1, SINGLE),
        "no tokens": functools.partial(make, 2, 8, 5, 0, 1, SINGLE),
    },
    bad=BAD,
)
