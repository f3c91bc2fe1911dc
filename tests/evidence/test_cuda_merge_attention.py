"""merge_attention in CUDA C++: its launcher and its kernels, executed without a GPU, against the oracle."""

import functools
import mmap

import ptx
import pytest
import torch
from cuda_device import call, compiled
from mutations import nth
from subjects import pairwise
from subjects.merge_attention import make
from torch import Tensor

from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle

OP = "merge_attention"
REFERENCE = OPS[OP].reference
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
Args = tuple[Tensor, Tensor, Tensor, Tensor]


def shifted(args: Args) -> Args:
    """Rows that start off the 16-byte grid."""
    wide = [torch.nn.functional.pad(out, (1, 0))[..., 1:] for out in args[::2]]
    return wide[0], args[1], wide[1], args[3]


def last_stride(args: Args) -> Args:
    """A last dimension that is not contiguous: the launcher copies."""
    swapped = [out.mT.contiguous().mT for out in args[::2]]
    return swapped[0], args[1], swapped[1], args[3]


def expanded(args: Args) -> Args:
    """Side b is the same for all heads and all rows: strides of 0."""
    return args[0], args[1], args[2][:, :1, :1].expand_as(args[0]), args[3][:, :1, :1].expand_as(args[1])


ROWS = pairwise(
    n=[1, 63, 65, 200], head_dim=[64, 128, 96, 40], heads=[1, 3], dtype=DTYPES, lse=["none", "one", "both"],
    strided=[False, True],
)  # fmt: skip
CASES = {
    "-".join(str(value).removeprefix("torch.") for value in row.values()): functools.partial(make, **row)
    for row in ROWS
}
WARP_CASES = list(CASES)[:4]
CASES |= {
    f"{change.__name__}-{dtype}".replace("torch.", ""): lambda change=change, dtype=dtype: change(
        make(65, 64, 3, dtype, "both", False)
    )
    for change in (shifted, last_stride, expanded)
    for dtype in DTYPES
}
CASES |= {
    "head dim 1": lambda: make(65, 1, 3, torch.float16, "both", False),
    "head dim 111": lambda: make(9, 111, 3, torch.bfloat16, "both", True),
    "more vectors than threads": lambda: make(3, 1028, 1, torch.float32, "one", False),
    "more elements than threads": lambda: make(3, 301, 1, torch.float16, "one", False),
    "far apart": lambda: with_lse(make(65, 64, 1, torch.float16, "both", False), 200, -150),
}


def with_lse(args: Args, a: float, b: float) -> Args:
    args[1][..., 1], args[3][..., 1] = a, b
    return args


def check(args: Args, order: str = "lockstep") -> None:
    results, runs = call(OP, *args, order=order)
    assert len(runs) == 1
    assert_matches_oracle(results, REFERENCE, *args, names=("out", "lse"))


@pytest.mark.parametrize("name", CASES)
def test_lockstep(name: str) -> None:
    check(CASES[name]())


@pytest.mark.parametrize("name", WARP_CASES)
def test_warp_by_warp(name: str) -> None:
    check(CASES[name](), "warp")


def test_the_suite_stays_small() -> None:
    assert len(CASES) <= 40


def test_every_kernel_runs() -> None:
    """Three dtypes, with 128-bit vectors and element by element."""
    ran = set()
    for dtype in DTYPES:
        args = make(3, 8, 1, dtype, "one", False)
        for variant in (args, shifted(args)):
            ran |= {run.kernel for run in call(OP, *variant)[1]}
    assert ran == {kernel for kernel, _ in compiled(OP).usage}
    assert len(ran) == 6


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (1, 2, 0, 8)], ids=str)
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    out, lse = torch.zeros(shape), torch.zeros(shape[:3])
    results, runs = call(OP, out, lse, out, lse)
    assert [tuple(result.shape) for result in results] == [shape, shape[:3]]
    assert runs == []


def test_no_head_dim() -> None:
    check(make(5, 0, 3, torch.float16, "both", False))


