"""What every shipped kernel must fulfil, whichever compiler made it."""

from collections.abc import Iterable, Iterator
from typing import Any

from subjects import SUBJECTS

from .records import Record

ARCHES = ("sm_80", "sm_90")  # optimised for; the others must compile and be launched
LDS = 64 * 1024  # local data share of a compute unit of gfx942
SECTOR_EFFICIENCY = 0.85  # of a reference launch; an op's own tests ask for more where memory is contiguous
CONFLICTS = 0.05  # of the accesses of shared memory


def unmet(record: Record, index_loops: int | None = None) -> list[str]:
    """Why a kernel may not be shipped.

    `index_loops`, if it is given, says that the kernel's loops must keep the tensor cores fed, and how many of them may
    load indices of fewer than 128 bits.
    """
    place = f"{record['config']} {record['kernel']} {record['arch']}"
    reasons = [*_launch(record)]
    if record["arch"] in ARCHES:
        if record["spills"] or record["stack"]:
            reasons.append(f"{record['spills']} spill instructions, {record['stack']} bytes of stack")
        if index_loops is not None:
            reasons += _tensor(record, index_loops)
    return [f"{place}: {reason}" for reason in reasons]


def _launch(record: Record) -> Iterator[str]:
    for device, words in record.get("occupancy", {}).items():
        if words.startswith("0 "):
            yield f"cannot be launched on {device}: {words}"
    if record["arch"] == "gfx942" and record["shared"] > LDS:
        yield f"cannot be launched: {record['shared']} bytes of local data share, there are {LDS}"


def _tensor(record: Record, index_loops: int) -> Iterator[str]:
    narrow = 0
    for number, loop in enumerate(record["hot_loops"]):
        if not loop.get("tensor"):
            yield f"loop {number} has no tensor-core instruction"
        if not loop.get("async_copies") and "128" not in loop.get("global_loads", {}):
            yield f"loop {number} loads nothing"
        if loop.get("async_copies") and loop.get("copy_groups_in_flight", 0) < loop.get("copy_groups", 1):
            yield f"loop {number} waits for the copies of its next round"
        narrow += any(width != "128" for width in loop.get("global_loads", {}))
    if narrow > index_loops:
        yield f"{narrow} loops have global loads that are neither asynchronous nor of 128 bits, {index_loops} may"


def unmet_by_passport(op: str, found: Record) -> list[str]:
    """Of all kernels of a passport and its reference launch; those of another compiler must not spill either."""
    reasons = unmet_by_counters(found["reference"])
    for record in found["kernels"]:
        reasons += unmet(record, SUBJECTS[op].index_loops(record["config"], record["kernel"]))
        for name, theirs in record.items():
            if name.startswith("triton ") and record["arch"] in ARCHES and (theirs["spills"] or theirs["stack"]):
                reasons.append(f"{record['config']} {record['kernel']} {record['arch']} by {name}: {theirs}")
    return reasons


def unmet_by_counters(reference: dict[str, Any]) -> list[str]:
    """The same for the emulator's counters of the reference launch."""
    return [
        f"{launch['kernel']}: {launch['sector_efficiency']:.1%} of the requested sectors are useful"
        for launch in reference["launches"] if launch["sector_efficiency"] < SECTOR_EFFICIENCY
    ] + unmet_by_conflicts(reference["launches"])  # fmt: skip


def unmet_by_conflicts(launches: Iterable[dict[str, Any]]) -> list[str]:
    """Launches with too many bank conflicts."""
    return [
        f"{launch['kernel']}: {launch['conflicted_accesses']} of {launch['shared_accesses']} accesses conflict"
        for launch in launches if launch["conflicted_accesses"] > CONFLICTS * launch["shared_accesses"]
    ]  # fmt: skip
