"""PTX, objects and ptxas's figures of CUDA C++ on a machine without a GPU, cached by content."""

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .toolchain import cache_folder, locked

# Whose code setup.py ships.
_ARCHITECTURES = (
    "-gencode=arch=compute_80,code=[sm_80,sm_86,sm_89,compute_80]",
    "-gencode=arch=compute_90,code=sm_90",
)


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel on one architecture."""

    registers: int
    shared: int
    spills: int


@dataclass(frozen=True)
class CudaObject:
    """A compiled CUDA file: the host object, the PTX for compute_80, and usage by (kernel, "sm_80")."""

    path: Path
    ptx: str
    usage: Mapping[tuple[str, str], Usage]


def nvcc_path() -> str | None:
    """The nvcc on PATH, in CUDA_HOME, in /usr/local/cuda or in the nvidia wheels of this environment."""
    found = shutil.which("nvcc")
    if found:
        return found
    places = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    places += [place for folder in sys.path for place in sorted(Path(folder).glob("nvidia/cu*"))]
    return next((str(place / "bin" / "nvcc") for place in places if (place / "bin" / "nvcc").exists()), None)


def compile_cuda(path: str | Path, include: Sequence[Path], arch: int = 80) -> str:
    """The PTX of a CUDA C++ file by ``nvcc -ptx``; quoted includes are part of the cache key."""
    source = Path(path).resolve()
    folders = [f"-I{folder}" for folder in include]
    command = [_nvcc(), "-ptx", "-std=c++20", "-lineinfo", f"-arch=compute_{arch}", *folders]
    target = cache_folder() / "cuda" / f"{source.stem}-{_key(command, source, include)}.ptx"
    with locked("cuda"):
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch = target.with_name(f"{target.name}.{os.getpid()}.tmp")
            _run([*command, "-o", str(scratch), str(source)], source)
            scratch.replace(target)
    return target.read_text()


def compile_cuda_object(path: str | Path, include: Sequence[Path], system: Sequence[Path]) -> CudaObject:
    """A launcher with its kernels, as setup.py compiles it, and line numbers.

    Sources under `include` are part of the cache key.
    """
    source = Path(path).resolve()
    command = [
        _nvcc(), "-c", "-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL",
        "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror", "-Xptxas=-v", "-lineinfo", "-keep",
        *_ARCHITECTURES, *(f"-I{folder}" for folder in include), *(f"-isystem={folder}" for folder in system),
    ]  # fmt: skip
    folder = cache_folder() / "cuda" / f"{source.stem}-{_key(command, source, include)}"
    with locked(f"cuda-{source.stem}"):
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                done = Path(scratch) / "done"
                done.mkdir()
                said = _run([*command, f"-keep-dir={scratch}", "-o", str(done / "object.o"), str(source)], source)
                (done / "ptxas.txt").write_text(said)
                Path(scratch, f"{source.stem}.compute_80.ptx").rename(done / "compute_80.ptx")
                done.rename(folder)
    return CudaObject(
        folder / "object.o", (folder / "compute_80.ptx").read_text(), _usage((folder / "ptxas.txt").read_text())
    )


@functools.cache
def nvcc_version() -> str:
    """As ``nvcc --version`` has it: 13.0.88."""
    said = subprocess.run([_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return said.rpartition(" V")[2].split()[0]


def _nvcc() -> str:
    nvcc = nvcc_path()
    if nvcc is None:
        raise RuntimeError("nvcc not found on PATH, in CUDA_HOME or in the nvidia wheels")
    return nvcc


def _run(command: Sequence[str], source: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc failed on {source}:\n{done.stderr[-4000:]}")
    return done.stdout + done.stderr


def _key(command: Sequence[str], source: Path, roots: Sequence[Path]) -> str:
    digest = hashlib.sha256(" ".join(command).encode())
    digest.update(subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout)
    for text in quoted_includes(source, roots, {}).values():
        digest.update(text)
    return digest.hexdigest()[:24]


def quoted_includes(path: Path, roots: Sequence[Path], seen: dict[Path, bytes]) -> dict[Path, bytes]:
    """The file and those it includes, directly or not, with their text; added to `seen`."""
    if path not in seen and path.exists():
        seen[path] = path.read_bytes()
        for name in re.findall(rb'^\s*#\s*include\s+"([^"]+)"', seen[path], re.M):
            for root in (path.parent, *roots):
                quoted_includes((root / name.decode()).resolve(), roots, seen)
    return seen


def _usage(said: str) -> dict[tuple[str, str], Usage]:
    pattern = (
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)"
    )
    found = {}
    for name, arch, stores, loads, registers, rest in re.findall(pattern, said, re.S):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[name, arch] = Usage(int(registers), int(shared[1]) if shared else 0, int(stores) + int(loads))
    return found
