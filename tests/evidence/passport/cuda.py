"""Passports of kernels in CUDA C++: what nvcc makes of every instantiation, and the counters of a reference launch."""

import functools
import json
import re

import cuda_device
import ptx
import torch
from cuda_subjects import SUBJECTS
from ptx.nvcc import quoted_includes

from . import demands, sass
from .compiled import ROOT, digest
from .occupancy import occupancy
from .records import FOLDER, Record, cubin_record, words

# Architecture -> devices whose occupancy its records hold; each has code, and so registers, of its own.
ARCHES = {"sm_80": ("sm_80", "sm_86", "sm_89"), "sm_90": ("sm_90",)}
SECTOR_EFFICIENCY = 0.95
PATHS = FOLDER / "cuda"


def sources(op: str) -> dict[str, str]:
    """A hash of every file of the op's own, whatever its comments and layout."""
    csrc, found = ROOT / "csrc", {}
    for path, text in sorted(quoted_includes(csrc / "cuda" / f"{op}.cu", [csrc], {}).items()):
        if path.parent.name == "cuda":
            bare = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text.decode(), flags=re.S)
            found[str(path.relative_to(ROOT))] = digest(" ".join(bare.split()))
    return found


def kernel_records(op: str) -> list[Record]:
    """Of every instantiation on every architecture."""
    built, names = cuda_device.compiled(op), cuda_device.kernels(op)
    threads = dict(re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", built.ptx))
    kernels = sass.read_object(built.path)
    records = []
    for arch, devices in ARCHES.items():
        for kernel in sorted(kernels[arch], key=lambda kernel: names[kernel.name]):
            name, warps = names[kernel.name], int(threads[kernel.name]) // 32
            record = {"config": "CUDA", "kernel": name, "arch": arch, "warps": warps}
            record |= cubin_record(kernel, arch, warps, SUBJECTS[op].dynamic_shared(name))
            shared = record["static_shared"] + record["dynamic_shared"]
            used = {device: built.usage[kernel.name, device].registers for device in devices}
            record["occupancy"] = {d: words(occupancy(d, used[d], shared, warps)) for d in devices}
            records.append(record)
    return records


def reference(op: str) -> Record:
    """The emulator's counters of the reference launch."""
    subject = SUBJECTS[op]
    torch.manual_seed(0)
    _, runs = cuda_device.call(op, *subject.cases[subject.reference_launch]())
    return {"case": subject.reference_launch, "launches": [
        {"kernel": run.kernel} | run.counters.summary() for run in runs
    ]}  # fmt: skip


def passport(op: str) -> Record:
    """All of it, without the demands that are not met."""
    return {
        "op": op,
        "sources": sources(op),
        "compilers": {"nvcc": ptx.nvcc_version()},
        "reference": reference(op),
        "kernels": kernel_records(op),
    }


def unmet(op: str, found: Record) -> list[str]:
    """Why the op's kernels may not be shipped."""
    launches = found["reference"]["launches"]
    reasons = demands.unmet_by_conflicts(launches)
    useful, sectors = (sum(launch[name] for launch in launches) for name in ("useful_bytes", "sectors"))
    if useful < SECTOR_EFFICIENCY * 32 * sectors:
        reasons.append(f"{useful / sectors / 32:.1%} of the requested sectors are useful")
    for record in found["kernels"]:
        reasons += demands.unmet(record, SUBJECTS[op].index_loops(record["kernel"]))
    return reasons


@functools.cache
def checked_in(op: str) -> Record:
    """The passport in the repository."""
    found: Record = json.loads((PATHS / f"{op}.json").read_text())
    return found
