"""Where a number comes from: processor, instruction set, versions, commit."""

import platform
import re
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

import scrimp
from scrimp import _ext
from scrimp.doctor import cpu_model

ROOT = Path(__file__).resolve().parent.parent


@cache
def commit() -> str:
    """The checkout's commit with "-dirty" where files differ from it; "unknown" outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return "unknown"
        return git("describe", "--always", "--dirty", "--abbrev=10", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions(distribution: str) -> str:
    """Versions of scrimp, Python, torch and the peer's package."""
    parts = [f"scrimp {scrimp.__version__}", f"python {platform.python_version()}"]
    for name in dict.fromkeys(("torch", distribution)):
        try:
            parts.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            parts.append(f"no {name}")
    return ", ".join(parts)


def processor(device: str = "cpu") -> str:
    """The name of the CPU or the GPU."""
    return cpu_model() if device == "cpu" else str(torch.cuda.get_device_name())


def isa(device: str = "cpu") -> str:
    """The instruction set of the kernels in use; a GPU's compute capability."""
    if device == "cpu":
        return _ext.current_isa() or "reference"
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def results_name(device: str = "cpu") -> str:
    """The name of a device's file of results: processor and instruction set."""
    words = re.sub(r"\((r|tm|c)\)", " ", f"{processor(device)} {isa(device)}", flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
