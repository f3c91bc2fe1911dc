"""Every op's compiled Triton kernels, executed on the PTX emulator against the oracle.

What they ask memory and tensor cores for is what the formulas of `benchmarks/<op>_cost.py` count.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import ptx
import pytest
from emulate import compile_launches, execute
from scrimp.benchmarks.roofline import Count
from subjects import SUBJECTS, Subject

ALL = [(op, name) for op, subject in SUBJECTS.items() for name in subject.cases]


def prepare(op: str, name: str) -> tuple[Any, list[Any], tuple[Any, ...]]:
    args = SUBJECTS[op].cases[name]()
    return *importlib.import_module(f"scrimp.kernels.{op}").launches(*args), args


@pytest.fixture(scope="module")
def compiled() -> None:
    """All kernels of all cases in one go: one compiler process, and a cache that every worker reads."""
    compile_launches([launch for op, name in ALL for launch in prepare(op, name)[1]])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("op", "name"), ALL)
def test_lockstep(op: str, name: str) -> None:
    run(op, name, "lockstep")


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, s in SUBJECTS.items() for name in s.warp_cases])
def test_warp_by_warp(op: str, name: str) -> None:
    run(op, name, "warp")


def run(op: str, name: str, order: str) -> None:
    results, launches, args = prepare(op, name)
    counters = execute(launches, order)
    SUBJECTS[op].check(results, args)
    assert_counted(importlib.import_module(f"scrimp.benchmarks.{op}_cost").count(*args), counters, SUBJECTS[op])


# Layouts hold one-dimensional tensors (indices, log-sum-exps) in several warps, each of which loads them.
REPEATED, REPEATED_BYTES = 1.1, 4096


def assert_counted(formula: Count, counters: Sequence[ptx.Counters], subject: Subject) -> None:
    """Bytes up to what is loaded in several warps, tensor-core FLOPs exactly, exponentials up to repeated ones."""
    rows = [row for counter in counters for row in counter.rows]
    if subject.exact_bytes:
        asked = sum(row.values["useful"] for row in rows)
        assert formula.bytes <= asked <= REPEATED * formula.bytes + REPEATED_BYTES
        touched = sum(high - low for counter in counters for low, high in counter.buffer_ranges.values())
        assert formula.unique_bytes <= min(formula.bytes, touched)
    products = sum(counter.tensor_flops for counter in counters)
    assert formula.flops_issued == products if subject.exact_flops else formula.flops_issued <= products
    assert formula.flops_useful <= products
    if products:
        exps = sum(row.values["threads"] for row in rows if "ex2.approx" in row.text)
        assert formula.exps <= exps <= subject.repeated_exps * formula.exps


@pytest.mark.parametrize("op", SUBJECTS)
def test_the_suite_stays_small(op: str) -> None:
    assert len(SUBJECTS[op].cases) <= 40
    assert len(SUBJECTS[op].warp_cases) == 4
