"""Builds the C++ core on first use and binds it with ctypes."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from .errors import KINDS
from .toolchain import cache_folder, locked

MODS = 6
PROFILE_FIELDS = (
    "warps", "threads", "bytes", "sectors", "useful", "wavefronts", "ideal", "conflicted", "low",
    "high", "waits", "before", "after", "after_min", "unwaited",
)  # fmt: skip

ENCODED = np.dtype(
    [
        ("handler", "i8"), ("flow", "i8"), ("guard", "i8"), ("negated", "i8"), ("line", "i8"),
        ("first_operand", "i8"), ("mod", "i8", (MODS,)),
    ]
)  # fmt: skip
PROFILE = np.dtype([(name, "i8") for name in PROFILE_FIELDS])

_SOURCES = Path(__file__).with_name("core")
_FLAGS = [
    "-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC",
    "-Wall", "-Wextra",
]  # fmt: skip


class LaunchSettings(ctypes.Structure):
    """Mirror of the struct in state.h."""

    _fields_ = [
        ("grid", ctypes.c_int32 * 3),
        ("block", ctypes.c_int32 * 3),
        ("static_shared", ctypes.c_int32),
        ("dynamic_shared", ctypes.c_int32),
        ("local_bytes", ctypes.c_int32),
        ("warp_order", ctypes.c_int32),
        ("check_races", ctypes.c_int32),
        ("check_uninitialised", ctypes.c_int32),
        ("param_bytes", ctypes.c_int32),
        ("buffer_count", ctypes.c_int32),
        ("seed", ctypes.c_int64),
        ("max_instructions", ctypes.c_int64),
        ("params", ctypes.c_void_p),
        ("buffer_bases", ctypes.POINTER(ctypes.c_uint64)),
        ("buffer_sizes", ctypes.POINTER(ctypes.c_uint64)),
        ("buffer_hosts", ctypes.POINTER(ctypes.c_void_p)),
        ("buffer_names", ctypes.POINTER(ctypes.c_char_p)),
    ]


class FaultRecord(ctypes.Structure):
    """Mirror of the struct in api.cpp."""

    _fields_ = [
        ("kind", ctypes.c_int32),
        ("warp", ctypes.c_int32),
        ("lane", ctypes.c_int32),
        ("pc", ctypes.c_int32),
        ("block", ctypes.c_int32 * 3),
        ("text", ctypes.c_char * 1024),
    ]

    @property
    def name(self) -> str:
        return KINDS[self.kind]


def _machine() -> str:
    """What -march=native depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        return next(line for line in text.splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _compile(compiler: str, source: Path, headers: bytes) -> Path:
    digest = hashlib.sha256(" ".join([compiler, *_FLAGS, _machine()]).encode())
    digest.update(headers + source.read_bytes())
    target = cache_folder() / "ptx-core" / f"{source.stem}-{digest.hexdigest()[:24]}.o"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        command = [compiler, *_FLAGS, "-c", str(source), "-o", str(scratch)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        scratch.replace(target)
    return target


def build() -> Path:
    """The shared library of the core; objects and library are cached by their content."""
    with locked("ptx-core"):
        return _build()


def _build() -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("the PTX emulator needs a C++20 compiler (g++), none was found")
    headers = b"".join(path.read_bytes() for path in sorted(_SOURCES.glob("*.h")))
    objects = [_compile(compiler, path, headers) for path in sorted(_SOURCES.glob("*.cpp"))]
    digest = hashlib.sha256(" ".join(path.name for path in objects).encode()).hexdigest()[:24]
    target = cache_folder() / "ptx-core" / f"core-{digest}.so"
    if not target.exists():
        scratch = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        command = [compiler, "-shared", *map(str, objects), "-o", str(scratch)]
        subprocess.run(command, check=True, capture_output=True)
        scratch.replace(target)
    return target


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded core with its functions typed."""
    core = ctypes.CDLL(str(build()))
    core.ptx_abi.restype = ctypes.c_int64
    core.ptx_handler.argtypes = [ctypes.c_char_p]
    core.ptx_handler.restype = ctypes.c_int64
    core.ptx_handler_count.restype = ctypes.c_int64
    core.ptx_handler_name.argtypes = [ctypes.c_int64]
    core.ptx_handler_name.restype = ctypes.c_char_p
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    array: list[type[Any]] = [pointer, size]
    core.ptx_program.argtypes = [*array * 5, ctypes.c_int32, ctypes.c_int32]
    core.ptx_program.restype = pointer
    core.ptx_free.argtypes = [pointer]
    core.ptx_free.restype = None
    core.ptx_launch.argtypes = [
        pointer, ctypes.POINTER(LaunchSettings), pointer, ctypes.POINTER(FaultRecord),
    ]  # fmt: skip
    core.ptx_launch.restype = ctypes.c_int32
    expected = ENCODED.itemsize << 32 | ctypes.sizeof(FaultRecord) << 16 | len(PROFILE_FIELDS)
    if core.ptx_abi() != expected:
        raise RuntimeError("core.py and api.cpp disagree about their structures")
    return core


@functools.cache
def handlers() -> dict[str, int]:
    """Name to index of every instruction the core implements."""
    core = library()
    return {core.ptx_handler_name(i).decode(): i for i in range(core.ptx_handler_count())}
