"""Loading PTX and launching its entries: programs, buffers, arguments."""

import ctypes
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import opcodes_memory  # noqa: F401  (registers its families)
from .core import PROFILE, FaultRecord, LaunchSettings, library
from .counters import Counters
from .encoder import SHARED_BASE, Encoder
from .errors import EmulatorError, PtxError
from .opcodes import FAMILIES
from .parser import Entry, Instruction, ParsedModule, Variable, parse, type_bytes

_FIRST_ADDRESS = 0x10_0000_0000
_GAP = 1 << 20


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


@dataclass(frozen=True)
class Struct:
    """A parameter passed as bytes.

    `pointers` maps the offset of each pointer among them to the name of a buffer, its array and a byte
    offset in that; the buffer is aligned to 16 bytes only where the array is.
    """

    raw: bytes
    pointers: Mapping[int, tuple[str, np.ndarray, int]] = field(default_factory=dict)


class Program:
    """One entry, encoded once and held by the core."""

    def __init__(self, entry: Entry, module: ParsedModule, symbols: dict[str, int]) -> None:
        self.entry = entry
        self.symbols = dict(symbols)
        self.local_bytes = self._place(entry.variables, "local", 0)
        shared = [v for v in (*module.variables, *entry.variables) if v.space == "shared"]
        static = [v for v in shared if not v.external]
        self.static_shared = self._place(static, "shared", SHARED_BASE) - SHARED_BASE
        dynamic = [v for v in shared if v.external]
        alignment = max([16, *(v.align for v in dynamic)])
        self.dynamic_start = _align(self.static_shared, alignment) if dynamic else self.static_shared
        for variable in dynamic:
            self.symbols[variable.name] = SHARED_BASE + self.dynamic_start
        for parameter in entry.parameters:
            self.symbols[parameter.name] = parameter.offset
        encoder = Encoder(entry, self.symbols)
        self.instructions = [*entry.instructions]
        last = self.instructions[-1].line if self.instructions else 0
        self.instructions.append(Instruction(("exit",), (), None, False, last, "exit"))
        for instruction in self.instructions:
            encoder.instruction = instruction
            handler = FAMILIES.get(instruction.opcode[0])
            if handler is None:
                raise encoder.error(f"unsupported instruction {instruction.name!r}")
            try:
                handler(encoder, instruction)
            except (ValueError, IndexError, KeyError) as error:
                if isinstance(error, PtxError):
                    raise
                raise encoder.error(f"unsupported instruction {instruction.name!r}") from error
        self._create(encoder)

    def _place(self, variables: Sequence[Variable], space: str, start: int) -> int:
        offset = start
        for variable in variables:
            if variable.space == space:
                offset = _align(offset, variable.align)
                self.symbols[variable.name] = offset
                offset += variable.size
        return offset

    def _create(self, encoder: Encoder) -> None:
        arrays = encoder.arrays()
        arguments: list[Any] = []
        for name in ("code", "operands", "jumps", "constants", "specials"):
            array = arrays[name]
            arguments += [array.ctypes.data, len(array)]
        self._library = library()
        self.handle = self._library.ptx_program(*arguments, encoder.rows, encoder.preds)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self._library.ptx_free(self.handle)


