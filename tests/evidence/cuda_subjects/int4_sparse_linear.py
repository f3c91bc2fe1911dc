"""Evidence of int4_sparse_linear in CUDA C++."""

import functools
import re

import torch
from mutations import BARRIER, COMMIT, WAIT, Change, nth
from scrimp.benchmarks.int4_sparse_linear_cost import count_cuda
from subjects.int4_sparse_linear import check, make
from subjects.subject import Case, Flat, Mutant, pairwise

from .sparse_linear import GREATER, GREATER_EQUAL, SUM, WRONG, ZERO, lookups, shared
from .subject import CudaSubject, source

HALF, BRAIN, SINGLE = DTYPES = [torch.float16, torch.bfloat16, torch.float32]
MUTATED, ALL, FIRST, WHOLE, SHORT, BOOK = (
    "mutated", "every channel", "one chunk", "whole tiles", "short list", "codebook",
)  # fmt: skip


def cases() -> dict[str, Case]:
    rows = pairwise(
        rows=[1, 3, 6], outputs=[40, 300], form=[(64, 32), (320, 64), (640, 128), (300, 300)],
        kind=["none8", "uint8", "float", "offset", "codebook"], dtype=DTYPES,
        chosen=["half", "few", "ends", "all", "none"], bias=[False, True],
    )  # fmt: skip
    found: dict[str, Case] = {}
    for row in rows:
        name = "-".join(str(value).replace("torch.", "") for value in row.values())
        row["K"], row["group_size"] = row.pop("form")
        found[name] = functools.partial(make, mode="exact", **row)
    return found | {
        MUTATED: functools.partial(make, 3, 300, 1120, 32, "uint8", "exact", HALF, "half", bias=True),
        ALL: functools.partial(make, 3, 300, 800, 32, "uint8", "exact", HALF, "all", bias=True),
        FIRST: functools.partial(make, 3, 300, 320, 64, "uint8", "exact", HALF, "half", bias=True),
        BOOK: functools.partial(make, 3, 40, 320, 64, "codebook", "exact", HALF, "half"),
        WHOLE: functools.partial(make, 1, 512, 1024, 128, "none8", "exact", BRAIN, "all"),
        SHORT: short_list,
        "three dimensions": lambda: changed(make(6, 40, 320, 64, "offset", "exact", BRAIN), (2, 3, 320)),
        "rows apart, scales off the grid": lambda: (lambda x, *rest: (x.T.contiguous().T, *rest))(
            *make(3, 130, 320, 64, "none8", "exact", HALF)
        ),
        "one dimension": lambda: changed(make(1, 40, 320, 64, "codebook8", "exact", BRAIN), (320,)),
    }


def changed(args: Flat, shape: tuple[int, ...]) -> Flat:
    return args[0].view(shape), *args[1:]


def short_list() -> Flat:
    """A list that holds its channels alone, and a count past its end, which is taken for its length."""
    args = list(make(3, 300, 320, 32, "uint8", "exact", HALF, "few", bias=True))
    args[6], args[7] = args[6][: int(args[7])].clone(), args[7] + 5
    return tuple(args)


line = source("int4_sparse_linear")
PRODUCT = "int4_sparse_linear_kernel<scrimp::cuda::int4_sparse_linear::Zeros, 4>"
EARLY, COPY = frozenset({"out_of_bounds"}), ("race", "async_race", "uninitialised", "value")


def planted(change: Change, *caught_by: str, case: str = "") -> Mutant:
    return Mutant(PRODUCT, change, frozenset(caught_by), case=case)


def added(change: Change, *caught_by: str) -> Mutant:
    return Mutant("int4_sparse_linear_sums_kernel", change, frozenset(caught_by))


