"""Evidence of sparse_linear in CUDA C++."""

import functools

import torch
from cuda_device import ROOT
from mutations import BARRIER, Change, at_line, nth
from scrimp.benchmarks.sparse_linear_cost import count_cuda
from subjects.sparse_linear import make
from subjects.subject import Case, Flat, Mutant, against_oracle, pairwise

from .subject import CudaSubject, source

HALF, BRAIN, SINGLE = DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Cases that others name: half of the channels of several rows, all of them, most of one block's, whole tiles.
MUTATED, ALL, FIRST, WHOLE, SHORT = "mutated", "every channel", "one chunk", "whole tiles", "short list"


def cases() -> dict[str, Case]:
    rows = pairwise(
        rows=[1, 3, 7, 17], K=[1, 100, 577, 1536], N=[8, 304], dtype=DTYPES,
        chosen=["half", "few", "block", "ends", "all", "none"], added=[False, True], strided=[False, True],
    )  # fmt: skip
    found: dict[str, Case] = {
        "-".join(str(value).removeprefix("torch.") for value in row.values()): functools.partial(make, **row)
        for row in rows
    }
    return found | {
        MUTATED: functools.partial(make, 3, 1104, 304, HALF, "half", True, True),
        ALL: functools.partial(make, 3, 816, 304, HALF, "all", True),
        FIRST: functools.partial(make, 3, 304, 304, HALF, "block", True),
        WHOLE: functools.partial(make, 1, 1024, 512, BRAIN),
        "one dimension": lambda: (lambda x, *rest: (x[0], *rest))(*make(1, 577, 304, BRAIN)),
        "three dimensions": three,
        SHORT: short_list,
        "outputs of a wider weight": functools.partial(make, 5, 600, 24, SINGLE, "few", strided=True),
    }


def three() -> Flat:
    x, weight, index, count, bias, residual = make(6, 577, 24, HALF, "half", True)
    apart = torch.cat([residual, residual], 1).view(2, 3, 48)[..., :24]
    return x.view(2, 3, 577), weight, index, count, bias, apart


def short_list() -> Flat:
    """A list that holds its channels alone, and a count past its end, which is taken for its length."""
    x, weight, index, count, *ends = make(3, 700, 24, HALF, "few", True)
    return x, weight, index[: int(count)].clone(), count + 5, *ends


def check(result: torch.Tensor, args: Flat) -> None:
    against_oracle("sparse_linear")(result, args)


BAD = {
    "dtype": (lambda a: (*(t.double() for t in a[:2]), *a[2:4], *(t.double() for t in a[4:])),
              "x must be float32, float16 or bfloat16 on CUDA"),
    "rank": (lambda a: (a[0][0, 0], *a[1:]), r"x must be \[.., K\], got a scalar"),
    "dtype of weight": (lambda a: (a[0], a[1].float(), *a[2:]), "weight must be of the dtype of x"),
    "weight": (lambda a: (a[0], a[1][1:], *a[2:]), r"weight must be .* \[1104, N\], got \[1103, 304\]"),
    "columns": (lambda a: (a[0], a[1].T.contiguous().T, *a[2:]), "the outputs of a channel must be adjacent"),
    "index": (lambda a: (*a[:2], a[2].long(), *a[3:]), r"index must be int32 \[at most 1104\]"),
    "count": (lambda a: (*a[:3], a[3][:0], *a[4:]), r"count must be int32 \[1\], got \[0\]"),
    "bias": (lambda a: (*a[:4], a[4][1:], a[5]), r"bias must be of the dtype of x and \[304\]"),
    "residual": (lambda a: (*a[:5], a[5][1:]), r"residual has shape \[2, 304\], but x \[3, 1104\]"),
    "device": (lambda a: (*a[:4], a[4].to("meta"), a[5]), "the tensors must be on one CUDA device"),
    "off the grid": (lambda a: (a[0], a[1][:, 1:297], *a[2:4], a[4][:296], a[5][:, :296]), "must be whole vectors"),
    "odd outputs": (lambda a: (a[0], a[1][:, :303], *a[2:4], a[4][:303], a[5][:, :303]), "must be whole vectors"),
}  # fmt: skip
WRONG, RACE = ("value", "out_of_bounds", "misaligned"), ("race", "uninitialised", "value")
line = source("sparse_linear")
shared = functools.partial(at_line, ROOT / "csrc" / "cuda" / "sparse_linear.parts.cuh")
SUM, ZERO = r"add\.f32(\s+%f\d+), (%f\d+), %f\d+;", (r"mul\.lo\.s64(\s+%rd\d+), %rd\d+, %rd\d+;", 0, r"mov.b64\1, 0;")
GREATER_EQUAL, GREATER = r"setp\.ge\.s64", "setp.gt.s64"