def test_rows_beyond_32_bit_offsets() -> None:
    """Two rows 2^31 + 64 elements apart, in memory that is only reserved."""
    stride = 2**31 + 64
    memory = mmap.mmap(-1, 2 * stride + 256, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    far = torch.frombuffer(memory, dtype=torch.float16).as_strided((1, 1, 2, 64), (stride, stride, stride, 1))
    far.copy_(torch.randn(1, 1, 2, 64))
    near, lse_a, lse_b = torch.randn(1, 1, 2, 64).half(), torch.randn(1, 1, 2), torch.randn(1, 1, 2)
    for args in ((far, lse_a, near, lse_b), (near, lse_a, far, lse_b)):
        check(args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_counters(dtype: torch.dtype, head_dim: int) -> None:
    """Every byte moves once, in whole sectors and 128 bits a lane; no bank conflict."""
    args = make(200, head_dim, 3, dtype, "one", False)
    (run,) = call(OP, *args)[1]
    counters = run.counters
    rows, size = args[1].numel(), args[0].element_size()
    wide = sum(row.values["useful"] for row in counters.rows if row.kind == "global" and ".v4." in row.text)
    assert wide == 3 * rows * head_dim * size
    assert counters.useful_bytes == wide + 3 * rows * 4
    assert counters.sector_efficiency >= 0.95
    assert counters.bank_conflicts == 0


def test_registers() -> None:
    """Four blocks of 256 threads a multiprocessor: at most 64 registers."""
    for (kernel, architecture), used in compiled(OP).usage.items():
        assert used.registers <= 64, (kernel, architecture)
        assert used.shared <= 4096


BAD = {
    "dtype": (lambda a: (a[0].double(), a[1], a[2].double(), a[3]), "out_a must be float32, float16 or bfloat16 on C"),
    "mixed dtype": (lambda a: (a[0], a[1], a[2].half(), a[3]), "out_a and out_b differ in dtype"),
    "lse dtype": (lambda a: (a[0], a[1], a[2], a[3].half()), "lse_b must be float32"),
    "rank": (lambda a: (a[0][0], a[1], a[2], a[3]), r"out_a must be \[B, H, N, D\] and lse_a .*, got \[3, 5, 8\]"),
    "head size": (lambda a: (a[0], a[1], a[2][..., :4], a[3]), r"shape \[2, 3, 5, 4\] of out_b .* does not fit out_a"),
    "rows": (lambda a: (a[0], a[1][..., :4], a[2], a[3]), r"\[2, 3, 4\] of lse_a does not fit out_a \[2, 3, 5, 8\]"),
    "device": (lambda a: (a[0], a[1], a[2], a[3].to("meta")), "out_a, lse_a, out_b and lse_b must be on one CUDA dev"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    change, words = BAD[case]
    with pytest.raises(RuntimeError, match="^merge_attention: .*" + words):
        call(OP, *change(make(5, 8, 3, torch.float32, "none", False)))


def test_a_failed_launch_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"^merge_attention: the launch failed: no kernel image is available$"):
        call(OP, *make(5, 8, 3, torch.float32, "none", False), failure="no kernel image is available")


# Planted faults in the PTX of the fp16 kernel with 128-bit vectors: (change, what must catch it).
LSE, WIDE = r"ld\.global\.f32(\s+%f\d+, \[%rd\d+)\]", r"ld\.global\.v4\.u32(\s+\{[^}]*\}, \[%rd\d+)\]"
STORE, WEIGHT = r"st\.global\.v4\.u32(\s+\[%rd\d+)\]", r"ld\.shared\.v2\.f32(\s+)\{(%f\d+), (%f\d+)\}"
BARRIER, BOUND = r"bar\.sync\s+0;", r"setp\.ge\.s32(\s+%p\d+, %r\d+, %r\d+);"
EMPTY, PAIR = r"setp\.leu\.f32(\s+%p\d+, %f\d+), 0f00000000", r"mov\.b32(\s+%r\d+), \{(%rs\d+), (%rs\d+)\};"
MUTANTS = {
    "no barrier": (nth(BARRIER, 0, ""), {"race", "uninitialised"}),
    "barrier of a warp": (nth(BARRIER, 0, "bar.warp.sync -1;"), {"race", "uninitialised"}),
    "one tile too far": (nth(r"min\.s64(\s+%rd\d+), (%rd\d+), (%rd\d+);", 0, r"mov.b64\1, \3;"), {"out_of_bounds"}),
    "weights off by one row": (nth(BOUND, 0, r"setp.gt.s32\1;"), {"out_of_bounds"}),
    "first row off by one": (nth(BOUND, 1, r"setp.gt.s32\1;"), {"uninitialised"}),
    "second row off by one": (nth(BOUND, 2, r"setp.gt.s32\1;"), {"out_of_bounds"}),
    "second row stored off by one": (nth(BOUND, 3, r"setp.gt.s32\1;"), {"uninitialised"}),
    "all blocks do the first tile": (nth(r"mov\.u32(\s+%r\d+), %ctaid\.x;", 0, r"mov.u32\1, 0;"), {"value"}),
    "lse of the next row": (nth(LSE, 0, r"ld.global.f32\1+4]"), {"out_of_bounds"}),
    "smaller lse as the base": (nth(r"max\.f32", 0, "min.f32"), {"value"}),
    "no guard against -inf": (nth(r"selp\.f32(\s+%f\d+), 0f00000000, (%f\d+), \S+;", 0, r"mov.f32\1, \2;"), {"value"}),
    "no guard against an empty row": (nth(EMPTY, 0, r"setp.lt.f32\1, 0f00000000"), {"value"}),
    "no normalisation": (nth(r"rcp\.rn\.f32(\s+%f\d+), %f\d+;", 0, r"mov.f32\1, 0f3F800000;"), {"value"}),
    "logarithm to base 2": (nth(r"0f3F317218", 0, "0f3F800000"), {"value"}),
    "weights exchanged": (nth(WEIGHT, 0, r"ld.shared.v2.f32\1{\3, \2}"), {"value"}),
    "weights of one row for both": (nth(r"(shl\.b32\s+%r\d+), %r\d+, 3;", -1, r"\1, %r5, 3;"), {"value"}),
    "vector of the next lane": (nth(WIDE, 1, r"ld.global.v4.u32\1+16]"), {"out_of_bounds"}),
    "misaligned vector": (nth(WIDE, 0, r"ld.global.v4.u32\1+8]"), {"misaligned"}),
    "store to the next vector": (nth(STORE, -1, r"st.global.v4.u32\1+16]"), {"out_of_bounds", "value"}),
    "halves of a word exchanged": (nth(PAIR, 0, r"mov.b32\1, {\3, \2};"), {"value"}),
}
EQUIVALENT = {
    # Sums of exponentials are never negative, so "not above 0" is "equal to 0" (and NaN goes the same way).
    "guard by equality": nth(EMPTY, 0, r"setp.equ.f32\1, 0f00000000"),
}


def mutant_case(n: int = 65) -> Args:
    """Tiles of 64 rows: the last one has 1 row, or for n = 104 40 rows, so that its threads have a second one."""
    return with_lse(make(n, 64, 3, torch.float16, "both", False), 200, -150)


def outcome(args: Args, change, order: str) -> tuple[str, object, object]:
    try:
        results, runs = call(OP, *args, order=order, change={"I6__halfLi8E": change} if change else None)
    except ptx.EmulatorError as fault:
        return fault.kind, None, None
    try:
        assert_matches_oracle(results, REFERENCE, *args)
    except AssertionError:
        return "value", results, runs
    return "fine", results, runs


@pytest.mark.parametrize("order", ["lockstep", "warp"])
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant(name: str, order: str) -> None:
    change, caught_by = MUTANTS[name]
    kind, *_ = outcome(mutant_case(104 if "second" in name else 65), change, order)
    assert kind in caught_by


@pytest.mark.parametrize("name", EQUIVALENT)
def test_equivalent_mutant(name: str) -> None:
    args = mutant_case()
    for order in ("lockstep", "warp"):
        kind, results, runs = outcome(args, None, order)
        mutated, others, other_runs = outcome(args, EQUIVALENT[name], order)
        assert kind == mutated == "fine"
        assert all(torch.equal(a, b) for a, b in zip(results, others, strict=True))
        assert runs[0].counters.buffer_ranges == other_runs[0].counters.buffer_ranges
