"""tree_attention in CUDA C++ does what the formula of its cost says, whatever the shape."""

import pytest
from cuda_device import call
from cuda_subjects.tree_attention import BAD, CASES, CROSSING, MANY, REFERENCE
from scrimp.benchmarks.tree_attention_cost import count_cuda

from scrimp.ops.tree_attention import _cuda_takes

TRITONS = {"dtype", "head size", "window", "rows off the grid"}


@pytest.mark.parametrize("name", ["tree-512+449-4-1-17-64-float16", "chain-1030-8-2-9-128-bfloat16", MANY, REFERENCE])
def test_formula(name: str) -> None:
    """Products exactly; bytes but for prefixes, ancestor words and what several warps look up."""
    args = CASES[name]()
    formula = count_cuda(*args)
    runs = call("tree_attention", *args)[1]
    rows = [row for run in runs for row in run.counters.rows]
    assert sum(run.counters.tensor_flops for run in runs) == formula.flops_issued >= formula.flops_useful
    assert formula.unique_bytes <= formula.bytes
    assert formula.bytes <= sum(row.values["useful"] for row in rows) <= 1.05 * formula.bytes
    exps = sum(row.values["threads"] for row in rows if "ex2.approx" in row.text)
    assert formula.exps <= exps <= 1.5 * formula.exps


def test_what_it_takes() -> None:
    """All cases; of what the launcher refuses, Triton serves some, and the launcher's words are for the rest."""
    assert all(_cuda_takes(*make()) for make in CASES.values())
    args = CASES[CROSSING]()
    for name in ("rank", "dtypes", "shapes", "rows", "prefix", "ancestors", "scale", *TRITONS):
        assert _cuda_takes(*BAD[name][0](args)) == (name not in TRITONS), name
    lone = args[0][:, :, :1].as_strided((1, 3, 1, 64), (3, 64, 1, 1))  # axes of one element have any stride
    assert _cuda_takes(lone, *args[1:])
