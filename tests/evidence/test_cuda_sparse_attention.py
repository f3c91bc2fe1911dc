"""sparse_attention in CUDA C++ does what the formula of its cost says, whatever the plan."""

import mmap
import re

import numpy as np
import ptx
import pytest
import torch
from cuda_device import Run, call, compiled, kernels
from cuda_subjects.sparse_attention import BAD, CASES, LAST, REFERENCE, SUBJECT, blocks_of_rows, in_order, uneven
from scrimp.benchmarks.sparse_attention_cost import cases, count_cuda, order_bytes
from scrimp.benchmarks.sparse_attention_order import OVERHEAD, PLANS, halves, last_end
from scrimp.benchmarks.sparse_attention_order import steps_of as scheduled
from subjects.sparse_attention import flat, listed

from scrimp import SparsePlan
from scrimp.ops.sparse_attention import _cuda_takes

TRITONS = {"dtype", "head size", "rows off the grid"}
N_K = 1536
# Ranges of whole steps; of 32 keys each, off any grid, with gaps of 8; and every third key as a column.
LOOPS = {
    "one range": lambda: listed([([[0, 1024]], [])], 64, N_K, causal=False),
    "ranges": lambda: listed([([[40 * i + 5, 40 * i + 37] for i in range(30)], [])], 64, N_K, causal=False),
    "columns": lambda: listed([([], list(range(0, N_K, 3)))], 64, N_K, causal=False),
}
USEFUL = {"one range": 0.95, "ranges": 0.95, "columns": 0.94}  # of sectors: a row's log-sum-exps lie apart
FORMS = [(D, loop, heads) for D in (64, 128) for loop in LOOPS for heads in (1, 2)]

# More than 256 blocks of rows whose plans do not list key 1,023.
SORTS = {
    "ranges and columns": (lambda: uneven(9, 30, 1), 9, 9),
    "several rounds of a warp": (lambda: uneven(18, 65, 1), 18, 9),
    "128 rows": (lambda: uneven(129, 66, 65), 129, 1),
    "blocks without rows": (lambda: uneven(43, 131, 130), 43, 1),
    "row starts": (
        lambda: SparsePlan.a_shape(65, 5, 900, n_k=LAST, q_block=1).expand(batch=2).with_padding([600, 0]),
        4,
        2,
    ),
    "all alike": (lambda: listed([([[0, 10]], [])] * 30, 30, LAST, 1, causal=False), 9, 9),
    "no keys": (lambda: listed([([], [])] * 30, 30, LAST, 1, causal=False), 9, 9),
}


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


@pytest.mark.parametrize(("D", "loop", "heads"), FORMS)
def test_memory_is_used_well(D: int, loop: str, heads: int) -> None:
    """Bytes of the formula, in whole sectors; two of three stages on their way while the third is multiplied."""
    args = flat(LOOPS[loop](), N_K, D, heads, 1, torch.bfloat16)
    runs, formula = call("sparse_attention", *args)[1], count_cuda(*args)
    rows = [row for run in runs for row in run.counters.rows]
    useful, sectors = sum(row.values["useful"] for row in rows), sum(run.counters.sectors for run in runs)
    assert formula.unique_bytes <= formula.bytes <= useful <= 1.05 * formula.bytes
    assert useful >= USEFUL[loop] * 32 * sectors
    assert sum(row.values["threads"] for row in rows if "ex2.approx" in row.text) == formula.exps
    counters, splits = runs[0].counters, runs[0].grid[1]
    assert splits > 1
    assert counters.conflicted_accesses <= 0.05 * counters.shared_accesses
    stage = 16 * 1024 // 4  # bytes of a warp
    hot = max(counters.async_waits, key=lambda wait: wait.executions)
    rounds = {"one range": 1024, "ranges": 960, "columns": 512}[loop] * D // 4096
    assert hot.executions == rounds * 4
    assert hot.bytes_before >= (2 - splits / rounds) * stage
    assert hot.bytes_after >= (1 - splits / rounds) * stage


@pytest.mark.parametrize("name", ["split", "split heads"])
def test_splits_are_added_up_in_order(name: str) -> None:
    """The same bits in any order of the warps."""
    torch.manual_seed(0)
    args = CASES[name]()
    (out, lse), runs = call("sparse_attention", *args)
    again, _ = call("sparse_attention", *args, order="warp")
    assert runs[0].grid[1] > 1
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])