MUTANTS = {
    **lookups(PRODUCT, ALL, SHORT),
    "no wait": planted(nth(WAIT, 0, ""), *COPY),
    "waits for a stage less": planted(nth(WAIT, 0, "cp.async.wait_group 3;"), *COPY),
    "stages begun together": planted(nth(COMMIT, 0, ""), *COPY),
    "codes of the first chunk": planted(line("const uint8_t* const codes", *ZERO), *WRONG),
    "codes behind the list": planted(
        line("if (entry < count)", r"setp\.(lt|ge)\.s32", None, "setp.ne.s32"), *COPY, *WRONG
    ),
    "another channel's x": planted(
        line(
            "const Vector<float, kRows> x = inputs", r"mul\.wide\.u16(\s+%r\d+, %rs\d+), 16;", 0, r"mul.wide.u16\1, 0;"
        ),
        "value",
    ),
    "base of the codes": planted(nth("0fCB000008", 0, "0fCB000007"), "value"),
    "mask of a code": planted(nth(r"mov\.u32(\s+%r\d+), 15;", 0, r"mov.u32\1, 7;"), "value"),
    "codes from elsewhere": planted(
        line("code = __uint_as_float", r"shr\.u32(\s+%r\d+, %r\d+), 4;", 0, r"shr.u32\1, 5;"), "value"
    ),
    "no sum of inputs": planted(line("all[r] += x.x[r]", SUM, None, r"mov.f32\1, \2;"), "value"),
    "no scale": planted(
        line("total[r][j] = fmaf(s, sums", r"(fma\.rn\.f32\s+%f\d+), %f\d+,", 0, r"\1, 0f3F800000,"), "value"
    ),
    "scales past the last output": planted(
        line("some[j] = n + j < p.ends.N", r"setp\.(ge|lt)\.s64", None, "setp.ne.s64"), *WRONG, case=ALL
    ),
    "zeros of the first group": planted(
        line("const int64_t zero =", r"mul\.lo\.s64(\s+%rd\d+), %rd\d+, %rd\d+;", 0, r"mov.b64\1, 0;"), *WRONG
    ),
    "a warp's sums left out": planted(
        line("sum += reinterpret_cast<const float*>", SUM, 3, r"mov.f32\1, \2;"), "value"
    ),
    "sums not awaited": planted(nth(BARRIER, 1, ""), *COPY),
    "sums of rows past the last": planted(line("if (m >= p.M) break", GREATER_EQUAL, -1, GREATER), *WRONG),
    "sums of the first chunk": planted(line("p.sums[(chunk * p.M", *ZERO), *WRONG),
    **{
        f"{name} short": Mutant(PRODUCT, str, EARLY, {name: size}, ALL)
        for name, size in {"x": 2, "codes": 80, "scales": 2, "zeros": 1}.items()
    },
    "bias of one chunk short": Mutant(PRODUCT, str, EARLY, {"bias": 2}, FIRST),
    "numbers past the last": added(shared("if (at >= all) return", GREATER_EQUAL, None, GREATER), "out_of_bounds"),
    "numbers of the first block": added(
        shared("const int64_t at =", r"mul\.wide\.u32(\s+%rd\d+), %r\d+, 256;", None, r"mov.b64\1, 0;"), *WRONG
    ),
    "the first chunk alone": added(
        shared("for (int64_t chunk = 0", r"and\.b64(\s+%rd\d+, %rd\d+), 7;", None, r"and.b64\1, 1;"), *WRONG
    ),
    "one chunk again and again": added(
        shared("for (int64_t chunk = 0", r"shl\.b64(\s+%rd\d+), %rd\d+, 2;", None, r"mov.b64\1, 0;"), *WRONG
    ),
    "nothing added": added(shared("for (int64_t chunk = 0", SUM, None, r"mov.f32\1, 0f00000000;"), *WRONG),
    "no bias": added(shared("if (ends.bias) total +=", SUM, None, r"mov.f32\1, \2;"), "value"),
    "all in the first row": added(shared("static_cast<T*>(ends.out)", ZERO[0], None, ZERO[2]), "value"),
    "outputs side by side": added(
        shared("static_cast<T*>(ends.out)", r"shl\.b64(\s+%rd\d+, %rd\d+), 1;", None, r"shl.b64\1, 0;"), *WRONG
    ),
    "bias of the next output": added(
        lambda text: re.sub(r"(ld\.global\.u16\s+%rs\d+, \[%rd\d+)\]", r"\1+2]", text), *WRONG
    ),
    "results are fp32": added(
        line("if (p.type == FloatType::fp32)", r"setp\.(eq|ne)\.s32(\s+%p\d+, %r\d+), 0;", -1, r"setp.\1.s32\2, 2;"),
        *WRONG,
    ),
    "results are bf16": added(
        line(
            "else if (p.type == FloatType::bf16)", r"setp\.(eq|ne)\.s32(\s+%p\d+, %r\d+), 1;", -1, r"setp.\1.s32\2, 2;"
        ),
        *WRONG,
    ),
    "bias short": Mutant("int4_sparse_linear_sums_kernel", str, EARLY, {"bias": 2}),
}
BAD = {
    "dtype": (
        lambda a: (a[0].double(), *a[1:8], a[8].double(), *a[9:]),
        "x must be float32, float16 or bfloat16 on CUDA",
    ),
    "zero kind": (lambda a: (*a[:10], 4, a[11]), "zero_kind=4 must be 0 to 3"),
    "mode": (lambda a: (*a[:11], 2), "mode=2 must be 0 or 1"),
    "int8 mode": (lambda a: (*a[:11], 1), "there is neither int8 mode nor permutation in CUDA C.."),
    "permuted": (lambda a: (*a[:5], torch.arange(1120).int(), *a[6:]), "neither int8 mode nor permutation in CUDA C.."),
    "rank": (lambda a: (a[0][0, 0], *a[1:]), r"x must be \[.., inputs\]"),
    "inputs": (lambda a: (a[0][:, 1:], *a[1:]), "x has 1119 inputs, but the weight 1120"),
    "codes": (lambda a: (a[0], a[1][:, 64:], *a[2:]), r"codes has shape \[1120, 128\], which does not fit"),
    "codes off the grid": (
        lambda a: (a[0], torch.cat((a[1].flatten(), a[1][0, :1]))[1:].view_as(a[1]), *a[2:]),
        "codes of a channel must begin at multiples of 16 bytes in CUDA C..",
    ),
    "group size": (
        lambda a: (*a[:2], *(t.repeat_interleave(2, 0) for t in a[2:4]), *a[4:9], 16, *a[10:]),
        "group_size=16 must be a multiple of 32 in CUDA C..",
    ),
    "zeros": (lambda a: (*a[:3], None, *a[4:]), "zeros do not fit zero_kind"),
    "index": (lambda a: (*a[:6], a[6].long(), *a[7:]), r"index must be int32 \[at most 1120\]"),
    "bias": (lambda a: (*a[:8], a[8].float(), *a[9:]), "bias has a dtype that does not fit"),
    "device": (lambda a: (*a[:8], a[8].to("meta"), *a[9:]), "the tensors must be on one CUDA device"),
}
CASES = cases()
SUBJECT = CudaSubject(
    op="int4_sparse_linear",
    cases=CASES,
    warp_cases=[*list(CASES)[:2], MUTATED, FIRST],
    check=check,
    reference_launch=WHOLE,
    least_bytes=lambda args: count_cuda(*args).unique_bytes,
    count=count_cuda,
    mutant_case=MUTATED,
    mutants=MUTANTS,
    idle={"no rows": functools.partial(make, 0, 40, 64, 32, "none8", "exact", HALF)},
    bad=BAD,
    shared={
        f"int4_sparse_linear_kernel<scrimp::cuda::int4_sparse_linear::{form}": 32_768 + 17_664 * parts
        for form, parts in {"Plain": 1, "Codebook": 1, "Zeros": 2}.items()
    },
)