def lookups(kernel: str, everything: str, short_list: str) -> dict[str, Mutant]:
    """Faults of looking channels up; cases that list every channel, and in which the list ends with them."""

    def of(change: Change, *caught_by: str, case: str = "") -> Mutant:
        return Mutant(kernel, change, frozenset(caught_by), case=case)

    return {
        "the first probe alone": of(shared("probe = threadIdx.x * apart", *ZERO), *WRONG),
        "probes past the list": of(
            shared("const bool probes", r"setp\.lt\.s64", 0, "setp.le.s64"), "out_of_bounds", case=short_list
        ),
        "probes past the count": of(shared("const int below", r"setp\.lt\.s64", 0, "setp.ne.s64"), *WRONG),
        "probes behind the chunk": of(shared("const int below", r"setp\.lt\.s64", 1, GREATER), *WRONG),
        "from the wrong probe on": of(
            shared("const int64_t first = max", r"add\.s32(\s+%r\d+, %r\d+), -1;", 0, r"add.s32\1, 0;"), *WRONG
        ),
        "a count past the list": of(
            nth(r"min\.s64(\s+%rd\d+), %rd\d+, (%rd\d+);", 1, r"mov.b64\1, \2;"), "out_of_bounds", case=short_list
        ),
        "entries past the list": of(
            shared("channels[j] = entry < last", GREATER_EQUAL, None, GREATER), "out_of_bounds", case=everything
        ),
        "the first channel of a chunk left out": of(
            shared("if (channels[j] >= begin", r"setp\.gt\.s64", None, "setp.ge.s64"), "value", case=everything
        ),
        "nothing cleared": of(nth(r"st\.shared\.u8\s+\[%r\d+\], %rs\d+;", 0, ""), *RACE),
        "list not awaited": of(nth(BARRIER, 0, ""), *RACE),
        "channels of the first warp": of(
            shared("const uint32_t low", r"ld\.shared\.u8(\s+%rs\d+, \[%r\d+)", 0, r"ld.shared.u8\1+32"), *RACE
        ),
        "list short": Mutant(kernel, caught_by=frozenset({"out_of_bounds"}), short={"index": 4}, case=everything),
        "count short": Mutant(kernel, caught_by=frozenset({"out_of_bounds"}), short={"count": 4}),
    }


def sums_of_chunks(kernel: str) -> dict[str, Mutant]:
    """Faults of adding up what the chunks gave, on the mutant case."""

    def of(change: Change, *caught_by: str) -> Mutant:
        return Mutant(kernel, change, frozenset(caught_by))

    return {
        "numbers past the last": of(shared("if (at >= all) return", GREATER_EQUAL, 0, GREATER), "out_of_bounds"),
        "numbers of the first block": of(
            shared("const int64_t at =", r"mul\.wide\.u32(\s+%rd\d+), %r\d+, 256;", 0, r"mov.b64\1, 0;"), *WRONG
        ),
        "the first chunk alone": of(
            shared("for (int64_t chunk = 0", r"and\.b64(\s+%rd\d+, %rd\d+), 7;", 0, r"and.b64\1, 1;"), *WRONG
        ),
        "one chunk again and again": of(
            shared("for (int64_t chunk = 0", r"shl\.b64(\s+%rd\d+), %rd\d+, 2;", -1, r"mov.b64\1, 0;"), *WRONG
        ),
        "the last chunk alone": of(shared("for (int64_t chunk = 0", SUM, -1, r"mov.f32\1, 0f00000000;"), *WRONG),
        "no bias": of(shared("if (ends.bias) total +=", SUM, 0, r"mov.f32\1, \2;"), "value"),
        "no residual": of(shared("if (ends.residual) total +=", SUM, 0, r"mov.f32\1, \2;"), "value"),
        "residual of the first row": of(shared("if (ends.residual) total +=", *ZERO), "value"),
        "all in the first row": of(shared("static_cast<T*>(ends.out)", *ZERO), "value"),
        "bias of the next output": of(nth(r"(ld\.global\.u16\s+%rs\d+, \[%rd\d+)\]", 0, r"\1+2]"), *WRONG),
        "residual of the next output": of(nth(r"(ld\.global\.u16\s+%rs\d+, \[%rd\d+)\]", 1, r"\1+2]"), *WRONG),
        **{f"{name} short": Mutant(kernel, caught_by=frozenset({"out_of_bounds"}), short={name: 2})
           for name in ("bias", "residual")},
    }  # fmt: skip


