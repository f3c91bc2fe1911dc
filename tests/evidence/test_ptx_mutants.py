"""Planted faults: each mutant of a kernel's PTX is caught by a checker or by its values.

A mutant that survives must be shown to be equivalent on the inputs used (`EQUIVALENT`).
"""

import re
from collections.abc import Callable

import ptx
import pytest
import torch
from mutations import BARRIER, COMMIT, MMA_A, MMA_B, SWAPPED, WAIT, Change, in_entry, nth, shuffle, weaker
from test_ptx_kernels import attention_reference, attention_request, cuda_text, matmul_request, poisoned

ROWS, HEADS = 100, 2


# name -> (mutation, what must catch it: fault kinds, or "value")
ATTENTION: dict[str, tuple[Callable[[str], str], set[str]]] = {
    **{f"barrier {k} removed": (nth(BARRIER, k, ""), {"race", "async_race"}) for k in (0, 1, 3)},
    "barrier 0 for the warp only": (nth(BARRIER, 0, "bar.warp.sync -1;"), {"race", "async_race"}),
    "barrier 1 of another name": (nth(BARRIER, 1, "bar.sync 1, 32;"), {"race", "async_race"}),
    "wait weakened": (nth(WAIT, 0, "cp.async.wait_group 1;"), {"async_race"}),
    "wait removed": (nth(WAIT, 0, ""), {"async_race"}),
    "second commit removed": (nth(COMMIT, 1, ""), {"async_race"}),
    "loop's second commit removed": (nth(COMMIT, 3, ""), {"async_race"}),
    "wait behind the barrier": (nth(rf"({WAIT})(\s*)({BARRIER})", 0, r"\3\2\1"), {"race", "async_race"}),
    "ldmatrix without trans": (nth(r"x4\.trans", 0, "x4"), {"value"}),
    "ldmatrix with trans": (nth(r"x4\.shared", 0, "x4.trans.shared"), {"value"}),
    "shuffle distance": (shuffle(0, 2, 4), {"value"}),
    "last shuffle distance": (shuffle(-1, 1, 2), {"value"}),
    "shuffle down": (nth(r"shfl\.sync\.bfly(\.b32\s+%r\d+, %r\d+,) 2,", -1, r"shfl.sync.down\1 2,"), {"value"}),
    "A registers swapped": (nth(MMA_A, 0, SWAPPED), {"value"}),
    "A registers of the last product swapped": (nth(MMA_A, -1, SWAPPED), {"value"}),
    "B registers swapped": (nth(MMA_B, 0, SWAPPED), {"value"}),
    "probabilities packed the wrong way": (
        nth(r"(cvt\.rn\.bf16x2\.f32\s+%r\d+, )(%r\d+), (%r\d+)", 0, r"\1\3, \2"), {"value"},
    ),
    "causal test off by one": (nth(r"setp\.le\.s64", 0, "setp.lt.s64"), {"value"}),
    "row bound off by one": (nth(r"setp\.lt\.s32(\s+%p3, )", 0, r"setp.le.s32\1"), {"out_of_bounds"}),
    "copy ignores its bound": (nth(r"(cp\.async\.cg[^;]*), 0x10, %r\d+;", -1, r"\1, 0x10;"), {"out_of_bounds"}),
    "prologue copy one row late": (nth(r"(cp\.async\.cg[^;]*\[ %rd\d+) \+ 0 \]", 2, r"\1 + 128 ]"), {"value"}),
    "swizzle": (nth(r"xor\.b32(\s+%r\d+, %r\d+, 16;)", 0, r"or.b32\1"), {"value", "race", "async_race"}),
    "wrong base of the exponential": (nth(r"0f3FB8AA3B", 0, "0f3F800000"), {"value"}),
    "no exponential": (nth(r"ex2\.approx\.f32(\s+)(%r\d+), (%r\d+)", 0, r"mov.b32\1\2, \3"), {"value"}),
    "shared base lost": (nth(r"mov\.b32(\s+%r\d+), global_smem;", 0, r"mov.b32\1, 0;"), {"out_of_bounds"}),
}  # fmt: skip
EQUIVALENT = {
    # Every wait is for all groups, so groups may be merged as long as the last one is committed.
    "first commit removed": nth(COMMIT, 0, ""),
    # The barrier at the end of the loop body already separates the last reads from the epilogue.
    "barrier behind the loop removed": nth(BARRIER, 2, ""),
    # The last step of a butterfly over four lanes: lanes 1 and 3 hold the same sum.
    "last shuffle distance 3": shuffle(-1, 1, 3),
    # Behind the loop nothing is in flight: the counters say so, and so does the test below.
    "last wait weakened": nth(WAIT, 1, "cp.async.wait_group 1;"),
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, ptx.Compiled]:
    requests = {"attention": attention_request("bf16"), "matmul": matmul_request("bf16", "bf16")}
    return dict(zip(requests, ptx.compile_triton_all(requests.values()), strict=True))


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    q, k, v = torch.randn(3, HEADS, ROWS, 64).bfloat16()
    return q, k, v, attention_reference(q, k, v)


