"""`scrimp bench --predict DEVICE OP`: roofline times of a GPU, from the counts of an op's kernels.

`--against NAME` puts somebody else's kernel beside ours. Rows carry `label: predicted`: nothing in them was measured.
Below them stand figures that others publish of like work (`label: published`); their shapes are named, and not ours.
"""

import argparse
import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from . import registry
from .devices import DEVICES
from .published import published
from .results import Row
from .roofline import ASSUMPTIONS, Count, predict

COLUMNS = {
    "case": "case", "dtype": "dtype", "mbytes": "MB asked for", "memory_mbytes": "MB from memory",
    "gflops": "GFLOP issued", "tile_efficiency": "useful", "limit": "limit", "predicted_us": "predicted us",
}  # fmt: skip


def ops() -> list[str]:
    """The ops whose kernels are counted."""
    return [op for op in registry.ops() if (Path(__file__).parent / f"{op}_cost.py").exists()]


def cost_file(op: str) -> ModuleType:
    """The module with the formulas of `op`."""
    if op not in ops():
        raise ValueError(f"the kernels of {op!r} are not counted; ops that are: {', '.join(ops())}")
    return import_module(f"{__package__}.{op}_cost")


def main(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.predict is None:
        raise ValueError("--against needs --predict and a GPU")
    unused = [f"--{name}" for name in ("list", "threads", "csv", "budget") if getattr(args, name)]
    if unused:
        raise ValueError(f"--predict measures nothing: {', '.join(unused)} has no meaning with it")
    if args.op is None and not args.all:
        raise ValueError(f"name an op or give --all; ops with counts are {', '.join(ops())}")
    device = DEVICES[args.predict]
    asked = ops() if args.all else [args.op]
    if args.json and not Path(args.json).parent.is_dir():
        raise ValueError(f"{args.json}: its folder does not exist")
    if args.against:
        rows = [row for op in asked for row in compared(op, args.predict, args.against)]
    else:
        rows = [row for op in asked for row in predicted(op, args.predict, args.case or "")]
    if not rows:
        raise ValueError(f"no case of {', '.join(asked)} has {args.case!r} in its name")
    rows += [row for op in asked for row in published(op) if (args.case or "") in row["case"]]
    print(f"predicted for {device.name}, nothing is measured")
    print("\n".join(f"- {line}" for line in (*ASSUMPTIONS, _rates(args.predict))))
    for op in asked:
        print(f"\n{op}")
        print("\n".join(table([row for row in rows if row["op"] == op])))
        if not published(op):
            print("no figure that others publish of like work is known to us")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def _rates(name: str) -> str:
    device = DEVICES[name]
    exps = f", {device.exps / 1e12:.2f} T exponentials/s" if device.exps else ""
    return (
        f"{device.flops['16'] / 1e12:g} TFLOP/s of dense fp16/bf16 products, {device.flops['32'] / 1e12:g} of fp32, "
        f"{device.memory / 1e12:g} TB/s, {device.cache / 2**20:g} MiB of cache{exps} ({device.source})"
    )


def predicted(op: str, device: str, text: str = "") -> list[Row]:
    """One row per case whose name contains `text`, two where there are kernels in Triton and in CUDA C++."""
    rows = []
    for case in cost_file(op).cases():
        if text in f"{case.name}-{case.dtype}":
            shape = dict(case.fields) | {"case": case.name, "dtype": case.dtype}
            if case.cuda:
                rows.append(row(op, device, shape | {"kernel": "CUDA C++"}, case.cuda(), case.dtype))
                shape["kernel"] = "Triton"
            rows.append(row(op, device, shape, case.count(), case.dtype))
    return rows


def compared(op: str, device: str, other: str) -> list[Row]:
    """Ours and somebody else's kernel, case by case; a row's `kernel` says whose it is."""
    known = getattr(cost_file(op), "AGAINST", {})
    if other not in known:
        raise ValueError(f"{op} is not compared with {other!r}; there is {', '.join(known) or 'nothing'}")
    rows = []
    for name, (ours, theirs) in known[other]().items():
        for kernel, count in (("scrimp", ours), (other, theirs)):
            rows.append(row(op, device, {"case": name, "kernel": kernel, "dtype": "bf16"}, count, "bf16"))
    return rows


def row(op: str, device: str, shape: Row, count: Count, dtype: str) -> Row:
    """The counts and what they predict."""
    found = predict(count, DEVICES[device], dtype)
    return {
        "op": op, **shape, "device": device, "label": "predicted",
        "bytes": count.bytes, "unique_bytes": count.unique_bytes, "memory_bytes": found.memory_bytes,
        "flops_issued": count.flops_issued, "flops_useful": count.flops_useful, "exps": count.exps,
        "tile_efficiency": round(count.flops_useful / count.flops_issued, 4) if count.flops_issued else None,
        "limit": found.limit, "predicted_us": float(f"{1e6 * found.time:.4g}"),
        "seconds": {name: float(f"{value:.4g}") for name, value in found.seconds.items()},
        "assumptions": list(ASSUMPTIONS),
    }  # fmt: skip


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of text; the tile efficiency is the share of useful among issued FLOPs."""
    columns = dict(COLUMNS)
    if any(row["label"] == "published" for row in rows):
        columns |= {"label": "label", "peer": "whose", "figure": "figure"}
    if any("kernel" in row for row in rows):
        columns = {"case": "case", "kernel": "kernel"} | columns
    if any("density" in row for row in rows):
        columns = {"case": "case", "density": "density"} | columns
    lines = [[columns[name] for name in columns], *([_cell(row, name) for name in columns] for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(columns))]
    return ["  ".join(cell.rjust(width) if k else cell.ljust(width) for k, (cell, width) in
                      enumerate(zip(line, widths, strict=True))).rstrip() for line in lines]  # fmt: skip


def _cell(row: Row, name: str) -> str:
    if row["label"] == "published" and name not in row:
        return "-"
    if name == "mbytes":
        return f"{row['bytes'] / 1e6:,.1f}"
    if name == "memory_mbytes":
        return f"{row['memory_bytes'] / 1e6:,.1f}"
    if name == "gflops":
        return f"{row['flops_issued'] / 1e9:,.1f}" if row["flops_issued"] else "-"
    if name == "tile_efficiency":
        return "-" if row[name] is None else f"{row[name]:.1%}"
    if name == "density":
        return f"{row[name]:.3g}" if name in row else "-"
    return str(row[name]) if name in row else "-"
