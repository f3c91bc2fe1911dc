"""GGUF files (llama.cpp): blocks of Q4_0, Q4_1 and Q8_0 stay packed.

Q4_0  18 bytes of 32: fp16 d, 16 bytes; byte i holds element i low and element 16 + i high; w = (q - 8) d
Q4_1  20 bytes of 32: fp16 d, fp16 m, 16 bytes likewise; w = q d + m
Q8_0  34 bytes of 32: fp16 d, 32 signed bytes; w = q d. Held as two columns of 4 bits an input:
      q = 16 (high - 8) + low, scales 16 d and d, zeros 8 and 0, the same numbers to the bit
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .check import check_finite
from .pack import pack_nibbles
from .weight import Int4Weight

BLOCK = 32
# ggml type -> (name, elements of a block, bytes of a block); those of OTHER are only handed out as bytes
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", BLOCK, 18),
    3: ("Q4_1", BLOCK, 20),
    8: ("Q8_0", BLOCK, 34),
    30: ("BF16", 1, 2),
}
OTHER = {
    6: ("Q5_0", BLOCK, 22),
    7: ("Q5_1", BLOCK, 24),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
}
_BYTES = {name: size for name, _, size in TYPES.values()}
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
MAX_COUNT = 1 << 20  # of tensors and of metadata entries
MAX_ARRAY_DEPTH = 4


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its type, its shape with the longest-running dimension last, its bytes."""

    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int


