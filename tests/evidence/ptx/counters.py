"""What a hardware profiler would count, from the core's per-instruction profile."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .parser import Instruction

_CLASSES = {
    "tensor": {"mma", "wgmma"},
    "matrix_load": {"ldmatrix", "stmatrix", "movmatrix"},
    "async_copy": {"cp"},
    "memory": {"ld", "ldu", "st", "atom", "red"},
    "barrier": {"bar", "barrier"},
    "warp": {"shfl", "vote", "match", "redux", "activemask", "elect"},
    "control": {"bra", "brx", "ret", "exit", "trap", "call"},
    "conversion": {"cvt"},
    "special": {"ex2", "lg2", "sin", "cos", "tanh", "rcp", "sqrt", "rsqrt"},
    "move": {"mov", "prmt", "cvta", "selp", "slct"},
}


def class_of(instruction: Instruction) -> str:
    """tensor, matrix_load, async_copy, global, shared, ... ; the rest is float or integer."""
    base = instruction.opcode[0]
    for name, members in _CLASSES.items():
        if base in members:
            if name == "memory":
                spaces = [part.split("::")[0] for part in instruction.opcode[1:]]
                known = ("global", "shared", "local", "param", "const")
                return next((s for s in spaces if s in known), "generic")
            return name
    floats = ("f16", "f16x2", "bf16", "bf16x2", "f32", "f64")
    return "float" if instruction.opcode[-1] in floats else "integer"


@dataclass(frozen=True)
class InstructionCount:
    """The profile of one instruction of the text."""

    line: int
    text: str
    kind: str
    values: Mapping[str, int]


@dataclass(frozen=True)
class AsyncWait:
    """One cp.async wait: executions by warps, mean bytes in flight before and after it."""

    line: int
    executions: int
    bytes_before: float
    bytes_after: float
    least_after: int


class Counters:
    """Totals of a launch; `rows` has them by instruction."""

    def __init__(
        self, instructions: Sequence[Instruction], profile: np.ndarray, blocks: int, threads: int,
        buffers: Mapping[str, tuple[int, int]],
    ) -> None:  # fmt: skip
        self.profile = profile
        self.blocks = blocks
        self.threads_per_block = threads
        self.instructions = tuple(instructions)
        self.kinds = tuple(class_of(i) for i in instructions)
        self._buffers = dict(buffers)

    def _sum(self, name: str, kinds: Iterable[str] | None = None) -> int:
        values = self.profile[name]
        if kinds is not None:
            wanted = set(kinds)
            values = values[[kind in wanted for kind in self.kinds]]
        return int(values.sum())

    @property
    def warp_instructions(self) -> int:
        return self._sum("warps")

    @property
    def thread_instructions(self) -> int:
        """Instructions times the lanes that executed them."""
        return self._sum("threads")

    @property
    def by_class(self) -> dict[str, int]:
        """Warp instructions by class."""
        result: dict[str, int] = {}
        for kind, count in zip(self.kinds, self.profile["warps"].tolist(), strict=True):
            if count:
                result[kind] = result.get(kind, 0) + count
        return result

    @property
    def sectors(self) -> int:
        """32-byte sectors that global accesses requested."""
        return self._sum("sectors")

    @property
    def useful_bytes(self) -> int:
        """Distinct bytes asked for within those sectors."""
        return self._sum("useful")

    @property
    def loaded_and_stored(self) -> int:
        """The same without those of atomic operations."""
        return sum(row.values["useful"] for row in self.rows if not re.search(r"\b(atom|red)\.", row.text))

    @property
    def sector_efficiency(self) -> float:
        return self.useful_bytes / (32 * self.sectors) if self.sectors else 1.0

    @property
    def tensor_flops(self) -> int:
        """Of products on tensor cores, two for each multiply-add."""
        total = 0
        for row in self.rows:
            if found := re.search(r"mma\.sync\.aligned\.m(\d+)n(\d+)k(\d+)", row.text):
                total += 2 * math.prod(map(int, found.groups())) * row.values["warps"]
        return total

    @property
    def shared_accesses(self) -> int:
        """Warp accesses of shared memory, asynchronous copies included."""
        return int(self.profile["warps"][self.profile["ideal"] > 0].sum())

    @property
    def conflicted_accesses(self) -> int:
        """Shared accesses that took more passes than needed."""
        return self._sum("conflicted")

    @property
    def bank_conflicts(self) -> int:
        """Extra passes over shared memory."""
        return self._sum("wavefronts") - self._sum("ideal")

    @property
    def unwaited_copies(self) -> int:
        """Asynchronous copies that were still in flight when their block ended."""
        return self._sum("unwaited")

    @property
    def async_waits(self) -> list[AsyncWait]:
        result = []
        for instruction, p in zip(self.instructions, self.profile, strict=True):
            count = int(p["waits"])
            if count:
                before, after = int(p["before"]) / count, int(p["after"]) / count
                wait = AsyncWait(instruction.line, count, before, after, int(p["after_min"]))
                result.append(wait)
        return result

    @property
    def rows(self) -> list[InstructionCount]:
        """Every executed instruction with its counts."""
        result = []
        for i, kind, p in zip(self.instructions, self.kinds, self.profile, strict=True):
            if p["warps"]:
                values = {name: int(p[name]) for name in self.profile.dtype.names or ()}
                result.append(InstructionCount(i.line, i.text, kind, values))
        return result

    @property
    def address_ranges(self) -> dict[int, tuple[int, int]]:
        """Line to the half-open range of addresses its accesses touched (of a copy: its source)."""
        return {
            i.line: (int(p["low"]), int(p["high"]))
            for i, p in zip(self.instructions, self.profile, strict=True)
            if p["high"] >= 0
        }

    @property
    def buffer_ranges(self) -> dict[str, tuple[int, int]]:
        """Buffer to the half-open range of byte offsets that global accesses touched in it."""
        result: dict[str, tuple[int, int]] = {}
        for p in self.profile[self.profile["sectors"] > 0]:
            for name, (base, size) in self._buffers.items():
                low, high = int(p["low"]) - base, int(p["high"]) - base
                if 0 <= low < size:
                    old = result.get(name, (low, high))
                    result[name] = (min(old[0], low), max(old[1], high))
        return result

    def summary(self) -> dict[str, Any]:
        """The totals as plain JSON types, for passports."""
        return {
            "blocks": self.blocks,
            "threads_per_block": self.threads_per_block,
            "warp_instructions": self.warp_instructions,
            "thread_instructions": self.thread_instructions,
            "by_class": dict(sorted(self.by_class.items())),
            "sectors": self.sectors,
            "useful_bytes": self.useful_bytes,
            "sector_efficiency": round(self.sector_efficiency, 4),
            "shared_accesses": self.shared_accesses,
            "conflicted_accesses": self.conflicted_accesses,
            "bank_conflicts": self.bank_conflicts,
            "async_waits": [
                {"line": w.line, "executions": w.executions, "bytes_before": w.bytes_before,
                 "bytes_after": w.bytes_after, "least_after": w.least_after}
                for w in self.async_waits
            ],
        }  # fmt: skip
