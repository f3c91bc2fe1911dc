"""setup.py builds the CUDA kernels into _C: with a real nvcc and libcudart; a CPU torch only says that it has CUDA."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from ptx.nvcc import nvcc_path

pytestmark = [pytest.mark.subprocess, pytest.mark.xdist_group("install")]
CUDA = torch.version.cuda or "13.0"
ROOT = Path(__file__).resolve().parents[2]
# setup.py under a torch that claims CUDA `sys.argv[1]` ("" is none).
SETUP = """
import os, runpy, sys, torch
torch.version.cuda = sys.argv[1] or None
sys.argv = ["setup.py", *sys.argv[2:]]
runpy.run_path("setup.py", run_name="__main__")
"""


def python(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, cwd=ROOT)


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libtorch_cuda.so that has the names torch's headers declare for CUDA only."""
    folder, names = tmp_path_factory.mktemp("stub"), set[str]()
    include = Path(torch.__file__).parent / "include/torch/csrc"
    for header in (include / "inductor/aoti_torch/c/shim.h", include / "stable/c/shim.h"):
        for block in re.findall(r"#ifdef USE_CUDA(.*?)#endif", header.read_text(), re.S):
            names |= set(re.findall(r"(\w+)\(", block))
    source = folder / "stub.c"
    source.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in sorted(names)))
    library = folder / "libtorch_cuda.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-o", library, source], check=True)
    return folder


@pytest.fixture(scope="module")
def installed(stub: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which `import scrimp` takes a build with CUDA kernels."""
    folder = tmp_path_factory.mktemp("built")
    library = folder / "lib"
    done = python(
        "-c", SETUP, CUDA, "-q", "build", "--build-base", folder / "base", "--build-lib", library,
        SCRIMP_CUDA="1", LIBRARY_PATH=str(stub),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (linked,) = re.findall(r"-ltorch_cuda (\S+)/libcudart\.so\S+", (ROOT / "build/ninja/build.ninja").read_text())
    return {"PYTHONPATH": str(library)} | ({} if torch.version.cuda else {"LD_LIBRARY_PATH": f"{stub}:{linked}"})


@pytest.mark.parametrize(("wish", "runs"), [({}, "CUDA C++"), ({"SCRIMP_CUDA_IMPL": "triton"}, "Triton")])
def test_the_compiled_kernel_is_preferred(installed: dict[str, str], wish: dict[str, str], runs: str) -> None:
    """And its launcher runs up to the point where it needs a device."""
    code = """
import torch, scrimp
from scrimp._registry import OPS
print(scrimp.which("merge_attention")["cuda"], list(OPS["merge_attention"].cuda))
try:
    OPS["merge_attention"].cuda["cuda-c++"](*(torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2)) * 2)
except RuntimeError as error:
    print(error)
"""
    done = python("-c", code, **installed, **wish)
    assert done.returncode == 0, done.stderr[-3000:]
    which, said = done.stdout.strip().splitlines()[-2:]
    order = ["cuda-triton", "cuda-c++"] if wish else ["cuda-c++", "cuda-triton"]
    assert which.startswith(runs)
    assert which.endswith(str(order))
    assert said == "merge_attention: out_a, lse_a, out_b and lse_b must be on one CUDA device"


def test_needs_what_torch_and_cuda_provide(installed: dict[str, str]) -> None:
    library = next(Path(installed["PYTHONPATH"]).glob("scrimp/_C*.so"))
    said = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(\S+)\]", said))
    cudart = f"libcudart.so.{CUDA.split('.')[0]}"
    assert {"libtorch_cuda.so", cudart, "libtorch_cpu.so"} <= needed
    assert needed <= {
        "libtorch_cuda.so", cudart, "libtorch_cpu.so", "libtorch.so", "libc10.so",
        "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2",
    }  # fmt: skip


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """setup(torch_cuda, SCRIMP_CUDA=...) is the namespace of setup.py, run up to its call of setuptools."""

    def load(torch_cuda: str | None, **environment: str) -> dict[str, Any]:
        monkeypatch.setattr(setuptools, "setup", lambda **options: None)
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.delenv("SCRIMP_CUDA", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return runpy.run_path(str(ROOT / "setup.py"))

    return load


@pytest.mark.parametrize(
    ("torch_cuda", "wish", "words"),
    [
        (None, "1", r"SCRIMP_CUDA=1 cannot be met: torch \S+ is built without CUDA$"),
        ("11.8", "1", r"SCRIMP_CUDA=1 cannot be met: torch is of CUDA 11\.8, .*nvcc is of CUDA 1\d\.\d+$"),
        (CUDA, "yes", r"SCRIMP_CUDA=yes is neither 0 nor 1$"),
    ],
)
def test_a_wish_that_cannot_be_met(setup, torch_cuda: str | None, wish: str, words: str) -> None:
    with pytest.raises(SystemExit, match="^scrimp: " + words):
        setup(torch_cuda, SCRIMP_CUDA=wish)["find_cuda"]()


def test_no_compiler_at_all(setup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: False)
    found = setup(CUDA, SCRIMP_CUDA="1", PATH=str(tmp_path))["find_cuda"]
    with pytest.raises(
        SystemExit, match=r"cannot be met: torch is of CUDA \S+, and there is no nvcc .*; no nvcc at all$"
    ):
        found()
    assert setup(CUDA, PATH=str(tmp_path))["find_cuda"]() is None
    assert "scrimp: the CUDA kernels are left out (Triton serves GPUs): torch is of" in capsys.readouterr().err


@pytest.mark.parametrize(("torch_cuda", "environment"), [(None, {}), ("11.8", {}), (CUDA, {"SCRIMP_CUDA": "0"})])
def test_builds_without(setup, tmp_path: Path, torch_cuda: str | None, environment: dict[str, str]) -> None:
    text = setup(torch_cuda, **environment)["ninja_file"]({"_C": "c.so", "_host": "host.so"}, tmp_path)
    assert "build c.so: link" in text
    assert not re.search("nvcc|cudart|torch_cuda|compile_cuda", text)


def test_the_compiler_of_the_wheels(setup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Found where PATH and CUDA_HOME have none: a tree like that of the nvidia wheels around this machine's nvcc."""
    real = nvcc_path()
    home = tmp_path / "site/nvidia/cu13"
    for folder in ("bin", "lib"):
        (home / folder).mkdir(parents=True)
    (home / f"lib/libcudart.so.{CUDA.split('.')[0]}").touch()
    (home / "bin/nvcc").write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    (home / "bin/nvcc").chmod(0o755)
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: exists(self) and "/usr/local/cuda" not in str(self))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    nvcc, cudart = setup(CUDA, CUDA_HOME="")["find_cuda"]()
    assert nvcc == nvcc_path() == str(home / "bin/nvcc")
    assert "/libcudart.so." in cudart
