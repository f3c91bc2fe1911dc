"""What skipping channels costs a model: perplexity, divergence and agreement of each method beside the dense model.

    python -m scrimp.benchmarks.wina_quality demo-dithered --csv device

The methods are calibrated on texts of the calibration documents and judged on windows of the held-out ones; after each
window's first token, every token is read as decoding reads it. A row is one method at one sparsity.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import scrimp
from scrimp.demo import text
from scrimp.demo.model import named_model
from scrimp.methods.evaluate import PROTOCOL, Quality, Reader, quality
from scrimp.methods.wina import ALLOCATIONS, METHODS, metered

from . import results
from .int4_quality import FIGURES, Kept
from .results import Row
from .rows import origin


def row(case: str, found: Quality, reference: float, fields: Row) -> Row:
    """One row of results."""
    figures = found.figures()
    shown = {name: float(f"{figures[name]:.6g}") for name in FIGURES if name in figures}
    base: Row = {"op": "wina_quality", "case": case, "dtype": "fp32", "threads": torch.get_num_threads()}
    ratio = {"reference_perplexity": round(reference, 4), "perplexity_ratio": round(found.perplexity / reference, 5)}
    return base | fields | {"peer": "self-dense"} | shown | ratio | origin("self-dense", "cpu") | {"note": ""}


def spread(found: Quality, dense: Quality) -> float:
    """Standard error of the perplexity's ratio to the dense model's, from the windows, each with itself."""
    change = (found.nll.double() - dense.nll.double()).mean(1)
    return float(found.perplexity / dense.perplexity * change.std() / len(change) ** 0.5)


def line(row: Row) -> str:
    """A row for people."""
    return (
        f"{row['case']:<13} {row['allocation']:<8} {row['sparsity']:7.0%} {row['dropped']:8.1%}  "
        f"{row['perplexity']:8.4f}  {100 * (row['perplexity_ratio'] - 1):+7.2f} +- {100 * row['ratio_error']:.2f} %  "
        f"{row['kl_mean']:8.5f}  {row['top1_agreement']:7.2%}"
    )


HEAD = (
    f"{'method':<13} {'shared':<8} {'asked':>7} {'dropped':>8}  {'perplex.':>8}  {'change':>16}  "
    f"{'KL mean':>8}  {'top-1':>7}"
)


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="what scrimp.load takes, or demo-dithered")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--allocations", nargs="+", default=["uniform"], choices=ALLOCATIONS)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.25, 0.4, 0.5, 0.65], metavar="S")
    parser.add_argument("--texts", type=int, default=8, metavar="N", help="calibration texts (default 8)")
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens of each (default 512)")
    parser.add_argument("--window", type=int, default=512, metavar="N", help="tokens of a window (default 512)")
    parser.add_argument("--windows", type=int, default=16, metavar="N", help="held-out windows (default 16)")
    parser.add_argument("--csv", metavar="FILE", help="replace these rows in FILE ('device': the checked-in results)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    asked = parser.parse_args(words)
    model, tokenizer = scrimp.load(named_model(asked.model))
    texts = text.windows(tokenizer, asked.length, "calibration", asked.texts)
    windows = text.windows(tokenizer, asked.window, "heldout", asked.windows)
    print(f"protocol: {PROTOCOL}")
    print(f"{len(windows)} windows of {asked.window} tokens; calibrated on {len(texts)} texts of {asked.length}")
    calibration = scrimp.calibrate(model, texts)
    reference = Kept(model)
    fields = {"windows": len(windows), "window_tokens": asked.window}
    rows: list[Row] = []
    print(HEAD)
    for method in asked.methods:
        for allocation in asked.allocations:
            for sparsity in asked.sparsities:
                other = copy.deepcopy(model)
                scrimp.sparsify(other, calibration, sparsity, method, allocation)
                with metered(other) as usage:
                    found, dense = quality(Reader(other), windows, reference)
                own: Row = {"allocation": allocation, "sparsity": sparsity, "dropped": round(usage.dropped, 4)}
                rows.append(row(method, found, dense.perplexity, fields | own | {"ratio_error": spread(found, dense)}))
                print(line(rows[-1]), flush=True)
    print(f"dense: perplexity {rows[0]['reference_perplexity']}")
    if asked.json is not None:
        results.write_json(asked.json, rows)
    if asked.csv is not None:
        results.update_csv(results.csv_file(asked.csv), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
