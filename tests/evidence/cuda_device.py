"""The compiled CUDA launchers, run without a GPU: their launches are executed by the PTX emulator.

    results, runs = call("merge_attention", out_a, lse_a, out_b, lse_b)

The objects of `csrc/cuda` are linked with `cuda_device.cpp` instead of libcudart and libtorch_cuda. An op then runs its
own launcher on CPU tensors: its checks, allocations, choice of kernel, grid and arguments are those of a GPU. Other ops
that it calls run as their references.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ptx
import torch
from ptx.nvcc import quoted_includes
from ptx.toolchain import cache_folder, locked

from scrimp._registry import OPS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(ROOT.glob("csrc/cuda/*.cu"))
TORCH = Path(torch.__file__).parent
_DEVICE = Path(__file__).with_suffix(".cpp")
_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.VE)


class _Dim3(ctypes.Structure):
    _fields_ = [(axis, ctypes.c_uint) for axis in "xyz"]

    def __iter__(self) -> Any:
        return iter((self.x, self.y, self.z))


class _Buffer(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_int64)]


_OnLaunch = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_Dim3), ctypes.POINTER(_Dim3), ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(_Buffer), ctypes.c_uint64,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One executed launch; `shared` are the bytes of dynamic shared memory it asked for, `memory` what `call` keeps."""

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    counters: ptx.Counters
    memory: tuple[np.ndarray, ...] = ()


def compiled(op: str) -> ptx.CudaObject:
    """The object, PTX and ptxas's figures of an op's launcher."""
    return ptx.compile_cuda_object(ROOT / f"csrc/cuda/{op}.cu", [ROOT / "csrc"], [TORCH / "include"])


@functools.cache
def kernels(op: str) -> dict[str, str]:
    """The op's kernels: name in PTX -> name in C++, "merge_attention_kernel<__half, 8>"."""
    names = re.findall(r"\.entry (\w+)", compiled(op).ptx)
    said = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout
    return {name: re.findall(r"(\w+(?:<.*>)?)\(", line)[0] for name, line in zip(names, said.splitlines(), strict=True)}


@functools.cache
def _library() -> ctypes.CDLL:
    objects = [compiled(source.stem).path for source in SOURCES]
    command = [
        os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-Wall", "-Wextra", "-Werror", f"-isystem{TORCH / 'include'}",
        str(_DEVICE), *map(str, objects), f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-ldl", "-Wl,-Bsymbolic", "-Wl,-z,defs",
    ]  # fmt: skip
    digest = hashlib.sha256(" ".join(command).encode() + _DEVICE.read_bytes()).hexdigest()[:24]
    target = cache_folder() / "cuda" / f"device-{digest}.so"
    with locked("cuda-device"):
        if not target.exists():
            scratch = target.with_name(f"{target.name}.{os.getpid()}.tmp")
            done = subprocess.run([*command, "-o", str(scratch)], capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"linking the launchers failed:\n{done.stderr[-4000:]}")
            scratch.replace(target)
    return ctypes.CDLL(str(target))


