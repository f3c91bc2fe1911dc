"""Every op's shipped kernels, compiled ahead of time: they meet the demands and are what their passports say.

The default configurations for sm_80 and sm_90 here; all configurations and architectures by `make evidence`.
"""

import functools
import importlib
import json
from typing import Any

import ptx
import pytest
from passport import compiled, demands, records, summary
from subjects import SUBJECTS

ADVICE = "if that is meant, run `make evidence` and review the changed lines"


@functools.cache
def recomputed(op: str) -> list[records.Record]:
    subject = SUBJECTS[op]
    some = compiled.shipped(op, subject.defaults or subject.shipped, compiled.DEFAULT_ARCHES)
    return json.loads(json.dumps(records.triton_records(some)))


def key(record: records.Record) -> tuple[Any, ...]:
    return record["config"], record["kernel"], record["arch"], record.get("flags")


def same_version(op: str) -> bool:
    """Whether the passport was made by the compiler at hand; otherwise only the demands can be held."""
    return records.checked_in(op)["compilers"]["triton"] == ptx.triton_version()


@pytest.fixture(scope="module")
def ready() -> None:
    """All ops' kernels in one go."""
    for op, subject in SUBJECTS.items():
        some = compiled.shipped(op, subject.defaults or subject.shipped, compiled.DEFAULT_ARCHES)
        ptx.compile_triton_all([one.asked for one in some])


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize("op", SUBJECTS)
def test_kernels_meet_the_demands(op: str) -> None:
    loops = SUBJECTS[op].index_loops
    reasons = [reason for record in recomputed(op)
               for reason in demands.unmet(record, loops(record["config"], record["kernel"]))]  # fmt: skip
    assert not reasons, "\n".join(reasons)


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize("op", SUBJECTS)
def test_kernels_are_those_of_the_passport(op: str) -> None:
    if same_version(op):
        compare(recomputed(op), records.checked_in(op)["kernels"])


def compare(found: list[records.Record], passport: list[records.Record]) -> None:
    known = {key(record): record for record in passport}
    for record in found:
        assert key(record) in known, f"no passport for {key(record)}: {ADVICE}"
        for name, value in record.items():
            expected = known[key(record)][name]
            assert value == expected, f"{key(record)}: {name} is {value}, the passport has {expected}: {ADVICE}"


@pytest.mark.parametrize("op", SUBJECTS)
def test_passport_is_whole(op: str) -> None:
    """It covers every architecture, was made from these sources, fits its size and names what demands are not met."""
    passport = records.checked_in(op)
    assert passport["sources"] == compiled.sources(op), f"the kernels have changed: {ADVICE}"
    kernels = passport["kernels"]
    for arch in compiled.ARCHES:
        configs = {record["config"] for record in kernels if record["arch"] == compiled.arch_name(arch)}
        assert configs >= set(SUBJECTS[op].shipped), arch
    assert all(any(name.startswith("triton 3.8") for name in record) for record in kernels if "flags" in record)
    assert passport["unmet"] == demands.unmet_by_passport(op, passport)
    assert len(records.text(passport).encode()) <= 64 * 1024
    assert (records.FOLDER / f"{op}.json").read_text() == records.text(passport)


@pytest.mark.parametrize("op", SUBJECTS)
def test_reference_launch(op: str) -> None:
    """The emulator counts what the passport says."""
    if same_version(op):
        found, expected = json.loads(json.dumps(records.reference(op))), records.checked_in(op)["reference"]
        for mine, theirs in zip(found["launches"], expected["launches"], strict=True):
            assert mine == theirs, ADVICE
        assert found == expected, ADVICE


@pytest.mark.parametrize("op", SUBJECTS)
def test_every_configuration_is_shipped(op: str) -> None:
    """Each entry of the op's configuration files is that of some shipped launch."""
    chosen: list[dict[str, int]] = []
    module = importlib.import_module(f"scrimp.kernels.{op}")
    tuning = importlib.import_module("scrimp.kernels.tuning")
    files = sorted((tuning.CONFIGS / op).glob("*.json"))
    assert [path.stem for path in files if path.stem == "default"]
    plain = module.config

    def spy(*args: Any, **shape: int) -> dict[str, int]:
        chosen.append(plain(*args, **shape))
        return chosen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "config", spy)
        for path in files:
            chosen.clear()
            with compiled.tuned_for(path.stem):
                for make in SUBJECTS[op].shipped.values():
                    module.launches(*make())
            for entry in json.loads(path.read_text()):
                assert entry["config"] in chosen, f"{path.name}: {entry} is of no shipped launch"


def test_the_document_shows_them() -> None:
    document = summary.DOCUMENT.read_text()
    assert document == summary.written(document), "run `make evidence`"


def test_demands() -> None:
    """Each demand is seen to fail."""
    loop = {"tensor": {"HMMA.16816.F32": 8}, "async_copies": {"LDGSTS.E.128": 2}, "global_loads": {"128": 1}}
    loop |= {"copy_groups": 2, "copy_groups_in_flight": 2}
    good = {"config": "c", "kernel": "k", "arch": "sm_80", "spills": 0, "stack": 0, "hot_loops": [loop]}
    good["occupancy"] = {"sm_80": "1 blocks, 6%, shared"}
    narrow = loop | {"global_loads": {"32": 1, "128": 2}}
    assert not demands.unmet(good, 0)
    assert not demands.unmet(good | {"hot_loops": [loop, narrow]}, 1)
    for change, value, reason in [
        ("spills", 2, "2 spill instructions"),
        ("stack", 8, "8 bytes of stack"),
        ("occupancy", {"sm_89": "0 blocks, 0%, shared"}, "cannot be launched on sm_89"),
        ("hot_loops", [loop, loop | {"copy_groups_in_flight": 1}], "loop 1 waits for the copies of its next round"),
        ("hot_loops", [loop | {"tensor": {}}], "loop 0 has no tensor-core instruction"),
        ("hot_loops", [loop, {"tensor": {"HMMA.16816.F32": 8}}], "loop 1 loads nothing"),
        ("hot_loops", [loop, narrow], "1 loops have global loads that are neither"),
    ]:
        (found,) = demands.unmet(good | {change: value}, 0)
        assert reason in found
    assert not demands.unmet(good | {"arch": "sm_100", "spills": 3}, 0)
    assert "cannot be launched on sm_100" in demands.unmet(good | {"arch": "sm_100", "occupancy": {"sm_100": "0 b"}})[0]
    assert "80000 bytes of local data" in demands.unmet({**good, "arch": "gfx942", "shared": 80000, "occupancy": {}})[0]
    counters = {"kernel": "k", "sector_efficiency": 0.8, "conflicted_accesses": 6, "shared_accesses": 100}
    assert len(demands.unmet_by_counters({"launches": [counters]})) == 2
