"""Planted faults in the kernels in CUDA C++: a checker of the emulator or a wrong value catches each of them.

A mutant that changes nothing on its case must be shown to be equivalent: the same bits in every tensor of the call,
the same addresses touched, the same copies in flight after every wait.
"""

import functools
from collections import Counter

import ptx
import pytest
import torch
from cuda_device import call, kernels
from cuda_subjects import SUBJECTS
from planted import ORDERS, Run, assert_caught, assert_is_a_fault, assert_sound, assert_touches_the_same
from subjects.subject import Mutant

ENOUGH = 1 << 22  # a fault must not make an endless loop
MUTANTS = [(op, name) for op, subject in SUBJECTS.items() for name in subject.mutants]
PLANTED = [(op, name) for op, name in MUTANTS if SUBJECTS[op].mutants[name].caught_by]
EQUIVALENT = [(op, name) for op, name in MUTANTS if not SUBJECTS[op].mutants[name].caught_by]


def run(op: str, order: str, mutant: Mutant | None = None, case: str = "") -> Run:
    subject = SUBJECTS[op]
    torch.manual_seed(0)
    args = subject.cases[case or (mutant.case if mutant else "") or subject.mutant_case]()
    change = {} if mutant is None or mutant.change is str else {mutant.kernel: mutant.change}
    try:
        short = mutant.short if mutant else {}
        results, runs = call(
            op, *args, order=order, change=change, short=short, max_instructions=ENOUGH, keep=subject.keep
        )
    except ptx.EmulatorError as error:
        return Run(error.kind, (), ())
    written = results if isinstance(results, tuple) else (results,)
    tensors = tuple(value for value in (*args, *written) if isinstance(value, torch.Tensor))
    try:
        subject.check_call((results, runs), args)
    except AssertionError:
        return Run("value", tensors, tuple(run.counters for run in runs))
    return Run("fine", tensors, tuple(run.counters for run in runs))


@functools.cache
def sound(op: str, order: str, case: str = "") -> Run:
    """The kernels without a fault."""
    return run(op, order, case=case)


@pytest.mark.parametrize("op", SUBJECTS)
def test_there_are_ten_of_every_kernel(op: str) -> None:
    """Of every kernel in one of its instantiations."""
    subject = SUBJECTS[op]
    planted = Counter[str]()
    for name, mutant in subject.mutants.items():
        instantiations = [kernel for kernel in kernels(op).values() if kernel.startswith(mutant.kernel)]
        assert instantiations, name
        planted[instantiations[0].split("<")[0]] += bool(mutant.caught_by)
        assert_is_a_fault(name, mutant)
    assert set(planted) == {kernel.split("<")[0] for kernel in kernels(op).values()}
    assert min(planted.values()) >= 10, planted


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
        assert [w.bytes_after for w in mine.async_waits] == [w.bytes_after for w in theirs.async_waits]
