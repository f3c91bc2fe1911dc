"""Evidence of codebook_topk in CUDA C++."""

import functools

import torch
from mutations import BARRIER, WAIT, Change, nth
from scrimp.benchmarks.codebook_topk_cost import count_cuda
from subjects.codebook_topk import check, make
from subjects.subject import Case, Flat, Mutant, pairwise

from .subject import CudaSubject, source

HALF, BRAIN = torch.float16, torch.bfloat16


def cases() -> dict[str, Case]:
    rows = pairwise(
        rows=[1, 5, 66], G=[0, 3], C=[64, 100, 333], D=[8, 64, 72], k=[1, 8, 17, 64], dtype=[HALF, BRAIN],
        bias=[False, True], euclidean=[False, True], mean=[False, True],
    )  # fmt: skip
    found: dict[str, Case] = {
        "-".join(str(value).removeprefix("torch.") for value in row.values()): functools.partial(make, **row)
        for row in rows
    }
    return found | {
        MUTATED: functools.partial(make, 69, 3, 333, 72, 7, HALF, bias=True, euclidean=True, mean=False),
        "broken": functools.partial(make, 4, 3, 133, 40, 20, BRAIN, True, True, broken=True),
        "forced": functools.partial(make, 4, 3, 133, 40, 20, HALF, True, broken=True),
        "any numbers": functools.partial(make, 66, 0, 200, 64, 8, HALF, exact=False),
        "apart": apart,
        WHOLE: functools.partial(make, 64, 0, 256, 192, 8, HALF),
    }


def apart() -> Flat:
    """Rows with gaps, codes inside wider ones."""
    x, codebook, *rest = make(6, 2, 70, 16, 5, HALF, bias=True)
    return x.repeat(1, 2)[:, :32], torch.cat([codebook, codebook], -1)[..., :16], *rest


BAD = {
    "dtype": (lambda a: (*(x.float() for x in a[:2]), *a[2:]), "x must be float16 or bfloat16 in CUDA C\\+\\+"),
    "dtype of codebook": (lambda a: (a[0], a[1].bfloat16(), *a[2:]), "x and codebook differ in dtype"),
    "width": (lambda a: (a[0][:, 1:], *a[1:]), r"codebook \[3, 333, 72\] does not fit x \[69, 215\]"),
    "k": (lambda a: (*a[:3], 65, *a[4:]), "k=65 must be from 1 to the 333 codes"),
    "bias": (lambda a: (*a[:2], a[2][:, 1:], *a[3:]), r"bias \[3, 332\] must be float32"),
    "device": (lambda a: (a[0], a[1].to("meta"), *a[2:]), "x, codebook and bias must be on one CUDA device"),
    "off the grid": (lambda a: (a[0][:, :15], a[1][..., :5], *a[2:]), "codes must begin at multiples of 16 bytes"),
}
line = source("codebook_topk")
MUTATED, WHOLE, WRONG = "69-3-333-72-7", "whole tiles", ("value", "out_of_bounds", "misaligned")
COPY = ("race", "async_race", "uninitialised", "value")


def of(kernel: str, change: Change, *caught_by: str, case: str = "") -> Mutant:
    return Mutant(f"codebook_topk{kernel}_kernel<__half", change, frozenset(caught_by), case=case)


def short(kernel: str, **buffers: int) -> dict[str, Mutant]:
    early = frozenset({"out_of_bounds"})
    word = kernel.strip("_") or "search"
    return {f"{name} of {word} short": Mutant(f"codebook_topk{kernel}_kernel<__half", str, early, {name: size})
            for name, size in buffers.items()}  # fmt: skip