class Module:
    """A PTX module whose entries can be launched."""

    def __init__(self, text: str) -> None:
        self.parsed = parse(text)
        self._programs: dict[str, Program] = {}
        self._next = _FIRST_ADDRESS
        self._variables: list[tuple[str, int, np.ndarray]] = []
        self._symbols: dict[str, int] = {}
        scoped = [v for entry in self.parsed.entries.values() for v in entry.variables]
        for variable in (*self.parsed.variables, *scoped):
            if variable.space in ("global", "const") and variable.size:
                data = variable.data or bytes(variable.size)
                host = np.frombuffer(data, np.uint8).copy()
                self._symbols[variable.name] = self._next
                self._variables.append((variable.name, self._next, host))
                self._next = _align(self._next + variable.size + _GAP, 4096)

    @property
    def entries(self) -> list[str]:
        return list(self.parsed.entries)

    def variable(self, name: str) -> np.ndarray:
        """The bytes of a module-scope variable, to read or to set between launches."""
        return next(host for known, _, host in self._variables if known == name)

    def program(self, name: str) -> Program:
        """The entry called `name`, or the only one whose name contains it."""
        if name not in self.parsed.entries:
            matches = [known for known in self.parsed.entries if name in known]
            if len(matches) != 1:
                raise PtxError(f"entry {name!r} is not one of {self.entries}")
            name = matches[0]
        if name not in self._programs:
            entry = self.parsed.entries[name]
            self._programs[name] = Program(entry, self.parsed, self._symbols)
        return self._programs[name]

    def launch(
        self,
        entry: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any] | dict[str, Any],
        shared_bytes: int = 0,
        order: str = "lockstep",
        check_races: bool = True,
        check_uninitialised: bool = True,
        seed: int = 0,
        max_instructions: int = 1 << 40,
    ) -> Counters:
        """Run an entry over a grid; arrays and tensors among `args` are its buffers.

        A dict names the buffers for error messages; a `Struct` is a parameter of bytes that may hold
        pointers. Missing trailing parameters are zero (Triton appends scratch pointers). `order` "warp"
        runs each warp up to its next barrier; a `seed` other than 0 shuffles the warps. Raises
        `EmulatorError` at the first fault.
        """
        program = self.program(entry)
        sizes = [_three(grid), _three(block)]
        threads = sizes[1][0] * sizes[1][1] * sizes[1][2]
        if not 0 < threads <= program.entry.max_threads:
            raise ValueError(f"launch: {threads} threads a block, 1 to {program.entry.max_threads} are possible")
        required = program.entry.required_threads
        if required and required != sizes[1]:
            raise ValueError(f"launch: block {sizes[1]} but the kernel requires {required}")
        if order not in ("lockstep", "warp"):
            raise ValueError(f"launch: order {order!r} is not 'lockstep' or 'warp'")
        buffers = list(self._variables)
        params, keep = self._arguments(program, args, buffers)
        shared = program.dynamic_start + shared_bytes
        names = [name.encode() for name, _, _ in buffers]
        count = len(buffers)
        settings = LaunchSettings(
            grid=(ctypes.c_int32 * 3)(*sizes[0]),
            block=(ctypes.c_int32 * 3)(*sizes[1]),
            static_shared=shared, dynamic_shared=shared_bytes, local_bytes=program.local_bytes,
            warp_order=int(order == "warp"), check_races=check_races,
            check_uninitialised=check_uninitialised, param_bytes=len(params), buffer_count=count,
            seed=seed, max_instructions=max_instructions,
            params=ctypes.cast(ctypes.c_char_p(params), ctypes.c_void_p),
            buffer_bases=(ctypes.c_uint64 * count)(*(base for _, base, _ in buffers)),
            buffer_sizes=(ctypes.c_uint64 * count)(*(host.nbytes for _, _, host in buffers)),
            buffer_hosts=(ctypes.c_void_p * count)(*(host.ctypes.data for _, _, host in buffers)),
            buffer_names=(ctypes.c_char_p * count)(*names),
        )  # fmt: skip
        profile = np.zeros(len(program.instructions), PROFILE)
        record = FaultRecord()
        failed = library().ptx_launch(program.handle, ctypes.byref(settings), profile.ctypes.data, ctypes.byref(record))
        del keep
        if failed:
            at = program.instructions[record.pc]
            block_index = (record.block[0], record.block[1], record.block[2])
            detail = record.text.decode(errors="replace")
            raise EmulatorError(record.name, detail, block_index, record.warp, record.lane, at.line, at.text)
        blocks = sizes[0][0] * sizes[0][1] * sizes[0][2]
        ranges = {name: (base, host.nbytes) for name, base, host in buffers}
        return Counters(program.instructions, profile, blocks, threads, ranges)

    def _arguments(
        self, program: Program, args: Sequence[Any] | dict[str, Any],
        buffers: list[tuple[str, int, np.ndarray]],
    ) -> tuple[bytes, list[Any]]:  # fmt: skip
        """The parameter bytes; appends one buffer an array argument."""
        parameters = program.entry.parameters
        values = list(args.values()) if isinstance(args, dict) else list(args)
        names = list(args) if isinstance(args, dict) else [f"argument {k}" for k in range(len(values))]
        if len(values) > len(parameters):
            raise ValueError(f"launch: {len(values)} arguments for {len(parameters)} parameters")
        last = parameters[-1] if parameters else None
        raw = bytearray(last.offset + last.size if last else 0)
        next_address = self._next
        placed: dict[str, int] = {}
        keep: list[Any] = []

        def place(array: Any, name: str, shift: int = 0) -> int:
            nonlocal next_address
            address, host = next_address + shift, bytes_of(array, name)
            keep.append((array, host))
            buffers.append((name, address, host))
            next_address = _align(address + host.nbytes + _GAP, 4096)
            return address

        for parameter, value, name in zip(parameters, values, names, strict=False):
            if isinstance(value, Struct):
                packed = bytearray(value.raw)
                for offset, (buffer, array, start) in value.pointers.items():
                    if buffer not in placed:
                        placed[buffer] = place(array, buffer, shift=array.ctypes.data % 16)
                    packed[offset : offset + 8] = (placed[buffer] + start).to_bytes(8, "little")
                value = bytes(packed)
            elif hasattr(value, "data_ptr") or isinstance(value, np.ndarray):
                value = place(value, name)
            raw[parameter.offset : parameter.offset + parameter.size] = _scalar(
                parameter.type, parameter.size, value, name
            )
        return bytes(raw) or b"\0", keep


def _three(size: int | Sequence[int]) -> tuple[int, int, int]:
    parts = (size,) if isinstance(size, int) else tuple(size)
    x, y, z = (*parts, 1, 1, 1)[:3]
    if min(x, y, z) < 1 or len(parts) > 3:
        raise ValueError(f"launch: bad size {size!r}")
    return x, y, z


def bytes_of(value: Any, name: str) -> np.ndarray:
    """The memory of an array or a CPU tensor as bytes, without a copy."""
    if isinstance(value, np.ndarray):
        if not value.flags.c_contiguous:
            raise ValueError(f"launch: array {name!r} is not contiguous")
        return value.reshape(-1).view(np.uint8)
    if value.device.type != "cpu" or value.layout.__str__() != "torch.strided":
        raise ValueError(f"launch: tensor {name!r} must be a strided CPU tensor")
    elements = 0
    if value.numel():
        elements = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    size = elements * value.element_size()
    if size == 0:
        return np.empty(0, np.uint8)
    memory = (ctypes.c_uint8 * size).from_address(value.data_ptr())
    return np.frombuffer(memory, np.uint8)


def _scalar(type_name: str, size: int, value: Any, name: str) -> bytes:
    """A parameter as bytes by its declared type; floats also for ``.b32``/``.u32`` parameters."""
    if isinstance(value, (bytes, bytearray)):
        if len(value) != size:
            raise ValueError(f"launch: {name!r} has {len(value)} bytes, the parameter has {size}")
        return bytes(value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) or type_name in ("f32", "f64"):
        formats = {4: "<f", 8: "<d"}
        return struct.pack(formats[type_bytes(type_name)], float(value))
    return (int(value) % (1 << 8 * size)).to_bytes(size, "little")
