"""Importing scrimp is cheap: no triton, no transformers, no CUDA; and kernels/ shadows nobody's package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.subprocess
ROOT = Path(__file__).resolve().parent.parent


def run(code: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
        cwd=ROOT,
    ).stdout.strip()


def test_import_loads_no_heavy_package() -> None:
    code = "import sys, scrimp; print([m for m in ('triton', 'transformers', 'gguf') if m in sys.modules])"
    assert run(code) == "[]"


def test_import_starts_no_device() -> None:
    assert run("import scrimp, torch; print(torch.cuda.is_initialized())") == "False"


def test_kernels_folder_shadows_no_package() -> None:
    code = (
        "import importlib.util as u; s = u.find_spec('kernels'); print(s is None or 'site-packages' in str(s.origin))"
    )
    assert run(code, PYTHONSAFEPATH="1") == "True"


@pytest.mark.parametrize("isa", ["portable"])
def test_environment_chooses_the_instruction_set(isa: str) -> None:
    assert run("import scrimp; print(scrimp.which('merge_attention')['cpu'])", SCRIMP_ISA=isa) == f"C++ ({isa})"


def test_a_wish_that_cannot_be_met_raises() -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run("import scrimp", SCRIMP_ISA="avx1024")
    assert "SCRIMP_ISA=avx1024 cannot be met: available are portable" in caught.value.stderr
