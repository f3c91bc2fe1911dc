"""Every CUDA launcher compiles against this torch's headers, needs only what a GPU machine has, and spills nothing."""

import re
import subprocess
from pathlib import Path

import pytest
from cuda_device import ROOT, SOURCES, TORCH, compiled
from ptx.nvcc import nvcc_path

OPS = [source.stem for source in SOURCES]
ARCHITECTURES = {"sm_80", "sm_86", "sm_89", "sm_90"}


def symbols(path: Path | str, *options: str) -> set[str]:
    said = subprocess.run(["nm", *options, str(path)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].split("@")[0] for line in said.splitlines() if line.strip()}


@pytest.fixture(scope="module")
def provided() -> set[str]:
    """What the CPU libtorch, cudart, libstdc++ and libc export, and what torch's headers declare for CUDA only."""
    compiler = ["c++", "-print-file-name=libstdc++.so.6"]
    libraries = [TORCH / "lib/libtorch_cpu.so"]
    for name in ("libstdc++.so.6", "libc.so.6", "libm.so.6", "libgcc_s.so.1"):
        compiler[1] = f"-print-file-name={name}"
        libraries.append(Path(subprocess.run(compiler, capture_output=True, text=True, check=True).stdout.strip()))
    dry = subprocess.run([str(nvcc_path()), "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True)
    home = Path(re.findall(r"TOP=(\S+)", dry.stderr)[0])
    libraries.append(next(path for lib in ("lib64", "lib") for path in (home / lib).glob("libcudart.so.*")))
    names = {"_GLOBAL_OFFSET_TABLE_", "__dso_handle", "atexit"}.union(
        *(symbols(library, "-D", "--defined-only") for library in libraries)
    )
    for header in ("inductor/aoti_torch/c/shim.h", "stable/c/shim.h"):
        text = (TORCH / "include/torch/csrc" / header).read_text()
        for block in re.findall(r"#ifdef USE_CUDA(.*?)#endif", text, re.S):
            names |= set(re.findall(r"\b(\w+)\(", block))
    return names


@pytest.mark.parametrize("op", OPS)
def test_needs_only_the_stable_abi(op: str, provided: set[str]) -> None:
    needed = symbols(compiled(op).path, "-u")
    assert needed - provided == set()
    torch_names = {name for name in needed if "torch" in name or "c10" in name}
    assert {name for name in torch_names if not re.match(r"(aoti_)?torch_\w+$", name)} == set()


@pytest.mark.parametrize("op", OPS)
def test_no_spills(op: str) -> None:
    usage = compiled(op).usage
    kernels = set(re.findall(r"\.entry (\w+)", compiled(op).ptx))
    assert set(usage) == {(kernel, architecture) for kernel in kernels for architecture in ARCHITECTURES}
    assert {which: used for which, used in usage.items() if used.spills} == {}


@pytest.mark.parametrize("op", OPS)
def test_kernels_compile_without_torch(op: str) -> None:
    """The kernels' header alone, from its own folder's point of view, warnings included."""
    header = ROOT / f"csrc/cuda/{op}.cuh"
    command = [str(nvcc_path()), "-x", "cu", "-E", "-std=c++20", f"-I{ROOT / 'csrc'}", str(header)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch/" not in done.stdout


def test_every_op_with_a_kernel_is_here() -> None:
    assert OPS
    assert {path.name.split(".")[0] for path in ROOT.glob("csrc/cuda/*.cuh")} == set(OPS)
