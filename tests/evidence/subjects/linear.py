"""Evidence of linear."""

import functools

import torch
from mutations import BARRIER, COMMIT, MMA_A, MMA_B, SWAPPED, WAIT, Change, at_line, nth, weaker
from scrimp.kernels import linear as kernels

from .subject import Case, Flat, Mutant, Subject, against_oracle

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def make(rows: int, K: int, outputs: tuple[int, ...], dtype: torch.dtype, added: bool = False) -> Flat:
    """`added`: the first, third, ... weight has a bias, and there is a residual."""
    x, weights = torch.randn(rows, K).to(dtype), [torch.randn(N, K).to(dtype) for N in outputs]
    biases = [None if i % 2 else torch.randn(N).to(dtype) for i, N in enumerate(outputs)] if added else []
    return x, weights, biases, torch.randn(rows, sum(outputs)).to(dtype) if added else None


def strided(dtype: torch.dtype) -> Flat:
    """Weights with strides of their own, one without outputs, more than one launch takes; x and residual transposed."""
    x, residual = torch.randn(40, 3, 2).to(dtype).permute(2, 1, 0), torch.randn(2, 3, 39).to(dtype)
    wide = [torch.randn(N, 50).to(dtype)[:, :40] for N in (7, 0, 3)]
    weights = wide + [torch.randn(N, 40).to(dtype) for N in (24, 5)]
    return x, weights, [None, None, torch.randn(3, 2).to(dtype)[:, 1], None, torch.randn(5).to(dtype)], residual


EMULATED: dict[str, Case] = {
    f"{dtype}-{rows}-{K}-{'-'.join(map(str, outputs))}".removeprefix("torch."): functools.partial(
        make, rows, K, outputs, dtype, added
    )
    for dtype, added, outputs, Ks, some_rows in [
        (BRAIN, False, (112,), (16, 128, 1024, 1040, 2128), (1, 7, 16)),  # several chunks are kept apart and added up
        (HALF, True, (40, 24, 16), (64, 2080, 3072), (5, 16)),
        (BRAIN, True, (33, 50), (1, 129, 577), (40, 64)),  # nothing is aligned
        (HALF, False, (2960,), (1104, 2064), (3,)),  # one program adds up the chunks
        (BRAIN, True, (2900, 60), (1040,), (33, 64)),
    ]
    for K in Ks for rows in some_rows
}  # fmt: skip
INTERPRETED: dict[str, Case] = {
    f"{name}-{word}": functools.partial(case, dtype=dtype)
    for word, dtype in (("half", HALF), ("single", SINGLE))
    for name, case in {
        "one row": functools.partial(make, 1, 2200, (40,)),
        "rows": functools.partial(make, 19, 100, (40, 3, 70), added=True),
        "chunks apart": functools.partial(make, 2, 1100, (9, 30), added=True),
        "strided": strided,
        "no inputs": functools.partial(make, 3, 0, (9, 30), added=True),
        "more rows": functools.partial(make, 70, 33, (9, 30), added=True),
    }.items()
}


def shipped() -> dict[str, Case]:
    """Every configuration: one weight, and the three of attention's queries, keys and values with biases."""

    def meta(rows: int, outputs: tuple[int, ...], dtype: torch.dtype, added: bool) -> Flat:
        empty = functools.partial(torch.empty, dtype=dtype, device="meta")
        biases = [empty(N) for N in outputs] if added else []
        return (
            empty(rows, 4096), [empty(N, 4096) for N in outputs], biases, empty(rows, sum(outputs)) if added else None
        )  # fmt: skip

    return {
        f"{rows}-{sum(outputs)}-{str(dtype).removeprefix('torch.')}": functools.partial(
            meta, rows, outputs, dtype, len(outputs) > 1
        )
        for rows in (1, 16, 32, 64) for outputs in ((14336,), (512, 128, 128)) for dtype in (BRAIN, SINGLE)
        if rows in (16, 64) or dtype is BRAIN
    }  # fmt: skip


def planted(change: Change, *caught_by: str, case: str = "") -> Mutant:
    return Mutant("linear_kernel", change, frozenset(caught_by), case=case)


def added(change: Change, *caught_by: str) -> Mutant:
    return Mutant("linear_chunks_kernel", change, frozenset(caught_by))


def short(kernel: str, **buffers: int) -> Mutant:
    return Mutant(kernel, caught_by=frozenset({"out_of_bounds"}), short=buffers)


