"""`scrimp bench`: measures cases against their peers, prints a table as rows come, writes JSON and CSV."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import scrimp

from . import environment, registry, results, table
from .registry import Case
from .results import Row
from .rows import FAILURES, measured

BUDGET_S = 3.0


def main(args: argparse.Namespace) -> int:
    """Runs the command; exit status 1 when a result was wrong or a call failed."""
    if args.list:
        print("\n".join(listing()))
        return 0
    if not args.all and args.op is None:
        raise ValueError(f"name an op or give --all; ops with cases are {', '.join(registry.names())}")
    device = args.device
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda needs a GPU that torch can use; `scrimp doctor` says what is here")
    ops = ops_with_kernels(device) if args.all else [with_kernel(args.op, device)]
    cases = selected(ops, args.case or "", device)
    counts = thread_counts(args.threads) if device == "cpu" else [1]
    budget_s = BUDGET_S if args.budget is None else args.budget
    if not budget_s >= 0:
        raise ValueError(f"--budget {budget_s} must be at least 0 seconds")
    json_file = Path(args.json) if args.json else None
    csv_file = results.csv_file(args.csv, device) if args.csv else None
    for file in (json_file, csv_file):
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"{file}: its folder does not exist")
    rows: list[Row] = []
    try:
        show(cases, counts, budget_s, device, rows)
    finally:
        if json_file is not None:
            results.write_json(json_file, rows)
        if csv_file is not None:
            results.update_csv(csv_file, rows)
    failed = sum(row["note"].startswith(FAILURES) for row in rows)
    if failed:
        print(f"{failed} of {len(rows)} rows have no number: a result was wrong or a call failed", file=sys.stderr)
    return 1 if failed else 0


def listing() -> list[str]:
    """Every op with its cases and their peers, then whether each peer is here."""
    lines: list[str] = []
    peers: dict[str, None] = {}
    for op in registry.names():
        cases = registry.case_file(op).cases()
        width = max(len(case.name) for case in cases)
        lines += [op, *(f"  {c.name:<{width}}  {c.dtype_name}  {', '.join(c.peers)}" for c in cases)]
        peers |= dict.fromkeys(peer for case in cases for peer in case.peers)
    lines.append("peers")
    for peer in peers:
        reason = None if registry.is_self(peer) else registry.peer_file(peer).available()
        lines.append(f"  {peer:<12}  {'ready' if reason is None else f'MISSING: {reason}'}")
    return lines


def with_kernel(op: str, device: str) -> str:
    """The op itself; the plain-torch reference is not worth timing."""
    if op in registry.ops() and not any(name.startswith(device) for name in scrimp.implementations(op)):
        raise RuntimeError(f"{op} has no kernel to measure here; {device}: {scrimp.which(op)[device]}")
    return op


def ops_with_kernels(device: str) -> list[str]:
    """Every op that can be measured; the others are named."""
    found = []
    for op in registry.names():
        try:
            found.append(with_kernel(op, device))
        except RuntimeError as error:
            print(f"skipped: {error}", file=sys.stderr)
    return found


def selected(ops: Sequence[str], text: str, device: str) -> list[Case]:
    """The cases of `ops` whose name contains `text`."""
    cases = [case for op in ops for case in registry.cases_of(op, device) if text in case.full_name]
    if not cases:
        raise ValueError(f"no case of {', '.join(ops)} has {text!r} in its name; `scrimp bench --list` shows them")
    return cases


def thread_counts(wish: Sequence[int] | None) -> list[int]:
    """The counts asked for, or one thread and all."""
    counts = list(dict.fromkeys(wish or (1, torch.get_num_threads())))
    if min(counts) < 1:
        raise ValueError(f"--threads {min(counts)} must be at least 1")
    return counts


def show(cases: Sequence[Case], counts: Sequence[int], budget_s: float, device: str, rows: list[Row]) -> None:
    """Measures, prints and appends to `rows`.

    The progress bar is drawn between measurements only, and tqdm's monitor thread is off: timing is undisturbed.
    """
    place = f"{environment.processor(device)}, {environment.isa(device)}"
    print(f"{place}, torch {torch.__version__}, commit {environment.commit()}")
    print("ratio: time of the peer over ours, median of pairs, and 20th to 80th percentile; below 1 we lose")
    widths = table.Widths.of(cases)
    tqdm.monitor_interval = 0
    with tqdm(total=len(cases) * len(counts), unit="run", disable=None, leave=False, mininterval=0) as bar:
        bar.write(table.head(widths), file=sys.stdout)
        for some in measured(cases, counts, budget_s, device):
            rows += some
            bar.write("\n".join(table.line(widths, row) for row in some), file=sys.stdout)
            sys.stdout.flush()
            bar.update()
