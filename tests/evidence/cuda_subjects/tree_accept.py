"""Evidence of tree_accept in CUDA C++."""

import functools
import re

import torch
from mutations import BARRIER, Change, nth
from scrimp.benchmarks.tree_accept_cost import count_cuda
from subjects.subject import Case, Flat, Mutant, pairwise
from subjects.tree_accept import check, lead, make

from .subject import CudaSubject, source

SPAN = 4096  # tokens of a chunk
# (batch, rows, vocabulary, dtype): one chunk and several, whole vectors and rows that no vector fits
SHAPES = [
    (1, 1, 7, torch.float32), (2, 70, 7, torch.bfloat16), (3, 9, 300, torch.float16), (1, 5, 4104, torch.bfloat16),
    (2, 4, 4099, torch.float32), (1, 4, 8200, torch.float16), (1, 3, 9001, torch.bfloat16),
]  # fmt: skip


def cases() -> dict[str, Case]:
    rows = pairwise(shape=SHAPES, heat=[0.0, 1.0], kind=["random", "ties", "wild"], strided=[False, True])
    found: dict[str, Case] = {}
    for row in rows:
        batch, T, vocab, dtype = row.pop("shape")
        case = {"batch": batch, "rows": T, "vocab": vocab, "dtype": dtype} | row
        found["-".join(str(value).removeprefix("torch.") for value in case.values())] = functools.partial(make, **case)
    return found | {
        REFERENCE: wide,
        DRAWN: functools.partial(make, 2, 5, 6999, torch.float16, 1.0, "random", True),
        TIES: functools.partial(make, 2, 5, 4200, torch.float16, 0.0, "ties", False),
        WILD: functools.partial(make, 3, 4, 8200, torch.float16, 1.0, "wild", False),
        "hot": functools.partial(make, 2, 3, 4200, torch.float16, 30.0, "random", False),
        "cold": functools.partial(make, 2, 3, 4200, torch.float32, 0.001, "random", False),
        "far apart": far,
    }


