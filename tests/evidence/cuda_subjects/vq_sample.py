"""Evidence of vq_sample in CUDA C++. The scores of the codes are those of the op linear, which has its own."""

import functools
import math
import re

import torch
from mutations import BARRIER, Change, nth
from scrimp.benchmarks.vq_logits_cost import in_shared
from scrimp.benchmarks.vq_sample_cost import chosen
from subjects.subject import Case, Flat, Mutant, pairwise
from subjects.vq_sample import check, make

from .subject import CudaSubject, source

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
SPAN = 4096  # tokens of a chunk
# (rows, K, V, levels): one chunk and several, whole vectors and tokens that no vector fits
SHAPES = [(4, 16, 64, 1), (3, 37, 1501, 2), (1, 130, 4100, 1), (2, 9, 8199, 3)]
FILTERS = {
    "all": {}, "top-k": {"top_k": 40}, "top-p": {"top_p": 0.7}, "min-p": {"min_p": 0.05},
    "both": {"top_k": 900, "top_p": 0.6, "min_p": 0.01},
}  # fmt: skip


def cases() -> dict[str, Case]:
    rows = pairwise(shape=SHAPES, dtype=[HALF, BRAIN, SINGLE], bias=[False, True], filtered=list(FILTERS))
    found: dict[str, Case] = {}
    for row in rows:
        shape, name, dtype = row["shape"], row["filtered"], str(row["dtype"]).removeprefix("torch.")
        found["-".join(map(str, (*shape, dtype, row["bias"], name)))] = functools.partial(
            make, *shape, row["dtype"], row["bias"], d=8, **FILTERS[name]
        )
    return found | {
        MUTATED: functools.partial(make, 3, 37, 5000, 2, HALF, True, 40, 0.2, 0.0, heats=(3.0, 9.0), d=8, spread=1),
        DRAWN: functools.partial(make, 3, 37, 4200, 1, HALF, True, heats=(0.7, 1.0, 3.0), d=8),
        WHOLE: functools.partial(make, 2, 64, 8 * SPAN, 1, HALF, heats=(0.0,), d=8),
        MIN_P: functools.partial(make, 3, 16, 300, 1, HALF, min_p=0.5, heats=(3.0, 9.0), d=8),
        TIES: functools.partial(make, 2, 2, 4200, 1, HALF, heats=(0.0,), d=8),
        CHUNKS: functools.partial(make, 2, 16, 40 * SPAN, 1, HALF, heats=(1.0,), d=8),
        NAN: one_nan,
        "no equals": functools.partial(make, 2, 500, 4800, 2, HALF, True, 300, 0.9, heats=(2.0,), d=8),
        FLAT: functools.partial(make, 3, 5, 9000, 1, HALF, top_k=8999, top_p=0.02, heats=(1.0,), spread=0, d=8),
        "the best alone": functools.partial(make, 4, 37, 3001, 2, BRAIN, True, 1, 1e-30, 1.0, d=8),
        BROKEN: functools.partial(make, 8, 16, 2064, 1, HALF, broken=True, d=8),
        "broken, all": functools.partial(make, 8, 37, 4200, 2, BRAIN, True, 20, 0.9, 0.1, broken=True, d=8),
        HEATS: functools.partial(
            make, 5, 16, 64, 1, HALF, top_p=0.9, heats=(-1.0, math.inf, math.nan, 1.0, 0.0), d=8
        ),
        "more codes than shared memory holds": functools.partial(make, 2, 4100, 64, 1, SINGLE, top_p=0.9, d=8),
        "codes off the grid": shifted,
    }  # fmt: skip


def shifted() -> Flat:
    """Codes that begin off the 16-byte grid."""
    args = list(make(2, 16, 1024, 2, HALF, top_p=0.9, d=8))
    args[2] = torch.cat([args[2].flatten()[:1], args[2].flatten()])[1:].view(2, 1024)
    return tuple(args)


def one_nan() -> Flat:
    """A logit that is NaN, in the second of three chunks."""
    args = make(2, 16, 9000, 1, HALF, bias=True, heats=(1.0, 0.0), d=8)
    args[3][5000] = torch.nan
    return args


def changed(i: int, change) -> Change:
    return lambda a: (*a[:i], change(a[i]), *a[i + 1 :])


