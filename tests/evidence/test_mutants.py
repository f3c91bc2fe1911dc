"""Planted faults in every op's kernels: a checker of the emulator or a wrong value catches each of them.

A mutant that changes nothing on its case must be shown to be equivalent: the same bits in every tensor, the same
addresses touched, the same copies in flight after every wait.
"""

import functools
import importlib

import ptx
import pytest
import torch
from emulate import compile_launches, execute
from planted import ORDERS, Run, assert_caught, assert_is_a_fault, assert_sound, assert_touches_the_same, bits
from subjects import SUBJECTS
from subjects.subject import Mutant

MUTANTS = [(op, name) for op, subject in SUBJECTS.items() for name in subject.mutants]
PLANTED = [(op, name) for op, name in MUTANTS if SUBJECTS[op].mutants[name].caught_by]
EQUIVALENT = [(op, name) for op, name in MUTANTS if not SUBJECTS[op].mutants[name].caught_by]


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
        assert_is_a_fault(name, mutant)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("op", SUBJECTS)
def test_the_kernels_themselves_are_fine(op: str, order: str) -> None:
    for case in {mutant.case for mutant in SUBJECTS[op].mutants.values()}:
        assert_sound(sound(op, order, case))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("op", "name"), PLANTED)
def test_planted_fault(op: str, name: str, order: str) -> None:
    mutant = SUBJECTS[op].mutants[name]
    assert_caught(run(op, order, mutant), mutant)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("op", "name"), EQUIVALENT)
def test_equivalent_mutant(op: str, name: str, order: str) -> None:
    mutant = SUBJECTS[op].mutants[name]
    before, after = sound(op, order, mutant.case), run(op, order, mutant)
    assert_touches_the_same(before, after)
    for mine, theirs in zip(before.counters, after.counters, strict=True):
        waits = {wait.line: wait for wait in theirs.async_waits}
        for wait in mine.async_waits:  # one that is gone must have waited for nothing
            left = waits[wait.line].bytes_after if wait.line in waits else wait.bytes_before
            assert left == wait.bytes_after


def test_a_survivor_is_not_taken_for_equivalent() -> None:
    """The comparison itself: a change that alters bits within the tolerance is seen."""
    op = "merge_attention"
    mutant = Mutant("merge_attention_kernel", lambda text: text.replace("0f3FB8AA3B", "0f3FB8AA3D"))
    before, after = sound(op, "lockstep"), run(op, "lockstep", mutant)
    assert after.outcome == "fine"
    assert not all(torch.equal(bits(a), bits(b)) for a, b in zip(before.tensors, after.tensors, strict=True))
