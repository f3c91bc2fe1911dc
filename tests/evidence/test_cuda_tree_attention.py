"""tree_attention in CUDA C++ does what the formula of its cost says, whatever the shape."""

import re

import pytest
from cuda_device import call
from cuda_subjects.tree_attention import CASES, MANY, REFERENCE
from scrimp.benchmarks.tree_attention_cost import count_cuda


@pytest.mark.parametrize("name", ["tree-512+449-4-1-17-64-float16", "chain-1030-8-2-9-128-bfloat16", MANY, REFERENCE])
def test_formula(name: str) -> None:
    """Products exactly; bytes but for prefixes, ancestor words and what several warps look up."""
    args = CASES[name]()
    formula = count_cuda(*args)
    rows = [row for run in call("tree_attention", *args)[1] for row in run.counters.rows]
    products = 0
    for row in rows:
        if found := re.search(r"mma\.sync\.aligned\.m(\d+)n(\d+)k(\d+)", row.text):
            m, n, k = map(int, found.groups())
            products += 2 * m * n * k * row.values["warps"]
    assert products == formula.flops_issued >= formula.flops_useful
    assert formula.unique_bytes <= formula.bytes
    assert formula.bytes <= sum(row.values["useful"] for row in rows) <= 1.05 * formula.bytes
    exps = sum(row.values["threads"] for row in rows if "ex2.approx" in row.text)
    assert formula.exps <= exps <= 1.5 * formula.exps