BAD = {
    "dtype": (lambda a: (*(x.double() for x in a[:2]), *a[2:]), "h must be float32, float16 or bfloat16 on CUDA"),
    "dtype of codes": (changed(2, torch.Tensor.long), "codes must be int32"),
    "bias": (changed(3, lambda x: x[1:]), r"bias has shape \[4999\], expected \[5000\]"),
    "temperature": (changed(4, torch.Tensor.double), "temperature is of the wrong dtype"),
    "seed": (changed(5, lambda x: x[:2]), r"seed has shape \[2\], which does not fit h \[3, 8\]"),
    "position": (changed(6, torch.Tensor.int), "position is of the wrong dtype"),
    "top_k": (changed(7, lambda _: -1), "top_k=-1 must not be negative"),
    "top_p": (changed(8, lambda _: 0.0), "top_p=0 must be above 0 and at most 1"),
    "min_p": (changed(9, lambda _: 1.5), "min_p=1.5 must be from 0 to 1"),
    "no token": (lambda a: (*a[:2], a[2][:, :0], None, *a[4:]), r"codes of shape \[2, 0\] offer no token"),
    "device": (changed(5, lambda x: x.to("meta")), "all tensors must be on one CUDA device"),
}
MUTATED, DRAWN, WHOLE = "3-37-5000", "drawn", "64 codes"
MIN_P, BROKEN, TIES, CHUNKS, HEATS = "min-p", "broken", "greedy ties", "many chunks", "temperatures"
NAN, FLAT = "one NaN", "flat"
WEIGH, CHOOSE = "vq_sample_weigh_kernel<__half, true>", "vq_sample_choose_kernel<__half, true>"
WRONG, RACE = ("value", "out_of_bounds", "misaligned"), ("race", "uninitialised", "value")
line, shared, drawing = source("vq_sample"), source("vq_tokens", "common"), source("draw", "common")


def planted(kernel: str, change: Change, *caught_by: str, case: str = "") -> Mutant:
    return Mutant(kernel, change, frozenset(caught_by), case=case)


def short(kernel: str, **buffers: int) -> dict[str, Mutant]:
    word = kernel.split("_")[2]
    return {f"{name} of {word} short": Mutant(kernel, str, frozenset({"out_of_bounds"}), {name: size})
            for name, size in buffers.items()}  # fmt: skip


weigh, choose, pick = (functools.partial(planted, kernel) for kernel in (WEIGH, CHOOSE, "vq_sample_pick_kernel"))
FIRST = (r"mov\.u32(\s+%r\d+), %ctaid\.x;", 0, r"mov.u32\1, 0;")


def every(old: str, new: str) -> Change:
    return lambda text: re.sub(old, new, text)


