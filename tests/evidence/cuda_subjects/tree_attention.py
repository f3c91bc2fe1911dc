"""Evidence of tree_attention in CUDA C++."""

import functools
import re

import torch
from mutations import BARRIER, COMMIT, WAIT, Change, nth, weaker
from scrimp.benchmarks.tree_attention_cost import count_cuda
from subjects.subject import Case, Flat, Mutant, against_oracle
from subjects.tree_attention import make

from .subject import CudaSubject, source

HALF, BRAIN = torch.float16, torch.bfloat16
FORMS = [("tree", 64, HALF), ("chain", 128, BRAIN), ("tree", 128, HALF), ("tree", 64, BRAIN)]
# Prefixes on both sides of a block (16 keys), a unit (128) and a split (512); (query heads, their groups); new rows.
SIZES: list[tuple[list[int], tuple[int, int], int]] = [
    ([0], (2, 2), 1), ([15, 0], (6, 2), 3), ([16], (8, 1), 5), ([126], (3, 1), 4), ([510], (3, 1), 4),
    ([640], (2, 2), 1), ([512, 449], (4, 1), 17), ([1030], (8, 2), 9), ([470], (1, 1), 64),
]  # fmt: skip
REFERENCE, MANY = "reference", "more heads than a tile"


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {
        f"{kind}-{'+'.join(map(str, prefix))}-{heads[0]}-{heads[1]}-{T}-{D}-{dtype}".replace("torch.", ""): (
            functools.partial(make, kind, prefix, heads, T, D, dtype)
        )
        for k, (kind, D, dtype) in enumerate(FORMS) for j, (prefix, heads, T) in enumerate(SIZES)
        if k < 2 or (j + k) % 2
    }  # fmt: skip
    return found | {
        "rows that see nothing": functools.partial(make, "empty", [0, 40], (2, 1), 3, 64, HALF),
        "by token": functools.partial(make, "tree", [530], (6, 2), 3, 64, HALF, by_token=True),
        MANY: functools.partial(make, "tree", [530], (40, 1), 2, 64, HALF),
        "negative scale": lambda: (*make("tree", [530], (4, 1), 3, 64, HALF)[:6], -0.2),
        "no scale": lambda: (*make("chain", [130], (2, 1), 3, 64, BRAIN)[:6], 0.0),
        REFERENCE: functools.partial(make, "tree", [4300], (8, 2), 4, 128, BRAIN),
    }


def nothing(B: int, H: int, T: int) -> Flat:
    return (
        make("chain", [5] * B, (H, 1), T, 64, HALF)
        if B
        else (
            torch.zeros(0, H, T, 64).half(),
            *[torch.zeros(0, 1, 9, 64).half()] * 2,
            torch.zeros(0, dtype=torch.int32),
            None,
            0,
            1.0,
        )
    )


def changed(i: int, change) -> Change:
    return lambda a: (*a[:i], change(a[i]), *a[i + 1 :])


