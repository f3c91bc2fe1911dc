"""Passports: what the compilers and the emulator say of an op's kernels, one line a kernel, checked in.

{"op": ..., "source": hash, "compilers": {...}, "kernels": [one record each], "reference": {...}}
"""

import functools
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ptx
import torch
from emulate import execute
from subjects import SUBJECTS

from . import amdgpu, compiled, sass
from .compiled import Shipped
from .occupancy import MULTIPROCESSORS, Occupancy, occupancy

Record = dict[str, Any]
FOLDER = Path(__file__).resolve().parent.parent / "passports"
SIBLINGS = {"sm_80": ("sm_80", "sm_86", "sm_89")}  # run the same code


def triton_record(one: Shipped, built: ptx.Compiled) -> Record:
    """Of one Triton kernel."""
    asked = one.asked
    record = {
        "config": one.config,
        "kernel": one.kernel,
        "arch": one.arch,
        "flags": compiled.flags(asked),
        "warps": asked.num_warps,
        "stages": asked.num_stages,
        "constants": dict(one.constants),
    }
    if one.arch.startswith("gfx"):
        return record | amdgpu.resources(built.ptx) | {"shared": built.shared}
    (kernel,) = sass.read(built.binary)
    return record | cubin_record(kernel, one.arch, asked.num_warps, built.shared)


def cubin_record(kernel: sass.Kernel, arch: str, warps: int, dynamic_shared: int) -> Record:
    """What a cubin says of one of its kernels."""
    shared = kernel.shared + dynamic_shared
    devices = [name for name in SIBLINGS.get(arch, (arch,)) if name in MULTIPROCESSORS]
    return {
        "registers": kernel.registers,
        "stack": kernel.stack,
        "spills": kernel.spills,
        "static_shared": kernel.shared,
        "dynamic_shared": dynamic_shared,
        "occupancy": {d: words(occupancy(d, kernel.registers, shared, warps)) for d in devices},
        "hot_loops": [sass.mix(loop) for loop in sass.hot_loops(kernel)],
    }


def words(of: Occupancy) -> str:
    """As a passport has it: "2 blocks, 12%, registers"."""
    return f"{of.blocks} blocks, {of.share:.0%}, {of.limit}"


def triton_records(some: Sequence[Shipped], triton: Path | None = None) -> list[Record]:
    built = compiled.compile_shipped(some, triton)
    return [triton_record(one, result) for one, result in zip(some, built, strict=True)]


def reference(op: str) -> Record:
    """The emulator's counters of one launch of every kernel."""
    subject = SUBJECTS[op]
    torch.manual_seed(0)
    args = subject.cases[subject.reference_launch]()
    _, launches = importlib.import_module(f"scrimp.kernels.{op}").launches(*args)
    counters = execute(launches)
    names = [getattr(launch.kernel, "fn", launch.kernel).__name__ for launch in launches if 0 not in launch.grid]
    return {"case": subject.reference_launch, "launches": [
        {"kernel": name} | counter.summary() for name, counter in zip(names, counters, strict=True)
    ]}  # fmt: skip


def passport(op: str, other: Path | None = None) -> Record:
    """All of an op's records, of every architecture; with what another Triton makes of the kernels, if there is one."""
    some = compiled.shipped(op, SUBJECTS[op].shipped, compiled.ARCHES)
    records = triton_records(some)
    if other is not None:
        version = f"triton {ptx.triton_version(other)}"
        for record, theirs in zip(records, triton_records(some, other), strict=True):
            names = ("vgprs", "vgpr_spills") if "vgprs" in theirs else ("registers", "stack", "spills")
            record[version] = {name: theirs[name] for name in names}
    return {
        "op": op,
        "sources": compiled.sources(op),
        "compilers": {"triton": ptx.triton_version()},
        "reference": reference(op),
        "kernels": records,
    }


def text(found: Record) -> str:
    """JSON with one line for each kernel."""
    head = {name: value for name, value in found.items() if name != "kernels"}
    lines = ",\n".join(f"    {json.dumps(record)}" for record in found["kernels"])
    return json.dumps(head, indent=1)[:-2] + f',\n "kernels": [\n{lines}\n ]\n}}\n'


@functools.cache
def checked_in(op: str) -> Record:
    """The passport in the repository."""
    found: Record = json.loads((FOLDER / f"{op}.json").read_text())
    return found
