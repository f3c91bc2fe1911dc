"""Evidence of channel_select in CUDA C++."""

import functools

import torch
from mutations import BARRIER, Change, nth
from scrimp.benchmarks.channel_select_cost import count_cuda
from subjects.channel_select import check, make
from subjects.subject import Case, Flat, Mutant, pairwise

from scrimp.ops.channel_select import RULES

from .subject import CudaSubject, source

HALF, BRAIN, SINGLE = DTYPES = [torch.float16, torch.bfloat16, torch.float32]
COMMON, EQUAL, ODD, SHARE, WHOLE = "common choice", "equal scores", "scores that are NaN", "a share", "whole tiles"
RELATIVE, LONG, ABOVE, HALF_ONE = "above the mean", "lists in parts", "above a threshold", "a half channel"


def cases() -> dict[str, Case]:
    rows = pairwise(
        rows=[1, 5], channels=[1, 130, 264, 577], dtype=DTYPES, rule=list(RULES), common=[False, True],
        extras=[False, True], kind=["random", "ties", "wild", "zeros"], strided=[False, True],
    )  # fmt: skip
    found: dict[str, Case] = {
        "-".join(str(value).removeprefix("torch.") for value in row.values()): functools.partial(make, **row)
        for row in rows
    }
    some = functools.partial(make, dtype=HALF, extras=True, strided=False)
    return found | {
        COMMON: functools.partial(some, 5, 264, rule="top_k", common=True, kind="random"),
        EQUAL: functools.partial(some, 5, 264, rule="top_k", common=True, kind="ties"),
        ODD: functools.partial(some, 2, 264, rule="top_k", common=True, kind="wild"),
        SHARE: functools.partial(some, 5, 264, rule="top_p", common=False, kind="random"),
        RELATIVE: functools.partial(some, 5, 264, rule="relative", common=False, kind="random"),
        LONG: functools.partial(some, 2, 8712, rule="threshold", common=False, kind="random"),
        WHOLE: functools.partial(make, 2, 4096, BRAIN, "top_k", False, True, "random", False),
        ABOVE: functools.partial(some, 5, 264, rule="threshold", common=True, kind="random"),
        "more than there are": functools.partial(level_of, "top_k", 1e9),
        "none": functools.partial(level_of, "top_k", 0.0),
        HALF_ONE: functools.partial(level_of, "top_k", 0.5),
        "all but zeros": functools.partial(level_of, "top_p", 1.0),
        "the least share": functools.partial(level_of, "top_p", 1e-30),
        "three dimensions": three,
        "common, bf16": functools.partial(make, 3, 264, BRAIN, "top_p", True, True, "random", False),
        "common, fp32": functools.partial(make, 3, 264, SINGLE, "relative", True, True, "random", False),
        "common, off the grid": functools.partial(make, 3, 130, HALF, "threshold", True, True, "random", True),
    }


def level_of(rule: str, level: float) -> Flat:
    x, _, *rest = make(3, 72, HALF, rule, False, False, "ties", False)
    return x, torch.tensor([level]), *rest


def three() -> Flat:
    x, level, scale, center, whole, rule, common = make(6, 72, BRAIN, "relative", False, True, "random", False)
    return x.view(2, 3, 72), level, scale, center, whole.view(2, 3), rule, common


BAD = {
    "dtype": (lambda a: (a[0].double(), *a[1:]), "x must be float32, float16 or bfloat16 on CUDA"),
    "rank": (lambda a: (a[0][0, 0], *a[1:]), r"x must be \[.., K\], got a scalar"),
    "rule": (lambda a: (*a[:5], 4, a[6]), "rule=4"),
    "level": (lambda a: (a[0], a[1].double(), *a[2:]), r"level must be float32 \[1\]"),
    "scale": (lambda a: (*a[:2], a[2][1:], *a[3:]), r"scale and center must be float32 \[264\]"),
    "whole": (lambda a: (*a[:4], a[4][1:], *a[5:]), r"whole must be bool, a number for each row of x \[5, 264\]"),
    "device": (lambda a: (*a[:2], a[2].to("meta"), *a[3:]), "the tensors must be on one CUDA device"),
    "channels": (
        lambda a: (torch.zeros(1, 24577).half(), a[1], None, None, None, *a[5:]),
        "x has 24577 channels; in CUDA C.. rule=2 takes at most 24576",
    ),
}
CASES = cases()
line = source("channel_select")
WRONG, RACE = ("value", "out_of_bounds", "misaligned"), ("race", "uninitialised", "value")
GREATER_EQUAL, GREATER = r"setp\.ge\.(\w+)", r"setp.gt.\1"
KEEP_FIRST = r"(\s+%f\d+), (%f\d+), %f\d+;"


def of(kernel: str, change: Change, *caught_by: str, case: str = "") -> Mutant:
    return Mutant(f"channel_select_{kernel}", change, frozenset(caught_by), case=case)


