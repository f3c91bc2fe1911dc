"""`scrimp doctor`: what runs here, what does not, and why."""

import importlib.util
import platform
from pathlib import Path

import torch

from . import __version__, _ext, _registry

OPTIONAL = {
    "transformers": "running Hugging Face models: pip install 'transformers>=5'",
    "triton": "GPU kernels: pip install triton",
    "gguf": "reading GGUF files: pip install gguf",
}


def cpu_model() -> str:
    """The processor's name as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def report() -> list[str]:
    """The lines that `scrimp doctor` prints."""
    lines = [
        f"scrimp {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"processor       {cpu_model()}, {torch.get_num_threads()} threads",
    ]
    if _ext.current_isa():
        lines.append(f"compiled ops    yes; instruction set {_ext.current_isa()} of {', '.join(_ext.available_isas())}")
    else:
        lines.append(f"compiled ops    NO: {_ext.ops_missing}")
    if _ext.host_missing:
        lines.append(f"host objects    NO: {_ext.host_missing}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    lines.append(f"CUDA device     {gpu}")
    for package, use in OPTIONAL.items():
        found = importlib.util.find_spec(package) is not None
        lines.append(f"{package:<15} {'yes' if found else f'NO, needed for {use}'}")
    lines.append("")
    width = max(map(len, _registry.OPS))
    for op in sorted(_registry.OPS):
        lines += [f"{op:<{width}}  {device:<5} {text}" for device, text in _registry.which(op).items()]
    return lines


def main() -> int:
    """Prints the report; exit status 1 when the compiled ops are missing."""
    print("\n".join(report()))
    return 0 if _ext.current_isa() else 1