MUTANTS = {
    **short(WEIGH, codes=4, bias=2, temperature=4),
    **{f"barrier {k} of weigh removed": weigh(nth(BARRIER, k, ""), *RACE) for k in range(5)},
    "tokens below top-k's threshold": weigh(line("rank < floor", r"setp\.lt\.u32", None, "setp.gt.u32"), *RACE),
    "all tokens of other digits": weigh(line("rank < floor", r"setp\.ne\.s64", None, "setp.eq.s64"), *RACE),
    "what is wanted of all": weigh(line("ceil(f.top_p", r"mul\.f64|mul\.rn\.f64", 0, "add.f64"), "value"),
    "above without the digit": weigh(line("const uint64_t above", r"sub\.s64", 0, "add.s64"), *RACE),
    "threshold of the first row": weigh(line("cut = f.before[row]", r", 24", 0, ", 0"), *RACE),
    "no carry": weigh(line("atomicAdd(&high, upper", r"add\.s32", None, "sub.s32"), "value"),
    "weights of the first row": weigh(
        line("if (weight) atomicAdd", r"shl\.b64(\s+%rd\d+), %rd\d+, ", 0, r"shl.b64\1, 0, "), *RACE
    ),
    "weights of the first block": weigh(nth(*FIRST), *WRONG, *RACE),
    "scores of the first row": weigh(
        line("row * p.tokens.K", r"mul\.lo\.s64(\s+%rd\d+, )%rd\d+, ", 0, r"mul.lo.s64\g<1>0, "), "value"
    ),
    **short(CHOOSE, codes=4, bias=2, temperature=4, seed=8, position=8),
    **{f"barrier {k} of choose removed": choose(nth(BARRIER, k, ""), *RACE) for k in range(5)},
    "not divided": choose(
        line("const float scaled", r"div\.rn\.f32(\s+%f\d+, %f\d+), %f\d+;", None, r"mul.f32\1, 0f3F800000;"), "value"
    ),
    "tokens past the last": choose(line("? scaled : -INF", r"setp\.lt\.s64", None, "setp.ge.s64"), *WRONG, *RACE),
    "below the threshold": choose(line(">= least ?", r"setp\.lt\.u32", None, "setp.eq.u32"), "value"),
    "all of the equals": choose(
        line(">= cut.wanted) score[i]", r"setp\.ge\.u64", None, "setp.eq.s64"), "value", case=FLAT
    ),
    "equals of the thread alone": choose(
        line("front += i < warp", r"add\.s64(\s+%rd\d+), (%rd\d+), %rd\d+;", None, r"mov.b64\1, 0;"), "value", case=FLAT
    ),
    "equals of earlier steps not counted": choose(
        line("earlier += all", r"add\.s64(\s+%rd\d+), %rd\d+, %rd\d+;", None, r"mov.b64\1, 0;"), "value", case=FLAT
    ),
    "the chunk's own weight": choose(line("c < chunk; c += 32", r"setp\.ge\.u32", 0, "setp.gt.u32"), *WRONG, case=FLAT),
    "noise of the first seed": choose(
        line("const uint64_t key", r"mul\.wide\.u32(\s+%rd\d+, %r\d+), 8;", 0, r"mul.wide.u32\1, 0;"), "value"
    ),
    "best score of the worst": choose(nth(r"redux\.sync\.max\.u32", 0, "redux.sync.min.u32"), "value", case=MIN_P),
    "min-p not asked": choose(
        line("uint32_t least = rank_of", r"add\.f32(\s+%f\d+), (%f\d+), %f\d+;", 0, r"mov.f32\1, 0fFF800000;"),
        "value",
        case=MIN_P,
    ),
    "hash shifted by 29": choose(every(r"(shr\.u64\s+%rd\d+, %rd\d+), 30;", r"\1, 29;"), "value"),
    "rough noise too low": choose(drawing("const float high", "0f39800000", None, "0fC1800000"), "value", case=DRAWN),
    "the last of equals": choose(drawing("return (a.value", r"setp\.lt\.s64", None, "setp.gt.s64"), "value", case=TIES),
    "NaN not seen": choose(
        nth(r"selp\.b64(\s+%rd\d+), (%rd\d+), 9221120237041090560, %p\d+;", 0, r"mov.b64\1, \2;"), "value", case=NAN
    ),
    **short("vq_sample_pick_kernel", temperature=4),
    "the first row's token": pick(nth(r"mul\.lo\.s64(\s+%rd\d+, )%rd\d+, ", 0, r"mul.lo.s64\g<1>0, "), "value"),
    "choices past the last": pick(nth(r"setp\.lt\.u64", 0, "setp.le.u64"), *WRONG, case=CHUNKS),
    "first chunk skipped": pick(nth(r"setp\.ge\.u32", 0, "setp.ne.s32"), *WRONG),
    "chunks behind 32 skipped": pick(nth(r"setp\.lt\.u64", 0, "setp.gt.u64"), *WRONG, case=CHUNKS),
    "the worst of the chunks": pick(drawing("return (a.value", r"setp\.gt\.f64", None, "setp.lt.f64"), "value"),
    "the last of equal chunks": pick(
        drawing("return (a.value", r"setp\.lt\.s64", None, "setp.gt.s64"), "value", case=TIES
    ),
    "shuffle over 8, not 16": pick(nth(r"mov\.u32(\s+%r\d+), 16;", 0, r"mov.u32\1, 8;"), "value", case=CHUNKS),
    "NaN not voted": pick(
        nth(r"vote\.sync\.any\.pred(\s+%p\d+), (%p\d+), %r\d+;", 0, r"setp.ne.s32\1, 0, 0;"), "value", case=NAN
    ),
    "nothing to choose not seen": pick(
        drawing("return __any_sync", "0dFFF0000000000000", 0, "0d7FF0000000000000"), "value", case=BROKEN
    ),
    "negative temperatures": pick(
        line("temperature < INFINITY ? token", r"setp\.ge\.f32", 0, "setp.ne.f32"), "value", case=HEATS
    ),
    "infinite temperatures": pick(
        line("temperature < INFINITY ? token", r"setp\.lt\.f32", 0, "setp.le.f32"), "value", case=HEATS
    ),
    "temperature of the first row": pick(
        nth(r"mul\.wide\.u32(\s+%rd\d+, %r\d+), 4;", 0, r"mul.wide.u32\1, 0;"), "value", case=HEATS
    ),
    "tokens of the next row": pick(nth(r"mul\.wide\.u32(\s+%rd\d+, %r\d+), 8;", 0, r"mul.wide.u32\1, 16;"), *WRONG),
}
CASES = cases()
SUBJECT = CudaSubject(
    op="vq_sample",
    cases=CASES,
    warp_cases=[MUTATED, DRAWN, FLAT, BROKEN],
    check=check,
    reference_launch=WHOLE,
    least_bytes=lambda args: chosen(*args).bytes,
    count=chosen,
    exact_bytes=lambda args: in_shared(*args[1:4]) and bool(args[0].isfinite().all()),
    mutant_case=MUTATED,
    mutants=MUTANTS,
    idle={"no rows": functools.partial(make, 0, 5, 20, 1, HALF)},
    bad=BAD,
)