BAD = {
    "rank": (changed(0, lambda x: x[0]), r"q must be \[B, H, N, D\], got \[8, 9, 64\]"),
    "dtypes": (changed(1, torch.Tensor.bfloat16), "k_cache and q differ in dtype"),
    "dtype": (lambda a: (*(x.float() for x in a[:3]), *a[3:]), r"CUDA C\+\+ serves float16 and bfloat16"),
    "head size": (lambda a: (*(x[..., :32] for x in a[:3]), *a[3:]), r"CUDA C\+\+ serves .*, head sizes 64 and 128"),
    "shapes": (changed(2, lambda x: x[:, :, :-1]), r"v_cache \[1, 2, 1041, 64\] do not fit together"),
    "heads": (changed(0, lambda x: x[:, :7]), "7 query heads are not a multiple of 2 key/value heads"),
    "rows": (changed(0, lambda x: x.repeat(1, 1, 8, 1)), "T=72 new rows are more than 64"),
    "prefix": (changed(3, torch.Tensor.long), r"prefix must be int32 \[1\], got \[1\]"),
    "ancestors": (changed(4, lambda x: x[:, :4]), r"ancestors must be int64 \[1 or 1, 9\], got \[1, 4\]"),
    "negative window": (changed(5, lambda _: -1), "window=-1 must not be negative"),
    "window of a tree": (changed(5, lambda _: 3), "window=3 goes with the chain only"),
    "window": (lambda a: (*a[:4], None, 3, a[6]), r"CUDA C\+\+ serves .* no window; Triton the rest"),
    "scale": (changed(6, lambda _: torch.inf), "scale=inf must be finite"),
    "capacity": (lambda a: (a[0], a[1][:, :, :8], a[2][:, :, :8], *a[3:]), "9 new rows leave the cache's 8 slots"),
    "rows off the grid": (
        changed(1, lambda x: torch.nn.functional.pad(x, (1, 0))[..., 1:]),
        "rows of .* at multiples of 16 bytes",
    ),
    "device": (changed(3, lambda x: x.to("meta")), "all tensors must be on one CUDA device"),
}
CROSSING = "tree-510-3-1-4-64-float16"  # whole blocks end within a unit, paths go on into the next split
line, parts = source("tree_attention"), source("tree_attention.parts")
PREFIX, TAIL = "tree_attention_kernel<__half, 64>", "tree_attention_merge_kernel<__half, 64>"
COPY, WRONG = ("race", "async_race", "uninitialised", "value"), ("value", "out_of_bounds", "misaligned")
MMA_A = r"(mma\.sync\S+ \{[^}]*\}, \{)(%r\d+),(%r\d+)"
MMA_B = r"(mma\.sync\S+ \{[^}]*\}, \{[^}]*\}, \{)(%r\d+),(%r\d+)"
SWAPPED, ANY = r"\1\3,\2", r"vote\.sync\.any\.pred(\s+%p\d+), %p\d+, %r\d+;"
SHUFFLE = r"(shfl\.sync\.bfly\.b32\s+%r\d+\|%p\d+, %r\d+), %r\d+,"
PRODUCT = r"mul\.lo\.s64(\s+%rd\d+), %rd\d+, %rd\d+;"
BEHIND = 3 * 64 * 2 + 2  # bytes of the slots that nobody sees, and one number more


def first(change: Change, *caught_by: str, case: str = "") -> Mutant:
    return Mutant(PREFIX, change, frozenset(caught_by), case=case)


def second(change: Change, *caught_by: str, case: str = "") -> Mutant:
    return Mutant(TAIL, change, frozenset(caught_by), case=case)


def short(kernel: str, **buffers: int) -> Mutant:
    return Mutant(kernel, caught_by=frozenset({"out_of_bounds"}), short=buffers)


