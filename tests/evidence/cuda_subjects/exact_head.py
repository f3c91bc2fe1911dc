"""Evidence of exact_head in CUDA C++: the k largest logits, equal to the reference's."""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from mutations import BARRIER, WAIT, Change, nth
from scrimp.benchmarks.exact_head_cost import screened
from subjects.exact_head import check, make
from subjects.subject import Case, Flat, Mutant, pairwise

from .subject import CudaSubject, source

HALF, BRAIN = torch.float16, torch.bfloat16
# (inputs, groups of 8 bits, a basis or none): all groups wide, none, some
SCREENS = [(64, None, False), (136, 1, True), (72, 0, False), (200, 2, False)]


def cases() -> dict[str, Case]:
    rows = pairwise(rows=[1, 5, 9], screen=SCREENS, V=[40, 700, 2083], k=[1, 7, 20], dtype=[HALF, BRAIN])
    found: dict[str, Case] = {}
    for row in rows:
        K, wide, basis = row["screen"]
        numbers = row["rows"], K, row["V"], row["k"]
        dtype = str(row["dtype"]).removeprefix("torch.")
        found["-".join(map(str, (*numbers, wide, basis, dtype)))] = functools.partial(
            make, *numbers, row["dtype"], wide, basis
        )
    return found | {
        MUTATED: functools.partial(make, 5, 136, 1100, 3, HALF),
        TURNED: functools.partial(make, 3, 136, 700, 3, HALF, 1, True),
        BROKEN: functools.partial(make, 5, 64, 1100, 3, HALF, broken=True),
        MANY: functools.partial(make, 66, 72, 300, 2, BRAIN),
        TIES: functools.partial(make, 3, 8, 60, 40, HALF),
        WHOLE: functools.partial(make, 2, 1088, 2048, 1, HALF),
        "few tiles": functools.partial(make, 2, 64, 40, 7, BRAIN),
    }


def checked(results: Any, args: Flat) -> None:
    """The check of the kernels in Triton; without states shapes alone."""
    if len(args[0]):
        check(results, args)
    elif [tuple(result.shape) for result in results] != [(0, args[-1]), (0, args[-1]), (0,)]:
        raise AssertionError(f"shapes {[result.shape for result in results]}")


def changed(i: int, change) -> Change:
    return lambda a: (*a[:i], change(a[i]), *a[i + 1 :])


BAD = {
    "dtype": (lambda a: (*(x.float() for x in a[:2]), *a[2:]), r"x must be float16 or bfloat16 in CUDA C\+\+"),
    "weight": (changed(1, torch.Tensor.bfloat16), r"weight has shape \[1100, 136\], expected \[V, 136\] in the dtype"),
    "strides": (changed(1, lambda x: x.T.contiguous().T), "the elements of a row of weight must be adjacent"),
    "k": (changed(9, lambda _: 65), "k=65 must be from 1 to 64 and at most the 1100 rows"),
    "wide": (changed(8, lambda _: 4), "wide=4 must be from 0 to 3"),
    "slack": (changed(7, lambda _: -1.0), "slack=-1 must be finite"),
    "codes": (changed(2, lambda x: x[1:]), r"codes has shape \[68, 3072\], expected uint8 \[69, 3072\]"),
    "scales": (changed(3, lambda x: x[1:]), r"scales has shape \[1103\], expected float32 \[1104\]"),
    "norm": (changed(6, torch.Tensor.double), r"norm has shape \[3\], expected float32 \[3\]"),
    "basis": (changed(4, lambda _: torch.zeros(192, 64)), r"basis has shape \[192, 64\], expected contiguous float32"),
    "scattered": (changed(3, lambda x: x.repeat(2)[::2]), "the screen's tensors must be contiguous"),
    "device": (changed(5, lambda x: x.to("meta")), "all tensors must be on one CUDA device"),
    "off the grid": (
        lambda a: (a[0][:, :4], a[1][:, :4], a[2][:, :1024].contiguous(), a[3], None, a[5][:1], a[6][:1], a[7], 1, 1),
        "rows of weight must begin at multiples of 16 bytes",
    ),
}  # fmt: skip
MUTATED, TURNED, BROKEN, MANY, WHOLE, TIES = "5-136-1100", "turned", "broken", "many states", "a wide head", "ties"
WRONG, COPY = ("value", "out_of_bounds", "misaligned"), ("race", "async_race", "uninitialised", "value")
line = source("exact_head")