SHUFFLE = r"mov\.u32(\s+%r\d+), 16;"
LOAD, STORE = r"ld\.global\.v4\.u32(\s+\{[^}]*\}, \[%rd\d+)\]", r"st\.global\.v4\.u32(\s+\[%rd\d+)\]"
SUM = r"add\.f32(\s+%f\d+), (%f\d+), %f\d+;"
norm, gather, search = (functools.partial(of, kernel) for kernel in ("_norm", "_gather", ""))
MUTANTS = {
    **short("_norm", codebook=2, bias=4),
    "codes past the last": norm(line("if (code >= static_cast", r"setp\.ge\.s64", 0, "setp.gt.s64"), *WRONG),
    "numbers past the last": norm(line("for (int d = threadIdx.x % 32", r"setp\.ge\.s32", 0, "setp.gt.s32"), *WRONG),
    "misaligned numbers": norm(nth(LOAD, 0, r"ld.global.v4.u32\1+8]"), "misaligned"),
    "squares of the next numbers": norm(nth(LOAD, 0, r"ld.global.v4.u32\1+16]"), *WRONG),
    "squares of half the lanes": norm(nth(SHUFFLE, 0, r"mov.u32\1, 8;"), "value"),
    "a lane left out": norm(line("squares += __shfl", SUM, -1, r"mov.f32\1, \2;"), "value"),
    "whole squares": norm(nth("0fBF000000", 0, "0fBF800000"), "value"),
    "codes of the first block": norm(nth(r"mov\.u32(\s+%r\d+), %ctaid\.x;", 0, r"mov.u32\1, 0;"), *WRONG),
    "no square": norm(line("squares = fmaf", r"(fma\.rn\.f32\s+%f\d+, %f\d+), %f\d+,", 0, r"\1, 0f3F800000,"), "value"),
    **short("", x=2, codebook=2, bias=4),
    "no wait": search(nth(WAIT, 0, ""), *COPY),
    "no barrier": search(nth(BARRIER, 0, ""), *COPY),
    "operand A swapped": search(nth(r"(mma\.sync\S+ \{[^}]*\}, \{)(%r\d+),(%r\d+)", 0, r"\1\3,\2"), "value"),
    "sums not begun": search(line("if (step % depth == 0)", r"setp\.eq\.s32", 0, "setp.ne.s32"), *COPY),
    "NaN not seen": search(line("broken[h] |= code", r"setp\.nan\.f32", None, "setp.lt.f32"), "value", case="forced"),
    "codes behind the last": search(
        line("if (code >= last", r"selp\.f32(\s+%f\d+), 0fFF800000, (%f\d+), %p\d+;", None, r"mov.f32\1, \2;"), *WRONG
    ),
    "key of the higher code": search(
        line("return (static_cast<int64_t>(bits", "2147483647", -1, "2147483646"), "value"
    ),
    "the rows of the first block": search(
        line("const int64_t first_row", r"shl\.b64(\s+%rd\d+), %rd\d+, 6;", 0, r"mov.b64\1, 0;"), *WRONG
    ),
    "the first range alone": search(
        line("const int first = part", r"mul\.lo\.s32(\s+%r\d+), %r\d+, %r\d+;", 0, r"mov.b32\1, 0;"), *WRONG
    ),
    **short("_gather", codebook=2),
    "rows past the last": gather(line("if (row >= p.M", r"setp\.ge\.s64", 0, "setp.gt.s64"), *WRONG),
    "keys past the last": gather(line("some[i] = 32 * i + lane", r"setp\.ge\.s32", 0, "setp.gt.s32"), *WRONG),
    "a key stays": gather(
        line("some[i] = some[i] == best", r"selp\.b64(\s+%rd\d+), -\d+, (%rd\d+), %p\d+;", 0, r"mov.b64\1, \2;"),
        "value",
    ),
    "nothing is broken": gather(line("broken |= best", r"setp\.eq\.s64", 0, "setp.lt.s64"), *WRONG, case="forced"),
    "scores past the last": gather(line("if (32 * i + lane < p.k)", r"setp\.ge\.s32", 0, "setp.gt.s32"), *WRONG),
    "always the mean": gather(
        line("const float share", r"setp\.eq\.s16(\s+%p\d+, %rs\d+), 0;", 0, r"setp.eq.s16\1, 7;"), "value"
    ),
    "codes of the next numbers": gather(nth(LOAD, -1, r"ld.global.v4.u32\1+16]"), *WRONG),
    "misaligned codes": gather(nth(LOAD, -1, r"ld.global.v4.u32\1+8]"), "misaligned"),
    "out of the next numbers": gather(nth(STORE, 0, r"st.global.v4.u32\1+16]"), *WRONG),
    "a code left out": gather(line("sums[i] += static_cast", SUM, -1, r"mov.f32\1, \2;"), "value"),
    "keys of the first rows": gather(nth(r"mov\.u32(\s+%r\d+), %ctaid\.x;", 0, r"mov.u32\1, 0;"), *WRONG),
}
CASES = cases()
SUBJECT = CudaSubject(
    op="codebook_topk",
    cases=CASES,
    warp_cases=[*list(CASES)[:2], MUTATED, "broken"],
    check=check,
    reference_launch=WHOLE,
    least_bytes=None,  # products and the search bound it, not memory
    count=count_cuda,
    exact_bytes=lambda args: bool(args[0].isfinite().all()),
    mutant_case=MUTATED,
    mutants=MUTANTS,
    idle={"no rows": functools.partial(make, 0, 0, 70, 16, 5, HALF)},
    bad=BAD,
    shared={"codebook_topk_kernel": 49_152},
    tensor_kernels={"codebook_topk_kernel": 1},  # what is added to the scores of a tile
)
