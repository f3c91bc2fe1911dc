"""Every op's compiled Triton kernels, executed on the PTX emulator against the oracle."""

import importlib
from typing import Any

import pytest
from emulate import compile_launches, execute
from subjects import SUBJECTS

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
    execute(launches, order)
    SUBJECTS[op].check(results, args)


@pytest.mark.parametrize("op", SUBJECTS)
def test_the_suite_stays_small(op: str) -> None:
    assert len(SUBJECTS[op].cases) <= 40
    assert len(SUBJECTS[op].warp_cases) == 4
