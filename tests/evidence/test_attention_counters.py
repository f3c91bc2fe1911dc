"""What a profiler would say of sparse_attention's three loops, each in a launch that is that loop for the most part."""

from collections.abc import Callable

import pytest
import torch
from emulate import compile_launches, execute
from scrimp.kernels.sparse_attention import launches
from subjects.sparse_attention import flat, listed

from scrimp import SparsePlan

N_K = 1536
# Ranges of whole pieces; of 32 keys each, off any grid, with gaps of 8; and every third key as a column.
PLANS: dict[str, Callable[[], SparsePlan]] = {
    "whole pieces": lambda: listed([([[0, 1024]], [])], 64, N_K, causal=False),
    "edges": lambda: listed([([[40 * i + 5, 40 * i + 37] for i in range(30)], [])], 64, N_K, causal=False),
    "columns": lambda: listed([([], list(range(0, N_K, 3)))], 64, N_K, causal=False),
}
USEFUL = {"whole pieces": 0.95, "edges": 0.95, "columns": 0.85}  # of the bytes of requested sectors
FORMS = [(D, loop) for D in (64, 128) for loop in PLANS]


@pytest.fixture(scope="module")
def compiled() -> None:
    plan = PLANS["edges"]()
    made = [launches(*flat(plan, N_K, D, 2, 1, torch.bfloat16))[1] for D in (64, 128)]
    compile_launches([launch for some in made for launch in some])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("D", "loop"), FORMS)
def test_memory_is_used_well(D: int, loop: str) -> None:
    _, made = launches(*flat(PLANS[loop](), N_K, D, 2, 1, torch.bfloat16))
    (counters,) = execute(made)
    # q, k, v and out are moved 16 bytes a lane; what is narrower are indices and log-sum-exps.
    moved = [row for row in counters.rows if row.values["sectors"] and (".v4" in row.text or "cp.async" in row.text)]
    assert any("cp.async" in row.text for row in moved)
    assert any("st.global" in row.text for row in moved)
    useful = sum(row.values["useful"] for row in moved) / sum(32 * row.values["sectors"] for row in moved)
    assert useful >= USEFUL[loop]
    assert counters.sector_efficiency >= USEFUL[loop], "indices and log-sum-exps included"
    assert counters.shared_accesses > 1000
    assert counters.conflicted_accesses <= 0.05 * counters.shared_accesses
    assert counters.unwaited_copies == 0


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("D", "loop"), FORMS)
def test_two_stages_are_in_flight(D: int, loop: str) -> None:
    """At the wait of the loop that does the work: two pieces asked for, and one of them left on its way.

    Means over the loop's rounds; the last ones have nothing left to ask for.
    """
    _, made = launches(*flat(PLANS[loop](), N_K, D, 2, 1, torch.bfloat16))
    (counters,) = execute(made)
    (launch,) = made
    stage = 2 * launch.constants["BLOCK_N"] * D * 2 / launch.num_warps  # bytes of K and V that a warp copies
    rounds = -(-{"whole pieces": 1024, "edges": 960, "columns": 512}[loop] // launch.constants["BLOCK_N"])
    hot = max(counters.async_waits, key=lambda wait: wait.executions)
    assert hot.executions == rounds * launch.num_warps * counters.blocks
    lost = 2 * stage / rounds  # two pieces are short in the last round, one in the last but one
    assert hot.bytes_before >= 2 * stage - lost
    assert hot.bytes_after >= stage - lost
