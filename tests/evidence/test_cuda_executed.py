"""Every op's launcher in CUDA C++ and the kernels it launches, executed without a GPU, against the oracle."""

import functools
from typing import Any

import pytest
import torch
from cuda_device import Run, call, kernels
from cuda_subjects import SUBJECTS


def by_op(field: str) -> list[Any]:
    """(op, name) for each name of the subjects' field; tests of an op share what one worker has executed."""
    return [pytest.param(op, name, marks=pytest.mark.xdist_group(f"cuda-{op}"))
            for op, subject in SUBJECTS.items() for name in getattr(subject, field)]  # fmt: skip


def execute(op: str, name: str, order: str) -> list[Run]:
    torch.manual_seed(0)
    args = SUBJECTS[op].cases[name]()
    results, runs = call(op, *args, order=order, keep=SUBJECTS[op].keep)
    SUBJECTS[op].check_call((results, runs), args)
    for run in runs:
        assert run.counters.unwaited_copies == 0
        assert run.shared == SUBJECTS[op].dynamic_shared(run.kernel)
    return runs


@functools.cache
def executed(op: str, name: str) -> list[Run]:
    return execute(op, name, "lockstep")


@pytest.mark.parametrize(("op", "name"), by_op("cases"))
def test_lockstep(op: str, name: str) -> None:
    executed(op, name)


@pytest.mark.parametrize(("op", "name"), by_op("warp_cases"))
def test_warp_by_warp(op: str, name: str) -> None:
    execute(op, name, "warp")


OPS = [pytest.param(op, marks=pytest.mark.xdist_group(f"cuda-{op}")) for op in SUBJECTS]


@pytest.mark.parametrize("op", OPS)
def test_every_kernel_runs(op: str) -> None:
    ran = {run.kernel for name in SUBJECTS[op].cases for run in executed(op, name)}
    assert ran == set(kernels(op).values())


@pytest.mark.parametrize("op", OPS)
def test_memory_is_used_well(op: str) -> None:
    """Of the reference launch: bytes by formula, loaded 16 at a time or asynchronously, in whole sectors."""
    subject = SUBJECTS[op]
    counters = [run.counters for run in executed(op, subject.reference_launch)]
    rows = [row for counter in counters for row in counter.rows if row.values["sectors"]]
    loads = [row for row in rows if "ld.global" in row.text or "cp.async" in row.text]
    wide = [row for row in loads if "cp.async" in row.text or row.values["bytes"] == 16 * row.values["threads"]]
    assert useful(wide) >= 0.95 * useful(loads)
    assert useful(rows) >= 0.95 * 32 * sum(counter.sectors for counter in counters)
    assert sum(c.conflicted_accesses for c in counters) <= 0.05 * sum(c.shared_accesses for c in counters)
    if subject.least_bytes is not None:
        torch.manual_seed(0)
        least = subject.least_bytes(subject.cases[subject.reference_launch]())
        assert least <= useful(rows) <= 1.05 * least


def useful(rows: list[Any]) -> int:
    return sum(row.values["useful"] for row in rows)


@pytest.mark.parametrize(("op", "name"), [one for one in by_op("cases") if SUBJECTS[one.values[0]].count])
def test_formula(op: str, name: str) -> None:
    """Products are those of the formula, bytes, too, but for atomic additions and what rows of a warp share."""
    torch.manual_seed(0)
    args, runs = SUBJECTS[op].cases[name](), executed(op, name)
    formula = SUBJECTS[op].count(*args)
    assert sum(run.counters.tensor_flops for run in runs) == formula.flops_issued >= formula.flops_useful
    asked = sum(run.counters.loaded_and_stored for run in runs)
    assert asked <= 1.01 * formula.bytes
    if SUBJECTS[op].exact_bytes(args):
        assert 0.99 * formula.bytes <= asked
        assert formula.unique_bytes <= formula.bytes


@pytest.mark.parametrize(("op", "name"), by_op("idle"))
def test_nothing_to_do(op: str, name: str) -> None:
    args = SUBJECTS[op].idle[name]()
    results, runs = call(op, *args)
    SUBJECTS[op].check(results, args)
    assert runs == []


@pytest.mark.parametrize(("op", "name"), by_op("bad"))
def test_bad_input(op: str, name: str) -> None:
    change, words = SUBJECTS[op].bad[name]
    with pytest.raises(RuntimeError, match=f"^{op}: .*{words}"):
        call(op, *change(SUBJECTS[op].cases[SUBJECTS[op].mutant_case]()))


@pytest.mark.parametrize("op", OPS)
def test_a_failed_launch_says_why(op: str) -> None:
    args = SUBJECTS[op].cases[SUBJECTS[op].mutant_case]()
    with pytest.raises(RuntimeError, match=f"^{op}: the launch failed: no kernel image is available$"):
        call(op, *args, failure="no kernel image is available")


@pytest.mark.parametrize("op", OPS)
def test_the_suite_stays_small(op: str) -> None:
    assert len(SUBJECTS[op].cases) <= 40
    assert 1 <= len(SUBJECTS[op].warp_cases) <= 4
