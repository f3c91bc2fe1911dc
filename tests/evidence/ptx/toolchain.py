"""PTX and cubins from Triton and nvcc on a machine without a GPU, cached by content.

Triton compiles in a subprocess without ``TRITON_INTERPRET`` (with it nothing compiles), so the
calling process may run the interpreter. One worker serves a whole list of requests.
"""

import base64
import contextlib
import fcntl
import functools
import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import Any

_WORKER = Path(__file__).with_name("triton_worker.py")


def cache_folder() -> Path:
    """Where builds and compiler outputs lie: ``SCRIMP_CACHE`` or ``~/.cache/scrimp``."""
    root = os.environ.get("SCRIMP_CACHE")
    folder = Path(root) if root else Path.home() / ".cache" / "scrimp"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """One process at a time: parallel test workers do not build the same thing twice."""
    with (cache_folder() / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class TritonRequest:
    """One compilation: a kernel of a file, its signature, constants and options.

    ``attrs`` maps an argument to its divisibility (declare 16 as the JIT would, or the loads are
    narrow). ``arch`` is an int for CUDA (80, 90, 100) or a string for HIP ("gfx942").
    """

    path: str
    name: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    attrs: Mapping[str, int] = field(default_factory=dict)
    arch: int | str = 80
    num_warps: int = 4
    num_stages: int = 2

    def as_json(self) -> str:
        return json.dumps({k: getattr(self, k) for k in self.__dataclass_fields__}, sort_keys=True)


@dataclass(frozen=True)
class Compiled:
    """What a compiler gave: PTX text (or AMD assembly), the binary, its metadata."""

    name: str
    ptx: str
    binary: bytes
    shared: int
    num_warps: int
    metadata: Mapping[str, Any]


def triton_request(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any] | None = None,
    attrs: Mapping[str, int] | None = None,
    arch: int | str = 80,
    num_warps: int = 4,
    num_stages: int = 2,
) -> TritonRequest:
    """A request for a ``triton.jit`` function object (interpreted or not)."""
    plain = getattr(fn, "fn", fn)
    path = inspect.getsourcefile(plain)
    if path is None:
        raise ValueError(f"{plain!r} has no source file")
    full = dict(signature) | dict.fromkeys(constexprs or {}, "constexpr")
    return TritonRequest(
        str(Path(path).resolve()), plain.__name__, full, dict(constexprs or {}),
        dict(attrs or {}), arch, num_warps, num_stages,
    )  # fmt: skip


def _local_sources(path: Path, seen: dict[Path, bytes]) -> None:
    """The file and every file of its folder whose modules or kernels it imports."""
    path = path.resolve()
    if path in seen:
        return
    seen[path] = path.read_bytes()
    files = {str(getattr(module, "__file__", None)): module for module in list(sys.modules.values())}
    for value in list(vars(files[str(path)]).values()) if str(path) in files else ():
        if isinstance(value, ModuleType):
            file = getattr(value, "__file__", None)
        else:
            file = inspect.getsourcefile(value.fn) if callable(getattr(value, "fn", None)) else None
        if file and Path(file).resolve().parent == path.parent:
            _local_sources(Path(file), seen)


@functools.cache
def triton_version(folder: Path | None = None) -> str:
    """Of the installed Triton, or of the one that ``pip install --target`` put into a folder."""
    places = {} if folder is None else {"path": [str(folder)]}
    found = next(iter(distributions(name="triton", **places)), None)
    if found is None:
        raise RuntimeError(f"there is no Triton in {folder or 'this environment'}")
    return str(found.version)


def _cache_path(request: TritonRequest, triton: str) -> Path:
    sources: dict[Path, bytes] = {}
    _local_sources(Path(request.path), sources)
    digest = hashlib.sha256(f"triton {triton}".encode())
    digest.update(_WORKER.read_bytes())
    digest.update(replace(request, path=Path(request.path).name).as_json().encode())
    for path in sorted(sources):
        digest.update(sources[path])
    return cache_folder() / "triton" / f"{request.name}-{digest.hexdigest()[:24]}.json"


def compile_triton_all(requests: Iterable[TritonRequest], folder: Path | None = None) -> list[Compiled]:
    """Compile every request; the missing ones in subprocesses, the others from the cache.

    `folder` holds another Triton than the installed one, as ``pip install --target`` puts it there.
    """
    version = triton_version(folder)
    asked = [(request, _cache_path(request, version)) for request in requests]
    if not all(path.exists() for _, path in asked):
        with locked("triton"):
            missing = {path: request for request, path in asked if not path.exists()}
            _compile_missing(list(missing.items()), folder)
    return [_read(path) for _, path in asked]


