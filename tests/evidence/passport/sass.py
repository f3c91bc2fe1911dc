"""What machine code says of its kernels: resources, instructions, loops. Read from cuobjdump's listings."""

import functools
import hashlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ptx.toolchain import cache_folder

from .control_flow import natural_loops

TENSOR = ("HMMA", "HGMMA", "IMMA", "IGMMA", "QGMMA", "DMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA")
ASYNC_COPY = ("LDGSTS", "UBLKCP", "UTMALDG", "UTMASTG")
CONVERSION = ("F2F", "F2FP", "F2I", "I2F", "I2FP", "F2IP", "I2I", "FRND")
SPILL = ("STL", "LDL")


@dataclass(frozen=True)
class Instruction:
    """One line of a listing; `opcode` with its modifiers."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def width(self) -> int:
        """Bits that a load or store moves per thread."""
        for part in self.opcode.split(".")[1:]:
            if part in ("U8", "S8", "U16", "S16"):
                return int(part[1:])
            if part in ("64", "128", "256"):
                return int(part)
        return 32


@dataclass(frozen=True)
class Kernel:
    """One function of a cubin. `shared` is static, without what the system reserves."""

    name: str
    registers: int
    stack: int
    shared: int
    local: int
    instructions: tuple[Instruction, ...] = field(repr=False)

    @property
    def spills(self) -> int:
        """Instructions that read or write local memory."""
        return sum(i.base in SPILL for i in self.instructions)


def read(cubin: bytes) -> list[Kernel]:
    """The kernels of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return parse(_cuobjdump(Path(file.name)))


def read_object(path: Path) -> dict[str, list[Kernel]]:
    """The kernels of an object file of nvcc, by the architecture of the cubins in it ("sm_90a")."""
    parts = re.split(r"^Fatbin (\w+) code:$", _cuobjdump(path), flags=re.M)[1:]
    found = {}
    for kind, part in zip(parts[::2], parts[1::2], strict=True):
        if kind == "elf":
            found[re.findall(r"^arch = (\w+)$", part, re.M)[0]] = parse(part)
    return found


def _cuobjdump(path: Path) -> str:
    """The listing; a tenth of a second a kernel, so it is kept by content."""
    digest = hashlib.sha256(tool("cuobjdump").read_bytes() + path.read_bytes()).hexdigest()[:24]
    kept = cache_folder() / "sass" / f"{digest}.txt"
    if not kept.exists():
        command = [str(tool("cuobjdump")), "-sass", "-res-usage", str(path)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        kept.parent.mkdir(exist_ok=True)
        scratch = kept.with_name(f"{digest}.{os.getpid()}.tmp")
        scratch.write_text(re.sub(r"\s+/\* 0x[0-9a-f]{16} \*/", "", listing))
        scratch.replace(kept)
    return kept.read_text()


@functools.cache
def tool(name: str) -> Path:
    """One of NVIDIA's programs that the triton package brings along."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
_USAGE = re.compile(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def parse(listing: str) -> list[Kernel]:
    """From the text of ``cuobjdump -sass -res-usage`` for one architecture."""
    found = re.search(r"code for sm_(\d+)", listing)
    if found is None:
        raise ValueError("the listing names no architecture")
    resources = {name: [int(n) for n in numbers] for name, *numbers in _USAGE.findall(listing)}
    kernels = []
    for name, body in re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", listing, re.S):
        registers, stack, shared, local = resources[name]
        # From sm_90 on the system's own KiB is listed as if the kernel had asked for it.
        shared -= 1024 if int(found[1]) >= 90 and shared >= 1024 else 0
        lines = tuple(Instruction(int(a, 16), guard, code, rest) for a, guard, code, rest in _LINE.findall(body))
        kernels.append(Kernel(name, registers, stack, shared, local, _without_padding(lines)))
    return kernels


def _without_padding(lines: Sequence[Instruction]) -> tuple[Instruction, ...]:
    """Up to the branch to itself that ends every function."""
    for index, line in enumerate(lines):
        if line.base == "BRA" and line.operands == f"{line.address:#x}":
            return tuple(lines[:index])
    return tuple(lines)


def loops(kernel: Kernel) -> list[list[Instruction]]:
    """The instructions of every loop."""
    return [[kernel.instructions[k] for k in sorted(loop)] for loop in natural_loops(kernel.instructions)]


def hot_loops(kernel: Kernel) -> list[list[Instruction]]:
    """The innermost loops with tensor-core instructions; without any, the innermost loops; without loops, everything.

    The loop that only loads is never hot where another computes: a pipelined kernel has both.
    """
    every = loops(kernel)
    some = [loop for loop in every if any(i.base in TENSOR for i in loop)] or every
    places = [{i.address for i in loop} for loop in some]
    inner = [loop for loop, own in zip(some, places, strict=True) if not any(own > other for other in places)]
    return inner or [list(kernel.instructions)]


def mix(instructions: Iterable[Instruction]) -> dict[str, int | dict[str, int]]:
    """How many there are, and of what matters: by opcode, or by the bits a thread moves."""
    lines = list(instructions)

    def opcodes(bases: Sequence[str]) -> dict[str, int]:
        return dict(sorted(Counter(i.opcode for i in lines if i.base in bases).items()))

    def widths(base: str) -> dict[str, int]:
        counted = Counter(i.width for i in lines if i.base == base)
        return {str(width): counted[width] for width in sorted(counted)}

    found: dict[str, int | dict[str, int]] = {
        "instructions": len(lines),
        "tensor": opcodes(TENSOR),
        "async_copies": opcodes(ASYNC_COPY),
        "conversions": opcodes(CONVERSION),
        "global_loads": widths("LDG"),
        "global_stores": widths("STG"),
    }
    for name, base in {"matrix_loads": "LDSM", "shared_loads": "LDS", "shared_stores": "STS", "special": "MUFU",
                       "shuffles": "SHFL", "barriers": "BAR", "spills": "LDL"}.items():  # fmt: skip
        found[name] = sum(i.base == base for i in lines)
    found["spills"] = sum(i.base in SPILL for i in lines)
    # LDGDEPBAR ends a group of copies; DEPBAR.LE SB0, N waits until at most N groups are in flight.
    waits = [
        int(i.operands.split("0x")[-1], 16) for i in lines if i.base == "DEPBAR" and i.operands.startswith("SB0, ")
    ]
    if waits:
        found["copy_groups"] = sum(i.base == "LDGDEPBAR" for i in lines)
        found["copy_groups_in_flight"] = min(waits)
    return {name: value for name, value in found.items() if value}
