"""Operands and storage of a program: register rows, predicate slots, constant rows, symbols."""

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .core import ENCODED, MODS, handlers
from .errors import PtxError
from .parser import Entry, Instruction

LANES = 32
SHARED_BASE = 1024
SHARED_WINDOW = 0x7E0000000000
LOCAL_WINDOW = 0x7D0000000000
PARAM_WINDOW = 0x7C0000000000

PRED_TRUE, PRED_FALSE, PRED_SINK = 0, 1, 2
FLOW_NEXT, FLOW_BRANCH, FLOW_INDIRECT, FLOW_EXIT, FLOW_BARRIER, FLOW_ALIGNED, FLOW_MEMBERS = range(7)

# Order mirrors special.cpp.
_SPECIALS = [
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    "%laneid", "%warpid", "%nwarpid", "%lanemask_eq", "%lanemask_le", "%lanemask_lt",
    "%lanemask_ge", "%lanemask_gt", "%dynamic_smem_size", "%total_smem_size", "zero32", "zero64",
    "carry",
]  # fmt: skip
_ZERO32 = {
    "%clock", "%clock_hi", "%smid", "%nsmid", "%globaltimer_lo", "%globaltimer_hi", "%envreg0",
    "%cluster_ctarank", "%cluster_ctaid.x", "%cluster_ctaid.y", "%cluster_ctaid.z",
}  # fmt: skip
_ZERO64 = {"%clock64", "%globaltimer", "%gridid"}