@contextlib.contextmanager
def _references(op: str) -> Iterator[None]:
    """The CPU runs the references of the ops that the launcher calls: those take every dtype of a GPU."""
    library = torch.library.Library("scrimp", "IMPL")
    csrc = ROOT / "csrc"
    text = b"".join(quoted_includes(csrc / f"cuda/{op}.cu", [csrc], {}).values()).decode()
    for name in set(re.findall(r'"scrimp::(\w+)"', text)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
            library.impl(name, OPS[name].reference, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


@functools.cache
def _module(text: str) -> ptx.Module:
    return ptx.load(text)


def call(
    op: str,
    *args: Any,
    order: str = "lockstep",
    change: Mapping[str, Callable[[str], str]] | None = None,
    short: Mapping[str, int] | None = None,
    failure: str = "",
    max_instructions: int = 1 << 40,
    keep: str = "",
) -> tuple[Any, list[Run]]:
    """The results of an op's CUDA implementation on CPU tensors, and what it launched.

    `change` maps the beginning of a kernel's name to a change of its own PTX, `short` an argument of the op to the
    bytes that its end lacks in the kernels; with `failure` the launch reports an error of that text. The warps of a
    launch have at most `max_instructions`. Runs of the kernel `keep` hold copies of what its pointers lead to. Raises
    what the launcher raises, or `ptx.EmulatorError` at the first fault of a kernel.
    """
    handle = getattr(torch.ops.scrimp, op).default
    names = {arg.data_ptr(): s.name for arg, s in zip(args, handle._schema.arguments, strict=False)
             if isinstance(arg, torch.Tensor)}  # fmt: skip
    text = compiled(op).ptx
    runs: list[Run] = []
    faults: list[BaseException] = []

    def on_launch(kernel: bytes, grid: Any, block: Any, shared: int, values: Any, buffers: Any, count: int) -> int:
        try:
            name = kernel.decode()
            plain = kernels(op)[name]
            mutate = next((mutate for part, mutate in (change or {}).items() if plain.startswith(part)), None)
            module = ptx.load(_changed(text, name, mutate)) if mutate else _module(text)
            known = {buffers[i].data: buffers[i].bytes for i in sorted(range(count), key=lambda i: buffers[i].bytes)}
            arguments = [
                _argument(ctypes.string_at(values[i], parameter.size), known, names, short or {})
                for i, parameter in enumerate(module.parsed.entries[name].parameters)
            ]
            counters = module.launch(
                name, tuple(grid[0]), tuple(block[0]), arguments, shared, order, max_instructions=max_instructions
            )
            found = [pointer for a in arguments for pointer in a.pointers.values()] if plain == keep else []
            memory = tuple(array[at:].copy() for _, array, at in found)
            runs.append(Run(plain, tuple(grid[0]), tuple(block[0]), shared, counters, memory))
        except BaseException as fault:
            faults.append(fault)
            return 719
        return 0

    callback = _OnLaunch(on_launch)
    _library().device_reset(callback)
    if failure:
        _library().device_fail(1, failure.encode())
    try:
        with _references(op):
            return handle.redispatch(_KEYS, *args), runs
    except RuntimeError:
        if faults:
            raise faults[0] from None
        raise


def _changed(text: str, kernel: str, mutate: Callable[[str], str]) -> str:
    """One kernel of the PTX, changed; the change sees the list of source files that its lines refer to, too."""
    starts = [match.start() for match in re.finditer(r"^\.visible \.entry ", text, re.M)]
    start = next(at for at in starts if text.startswith(f".visible .entry {kernel}(", at))
    end = text.rindex("\n}", start, next((at for at in starts if at > start), len(text)))
    files = "".join(re.findall(r"^\s*\.file\s.*\n", text, re.M))
    body = mutate(files + text[start:end]).removeprefix(files)
    if body == text[start:end]:
        raise AssertionError(f"the change of {kernel} changes nothing")
    lines = "\n" * text.count("\n", starts[0], start)  # faults and counters are known by their lines
    return text[: starts[0]] + lines + body + "\n}\n"


def _argument(raw: bytes, known: Mapping[int, int], names: Mapping[int, str], short: Mapping[str, int]) -> ptx.Struct:
    """A kernel's parameter; the words that lead into a tensor are its pointers."""
    pointers = {}
    for offset in range(0, len(raw) - 7, 8):
        word = int.from_bytes(raw[offset : offset + 8], "little")
        start = next((data for data, size in known.items() if data and data <= word < data + max(size, 1)), None)
        if start is not None:
            name = names.get(start, f"buffer {list(known).index(start)}")
            memory = np.ctypeslib.as_array((ctypes.c_uint8 * known[start]).from_address(start))
            pointers[offset] = (name, memory[: len(memory) - short.get(name, 0)], word - start)
    return ptx.Struct(raw, pointers)