def short(kernel: str, **buffers: int) -> dict[str, Mutant]:
    early = frozenset({"out_of_bounds"})
    return {f"{name} of {kernel.split('_')[0]} short": Mutant(f"exact_head_{kernel}", str, early, {name: size})
            for name, size in buffers.items()}  # fmt: skip


def every(old: str, new: str) -> Change:
    return lambda text: re.sub(old, new, text)


STATE, SCREEN, RERANK, TOP = (
    "state_kernel<__half>",
    "screen_kernel<1>",
    "rerank_kernel<__half, 1>",
    "top_kernel<__half>",
)


def named(kernel: str) -> Callable[..., Mutant]:
    return lambda change, *caught_by, case="": Mutant(f"exact_head_{kernel}", change, frozenset(caught_by), case=case)


state, screen, rerank, top = (named(kernel) for kernel in (STATE, SCREEN, RERANK, TOP))
select, listed = named("select_kernel"), named("list_kernel")
A = r"(mma\.sync\S+ \{[^}]*\}, \{)(%r\d+),(%r\d+)"
B = r"(mma\.sync\S+ \{[^}]*\}, \{[^}]*\}, \{)(%r\d+),(%r\d+)"
SWAPPED = r"\1\3,\2"
DISTANCE = r"mov\.u32(\s+%r\d+), 16;", 0, r"mov.u32\1, 8;"
FIRST = r"mov\.u32(\s+%r\d+), %ctaid\.x;", 0, r"mov.u32\1, 0;"
MUTANTS = {
    **short(STATE, x=2, error=4, norm=4),
    "nothing is sound": state(every("0f7149F2CA", "0f00000000"), "value"),
    "steps of half": state(line("step = __fdiv_rn(step", "0f46FEFE00", 0, "0f477EFE00"), "value"),
    "high pieces of half": state(line("const int high = (integer", ", 8;", None, ", 9;"), "value"),
    "sums of half the lanes": state(every(r"mov\.u32(\s+%r\d+), 16;", r"mov.u32\1, 8;"), "value"),
    "no bound": state(nth("0d3FF0000100000000", 0, "0d0000000000000000"), "value", case=TURNED),
    "the other groups' offset": state(
        line("p.steps[g * p.padded", r"selp\.b32(\s+%r\d+), (%?\w+), (%?\w+),", 0, r"selp.b32\1, \3, \2,"), "value"
    ),
    "the other groups' places": state(
        line("const int d = g", r"selp\.b32(\s+%r\d+), (%r\d+), (%r\d+),", 0, r"selp.b32\1, \3, \2,"), "value"
    ),
    "inputs past the end": state(line("d >= p.D ? 0.0f", r"setp\.ge\.s32", None, "setp.gt.s32"), *WRONG),
    "squares past the end": state(line("exists && i < p.K", r"setp\.ge\.s32", 0, "setp.gt.s32"), *WRONG),
    "states past the last": state(line("const bool exists", r"setp\.ge\.s32", 0, "setp.gt.s32"), *WRONG),
    "the first state": state(nth(*FIRST), *WRONG),
    "sums of warps not awaited": state(nth(BARRIER, 0, ""), *COPY),
    "sums of warps in one place": state(
        line("if (lane == 0) parts", r"shl\.b32(\s+%r\d+), %r\d+, 3;", 0, r"mov.b32\1, 0;"), *COPY
    ),
    **short(SCREEN, codes=1, scales=4),
    "operand A of the screen swapped": screen(nth(A, 0, SWAPPED), "value"),
    "operand B of the screen swapped": screen(nth(B, 0, SWAPPED), "value"),
    "tiles past the last": screen(line("const uint8_t* codes = tile", r"setp\.ge\.s32", 0, "setp.gt.s32"), *WRONG),
    "words of other lanes": screen(every(r"and\.b32(\s+%r\d+, %r\d+), 192;", r"and.b32\1, 128;"), "value"),
    "upper pieces of half": screen(line("const int32_t sum = high", ", 8;", None, ", 7;"), "value"),
    "the same group again": screen(line("codes += 1024", ", 1024;", 0, ", 0;"), "value"),
    "narrow codes of 3 bits": screen(every("252645135", "117901063"), "value", case=TURNED),
    "centres of the next rows": screen(
        nth(r"st\.global\.v4\.f32(\s+\[%rd\d+)\]", 0, r"st.global.v4.f32\1+16]"), *WRONG
    ),
    "centres misaligned": screen(nth(r"st\.global\.v4\.f32(\s+\[%rd\d+)\]", 0, r"st.global.v4.f32\1+8]"), "misaligned"),
    "codes misaligned": screen(
        nth(r"ld\.global\.nc\.v4\.u32(\s+\{[^}]*\}, \[%rd\d+)\]", 0, r"ld.global.nc.v4.u32\1+8]"), "misaligned"
    ),
    "tiles of the first block": screen(nth(*FIRST), *WRONG),
    "no barrier behind counts": select(nth(BARRIER, 0, ""), *COPY),
    "counts of one lane": select(
        line("counts[bit % 2][threadIdx.x / 32]", r"setp\.eq\.s32|and\.b32(\s+%r\d+, %r\d+), 32", 0, r"and.b32\1, 0"),
        *COPY,
    ),
    "a barrier of the warp": select(nth(BARRIER, 0, "bar.warp.sync -1;"), *COPY),
    "the other counts": select(
        line("count += counts[bit % 2][i]", r"and\.b32(\s+%r\d+, %r\d+), 32;", 0, r"and.b32\1, 0;"), *COPY
    ),
    "counts apart": select(nth(r"shl\.b32(\s+%r\d+, %r\d+), 2;", 0, r"shl.b32\1, 3;"), *COPY),
    "best tiles misaligned": select(
        nth(r"ld\.global\.f32(\s+%f\d+), \[(%rd\d+)\];", -2, r"ld.global.f32\1, [\2+2];"), "misaligned"
    ),
    "bound misaligned": select(
        nth(r"ld\.global\.f32(\s+%f\d+), \[(%rd\d+)\];", -1, r"ld.global.f32\1, [\2+2];"), "misaligned"
    ),
    "cut misaligned": select(nth(r"st\.global\.f32(\s+\[%rd\d+)\]", 0, r"st.global.f32\1+2]"), "misaligned"),
    "search from above": select(nth("-32768", 0, "20000"), "value"),
    "every cut infinite": select(
        every(r"selp\.f32(\s+%f\d+), %f\d+, 0f7F800000", r"selp.f32\1, 0f7F800000, 0f7F800000"), "value"
    ),
    "tiles of the first state": select(
        line("const float* best = p.best", r"mul\.wide\.s32(\s+%rd\d+, %r\d+), %r\d+;", 0, r"mul.wide.s32\1, 0;"),
        "value",
    ),
    "best tiles past the end": select(nth(r"setp\.ge\.s32(\s+%p1),", 0, r"setp.gt.s32\1,"), *WRONG),
    **short("list_kernel", scales=4),
    "rows past the last": listed(every(r"setp\.lt\.s64", "setp.le.s64"), *WRONG, case=BROKEN),
    "places of the first lane": listed(
        nth(r"shfl\.sync\.idx\.b32(\s+%r\d+\|%p\d+, %r\d+), %r\d+,", 0, r"shfl.sync.idx.b32\1, 0,"), *WRONG
    ),
    "below the cut": listed(every(r"setp\.geu\.f32", "setp.ltu.f32"), *WRONG),
    "no width": listed(
        every(r"mul\.rp\.f32(\s+%f\d+), %f\d+, %f\d+;", r"mov.f32\1, 0f00000000;"), "value", case=TURNED
    ),
    "lower ends": listed(every(r"add\.rp\.f32", "sub.rp.f32"), "value", case=TURNED),
    "the most of a warp": listed(
        nth(r"atom\.global\.add\.u32|red\.global\.add\.u32", 0, "atom.global.max.u32"), "value"
    ),
    "places again": listed(nth(r"atom\.global\.add\.u32", -1, "atom.global.max.u32"), *WRONG),
    "places not summed": listed(line("upto += lane >=", r"setp\.lt\.u32", None, "setp.ge.u32"), *WRONG),
    "listed apart": listed(line("p.listed[first] =", r", 4;", 0, ", 8;"), *WRONG),
    "the next row": listed(line("p.listed[first] =", r"add\.s32(\s+%r\d+, %r\d+), 1;", 0, r"add.s32\1, 2;"), *WRONG),
    "centres read misaligned": listed(
        nth(r"ld\.global\.v4\.f32(\s+\{[^}]*\}, \[%rd\d+)\]", 1, r"ld.global.v4.f32\1+8]"), "misaligned"
    ),
    "rows of the first block": listed(nth(*FIRST), *WRONG),
    **short(RERANK, x=2),
    "weight short": Mutant(f"exact_head_{RERANK}", str, frozenset({"out_of_bounds"}), {"weight": 2}, BROKEN),
    "no wait": rerank(nth(WAIT, 0, ""), *COPY),
    "no barrier": rerank(nth(BARRIER, 0, ""), *COPY),
    "operand A swapped": rerank(nth(A, 0, SWAPPED), "value"),
    "operand B swapped": rerank(nth(B, 0, SWAPPED), "value"),
    "more states than there are": rerank(
        every(r"(setp\.lt\.s32\s+%p\d+, %r7,) (%r\d+);", r"setp.le.s32 %p36, %r7, \2;"), *WRONG
    ),
    "rows that are none": rerank(
        line("row[i] >= 0", r"setp\.gt\.s32(\s+%p\d+, %r\d+), -1;", None, r"setp.gt.s32\1, -2;"), *WRONG
    ),
    "one row for all": rerank(
        line("p.listed[place] : -1", r"ld\.global\.u32(\s+%r\d+), \[%rd\d+\];", 0, r"mov.u32\1, 1;"), "value"
    ),
    "logits of the next places": rerank(nth(r"st\.global\.u16(\s+\[%rd\d+)\]", 0, r"st.global.u16\1+2]"), *WRONG),
    "sums without the chunk": rerank(
        line("T(sums[i / 4]", r"add\.f32(\s+%f\d+), (%f\d+), %f\d+;", 0, r"mov.f32\1, \2;"), "value"
    ),
    "the first places": rerank(nth(*FIRST), *WRONG, case=BROKEN),
    "rows the state does not need": top(line("p.needs[i] >> m", r"setp\.eq\.s64", 0, "setp.ne.s64"), *WRONG),
    "needs of the first state": top(nth(r"shl\.b64(\s+%rd\d+, %rd\d+), %r\d+;", 0, r"shl.b64\1, 0;"), "value"),
    "no barrier behind the best": top(nth(BARRIER, 0, ""), *COPY),
    "the best again": top(line("key < before", r"setp\.lt\.s64", 0, "setp.le.s64"), "value"),
    "the worst": top(line("key < before", r"setp\.gt\.s64", 0, "setp.lt.s64"), "value"),
    "NaN is the least": top(nth("9223372032559808512", 0, "0"), "value", case=BROKEN),
    "the list past the end": top(
        line("for (int i = threadIdx.x; i < count", r"setp\.lt\.s32", 0, "setp.gt.s32"), *WRONG, case=BROKEN
    ),
    "the last of equals": top(line("(0x7FFFFFFF - p.listed[i])", r"sub\.s32", 0, "add.s32"), "value", case=TIES),
    "the best of half the lanes": top(nth(*DISTANCE), *WRONG),
    "ids of the next place": top(nth(r"st\.global\.u64(\s+\[%rd\d+)\]", 0, r"st.global.u64\1+8]"), *WRONG),
    "values of the next place": top(nth(r"st\.global\.u16(\s+\[%rd\d+)\]", 0, r"st.global.u16\1+2]"), *WRONG),
    "scored of the list": top(line("p.scored[m] = counts", r", 1;", 0, ", 0;"), "value"),
}
CASES = cases()
SUBJECT = CudaSubject(
    op="exact_head",
    cases=CASES,
    warp_cases=[MUTATED, TURNED, BROKEN, MANY],
    check=checked,
    reference_launch=WHOLE,
    least_bytes=lambda args: screened(*args).bytes,
    mutant_case=MUTATED,
    mutants=MUTANTS,
    idle={"no states": functools.partial(make, 0, 64, 70, 3, HALF)},
    bad=BAD,
    shared={
        "exact_head_rerank_kernel<__half, 1>": 27_648,
        "exact_head_rerank_kernel<__nv_bfloat16, 1>": 27_648,
        "exact_head_rerank_kernel": 49_152,
    },
    tensor_kernels={"exact_head_screen_kernel": 0, "exact_head_rerank_kernel": 0},
)