def short(kernel: str, case: str = "", **buffers: int) -> dict[str, Mutant]:
    early = frozenset({"out_of_bounds"})
    return {f"{name} of {kernel} short": Mutant(f"channel_select_{kernel}", str, early, {name: size}, case)
            for name, size in buffers.items()}  # fmt: skip


ALL, CUT, ROW = (f"{name}kernel<__half, true>" for name in ("common_", "cut_", ""))
LIST = "list_kernel"
join, cut, keep, listed = (functools.partial(of, kernel) for kernel in (ALL, CUT, ROW, LIST))
INSIDE = "const uint4 some = k < K"
MUTANTS = {
    **short(ALL, x=2, scale=4, center=4),
    "joined x past the last channel": join(nth(GREATER_EQUAL, 0, GREATER), "out_of_bounds"),
    "joined center past the last channel": join(nth(GREATER_EQUAL, 1, GREATER), "out_of_bounds"),
    "joined scale past the last channel": join(nth(GREATER_EQUAL, 3, GREATER), "out_of_bounds"),
    "joined numbers of the lower half": join(nth(r"or\.b32(\s+%r\d+), (%r\d+), 16;", 0, r"mov.b32\1, \2;"), "value"),
    "joined numbers not centred": join(
        line("tile.moved[i] -= numbers[i]", r"sub\.f32" + KEEP_FIRST, None, r"mov.f32\1, \2;"), "value"
    ),
    "joined numbers not scaled": join(
        line("tile.score[i] = fabsf", r"mul\.f32" + KEEP_FIRST, None, r"mov.f32\1, \2;"), "value"
    ),
    "the last row alone": join(
        line("sums[i] = fmaf(tile", r"fma\.rn\.f32(\s+%f\d+, %f\d+, %f\d+), %f\d+;", None, r"mul.f32\1;"), "value"
    ),
    "every other row": join(
        line("for (int64_t m = 0; m < p.M; ++m) {", r"add\.s64(\s+%rd\d+, %rd\d+), 1;", 0, r"add.s64\1, 2;"), "value"
    ),
    "no mean": join(
        line("p.judged[k] = __fsqrt_rn", r"div\.rn\.f32" + KEEP_FIRST, None, r"mov.f32\1, \2;"), "value", case=ABOVE
    ),
    "no root": join(line("p.judged[k] = __fsqrt_rn", r"sqrt\.rn\.f32", None, "mov.f32"), "value", case=ABOVE),
    "scores past the last": join(line("if (k < p.K) p.judged[k]", GREATER_EQUAL, None, GREATER), "out_of_bounds"),
    **short(CUT, level=4),
    **short(CUT, SHARE, x=2, scale=4, center=4),
    "scores not awaited": cut(nth(BARRIER, 0, ""), *RACE),
    "sums not awaited": cut(nth(BARRIER, 2, ""), *RACE, case=EQUAL),
    "sums in one place": cut(
        line("return block_sum(sum, turn ^= 1)", r"xor\.b32(\s+%r\d+), %r\d+, 1;", None, r"mov.b32\1, 0;"), *RACE
    ),
    "every other digit": cut(
        line("for (uint32_t digit = 1u << 30", r"shr\.u32(\s+%r\d+, %r\d+), 1;", 0, r"shr.u32\1, 2;"), "value"
    ),
    "equals too early": cut(
        line("if (above + sum < target) before", r"setp\.(lt|ge)\.u64", 0, "setp.eq.u64"), "value", case=EQUAL
    ),
    "half of a channel is none": cut(nth(r"cvt\.rpi\.f32\.f32", 0, "cvt.rmi.f32.f32"), "value", case=HALF_ONE),
    "least of the largest": cut(nth(r"redux\.sync\.max\.u32", 0, "redux.sync.min.u32"), "value", case=SHARE),
    "scores, not energies": cut(
        line(
            "return shift < 64 ? digits * digits",
            r"mul\.wide\.u32(\s+%rd\d+, %r\d+), %r\d+;",
            None,
            r"mul.wide.u32\1, 1;",
        ),
        "value",
        case=SHARE,
    ),
    "cut of the first row": cut(
        line("p.cuts[m] = cut", r"mul\.wide\.u32(\s+%rd\d+), %r\d+, 8;", None, r"mov.b64\1, 0;"), "value", case=SHARE
    ),
    **short(ROW, x=2, scale=4, center=4, whole=1),
    **short(ROW, ABOVE, level=4),
    "x past the last channel": keep(line(INSIDE, GREATER_EQUAL, -1, GREATER), "out_of_bounds"),
    "numbers of the lower half": keep(nth(r"or\.b32(\s+%r\d+), (%r\d+), 16;", -1, r"mov.b32\1, \2;"), "value"),
    "not centred": keep(
        line("tile.moved[i] -= numbers[i]", r"sub\.f32" + KEEP_FIRST, None, r"mov.f32\1, \2;"), "value"
    ),
    "NaN not kept": keep(line("const bool keep = k + i", r"setp\.gtu\.f32", None, "setp.gt.f32"), "value", case=ODD),
    "equals all dropped": keep(
        line("const bool keep = k + i", r"setp\.neu\.f32", None, "setp.equ.f32"), "value", case=EQUAL
    ),
    "whole rows like others": keep(
        line("if (p.whole && p.whole[m])", r"setp\.eq\.s16(\s+%p\d+, %rs\d+), 0;", 0, r"setp.ne.s16\1, 7;"), "value"
    ),
    "energy of the last numbers": keep(
        line("every = fmaf(score", r"fma\.rn\.f32(\s+%f\d+, %f\d+, %f\d+), %f\d+;", None, r"mul.f32\1;"), "value"
    ),
    "the sum, no mean": keep(
        line("cut.score *= __fdiv_rn", r"div\.rn\.f32" + KEEP_FIRST, 0, r"mov.f32\1, \2;"), "value", case=RELATIVE
    ),
    "scores of a row not awaited": keep(nth(BARRIER, 0, ""), *RACE, case=RELATIVE),
    "energy not awaited": keep(nth(BARRIER, -1, ""), *RACE),
    "masks of fewer lanes": keep(
        line("masks[g] |= __shfl_xor_sync", r"or\.b32(\s+%r\d+), %r\d+, (%r\d+);", 0, r"mov.b32\1, \2;"), "value"
    ),
    "words past the last": keep(line("lane % 4 == 0 && word", r"setp\.(lt|ge)\.s64", 0, "setp.ne.s64"), *WRONG),
    "kept of the first row": keep(
        line("T* kept = static_cast<T*>", r"mul\.lo\.s64(\s+%rd\d+), %rd\d+, %rd\d+;", 0, r"mov.b64\1, 0;"), *WRONG
    ),
    "the last mask alone": listed(
        line("word |= p.masks", r"or\.b32(\s+%r\d+), (%r\d+), %r\d+;", None, r"mov.b32\1, \2;"), "value"
    ),
    "masks past the last word": listed(line("if (at < p.words)", GREATER_EQUAL, 0, GREATER), *WRONG),
    "count of fewer lanes": listed(
        line("if (lane >= other) sum += lower", r"selp\.b32(\s+%r\d+), 0, %r\d+, %p\d+;", -1, r"mov.b32\1, 0;"),
        *RACE,
        *WRONG,
        case=LONG,
    ),
    "count of another lane": listed(nth(r"mov\.u32(\s+%r\d+), 2;", 0, r"mov.u32\1, 1;"), *RACE, *WRONG),
    "words not awaited": listed(nth(BARRIER, 0, ""), *RACE, *WRONG),
    "list not awaited": listed(nth(BARRIER, -1, ""), *RACE, *WRONG, case=LONG),
    "channels of lower lanes as bits": listed(nth(r"popc\.b32(\s+%r\d+, %r\d+)", 1, r"mov.b32\1"), *RACE, *WRONG),
    "a part's total left out": listed(
        line("all += totals[part]", r"add\.s32(\s+%r\d+), %r\d+, (%r\d+);", 0, r"mov.b32\1, \2;"),
        *RACE,
        *WRONG,
        case=LONG,
    ),
    "every channel a neighbour's": listed(
        line("list[all + before[at]", r"or\.b32(\s+%r\d+, %r\d+), %r\d+;", 0, r"or.b32\1, 1;"), "value"
    ),
    "entries past the last": listed(
        line("i < all; i += kThreads) p.index", r"setp\.(ge|lt)\.s32", 0, "setp.gt.s32"), *RACE, *WRONG
    ),
    "list filled past its end": listed(line("i < p.K; i += kThreads) p.index", GREATER_EQUAL, None, GREATER), *WRONG),
    "no parts before": listed(
        line("listed += all;", r"add\.s64(\s+%rd\d+), %rd\d+, (%rd\d+);", 0, r"mov.b64\1, \2;"), *WRONG, case=LONG
    ),
    "count of a row": listed(
        line("*p.count = static_cast", r"st\.global\.u32(\s+\[%rd\d+\]), %rd?\d+;", 0, r"st.global.u32\1, 1;"), *WRONG
    ),
}
SUBJECT = CudaSubject(
    op="channel_select",
    cases=CASES,
    warp_cases=[next(iter(CASES)), COMMON, EQUAL, SHARE],
    check=check,
    reference_launch=WHOLE,
    least_bytes=lambda args: count_cuda(*args).bytes,
    count=count_cuda,
    mutant_case=COMMON,
    mutants=MUTANTS,
    idle={
        "no rows": functools.partial(make, 0, 70, HALF, "top_k", False, False, "zeros", False),
        "no channels": lambda: (torch.zeros(3, 0), torch.ones(1), None, None, None, 0, False),
    },
    bad=BAD,
    shared={"channel_select_cut_kernel": 98_304},
)
