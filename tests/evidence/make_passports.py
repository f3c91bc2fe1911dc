"""`make evidence`: compiles every shipped kernel for every architecture, rewrites passports and docs/gpu-evidence.md.

    python tests/evidence/make_passports.py [--triton FOLDER] [--cuda] [OP ...]

With --cuda those of the kernels in CUDA C++ alone. FOLDER holds a second Triton (``pip install --no-deps --target``),
which must compile all kernels too. Demands that a kernel does not fulfil are written into its passport and into the
document. Exit status 1 if there are new ones.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # of this process only: compilers run in subprocesses
sys.path.insert(0, str(Path(__file__).parent))

from passport import cuda, demands, records, summary
from subjects import SUBJECTS


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every shipped kernel and rewrite the passports.")
    parser.add_argument("--triton", type=Path, metavar="FOLDER", help="a second Triton that must compile everything")
    parser.add_argument("--cuda", action="store_true", help="only the kernels in CUDA C++")
    parser.add_argument("ops", nargs="*", metavar="OP", help="default: all")
    args = parser.parse_args()
    cuda.PATHS.mkdir(parents=True, exist_ok=True)
    reasons = []
    for op in [] if args.cuda else args.ops or SUBJECTS:
        make = functools.partial(records.passport, op, args.triton)
        reasons += write(op, records.FOLDER / f"{op}.json", make, demands.unmet_by_passport)
    for op in cuda.SUBJECTS:
        if not args.ops or op in args.ops:
            reasons += write(op, cuda.PATHS / f"{op}.json", functools.partial(cuda.passport, op), cuda.unmet)
    records.checked_in.cache_clear()
    cuda.checked_in.cache_clear()
    summary.DOCUMENT.write_text(summary.written(summary.DOCUMENT.read_text()))
    print("\n".join(reasons))
    return 1 if reasons else 0


def write(
    op: str, path: Path, make: Callable[[], records.Record], unmet: Callable[[str, records.Record], list[str]]
) -> list[str]:
    """Makes and writes one passport; the demands that it newly does not meet."""
    start = time.perf_counter()
    known = json.loads(path.read_text())["unmet"] if path.exists() else []
    found = make()
    found["unmet"] = unmet(op, found)
    path.write_text(records.text(found))
    print(line(op, found, time.perf_counter() - start), flush=True)
    return [f"{op}: {reason}" for reason in found["unmet"] if reason not in known]


def line(op: str, found: records.Record, seconds: float) -> str:
    kernels = found["kernels"]
    nvidia = [record for record in kernels if "registers" in record]
    by_arch = {record["arch"]: sum(r["arch"] == record["arch"] for r in kernels) for record in kernels}
    return (
        f"{op}: {len(kernels)} kernels ({', '.join(f'{count} for {arch}' for arch, count in by_arch.items())}) in "
        f"{seconds:.0f} s; NVIDIA: {min(r['registers'] for r in nvidia)} to {max(r['registers'] for r in nvidia)} "
        f"registers, {sum(r['spills'] > 0 for r in nvidia)} with spills"
    )


if __name__ == "__main__":
    sys.exit(main())