MUTANTS = {
    **{f"barrier {k} removed": first(nth(BARRIER, k, ""), *COPY) for k in (0, 1)},
    **{f"wait {k} weakened": first(weaker(k), *COPY) for k in (0, 1)},
    **{f"wait {k} removed": first(nth(WAIT, k, ""), *COPY) for k in (0, 1)},
    **{f"commit {k} removed": first(nth(COMMIT, k, ""), *COPY) for k in (0, 1, 4)},
    **{f"operand A of product {k} swapped": first(nth(MMA_A, k, SWAPPED), "value") for k in (0, 15, 16, 31)},
    **{f"operand B of product {k} swapped": first(nth(MMA_B, k, SWAPPED), "value") for k in (0, 15, 16, 31)},
    "keys transposed": first(nth(r"x4\.shared", 0, "x4.trans.shared"), "value"),
    "values not transposed": first(nth(r"x4\.trans", 0, "x4"), "value"),
    "maximum of another row": first(nth(SHUFFLE, 0, r"\1, 4,"), "value"),
    "total of another row": first(nth(SHUFFLE, 2, r"\1, 4,"), "value"),
    "sums not scaled": first(nth(ANY, 0, r"setp.ne.s32\1, 0, 0;"), "value"),
    "another head's keys": first(line("const T* k = static_cast", PRODUCT, 1, r"mov.b64\1, 0;"), *WRONG),
    "another head's values": first(line("const T* v = static_cast", PRODUCT, 1, r"mov.b64\1, 0;"), *WRONG),
    "keys of the first split": first(line("const T* k = static_cast", PRODUCT, -1, r"mov.b64\1, 0;"), *WRONG),
    "split of another": first(line("const bool complete", r"setp\.gt\.s64", 0, "setp.le.s64"), "value"),
    "no units": first(nth(r"setp\.ge\.s64(\s+%p\d+, %rd\d+, %rd\d+);", -1, r"setp.lt.s64\1;"), "value", case=CROSSING),
    "units of half the keys": first(
        lambda text: re.sub(r"(min\.s64\s+%rd\d+, %rd\d+), 128;", r"\1, 64;", text), "value"
    ),
    "state of another row": first(line("const int64_t at = (head", PRODUCT, -1, r"mov.b64\1, 0;"), "value"),
    **{
        f"{name} short": short(PREFIX, **{name: size})
        for name, size in {"q": 2, "k_cache": BEHIND, "v_cache": BEHIND, "prefix": 4}.items()
    },
    **{f"barrier {k} of the tail removed": second(nth(BARRIER, k, ""), *COPY) for k in (0, 1, 2)},
    "wait of the tail removed": second(nth(WAIT, 0, ""), *COPY),
    "path without its order": second(nth(r"st\.shared\.u8(\s+\[[^\]]*\]), %r\d+;", 0, r"st.shared.u8\1, %r2;"), *WRONG),
    "path of another row": second(line("const uint64_t word", r", 3;", 0, ", 4;"), *WRONG),
    "a hidden key seen": second(parts("x = key + i / 2 * 8", r"setp\.lt\.s32", None, "setp.le.s32"), "value"),
    "operand A of the tail swapped": second(nth(MMA_A, 0, SWAPPED), "value"),
    "operand B of the tail swapped": second(nth(MMA_B, -1, SWAPPED), "value"),
    "another row's query": second(line("static_cast<const T*>(p.q) + b", PRODUCT, 1, r"mov.b64\1, 0;"), "value"),
    "a unit over the one before": second(
        line("first_pair, sums + next * kTile", r"shl\.b32(\s+%r\d+), %r\d+, 10;", 0, r"mov.b32\1, 0;"),
        *COPY,
        case=CROSSING,
    ),
    "a unit begun anew": second(
        line("const bool begun", r"(setp\.lt\.s64\s+%p\d+, %rd\d+), 1;", 0, r"\1, 128;"), "value", case=CROSSING
    ),
    "no new split": second(
        line("if (s == last + 1 && crosses)", r"setp\.(?:ne|eq)\.s64", None, "setp.gt.s64"), "value", case=CROSSING
    ),
    "last split with all": second(line("if (s == last)", r"setp\.ne\.s64", None, "setp.gt.s64"), "value"),
    "splits of half a warp": second(nth(SHUFFLE, -1, r"\1, 8,"), "value"),
    "logarithm to base 2": second(nth("0f3F317218", 0, "0f3F800000"), "value"),
    "not inverted": second(nth(r"rcp\.rn\.f32(\s+%f\d+), %f\d+;", 0, r"mov.f32\1, 0f3F800000;"), "value"),
    "results in half a row": second(
        line("*reinterpret_cast<uint2*>", r"(shl\.b64\s+%rd\d+, %rd\d+), 6;", 0, r"\1, 5;"), "value"
    ),
    "ancestors short": short(TAIL, ancestors=8),
}
CASES = cases()
SUBJECT = CudaSubject(
    op="tree_attention",
    cases=CASES,
    warp_cases=["tree-126-3-1-4-64-float16", "chain-1030-8-2-9-128-bfloat16", "tree-510-3-1-4-64-float16", MANY],
    check=against_oracle("tree_attention"),
    reference_launch=REFERENCE,
    least_bytes=lambda args: count_cuda(*args).bytes,
    mutant_case="tree-1030-8-2-9-64-float16",
    mutants=MUTANTS,
    idle={"no rows": functools.partial(nothing, 1, 2, 0), "no sequence": functools.partial(nothing, 0, 2, 3)},
    bad=BAD,
    shared={
        "tree_attention_kernel<__half, 64>": 70656,
        "tree_attention_kernel<__nv_bfloat16, 64>": 70656,
        "tree_attention_kernel": 74752,
        "tree_attention_merge_kernel<__half, 64>": 31040,
        "tree_attention_merge_kernel<__nv_bfloat16, 64>": 31040,
        "tree_attention_merge_kernel": 61760,
    },
    tensor_kernels={"tree_attention_kernel": 0},
)