@dataclass
class Encoder:
    """Turns the operands of one entry into indices and collects the encoded instructions."""

    entry: Entry
    symbols: dict[str, int]
    code: list[tuple[int, ...]] = field(default_factory=list)
    operands: list[int] = field(default_factory=list)
    jumps: list[int] = field(default_factory=list)
    constants: list[int] = field(default_factory=list)
    specials: list[tuple[int, int]] = field(default_factory=list)
    rows: int = 2  # the first two are the sink of "_"
    preds: int = 3
    instruction: Instruction | None = None
    _rows: dict[str, int] = field(default_factory=dict)
    _preds: dict[str, int] = field(default_factory=dict)
    _constants: dict[tuple[int, int], int] = field(default_factory=dict)

    def error(self, reason: str) -> PtxError:
        """An error that names the instruction being encoded."""
        i = self.instruction
        assert i is not None
        return PtxError(f"line {i.line}: {reason}: {i.text}")

    # Registers and predicates -----------------------------------------------------------------

    def _row(self, name: str, bits: int) -> int:
        if name not in self._rows:
            self._rows[name] = self.rows
            self.rows += 2 if bits == 64 else 1
        return self._rows[name]

    def register_bits(self, name: str) -> int:
        """Width of a register operand; constants count as 64 bits wide."""
        if name == "_":
            return 32
        return self.entry.width(name) or (32 if name in _ZERO32 or name in _SPECIALS else 64)

    def out(self, name: str, bits: int) -> int:
        """Row of a destination register, whose width must fit the instruction's type."""
        if name == "_":
            return 0
        have = self.entry.width(name)
        if have is None or have == 1:
            raise self.error(f"destination {name!r} is not a register")
        if (have == 64) != (bits == 64):
            raise self.error(f"destination {name!r} has {have} bits where {bits} are needed")
        return self._row(name, have)

    def any_out(self, name: str) -> tuple[int, int]:
        """Row and bytes of a destination of any width."""
        if name == "_":
            return 0, 8
        have = self.entry.width(name)
        if have is None or have == 1:
            raise self.error(f"destination {name!r} is not a register")
        return self._row(name, have), max(have // 8, 2)

    def value(self, name: str, bits: int, kind: str = "i") -> int:
        """Row of a source: register, special register, symbol or constant (kind "f": float)."""
        have = self.entry.width(name)
        if have is not None:
            if have == 1 or (have == 64) != (bits == 64):
                raise self.error(f"source {name!r} has {have} bits where {bits} are needed")
            return self._row(name, have)
        if name in _SPECIALS or name in _ZERO32 or name in _ZERO64:
            return self.special(name)
        return self.constant(self.number(name, bits, kind), bits)

    def any_value(self, name: str, bits: int) -> tuple[int, int]:
        """Row and row bytes (4 or 8) of a source of any width."""
        have = self.entry.width(name)
        if have is None:
            return self.value(name, bits), 8 if bits == 64 else 4
        return self._row(name, have), 8 if have == 64 else 4

    def special(self, name: str) -> int:
        kind = "zero64" if name in _ZERO64 else "zero32" if name in _ZERO32 else name
        if kind not in self._rows:
            row = self._row(kind, 64 if kind == "zero64" else 32)
            self.specials.append((_SPECIALS.index(kind), row))
        return self._rows[kind]

    def number(self, text: str, bits: int, kind: str) -> int:
        """The bits of a literal or of the address of a symbol."""
        if text in self.symbols:
            return self.symbols[text]
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            value = int(text[2:], 16)
            if bits == 64 and kind == "f":
                return int(np.float64(np.uint32(value).view(np.float32)).view(np.uint64))
            return value
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            value = int(text[2:], 16)
            if bits == 32 and kind == "f":
                narrow = np.float32(struct.unpack("<d", struct.pack("<Q", value))[0])
                return int(narrow.view(np.uint32))
            return value
        if re.fullmatch(r"[+-]?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text):
            value = int(text.rstrip("U"), 0) if not text.lstrip("+-").isdigit() else int(text)
            if kind == "f":
                raise self.error(f"integer literal {text!r} as a float")
            return value % (1 << max(bits, 16))
        if re.fullmatch(r"[+-]?\d*\.\d+([eE][+-]?\d+)?", text) and kind == "f":
            if bits == 64:
                return int(np.float64(text).view(np.uint64))
            return int(np.float32(text).view(np.uint32))
        raise self.error(f"operand {text!r} is unknown")

    def constant(self, value: int, bits: int) -> int:
        """Index (negative) of a row that holds the constant in every lane."""
        wide = bits == 64
        key = (value, 64 if wide else 32)
        if key not in self._constants:
            self._constants[key] = ~(len(self.constants) // LANES)
            words = [value & 0xFFFFFFFF, value >> 32] if wide else [value & 0xFFFFFFFF]
            self.constants += words * LANES
        return self._constants[key]

    def predicate(self, name: str) -> tuple[int, bool]:
        """Slot of a source predicate and whether it is negated."""
        negated = name.startswith("!")
        name = name[1:].strip() if negated else name
        if name in ("0", "1", "-1"):
            return (PRED_FALSE if name == "0" else PRED_TRUE), negated
        if self.entry.width(name) != 1:
            raise self.error(f"{name!r} is not a predicate")
        if name not in self._preds:
            self._preds[name] = self.preds
            self.preds += 1
        return self._preds[name], negated

    def predicate_out(self, name: str) -> int:
        return PRED_SINK if name == "_" else self.predicate(name)[0]

    # Addresses and tuples ---------------------------------------------------------------------

    def address(self, operand: str) -> tuple[int, bool, int]:
        """Row, whether the row has 64 bits, and the constant offset of ``[base+offset]``."""
        match = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:([+-])\s*(-?\s*\w+))?\s*\]", operand)
        if not match:
            raise self.error(f"address {operand!r} is not understood")
        base, sign, tail = match.groups()
        offset = int(tail.replace(" ", ""), 0) if tail else 0
        offset = -offset if sign == "-" else offset
        bits = self.entry.width(base)
        if bits is None:
            return self.constant(self.number(base, 64, "i"), 64), True, offset
        return self._row(base, bits), bits == 64, offset

    @staticmethod
    def elements(operand: str) -> list[str]:
        """The parts of ``{a, b}``, or the operand itself."""
        if operand.startswith("{"):
            return [part.strip() for part in operand.strip("{} ").split(",")]
        return [operand]

    # Output -----------------------------------------------------------------------------------

    def emit(self, key: str, operands: Sequence[int] = (), mods: Sequence[int] = (), flow: int = FLOW_NEXT) -> None:
        """Append the instruction at hand under the handler `key`."""
        i = self.instruction
        assert i is not None
        handler = handlers().get(key)
        if handler is None:
            raise self.error(f"unsupported instruction {i.name!r}")
        guard, negated = self.predicate(i.guard) if i.guard else (-1, False)
        first = len(self.operands)
        self.operands += operands
        full = (*mods, *([0] * (MODS - len(mods))))
        self.code.append((handler, flow, guard, int(negated ^ i.negated), i.line, first, *(int(m) for m in full)))

    def arrays(self) -> dict[str, np.ndarray]:
        """The encoded program as the core takes it."""
        table = np.array(self.code, np.int64)
        code = table.view(ENCODED).reshape(len(self.code))
        return {
            "code": np.ascontiguousarray(code),
            "operands": np.array([*self.operands, 0], np.int32),
            "jumps": np.array([*self.jumps, 0], np.int32),
            "constants": np.array([*self.constants, 0], np.uint32),
            "specials": np.array(self.specials, np.int32).reshape(-1, 2),
        }