def planted(change: Change, *caught_by: str, case: str = "") -> Mutant:
    return Mutant(PRODUCT, change, frozenset(caught_by), case=case)


def short(case: str, **buffers: int) -> Mutant:
    return Mutant(PRODUCT, caught_by=frozenset({"out_of_bounds"}), short=buffers, case=case)


PRODUCT = "sparse_linear_kernel<__half, 4>"
MUTANTS = {
    **lookups(PRODUCT, ALL, SHORT),
    **sums_of_chunks("sparse_linear_sums_kernel<__half>"),
    "half a chunk less": planted(shared("return static_cast<int>(threadIdx.x", ", 224,", None, ", 223,"), *WRONG),
    "x past the last channel": planted(
        line("if (begin + i >= end) break", GREATER_EQUAL, None, GREATER), "out_of_bounds", case=ALL
    ),
    "rows past the last": planted(line("some.x[r] = first_m", GREATER_EQUAL, None, GREATER), "out_of_bounds", case=ALL),
    "x of the first chunk": planted(line("const T* x =", *ZERO), *WRONG),
    "weights past the last output": planted(
        line("if (n < p.ends.N)", GREATER_EQUAL, 0, GREATER), "out_of_bounds", case=ALL
    ),
    "weights of the first chunk": planted(line("const T* weight", *ZERO), *WRONG),
    "weights of the next outputs": planted(nth(r"(ld\.global\.v4\.u32\s+\{[^}]*\}, \[%rd\d+)\]", 1, r"\1+16]"), *WRONG),
    "weights misaligned": planted(nth(r"(ld\.global\.v4\.u32\s+\{[^}]*\}, \[%rd\d+)\]", 1, r"\1+8]"), "misaligned"),
    "sums not awaited": planted(nth(BARRIER, 1, ""), *RACE),
    "a warp's sums left out": planted(line("sum += sums[r % 2]", SUM, 3, r"mov.f32\1, \2;"), "value"),
    "sums of rows past the last": planted(line("if (m >= p.M) break", GREATER_EQUAL, -1, GREATER), *WRONG),
    "sums past the last output": planted(line("own >= p.ends.N", r"@%p\d+ bra\s+\S+;", 0, ""), *WRONG),
    "sums of the first chunk": planted(line("p.sums[(chunk * p.M", *ZERO), *WRONG),
    "x short": short(ALL, x=2),
    "weight short": short(ALL, weight=2),
    **{f"{name} of one chunk short": short(FIRST, **{name: 2}) for name in ("bias", "residual")},
}
CASES = cases()
SUBJECT = CudaSubject(
    op="sparse_linear",
    cases=CASES,
    warp_cases=[*list(CASES)[:2], MUTATED, FIRST],
    check=check,
    reference_launch=WHOLE,
    least_bytes=lambda args: count_cuda(*args).unique_bytes,
    count=count_cuda,
    mutant_case=MUTATED,
    mutants=MUTANTS,
    idle={"no rows": functools.partial(make, 0, 100, 24, HALF, added=True)},
    bad=BAD,
)