class _Cursor:
    """Reads little-endian values from a header, never past its end."""

    def __init__(self, where: str, data: mmap.mmap) -> None:
        self.where, self.data, self.at = where, data, 0

    def fail(self, text: str) -> ValueError:
        return ValueError(f"{self.where}: {text}")

    def skip(self, size: int, what: str) -> int:
        """The position of the next `size` bytes, which are passed over."""
        begin = self.at
        if size > len(self.data) - begin:
            raise self.fail(f"{what} of {size} bytes at byte {begin} runs past the end, {len(self.data)}")
        self.at = begin + size
        return begin

    def number(self, code: str, what: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.skip(struct.calcsize("<" + code), what))[0]

    def count(self, what: str, most: int) -> int:
        value = self.number("Q", what)
        if value > most:
            raise self.fail(f"{what} is {value}, at most {most} can be")
        return value

    def text(self, what: str) -> str:
        size = self.count(f"the length of {what}", len(self.data))
        begin = self.skip(size, what)
        try:
            return self.data[begin : begin + size].decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} at byte {begin} is not UTF-8: {error}") from error

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        """A metadata value; None for an array, which is passed over."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY or depth == MAX_ARRAY_DEPTH:
            raise self.fail(f"{what} has the unknown type {kind}, {depth} arrays deep")
        inner = self.number("I", f"the type of {what}")
        count = self.count(f"the length of {what}", len(self.data))
        if inner in _SCALARS:
            self.skip(count * struct.calcsize("<" + _SCALARS[inner]), what)
        else:
            for _ in range(count):
                self.value(inner, what, depth + 1)
        return None


class GgufFile:
    """A GGUF file: its metadata, and its tensors, read one at a time.

    Attributes:
        metadata: key -> value; arrays are left out.
        weights: names of the tensors of the three packed types with two dimensions.
        plain: names of the F32, F16 and BF16 tensors.
        other: name -> number of the type, of those that are not read; `raw` has the bytes of some.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from error
        head = _Cursor(str(path), self._data)
        if self._data[:4] != b"GGUF":
            raise head.fail(f"begins with {self._data[:4]!r}, not a GGUF file")
        head.skip(4, "magic")
        if (version := head.number("I", "version")) not in (2, 3):
            raise head.fail(f"GGUF version {version}; 2 and 3 are read")
        tensors = head.count("the number of tensors", MAX_COUNT)
        self.metadata: dict[str, Any] = {}
        for _ in range(head.count("the number of metadata entries", MAX_COUNT)):
            key = head.text("a metadata key")
            self.metadata[key] = head.value(head.number("I", f"the type of {key!r}"), repr(key))
        self.entries: dict[str, Entry] = {}
        self.other: dict[str, int] = {}
        self._read_entries(head, tensors)
        packed = {name: entry for name, entry in self.entries.items() if name not in self.other}
        self.weights = tuple(n for n, e in packed.items() if e.kind not in _PLAIN and len(e.shape) == 2)
        self.plain = tuple(n for n, e in packed.items() if e.kind in _PLAIN)

    def _read_entries(self, head: _Cursor, tensors: int) -> None:
        infos = []
        for _ in range(tensors):
            name = head.text("a tensor's name")
            dims = head.number("I", f"dimensions of {name!r}")
            if dims > 4:
                raise head.fail(f"tensor {name!r}: {dims} dimensions, at most 4 can be")
            shape = tuple(head.number("Q", f"shape of {name!r}") for _ in range(dims))[::-1]
            infos.append((name, shape, head.number("I", f"type of {name!r}"), head.number("Q", f"offset of {name!r}")))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment > 1 << 16 or alignment % 8:
            raise head.fail(f"general.alignment={alignment!r} must be a multiple of 8 up to {1 << 16}")
        start = -(-head.at // alignment) * alignment
        for name, shape, number, offset in infos:
            if name in self.entries or name in self.other:
                raise head.fail(f"tensor {name!r} is there twice")
            if number not in TYPES:
                self.other[name] = number
            if number not in TYPES | OTHER:
                continue
            kind, elements, size = (TYPES | OTHER)[number]
            total = math.prod(shape)
            if total == 0:
                raise head.fail(f"tensor {name!r}: shape {list(shape)} is empty")
            if elements > 1 and (not shape or shape[-1] % elements):
                raise head.fail(f"tensor {name!r}: shape {list(shape)} is not made of {kind} blocks of {elements}")
            begin = start + offset
            end = begin + total // elements * size
            if end > len(self._data) or offset % alignment:
                raise head.fail(
                    f"tensor {name!r}: {kind} {list(shape)} at byte {begin} would end at {end}, the file at "
                    f"{len(self._data)} (alignment {alignment})"
                )
            self.entries[name] = Entry(kind, shape, begin, end)

    def _fail(self, name: str, text: str) -> ValueError:
        return ValueError(f"{self.path}: tensor {name!r}: {text}")

    def _entry(self, name: str) -> Entry:
        if name in self.other:
            raise self._fail(name, f"ggml type {self.other[name]}; Q4_0, Q4_1, Q8_0, F32, F16 and BF16 are read")
        if name not in self.entries:
            raise self._fail(name, "missing")
        return self.entries[name]

    def _bytes(self, entry: Entry) -> Tensor:
        raw = bytearray(self._data[entry.begin : entry.end])
        return torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)

    def tensor(self, name: str) -> Tensor:
        """An F32, F16 or BF16 tensor."""
        entry = self._entry(name)
        if entry.kind not in _PLAIN:
            raise self._fail(name, f"{entry.kind} is packed; read it with weight()")
        return self._bytes(entry).view(_PLAIN[entry.kind]).view(entry.shape)

    def raw(self, name: str) -> tuple[int, tuple[int, ...], Tensor]:
        """A tensor of one of the types in OTHER: the type's number, the shape, the bytes."""
        if name not in self.other or name not in self.entries:
            kinds = ", ".join(kind for kind, *_ in OTHER.values())
            raise self._fail(name, f"ggml type {self.other.get(name)} is not one of {kinds}")
        entry = self.entries[name]
        return self.other[name], entry.shape, self._bytes(entry)

    def weight(self, name: str) -> Int4Weight:
        """A packed matrix `[N, K]`.

        Raises: ValueError naming file and tensor for another type or rank, or a scale that is not finite.
        """
        entry = self._entry(name)
        if name not in self.weights:
            raise self._fail(name, f"{entry.kind} {list(entry.shape)} is no packed matrix")
        N, K = entry.shape
        blocks = self._bytes(entry).view(N, K // BLOCK, _BYTES[entry.kind])
        halves = 1 if entry.kind != "Q4_1" else 2
        scales = blocks[..., : 2 * halves].contiguous().view(torch.float16)
        check_finite(f"{self.path}: tensor {name!r}", "scales (rows, blocks, d and m)", scales)
        codes, d = blocks[..., 2 * halves :], scales[..., 0].contiguous()
        if entry.kind == "Q8_0":
            return _two_nibbles(codes.view(torch.int8), d)
        qweight = pack_nibbles(torch.cat((codes & 15, codes >> 4), -1)).view(N, K // 2)
        if entry.kind == "Q4_0":
            return Int4Weight(qweight, d, group_size=BLOCK)
        return Int4Weight(qweight, d, scales[..., 1].contiguous(), group_size=BLOCK, zero_kind="offset")


def _two_nibbles(codes: Tensor, d: Tensor) -> Int4Weight:
    """Signed bytes `[N, B, 32]` and fp16 scales `[N, B]` as 4-bit columns: 32 high ones, then their 32 low ones."""
    N, B, _ = codes.shape
    nibbles = torch.stack(((codes >> 4) + 8, codes & 15), 2).to(torch.uint8).view(N, 2 * B * BLOCK)
    scales = torch.stack((16 * d.float(), d.float()), 2).view(N, 2 * B)
    if bool((scales.abs() <= torch.finfo(torch.float16).max).all()):
        scales = scales.to(torch.float16)  # exact: 16 d has the digits of d
    zeros = torch.tensor([8, 0], dtype=torch.uint8).repeat(N, B)
    inputs = torch.arange(B * BLOCK, dtype=torch.int32).view(B, 1, BLOCK).expand(B, 2, BLOCK).reshape(-1)
    return Int4Weight(
        pack_nibbles(nibbles),
        scales,
        zeros,
        permutation=inputs,
        group_size=BLOCK,
        zero_kind="uint8",
        in_features=B * BLOCK,
    )
