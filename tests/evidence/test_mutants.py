"""Planted faults in every op's kernels: a checker of the emulator or a wrong value catches each of them.

A mutant that changes nothing on its case must be shown to be equivalent: the same bits in every tensor, the same
addresses touched, the same copies in flight after every wait.
"""

import functools
import importlib
from dataclasses import dataclass

import ptx
import pytest
import torch
from emulate import compile_launches, execute
from ptx.errors import KINDS
from subjects import SUBJECTS
from subjects.subject import Mutant

ORDERS = ["lockstep", "warp"]
MUTANTS = [(op, name) for op, subject in SUBJECTS.items() for name in subject.mutants]
PLANTED = [(op, name) for op, name in MUTANTS if SUBJECTS[op].mutants[name].caught_by]
EQUIVALENT = [(op, name) for op, name in MUTANTS if not SUBJECTS[op].mutants[name].caught_by]


@dataclass(frozen=True)
class Run:
    """What a run of the mutant case gave: "fine", "value" or the kind of a fault; every tensor; the counters."""

    outcome: str
    tensors: tuple[torch.Tensor, ...]
    counters: tuple[ptx.Counters, ...]


def run(op: str, order: str, mutant: Mutant | None = None, case: str = "") -> Run:
    subject = SUBJECTS[op]
    torch.manual_seed(0)
    args = subject.cases[case or (mutant.case if mutant else "") or subject.mutant_case]()
    results, launches = importlib.import_module(f"scrimp.kernels.{op}").launches(*args)
    tensors = tuple(v for launch in launches for v in launch.args.values() if isinstance(v, torch.Tensor))
    change = {} if mutant is None or mutant.change is str else {mutant.kernel: mutant.change}
    short = {mutant.kernel: mutant.short} if mutant else {}
    try:
        counters = tuple(execute(launches, order, change, short))
    except ptx.EmulatorError as error:
        return Run(error.kind, tensors, ())
    try:
        subject.check(results, args)
    except AssertionError:
        return Run("value", tensors, counters)
    return Run("fine", tensors, counters)


@functools.cache
def sound(op: str, order: str, case: str = "") -> Run:
    """The kernels without a fault."""
    return run(op, order, case=case)


@pytest.mark.parametrize("op", SUBJECTS)
def test_there_are_ten_of_every_kernel(op: str) -> None:
    subject = SUBJECTS[op]
    _, launches = importlib.import_module(f"scrimp.kernels.{op}").launches(*subject.cases[subject.mutant_case]())
    kernels = {compiled.name for compiled in compile_launches(launches)}
    planted = [m.kernel for m in subject.mutants.values() if m.caught_by]
    assert {m.kernel for m in subject.mutants.values()} <= kernels
    assert all(planted.count(kernel) >= 10 for kernel in kernels), planted
    for name, mutant in subject.mutants.items():
        assert mutant.caught_by <= {"value", *KINDS.values()}, name
        assert mutant.short or mutant.change is not str, name


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("op", SUBJECTS)
def test_the_kernels_themselves_are_fine(op: str, order: str) -> None:
    for case in {mutant.case for mutant in SUBJECTS[op].mutants.values()}:
        assert sound(op, order, case).outcome == "fine"
        assert sum(c.unwaited_copies for c in sound(op, order, case).counters) == 0


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("op", "name"), PLANTED)
def test_planted_fault(op: str, name: str, order: str) -> None:
    mutant = SUBJECTS[op].mutants[name]
    found = run(op, order, mutant)
    assert found.outcome in mutant.caught_by, f"{found.outcome}, not {' or '.join(mutant.caught_by)}"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("op", "name"), EQUIVALENT)
def test_equivalent_mutant(op: str, name: str, order: str) -> None:
    mutant = SUBJECTS[op].mutants[name]
    before, after = sound(op, order, mutant.case), run(op, order, mutant)
    assert after.outcome == "fine"
    for mine, theirs in zip(before.tensors, after.tensors, strict=True):
        assert torch.equal(bits(mine), bits(theirs))
    for mine, theirs in zip(before.counters, after.counters, strict=True):
        assert mine.address_ranges == theirs.address_ranges
        assert mine.buffer_ranges == theirs.buffer_ranges
        assert theirs.unwaited_copies == 0
        waits = {wait.line: wait for wait in theirs.async_waits}
        for wait in mine.async_waits:  # one that is gone must have waited for nothing
            left = waits[wait.line].bytes_after if wait.line in waits else wait.bytes_before
            assert left == wait.bytes_after


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as integers, so that NaN equals NaN."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def test_a_survivor_is_not_taken_for_equivalent() -> None:
    """The comparison itself: a change that alters bits within the tolerance is seen."""
    op = "merge_attention"
    mutant = Mutant("merge_attention_kernel", lambda text: text.replace("0f3FB8AA3B", "0f3FB8AA3D"))
    before, after = sound(op, "lockstep"), run(op, "lockstep", mutant)
    assert after.outcome == "fine"
    assert not all(torch.equal(bits(a), bits(b)) for a, b in zip(before.tensors, after.tensors, strict=True))