@pytest.mark.parametrize("name", SORTS)
def test_sorted_blocks(name: str) -> None:
    """In the order of their steps, by the bytes of the formula; the bits are those of blocks that are not sorted."""
    torch.manual_seed(0)
    plan, heads, kv_heads = SORTS[name]
    args = flat(plan(), LAST + 1, 64, heads, kv_heads, torch.float16)
    called = call("sparse_attention", *args, keep=SUBJECT.keep)
    SUBJECT.check_call(called, args)
    (out, lse), runs = called
    assert [run.kernel.split("<")[0].split("_")[-2] for run in runs] == ["steps", "order", "attention"]

    rows = list(blocks_of_rows(args))
    with_rows = [(b, head, tile) for b, head, tile, tokens in rows if tokens]
    slices = args[4]
    listed_for = [slices[min(b, slices.shape[0] - 1), min(h, slices.shape[1] - 1), tile, 1] for b, h, tile in with_rows]
    moved = [sum(row.values["useful"] for row in run.counters.rows) for run in runs[:2]]
    expected = list(order_bytes(len(rows), len(with_rows), int(sum(listed_for))))
    if args[7] is None:  # row starts are read, too
        assert moved == expected
    shorter = (args[0], *(x[:, :, :LAST] for x in args[1:3]), *args[3:])
    (other_out, other_lse), others = call("sparse_attention", *shorter)
    assert len(others) == 1
    assert torch.equal(out, other_out)
    assert torch.equal(lse, other_lse)


@pytest.mark.parametrize("order", ["lockstep", "warp"])
@pytest.mark.parametrize("blocks", [1, 33, 1024, 1025, 70000])
def test_order_of_any_steps(blocks: int, order: str) -> None:
    """More blocks than the launcher sorts, one alone; steps of all sizes, none at all, and as bad plans overflow."""
    name = next(name for name, kernel in kernels("sparse_attention").items() if kernel == SUBJECT.keep)
    module = ptx.load(compiled("sparse_attention").ptx)
    chance = np.random.default_rng(blocks)
    sizes = chance.integers(0, 31, blocks)
    for steps in (chance.integers(0, 2**sizes), np.zeros(blocks), np.full(blocks, 2**31 - 1), -(2**sizes)):
        steps = steps.astype(np.int32)
        found = np.full(blocks, -1, np.int32)
        module.launch(name, 1, 1024, [steps, found, blocks], order=order)
        assert np.array_equal(np.sort(found), np.arange(blocks))
        if steps.min() >= 0:
            assert found.tolist() == in_order(steps.tolist())


def test_sorting_gains_what_the_documents_say() -> None:
    """By the order in which the kernel starts them, and where the launcher sorts."""
    assert last_end([4, 4, 8], 2) == 4 + 8 + 2 * OVERHEAD
    assert last_end([8, 4, 4], 2) == 4 + 4 + 2 * OVERHEAD
    steps, resident = scheduled(PLANS["rows differ, 8,192 of 8,192"]())
    flat_steps = steps.flatten()
    assert halves(flat_steps).sort(descending=True, stable=True).indices.tolist() == in_order(flat_steps.tolist())
    now, coarse = (
        last_end(x, 108 * resident) for x in (flat_steps.tolist(), flat_steps[in_order(flat_steps.tolist())].tolist())
    )
    assert 1.4 < now / coarse < 1.45


def test_what_is_not_sorted() -> None:
    """Up to 256 blocks, which may have splits; more than 4,096."""
    for tiles, heads in ((64, 4), (64, 65)):
        args = flat(listed([([], [])] * tiles, tiles, LAST + 1, 1), LAST + 1, 64, heads, heads, torch.float16)
        runs = call("sparse_attention", *args)[1]
        assert runs[0].grid[0] == tiles * heads
        assert not any("order" in run.kernel for run in runs)


def test_what_it_takes() -> None:
    """All cases; of what the launcher refuses, Triton serves some, and the launcher's words are for the rest."""
    assert all(_cuda_takes(*make()) for make in CASES.values())
    args = CASES[REFERENCE]()
    for name in BAD.keys() - {"device", "too many"}:
        assert _cuda_takes(*BAD[name][0](args)) == (name not in TRITONS), name


def test_rows_beyond_32_bit_offsets() -> None:
    """Two tokens 2^31 + 64 elements apart, in memory that is only reserved."""
    stride = 2**31 + 64
    memory = mmap.mmap(-1, 2 * stride + 256, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    far = torch.frombuffer(memory, dtype=torch.float16).as_strided((1, 1, 2, 64), (stride, stride, stride, 1))
    far.copy_(torch.randn(1, 1, 2, 64))
    args = flat(SparsePlan.dense(2), 2, 64, 1, 1, torch.float16)
    for i in range(3):
        given = (*args[:i], far, *args[i + 1 :])
        SUBJECT.check(call("sparse_attention", *given)[0], given)


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