TOGETHER = "float16-3-1104-2960"  # one program adds up the chunks
COPY = ("race", "async_race", "uninitialised", "value")
WRONG = ("value", "out_of_bounds")
LESS, LESS_EQUAL = r"setp\.lt\.s32", "setp.le.s32"
line = functools.partial(at_line, kernels.linear_kernel)
sums = functools.partial(at_line, kernels.linear_chunks_kernel)
MUTANTS = {
    **{f"barrier {k} removed": planted(nth(BARRIER, k, ""), *COPY) for k in range(4)},
    "wait weakened": planted(weaker(0), *COPY),
    **{f"wait {k} removed": planted(nth(WAIT, k, ""), *COPY) for k in (0, 1)},
    **{f"commit {k} removed": planted(nth(COMMIT, k, ""), *COPY) for k in (1, 4, 6)},
    **{f"operand A of product {k} swapped": planted(nth(MMA_A, k, SWAPPED), "value") for k in (0, 10)},
    **{f"operand B of product {k} swapped": planted(nth(MMA_B, k, SWAPPED), "value") for k in (0, 10)},
    "rows past the end": planted(line("rows = tl.load(x + at", LESS, 0, LESS_EQUAL), "out_of_bounds"),
    "outputs past the end": planted(line("outputs = tl.load(weight + at", LESS, 5, LESS_EQUAL), "out_of_bounds"),
    "inputs past the end": planted(line("inside = (k < K - at)", LESS, 0, LESS_EQUAL), *WRONG),
    "tile of the first weight": planted(line("behind = tile >= tiles", r"setp\.ge", 0, "setp.gt"), *WRONG),
    "tile of the second weight": planted(line("behind &= tile >= tiles", r"setp\.ge", 0, "setp.gt"), *WRONG),
    "weights exchanged": planted(
        line("weight2, weight)", r"(selp\.b32\s+%r\d+), (%r\d+), (%r\d+)", 0, r"\1, \3, \2"), *WRONG
    ),
    "first output": planted(line("weight2, weight)", r"add\.s32(\s+%r\d+, %r\d+, )%r\d+", 0, r"add.s32\g<1>0"), *WRONG),
    "begin of a chunk": planted(line("begin = tl.program_id(1)", r", 10;", 0, ", 9;"), *WRONG),
    "end of a chunk": planted(line("end = tl.minimum(begin", ", 1024;", 0, ", 1152;"), "value"),
    "sum stored without a mask": planted(nth(r"@%p\d+( st\.global\.b32)", 0, r"\1"), *WRONG),
    "sum of no row stored": planted(nth(r"@%p\d+( st\.global\.b32)", -1, r"\1"), *WRONG),
    "chunks overlap": planted(line("out += tl.program_id(1)", r"shl\.b64(.*), 2;", 0, r"shl.b64\1, 1;"), *WRONG),
    **{f"{name} short": short("linear_kernel", **{name: 2}) for name in ("x", "weight0", "weight1", "weight2")},
    "sums short": short("linear_kernel", out=4),
    "chunk not begun at zero": planted(line("sums += chunk", "0f00000000", -1, "0f3F800000"), "value", case=TOGETHER),
    "sums not kept": planted(
        line("sums += chunk", r"add\.f32(\s+%r\d+), %r\d+, (%r\d+);", 0, r"mov.b32\1, 0;"), "value", case=TOGETHER
    ),
    "last chunk past the end": added(sums("n < tl.where(first + i", LESS, 3, LESS_EQUAL), "out_of_bounds"),
    "one chunk more": added(sums("n < tl.where(first + i", LESS, 4, LESS_EQUAL), "out_of_bounds"),
    "a chunk less": added(sums("n < tl.where(first + i", ", 2;", 0, ", 3;"), "value"),
    "a chunk left out": added(
        sums("n < tl.where(first + i", r"add\.f32(\s+%r\d+), (%r\d+), %r\d+;", 1, r"mov.b32\1, \2;"), "value"
    ),
    "a chunk added twice": added(
        sums("n < tl.where(first + i", r"add\.f32(\s+%r\d+), %r\d+, (%r\d+);", 1, r"add.f32\1, \2, \2;"), "value"
    ),
    "outputs of the first bias": added(sums("tl.load(bias0 + n", LESS, 0, LESS_EQUAL), "out_of_bounds"),
    "outputs before the third bias": added(sums("tl.load(bias2 + n2", ", -1;", 0, ", -2;"), "out_of_bounds"),
    "outputs behind the third bias": added(sums("tl.load(bias2 + n2", LESS, 0, LESS_EQUAL), "out_of_bounds"),
    "begin of the third bias": added(sums("n2 = n1 - N1", r"sub\.s32", 0, "add.s32"), *WRONG),
    "row of the residual": added(
        sums("at = residual", r"mul\.lo\.s64(\s+%rd\d+), %rd\d+,", 0, r"mov.b64\1,"), *WRONG
    ),
    "residual loaded without a mask": added(nth(r"@%p\d+( ld\.global\.b16)", -1, r"\1"), "out_of_bounds"),
    "stored without a mask": added(nth(r"@%p\d+( st\.global\.b16)", -1, r"\1"), *WRONG),
    "no residual": added(
        sums("sums += tl.load(at,", r"add\.f32(\s+%r\d+), (%r\d+), %r\d+;", 0, r"mov.b32\1, \2;"), "value"
    ),
    **{f"{name} of the chunks short": short("linear_chunks_kernel", **{name: size}) for name, size in
       {"chunk": 4, "bias0": 2, "bias2": 2, "residual": 2, "out": 2}.items()},
    # The odd products are of rows 8 to 15, of which there are none: zeros.
    **{f"operand B of product {k} swapped": planted(nth(MMA_B, k, SWAPPED)) for k in (1, 9)},
}  # fmt: skip
SHIPPED = shipped()
SUBJECT = Subject(
    op="linear",
    cases=EMULATED,
    warp_cases=["bfloat16-7-2128-112", "float16-5-2080-40-24-16", "bfloat16-40-129-33-50", "float16-3-1104-2960"],
    interpreted=INTERPRETED,
    check=against_oracle("linear"),
    reference_launch="float16-16-3072-40-24-16",
    shipped=SHIPPED,
    defaults=["1-14336-bfloat16", "64-768-bfloat16"],
    mutant_case="float16-5-2080-40-24-16",
    mutants=MUTANTS,
    tensor_kernels={"linear_kernel": 0},
    without_tensors=[name for name in SHIPPED if "float32" in name],
)
