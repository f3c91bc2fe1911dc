"""Installs as users do: a wheel into an environment without a compiler, and a package without the extension."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = [pytest.mark.subprocess, pytest.mark.xdist_group("install")]
ROOT = Path(__file__).resolve().parent.parent
CODE = (
    "import torch, scrimp; q = torch.randn(1, 2, 9, 8); "
    "out, lse = scrimp.ops.sparse_attention(q, q, q, scrimp.SparsePlan.dense(9)); "
    "print(scrimp.__file__, tuple(out.shape), scrimp.which('sparse_attention')['cpu'])"
)


def test_builds_share_a_worker(request: pytest.FixtureRequest) -> None:
    """They write one folder."""
    in_groups = request.config.getoption("loadgroup", False)
    assert request.node.nodeid.endswith("@install") or not in_groups


def run(*command: str | Path, status: int = 0, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ""} | environment,
        cwd="/",
    )
    assert result.returncode == status, result.stdout[-1500:] + result.stderr[-1500:]
    return result.stdout


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An empty environment that sees this one's packages (torch), but not its scrimp."""
    venv.create(tmp_path / "env", with_pip=False)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return tmp_path / "env"


def pip_install(environment: Path, what: str | Path, **variables: str) -> None:
    run(
        environment / "bin/python", "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", what, **variables
    )


def test_wheel_in_an_environment_without_a_compiler(environment: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("scrimp-*.whl")
    pip_install(environment, wheel, PATH=str(environment / "bin"))
    where, *_, how = run(environment / "bin/python", "-c", CODE, PATH=str(environment / "bin")).split(" ", 1)
    assert str(environment) in where
    assert "(1, 2, 9, 8) C++" in how
    assert "compiled ops    yes" in run(environment / "bin/scrimp", "doctor", PATH=str(environment / "bin"))
    assert "sparse_attention" in run(environment / "bin/scrimp", "bench", "--list", PATH=str(environment / "bin"))


def test_install_without_the_extension(environment: Path) -> None:
    pip_install(environment, ROOT, SCRIMP_NO_EXT="1")
    said = run(environment / "bin/python", "-c", CODE)
    assert "(1, 2, 9, 8) reference (plain torch): scrimp._C was not built" in said
    assert "compiled ops    NO: scrimp._C was not built" in run(environment / "bin/scrimp", "doctor", status=1)


def test_build_without_torch_says_what_to_do(tmp_path: Path) -> None:
    blocker = tmp_path / "torch.py"
    blocker.write_text("raise ImportError('no torch')")
    result = subprocess.run(
        [sys.executable, ROOT / "setup.py", "-q", "build_ext", "--build-lib", tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": ""},
        cwd=ROOT,
    )
    assert result.returncode == 1
    assert result.stderr.strip().startswith(
        "scrimp: torch is not installed in this environment; run `pip install torch"
    )
