"""PTX and cubins from Triton on a machine without a GPU, cached by content.

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
import subprocess
import sys
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