def _compile_missing(missing: Sequence[tuple[Path, TritonRequest]], folder: Path | None) -> None:
    """Some seconds each: as many at once as there are processors."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = environment.get("TRITON_DEFAULT_FP_FUSION", "1")
    environment["TRITON_CACHE_DIR"] = str(cache_folder() / "triton-jit")
    if folder is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), *os.environ.get("PYTHONPATH", "").split()])

    def work(part: Sequence[tuple[Path, TritonRequest]]) -> str:
        lines = "\n".join(f"{path}\t{request.as_json()}" for path, request in part)
        command = [sys.executable, str(_WORKER)]
        done = subprocess.run(command, input=lines, capture_output=True, text=True, env=environment)
        return done.stderr[-4000:] if done.returncode else ""

    workers = min(len(missing), len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        failures = [text for text in pool.map(work, [missing[k::workers] for k in range(workers)]) if text]
    if failures:
        raise RuntimeError("Triton compilation failed:\n" + "\n".join(failures))


def compile_triton(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any] | None = None,
    attrs: Mapping[str, int] | None = None,
    arch: int | str = 80,
    num_warps: int = 4,
    num_stages: int = 2,
) -> Compiled:
    """Compile one Triton kernel ahead of time (see `TritonRequest`)."""
    request = triton_request(fn, signature, constexprs, attrs, arch, num_warps, num_stages)
    return compile_triton_all([request])[0]


def _read(path: Path) -> Compiled:
    raw = json.loads(path.read_text())
    metadata = raw["metadata"]
    return Compiled(
        metadata["name"], raw["ptx"], base64.b64decode(raw["binary"]), int(metadata["shared"]),
        int(metadata["num_warps"]), metadata,
    )  # fmt: skip


def nvcc_path() -> str | None:
    """The nvcc on PATH, in CUDA_HOME, or in the nvidia wheels of this environment."""
    found = shutil.which("nvcc")
    if found:
        return found
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    places += [str(Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13")]
    for place in places:
        candidate = Path(place) / "bin" / "nvcc"
        if place and candidate.exists():
            return str(candidate)
    return None


@functools.cache
def nvcc_version() -> str:
    """As ``nvcc --version`` has it: 13.0.88."""
    found = re.search(r"V([\d.]+)", subprocess.run([_nvcc(), "--version"], capture_output=True, text=True).stdout)
    return found[1] if found else "unknown"


def _nvcc() -> str:
    nvcc = nvcc_path()
    if nvcc is None:
        raise RuntimeError("nvcc not found on PATH, in CUDA_HOME or in the nvidia wheels")
    return nvcc


def compile_cuda(path: str | Path, arch: int = 80, flags: Sequence[str] = ()) -> str:
    """The PTX of a CUDA C++ file by ``nvcc -ptx``; quoted includes are part of the cache key."""
    return _compile_cuda(path, "ptx", ["-ptx", "-lineinfo", f"-arch=compute_{arch}", *flags]).decode()


def compile_cubin(path: str | Path, arch: str = "80", flags: Sequence[str] = ()) -> bytes:
    """The cubin of a CUDA C++ file by ``nvcc -cubin``; `arch` is "80" or "90a"."""
    return _compile_cuda(path, "cubin", ["-cubin", f"-arch=sm_{arch}", *flags])


def _compile_cuda(path: str | Path, kind: str, flags: Sequence[str]) -> bytes:
    source = Path(path).resolve()
    command = [_nvcc(), "-std=c++17", *flags]
    digest = hashlib.sha256(" ".join([*command, nvcc_version()]).encode())
    folders = [Path(flag[2:]) for flag in flags if flag.startswith("-I")]
    for text in _quoted_includes(source, folders, {}).values():
        digest.update(text)
    target = cache_folder() / "cuda" / f"{source.stem}-{digest.hexdigest()[:24]}.{kind}"
    with locked("cuda"):
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch = target.with_name(f"{target.name}.{os.getpid()}.tmp")
            done = subprocess.run([*command, "-o", str(scratch), str(source)], capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"nvcc failed on {source}:\n{done.stderr[-4000:]}")
            scratch.replace(target)
    return target.read_bytes()


def _quoted_includes(path: Path, folders: Sequence[Path], seen: dict[Path, bytes]) -> dict[Path, bytes]:
    if path not in seen and path.exists():
        seen[path] = path.read_bytes()
        for name in re.findall(rb'^\s*#\s*include\s+"([^"]+)"', seen[path], re.M):
            for folder in (path.parent, *folders):
                _quoted_includes((folder / name.decode()).resolve(), folders, seen)
    return seen
