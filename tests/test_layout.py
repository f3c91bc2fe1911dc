"""The house rules that a test can hold: one word per op, calls go down, no weak symbols in kernels."""

import re
import subprocess
from pathlib import Path

import pytest

from scrimp import _ext
from scrimp._registry import OPS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "scrimp"
SOURCES = [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]


def stems(folder: str, pattern: str) -> set[str]:
    return {path.name.split(".")[0] for path in (ROOT / folder).glob(pattern)}


def test_every_op_has_its_files() -> None:
    assert stems("python/scrimp/ops", "[a-z]*.py") == set(OPS)
    assert stems("tests/ops", "test_*.py") == {f"test_{op}" for op in OPS}
    assert stems("csrc/cpu", "*.kernel.cpp") <= set(OPS)
    assert stems("csrc/cpu", "*.vnni.kernel.cpp") == set(_ext.VNNI_OPS)
    assert stems("csrc/cpu", "*.cpp") <= set(OPS)
    assert stems("csrc/cuda", "*.cu*") <= set(OPS)
    assert stems("kernels", "[a-z]*.py") - {"launch", "tuning", "gate"} <= set(OPS)


def test_kernels_know_no_framework() -> None:
    for path in [
        *ROOT.glob("csrc/cpu/*.kernel.cpp"),
        *ROOT.glob("csrc/c*/*.cuh"),
        ROOT / "csrc/common/simd.h",
    ]:
        assert not re.search(
            r"#include <(torch/|ATen/|c10/|vector>|string>|algorithm>|functional>)", path.read_text()
        ), path


def test_ptx_stands_in_one_header() -> None:
    for path in ROOT.glob("csrc/**/*.cu*"):
        assert path.name == "ptx.cuh" or not re.search(r"\basm\b", path.read_text()), path


def test_host_objects_know_no_torch() -> None:
    for path in ROOT.glob("csrc/host/*"):
        assert "torch/" not in path.read_text(), path


def test_only_the_registry_looks_at_devices_and_environment() -> None:
    allowed = {PACKAGE / "_ext.py", PACKAGE / "_registry.py"}
    for path in SOURCES:
        text = path.read_text()
        if path not in allowed and path.parent.name in ("ops", "methods", "sparse_plan", "int4_weight", "kernels"):
            assert not re.search(r"is_cuda|os\.environ|getenv", text), path


@pytest.mark.parametrize(
    ("folder", "above"),
    [
        ("ops", "methods|integrations|cli|demo"),
        ("sparse_plan", "ops|methods|integrations|cli|demo"),
        ("int4_weight", "ops|methods|integrations|cli|demo"),
    ],
)
def test_calls_go_down(folder: str, above: str) -> None:
    for path in (PACKAGE / folder).rglob("*.py"):
        assert not re.search(rf"^\s*from \.+({above})|import scrimp", path.read_text(), re.M), path


def test_shipped_code_has_no_assert() -> None:
    for path in SOURCES:
        assert not re.search(r"^\s*assert ", path.read_text(), re.M), path


def test_kernel_objects_export_no_weak_symbol() -> None:
    """The linker may keep one copy of a weak symbol for everybody: an AVX-512 one would crash older processors."""
    objects = sorted((ROOT / "build" / "ninja" / "_C").glob("*.kernel.*.o"))
    assert objects, "run `make setup` first"
    for path in objects:
        listing = subprocess.run(["nm", str(path)], capture_output=True, text=True, check=True).stdout
        weak = [line for line in listing.splitlines() if re.search(r" [WVu] ", line)]
        assert not weak, f"{path.name}: {weak}"
