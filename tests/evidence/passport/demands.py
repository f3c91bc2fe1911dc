"""What every shipped kernel must fulfil on the architectures that are optimised for, whichever compiler made it."""

from collections.abc import Iterator
from typing import Any

from subjects import SUBJECTS

from .records import Record

ARCHES = ("sm_80", "sm_90", "sm_90a")
SECTOR_EFFICIENCY = 0.85  # of a reference launch; an op's own tests ask for more where memory is contiguous
CONFLICTS = 0.05  # of the accesses of shared memory


def unmet(record: Record, tensor: bool) -> list[str]:
    """Why a kernel may not be shipped; `tensor`: its loops must keep the tensor cores fed."""
    if record["arch"] not in ARCHES:
        return []
    place = f"{record['config']} {record['kernel']} {record['arch']}"
    return [f"{place}: {reason}" for reason in (*_always(record), *(_tensor(record) if tensor else ()))]


def _always(record: Record) -> Iterator[str]:
    if record["spills"] or record["stack"]:
        yield f"{record['spills']} spill instructions, {record['stack']} bytes of stack"
    for device, words in record["occupancy"].items():
        if words.startswith("0 "):
            yield f"cannot be launched on {device}: {words}"


def _tensor(record: Record) -> Iterator[str]:
    for number, loop in enumerate(record["hot_loops"]):
        if not loop.get("tensor"):
            yield f"loop {number} has no tensor-core instruction"
        narrow = {width: count for width, count in loop.get("global_loads", {}).items() if width != "128"}
        if narrow:
            yield f"loop {number} has global loads of {', '.join(narrow)} bits that are not asynchronous"
        if not loop.get("async_copies") and not loop.get("global_loads"):
            yield f"loop {number} loads nothing"
    if record.get("stages", 2) < 2:
        yield f"{record['stages']} stage"


def unmet_by_passport(op: str, found: Record) -> list[str]:
    """Of all kernels of a passport and its reference launch; those of another compiler must not spill either."""
    reasons = unmet_by_counters(found["reference"])
    for record in found["kernels"]:
        reasons += unmet(record, record["kernel"] in SUBJECTS[op].tensor_kernels)
        for name, theirs in record.items():
            if name.startswith("triton ") and record["arch"] in ARCHES and (theirs["spills"] or theirs["stack"]):
                reasons.append(f"{record['config']} {record['kernel']} {record['arch']} by {name}: {theirs}")
    return reasons


def unmet_by_counters(reference: dict[str, Any]) -> list[str]:
    """The same for the emulator's counters of the reference launch."""
    found = []
    for launch in reference["launches"]:
        name = launch["kernel"]
        if launch["sector_efficiency"] < SECTOR_EFFICIENCY:
            found.append(f"{name}: {launch['sector_efficiency']:.1%} of the requested sectors are useful")
        if launch["conflicted_accesses"] > CONFLICTS * launch["shared_accesses"]:
            found.append(f"{name}: {launch['conflicted_accesses']} of {launch['shared_accesses']} accesses conflict")
    return found
