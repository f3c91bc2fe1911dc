"""sparse_attention in CUDA C++ does what the formula of its cost says, whatever the plan."""

import functools
import re

import pytest
import torch
from cuda_device import Run, call
from cuda_subjects.sparse_attention import BAD, CASES, REFERENCE
from scrimp.benchmarks.sparse_attention_cost import cases, count_cuda
from subjects.sparse_attention import flat, listed

from scrimp.ops.sparse_attention import _cuda_takes

TRITONS = {"dtype", "head size", "rows off the grid"}
N_K = 1536
# Ranges of whole steps; of 32 keys each, off any grid, with gaps of 8; and every third key as a column.
LOOPS = {
    "one range": lambda: listed([([[0, 1024]], [])], 64, N_K, causal=False),
    "ranges": lambda: listed([([[40 * i + 5, 40 * i + 37] for i in range(30)], [])], 64, N_K, causal=False),
    "columns": lambda: listed([([], list(range(0, N_K, 3)))], 64, N_K, causal=False),
}
FORMS = [(D, loop, heads) for D in (64, 128) for loop in LOOPS for heads in (1, 2)]


def products(runs: list[Run]) -> int:
    """FLOPs of tensor cores."""
    total = 0
    for row in (row for run in runs for row in run.counters.rows):
        if found := re.search(r"mma\.sync\.aligned\.m(\d+)n(\d+)k(\d+)", row.text):
            m, n, k = map(int, found.groups())
            total += 2 * m * n * k * row.values["warps"]
    return total


@pytest.mark.parametrize("name", CASES)
def test_products_of_the_formula(name: str) -> None:
    torch.manual_seed(0)
    args = CASES[name]()
    formula = count_cuda(*args)
    assert products(call("sparse_attention", *args)[1]) == formula.flops_issued >= formula.flops_useful


@functools.cache
def ran(D: int, loop: str, heads: int) -> tuple[tuple[object, ...], list[Run]]:
    args = flat(LOOPS[loop](), N_K, D, heads, 1, torch.bfloat16)
    return args, call("sparse_attention", *args)[1]


@pytest.mark.parametrize(("D", "loop", "heads"), FORMS)
def test_memory_is_used_well(D: int, loop: str, heads: int) -> None:
    """Bytes of the formula, in whole sectors; two of three stages on their way while the third is multiplied."""
    args, (run,) = ran(D, loop, heads)
    counters, formula = run.counters, count_cuda(*args)
    assert formula.bytes <= sum(row.values["useful"] for row in counters.rows) <= 1.05 * formula.bytes
    assert formula.unique_bytes <= formula.bytes
    exps = sum(row.values["threads"] for row in counters.rows if "ex2.approx" in row.text)
    assert exps == formula.exps
    assert counters.sector_efficiency >= 0.95
    assert counters.conflicted_accesses <= 0.05 * counters.shared_accesses
    stage = 16 * 1024 // 4  # bytes of a warp
    hot = max(counters.async_waits, key=lambda wait: wait.executions)
    rounds = {"one range": 1024, "ranges": 960, "columns": 512}[loop] * D // 4096
    assert hot.executions == rounds * 4
    assert hot.bytes_before >= (2 - 1 / rounds) * stage
    assert hot.bytes_after >= (1 - 1 / rounds) * stage


def test_what_it_takes() -> None:
    """All cases; of what the launcher refuses, Triton serves some, and the launcher's words are for the rest."""
    assert all(_cuda_takes(*make()) for make in CASES.values())
    args = CASES[REFERENCE]()
    for name in BAD.keys() - {"device", "too many"}:
        assert _cuda_takes(*BAD[name][0](args)) == (name not in TRITONS), name


def test_a_bad_plan_stays_in_its_buffers() -> None:
    """Slices, ranges, columns and row starts that leave their bounds are clamped."""
    q, k, v, ranges, range_slice, columns, column_slice, _, *rest = flat(
        listed([([[0, 40], [60, 90]], [95, 99])], 64, 100), 100, 64, 2, 1, torch.float16
    )
    wild = torch.tensor([[-50, 2**31 - 1], [-(2**31), 7]], dtype=torch.int32)
    for changed in (
        (wild.view_as(ranges), range_slice, columns, column_slice, None),
        (ranges, range_slice + 1, columns, column_slice - 5, None),
        (ranges, range_slice * 2**30, columns - 200, column_slice, None),
        (ranges, range_slice, columns * 2**20, column_slice * 1000, torch.full((1, 64), -7, dtype=torch.int32)),
    ):
        out, _ = call("sparse_attention", q, k, v, *changed, *rest)[0]
        assert bool(out.isfinite().all())


def test_beside_triton() -> None:
    """No more products than Triton's kernel, which rounds the ends of ranges up, and fewer where they end anywhere."""
    shares = {}
    for case in cases():
        if case.name.startswith(("window-128", "columns-100-", "blocks-0.05", "a_shape")):
            triton, cuda = case.count(), count_cuda(*case.count.args)  # type: ignore[attr-defined]
            assert cuda.flops_useful == triton.flops_useful, case.name
            shares[case.name.split("-")[0]] = cuda.flops_issued / triton.flops_issued
    assert shares.keys() == {"window", "columns", "blocks", "a_shape"}
    assert max(shares.values()) <= 1
    assert shares["window"] < 0.85