def attend(text: str, shared: int, inputs, order: str = "lockstep", short: str = "", missing: int = 0):
    """Outcome ("fine", "value" or a fault kind), output and counters of the attention kernel."""
    *tensors, expected = inputs
    args = dict(zip("qkv", tensors, strict=True)) | {"o": poisoned(HEADS, ROWS, 64, dtype=torch.bfloat16)}
    out = args["o"]
    if short:
        args[short] = args[short].view(-1)[: -missing * 64]
    args |= {"S": ROWS, "scale": 0.125}
    try:
        counters = ptx.load(text).launch("attention", (2, HEADS), 128, args, shared, order)
    except ptx.EmulatorError as error:
        return error.kind, out, None
    bound = 2.0**-9 * (tensors[2].double().abs().max() + expected.abs().max()) + 1e-5
    error = (out.double() - expected).abs().nan_to_num(torch.inf).max()
    return ("fine" if error < bound else "value"), out, counters


def test_the_kernel_itself_is_fine(compiled, inputs):
    kernel = compiled["attention"]
    assert len(re.findall(BARRIER, kernel.ptx)) == 4
    for order in ("lockstep", "warp"):
        assert attend(kernel.ptx, kernel.shared, inputs, order)[0] == "fine"


@pytest.mark.parametrize("order", ["lockstep", "warp"])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_mutant(compiled, inputs, name, order):
    mutate, caught_by = ATTENTION[name]
    kernel = compiled["attention"]
    outcome = attend(mutate(kernel.ptx), kernel.shared, inputs, order)[0]
    early = {"uninitialised"} if order == "warp" and caught_by & {"race", "async_race"} else set()
    assert outcome in caught_by | early, outcome


@pytest.mark.parametrize("name", EQUIVALENT)
def test_equivalent_mutant(compiled, inputs, name):
    """The same bits out, the same addresses touched, nothing in flight that should not be."""
    kernel = compiled["attention"]
    for order in ("lockstep", "warp"):
        outcome, out, counters = attend(kernel.ptx, kernel.shared, inputs, order)
        mutated, other, others = attend(EQUIVALENT[name](kernel.ptx), kernel.shared, inputs, order)
        assert outcome == mutated == "fine"
        assert torch.equal(out, other)
        assert counters.address_ranges == others.address_ranges
        assert counters.buffer_ranges == others.buffer_ranges
        assert [w.bytes_after for w in others.async_waits] == [w.bytes_after for w in counters.async_waits]
        if name == "last wait weakened":
            assert counters.async_waits[1].bytes_before == 0


@pytest.mark.parametrize(("buffer", "missing"), [("v", 40), ("k", 1), ("q", 1), ("o", 1)])
def test_short_buffer(compiled, inputs, buffer, missing):
    kernel = compiled["attention"]
    assert attend(kernel.ptx, kernel.shared, inputs, short=buffer, missing=missing)[0] == "out_of_bounds"


