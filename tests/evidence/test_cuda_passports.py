"""The kernels in CUDA C++, compiled: they meet the demands and are what their passports say."""

import functools
import json

import pytest
from cuda_subjects import SUBJECTS
from passport import cuda, demands, records
from ptx import nvcc_version
from test_passports import ADVICE, compare


@functools.cache
def recomputed(op: str) -> list[records.Record]:
    return json.loads(json.dumps(cuda.kernel_records(op)))


def same_version(op: str) -> bool:
    """Whether the passport was made by the compiler at hand; otherwise only the demands can be held."""
    return cuda.checked_in(op)["compilers"]["nvcc"] == nvcc_version()


@pytest.mark.parametrize("op", SUBJECTS)
def test_kernels_meet_the_demands(op: str) -> None:
    loops = SUBJECTS[op].index_loops
    reasons = [reason for record in recomputed(op) for reason in demands.unmet(record, loops(record["kernel"]))]
    assert not reasons, "\n".join(reasons)
    for kernel in SUBJECTS[op].tensor_kernels:
        assert any(record["kernel"].startswith(kernel) for record in recomputed(op)), kernel


@pytest.mark.parametrize("op", SUBJECTS)
def test_kernels_are_those_of_the_passport(op: str) -> None:
    if same_version(op):
        compare(recomputed(op), cuda.checked_in(op)["kernels"])
        assert len(recomputed(op)) == len(cuda.checked_in(op)["kernels"])


@pytest.mark.parametrize("op", SUBJECTS)
def test_passport_is_whole(op: str) -> None:
    """It was made from these sources, fits its size and names what demands are not met."""
    passport = cuda.checked_in(op)
    assert passport["sources"] == cuda.sources(op), f"the kernels have changed: {ADVICE}"
    assert passport["unmet"] == cuda.unmet(op, passport)
    text = records.text(passport)
    assert len(text.encode()) <= 64 * 1024
    assert (cuda.PATHS / f"{op}.json").read_text() == text


@pytest.mark.parametrize("op", SUBJECTS)
def test_reference_launch(op: str) -> None:
    """The emulator counts what the passport says."""
    if same_version(op):
        assert json.loads(json.dumps(cuda.reference(op))) == cuda.checked_in(op)["reference"], ADVICE


def test_no_passport_without_kernels() -> None:
    assert {path.stem for path in cuda.PATHS.glob("*.json")} == set(SUBJECTS)