def wide() -> Flat:
    """A greedy choice in a tree of many rows and few steps."""
    parents = ((torch.arange(60, dtype=torch.int32) + 2) // 3 - 1)[None]
    logits, zero = torch.randint(-99, 100, (1, 60, 32768)).bfloat16(), torch.zeros(1, dtype=torch.int64)
    flat = logits, torch.randint(32768, (1, 60)), parents, zero.float(), zero, zero
    lead(*flat)
    return flat


def far() -> Flat:
    """Scores so large that noise is in their last bits."""
    logits, tokens, parents, temperature, seed, position = make(2, 3, 300, torch.float32, 1.0, "random", False)
    return torch.where(logits > 1, 2.0**22 + logits, logits), tokens, parents, temperature, seed, position


def nothing(B: int, T: int, V: int) -> Flat:
    tokens, number = torch.zeros(B, T, dtype=torch.int64), torch.zeros(B, dtype=torch.int64)
    return torch.zeros(B, T, V), tokens, tokens.int(), number.float(), number, number


def changed(i: int, change) -> Change:
    return lambda a: (*a[:i], change(a[i]), *a[i + 1 :])


BAD = {
    "dtype": (changed(0, torch.Tensor.double), "logits must be float32, float16 or bfloat16 on CUDA"),
    "rank": (changed(0, lambda x: x[0]), r"logits must be \[B, T, V\], got \[5, 6999\]"),
    "no token": (changed(0, lambda x: x[..., :0]), r"logits of shape \[2, 5, 0\] offer no token"),
    "token dtype": (changed(1, torch.Tensor.int), "tokens is of the wrong dtype"),
    "parents": (changed(2, lambda x: x[:, :4]), r"parents has shape \[2, 4\], which does not fit logits"),
    "seed": (changed(4, lambda x: x[:1]), r"seed has shape \[1\], which does not fit logits"),
    "device": (changed(5, lambda x: x.to("meta")), "all tensors must be on one CUDA device"),
}
REFERENCE, DRAWN, TIES, WILD = "wide", "drawn", "greedy ties", "wild"
line, drawing = source("tree_accept"), source("draw", "common")


def chosen(change: Change, *caught_by: str, case: str = "") -> Mutant:
    return Mutant("tree_accept_choose_kernel<__half, 8>", change, frozenset(caught_by), case=case)


def walked(change: Change, *caught_by: str, case: str = "") -> Mutant:
    return Mutant("tree_accept_walk_kernel", change, frozenset(caught_by), case=case)


def short(kernel: str, **buffers: int) -> Mutant:
    return Mutant(kernel, caught_by=frozenset({"out_of_bounds"}), short=buffers)


def every(old: str, new: str) -> Change:
    return lambda text: re.sub(old, new, text)


HOT = r"setp\.leu\.f32(\s+%p\d+, %f\d+), 0f00000000;"
CHOOSE, WALK = "tree_accept_choose_kernel<__half, 8>", "tree_accept_walk_kernel"
WRONG, RACE = ("value", "out_of_bounds", "misaligned"), ("race", "uninitialised", "value")
MUTANTS = {
    "tokens past the last": chosen(line("score[i + j] = v + j < p.V", r"setp\.ge\.s64", None, "setp.gt.s64"), *WRONG),
    "vectors past the last": chosen(line("if (v + kWidth <= p.V)", r"setp\.gt\.s64", None, "setp.lt.s64"), *WRONG),
    "depth not counted": chosen(line("++depth", ", 1;", 0, ", 0;"), "value"),
    "rows off the tree instead": chosen(line("row.in_tree = above == 0", r"setp\.eq", 0, "setp.ne"), *RACE),
    "temperature of another sequence": chosen(line("row.temperature = p", r", 2;", 0, ", 3;"), *WRONG),
    "not divided": chosen(
        line("__fdiv_rn", r"div\.rn\.f32(\s+%f\d+, %f\d+), %f\d+;", None, r"mul.f32\1, 0f3F800000;"),
        "value",
        case="hot",
    ),
    "no noise": chosen(nth(HOT, 0, r"setp.gtu.f32\1, 0f00000000;"), "value"),
    "noise where there is none": chosen(nth(HOT, 0, r"setp.gtu.f32\1, 0f00000000;"), *RACE, case=TIES),
    "all blocks do the first chunk": chosen(
        line("const int64_t first =", r"(mul\.wide\.u32\s+%rd\d+, %r\d+), 4096;", 0, r"\1, 0;"), "value"
    ),
    **{
        f"hash shifted by {old - 1}": chosen(
            every(rf"(shr\.u64\s+%rd\d+, %rd\d+), {old};", rf"\1, {old - 1};"), "value"
        )
        for old in (30, 27, 31)
    },
    "a bit more of the hash": chosen(every(r"(shr\.u64\s+%rd\d+, %rd\d+), 12;", r"\1, 11;"), "value"),
    "rough noise too low": chosen(drawing("const float high", "0f39800000", None, "0fC1800000"), "value"),
    "no doubt in the best's bound": chosen(every("0fB9800000", "0f41800000"), "value"),
    "noise taken off": chosen(drawing("const double value = own", r"sub\.f64|add\.f64", -1, "mul.f64"), "value"),
    "shuffle over 8, not 16": chosen(every(r"mov\.u32(\s+%r\d+), 16;", r"mov.u32\1, 8;"), "value"),
    "the last of equals": chosen(drawing("return (a.value", r"setp\.lt\.s64", None, "setp.gt.s64"), "value", case=TIES),
    "NaN not seen": chosen(
        nth(r"selp\.b64(\s+%rd\d+), (%rd\d+), 9221120237041090560, %p\d+;", 0, r"mov.b64\1, \2;"), "value", case=WILD
    ),
    **{f"barrier {k} removed": chosen(nth(BARRIER, k, ""), *RACE) for k in (0, 1)},
    "no barrier behind the warps' best": chosen(
        nth(r"(?:bar|barrier(?:\.cta)?)\.red\.or\.pred\s+(%\S+), 0, (%[^;]+);", 0, r"mov.pred \1, \2;"), *RACE
    ),
    **{
        f"{name} short": short(CHOOSE, **{name: size})
        for name, size in {"logits": 2, "parents": 4, "temperature": 4, "seed": 8, "position": 8}.items()
    },
    "choices past the last": walked(nth(r"setp\.le\.s64", 0, "setp.lt.s64"), *WRONG),
    "choices of the first row": walked(
        drawing("for (int64_t c = threadIdx", r"mul\.lo\.s64(\s+%rd\d+), %rd\d+, %rd\d+;", 0, r"mov.b64\1, 0;"), "value"
    ),
    "choices of the first chunks": walked(
        nth(r"mov\.u32(\s+%r\d+), 16;", 0, r"mov.u32\1, 32;"), "value", case=REFERENCE
    ),
    "the worst of the chunks": walked(drawing("return (a.value", r"setp\.gt\.f64", None, "setp.lt.f64"), "value"),
    "the last of equal chunks": walked(
        drawing("return (a.value", r"setp\.lt\.s64", None, "setp.gt.s64"), "value", case=TIES
    ),
    "nothing to choose not seen": walked(
        drawing("return __any_sync", "0dFFF0000000000000", 0, "0d7FF0000000000000"), "value", case=WILD
    ),
    "NaN not seen on the walk": walked(
        nth(r"vote\.sync\.any\.pred(\s+%p\d+), (%p\d+), %r\d+;", 0, r"setp.ne.s32\1, 0, 0;"), "value", case=WILD
    ),
    "children of others": walked(line("const uint32_t found", r"setp\.ne\.s64", 0, "setp.eq.s64"), "value"),
    "children of other tokens": walked(line("const uint32_t found", r"setp\.eq\.s64", 0, "setp.ne.s64"), "value"),
    "rows past the last": walked(line("const uint32_t found", r"setp\.ge\.s64", 0, "setp.gt.s64"), *WRONG),
    "every other row": walked(line("int64_t begin = node + 1", ", 1;", 0, ", 2;"), "value"),
    "no step down": walked(line("for (int64_t node = 0", ", 1;", -1, ", 0;"), "value"),
    "filled past the last": walked(line("for (int64_t t = depth + lane", r"setp\.ge\.s64", 0, "setp.gt.s64"), *WRONG),
    "not filled": walked(line("for (int64_t t = depth + lane", r"setp\.ge\.s64", 0, "setp.lt.s64"), *WRONG),
    "tokens short": short(WALK, tokens=40),
}
CASES = cases()
SUBJECT = CudaSubject(
    op="tree_accept",
    cases=CASES,
    warp_cases=[next(iter(CASES)), DRAWN, TIES, WILD],
    check=check,
    reference_launch=REFERENCE,
    least_bytes=lambda args: count_cuda(*args).unique_bytes,
    mutant_case=DRAWN,
    mutants=MUTANTS,
    idle={"no rows": functools.partial(nothing, 2, 0, 5), "no sequence": functools.partial(nothing, 0, 3, 5)},
    bad=BAD,
)