def test_barriers_are_not_seen_in_lockstep_values(compiled, inputs):
    """Why the race checker exists: without it a removed barrier passes in lockstep."""
    kernel = compiled["attention"]
    text = ATTENTION["barrier 1 removed"][0](kernel.ptx)
    out = torch.empty_like(inputs[0])
    args = dict(zip("qkv", inputs, strict=False)) | {"o": out, "S": ROWS, "scale": 0.125}
    ptx.load(text).launch("attention", (2, HEADS), 128, args, kernel.shared, check_races=False)
    assert (out.double() - inputs[3]).abs().max() < 0.01


def multiply(text: str, shared: int, order: str) -> tuple[str, ptx.Counters | None]:
    m, n, k = 128, 64, 160
    a, b, c = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16(), poisoned(m, n, dtype=torch.bfloat16)
    args = {"a": a, "b": b, "c": c, "M": m, "N": n, "K": k}
    try:
        counters = ptx.load(text).launch("matmul", (2, 1), 128, args, shared, order)
    except ptx.EmulatorError as error:
        return error.kind, None
    error = (c.double() - a.double() @ b.double()).abs().nan_to_num(torch.inf)
    fine = (error <= 2.0**-8 * (a.double() @ b.double()).abs() + 1e-4).all()
    return ("fine" if fine else "value"), counters


@pytest.mark.parametrize("order", ["lockstep", "warp"])
def test_pipelined_matmul_mutants(compiled, order):
    """Three stages: prologue wait and barrier, then in the loop wait, barrier, products, barrier,
    copies, the wait twice, barrier, products; wait, barrier and an epilogue through shared memory."""
    kernel = compiled["matmul"]
    races = {"race", "async_race", "uninitialised"}
    outcome, counters = multiply(kernel.ptx, kernel.shared, order)
    assert outcome == "fine"
    assert counters is not None
    mutants = {f"barrier {k}": nth(BARRIER, k, "") for k in range(6)}
    mutants |= {f"wait {k}": weaker(k) for k in range(5)} | {"waits 2 and 3": weaker(2, 3)}
    outcomes = {name: multiply(mutate(kernel.ptx), kernel.shared, order)[0] for name, mutate in mutants.items()}
    # Wait 1 and its barrier repeat those just before; waits 2 and 3 are the same wait twice; behind
    # the loop nothing is in flight. The counters below show which waits force nothing.
    redundant = {"barrier 1", "wait 1", "wait 2", "wait 3", "wait 4"}
    assert {name for name, kind in outcomes.items() if kind == "fine"} == redundant
    assert all(kind in races for name, kind in outcomes.items() if name not in redundant), outcomes
    waits = counters.async_waits
    assert [wait.bytes_before == wait.bytes_after for wait in waits] == [False, True, False, True, True]


@pytest.mark.parametrize("order", ["lockstep", "warp"])
def test_nvcc_gemm_mutants(order):
    text = cuda_text()
    a, b = torch.randn(100, 104).half(), torch.randn(104, 72).half()

    def outcome(kernel: str) -> str:
        c = poisoned(100, 72)
        args = {"a": a, "b": b, "c": c, "m": 100, "n": 72, "k": 104}
        try:
            ptx.load(kernel).launch("gemmI6__half", (2, 2), 128, args, 16384, order)
        except ptx.EmulatorError as error:
            return error.kind
        return "fine" if (c.double() - a.double() @ b.double()).abs().nan_to_num(torch.inf).max() < 1e-3 else "value"

    assert outcome(text) == "fine"

    def mutated(change: Change) -> str:
        return outcome(in_entry("_Z4gemmI6__half", change)(text))

    races = {"race", "async_race", "uninitialised"}
    for k in range(2):
        assert mutated(nth(BARRIER, k, "")) in races
        assert mutated(nth(WAIT, k, "cp.async.wait_group 2;")) in races
    assert mutated(nth(r"x4\.trans", 0, "x4")) == "value"
    assert mutated(nth(r"setp\.lt\.s32", 1, "setp.le.s32")) != "trap"
