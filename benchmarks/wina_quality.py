"""What skipping channels costs a model: perplexity, divergence and agreement of each method beside the dense model.

    python -m scrimp.benchmarks.wina_quality demo-dithered --csv device --plot quality.svg

The methods are calibrated on texts of the calibration documents and judged on windows of the held-out ones; after each
window's first token, every token is read as decoding reads it. A row is one method with one way to share the sparsity
out. Sparsities are shares of all weights of the decoder layers; rows that a method cannot reach are left out. A folder
of 4-bit weights is judged beside itself with all channels.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from math import isnan, nan
from pathlib import Path
from statistics import median

import scrimp
from scrimp.demo import text
from scrimp.demo.model import named_model
from scrimp.methods.evaluate import PROTOCOL, Quality, Reader, quality
from scrimp.methods.wina import ALLOCATIONS, METHODS, Report, Usage, metered
from scrimp.ops.int4_linear import MODES

from . import wina_plot
from .quality import Kept, add_outputs, row, write
from .results import Row

VARIANTS = (
    "cats:uniform",
    "teal:greedy",
    "teal-rotated:greedy",
    "wina:greedy",
    "wina-rotated:greedy",
    "teal:knapsack",
    "wina:knapsack",
    "wina-centred:knapsack",
)


def spread(found: Quality, dense: Quality) -> float:
    """Standard error of the perplexity's ratio to the dense model's, from the windows, each with itself."""
    change = (found.nll.double() - dense.nll.double()).mean(1)
    return float(found.perplexity / dense.perplexity * change.std() / len(change) ** 0.5)


def dropped(usage: Usage, report: Report) -> float:
    """Share of all weights that tokens did not need; with CATS, of the up projections as many as of the down ones."""
    metered_weights = sum(layer.in_features * layer.out_features for layer, _ in usage.meters.values())  # type: ignore[operator]
    times = 2 if report.method == "cats" else 1
    needless = times * usage.dropped * metered_weights if usage.meters else 0.0
    return needless / sum(layer.weights for layer in report.layers)


def errors(usage: Usage) -> Row:
    """Medians over the layers of the relative errors of their outputs: estimated, and certified where asked for."""
    layers = usage.layers()
    found = {"layer_error": [layer.error for layer in layers], "layer_bound": [layer.bound for layer in layers]}
    return {name: round(median(values), 4) for name, values in found.items() if layers and not any(map(isnan, values))}


def line(row: Row) -> str:
    """A row for people."""
    return (
        f"{row['method']:<13} {row['allocation']:<9} {row['sparsity']:7.0%} {row['dropped']:8.1%} {row['saved']:7.1%}  "
        f"{row['perplexity']:8.4f}  {100 * (row['perplexity_ratio'] - 1):+7.2f} +- {100 * row['ratio_error']:.2f} %  "
        f"{row['kl_mean']:8.5f}  {row['top1_agreement']:7.2%}  {row.get('layer_error', nan):7.4f} "
        f"{row.get('layer_bound', nan):7.4f}"
    )


HEAD = (
    f"{'method':<13} {'shared':<9} {'asked':>7} {'dropped':>8} {'saved':>7}  {'perplex.':>8}  {'change':>16}  "
    f"{'KL mean':>8}  {'top-1':>7}  {'error':>7} {'at most':>7}"
)


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="what scrimp.load takes, or demo-dithered")
    known = [f"{method}:{allocation}" for method in METHODS for allocation in ALLOCATIONS]
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=known, metavar="METHOD:ALLOCATION")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.25, 0.4, 0.5, 0.65], metavar="S")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="read it instead of measuring one")
    parser.add_argument("--texts", type=int, default=8, metavar="N", help="calibration texts (default 8)")
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens of each (default 512)")
    parser.add_argument("--window", type=int, default=512, metavar="N", help="tokens of a window (default 512)")
    parser.add_argument("--windows", type=int, default=16, metavar="N", help="held-out windows (default 16)")
    parser.add_argument("--certified", action="store_true", help="bounds of the layers' errors, too (slower)")
    parser.add_argument("--mode", choices=MODES, help="of a model's 4-bit layers (default: as its folder says)")
    add_outputs(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rows as an SVG file")
    asked = parser.parse_args(words)
    model, tokenizer = scrimp.load(named_model(asked.model), mode=asked.mode)
    windows = text.windows(tokenizer, asked.window, "heldout", asked.windows)
    print(f"protocol: {PROTOCOL}")
    if asked.calibration is None:
        calibration = scrimp.calibrate(model, text.windows(tokenizer, asked.length, "calibration", asked.texts))
    else:
        calibration = scrimp.Calibration.load(asked.calibration, model)
    print(f"{len(windows)} windows of {asked.window} tokens; calibrated on {calibration.tokens} tokens")
    reference = Kept(model)
    fields = {"windows": len(windows), "window_tokens": asked.window}
    rows: list[Row] = []
    print(HEAD)
    for variant in asked.variants:
        method, _, allocation = variant.partition(":")
        for sparsity in asked.sparsities:
            other = copy.deepcopy(model)
            try:
                report = scrimp.sparsify(other, calibration, sparsity, method, allocation)
            except ValueError as error:
                print(f"{method:<13} {allocation:<9} {sparsity:7.0%}: {error}")
                continue
            with metered(other, asked.certified) as usage:
                found, dense = quality(Reader(other), windows, reference)
            own: Row = {"method": method, "allocation": allocation, "sparsity": sparsity}
            own |= {"dropped": round(dropped(usage, report), 4), "saved": round(report.saved, 4)}
            own |= {"ratio_error": round(spread(found, dense), 5), **errors(usage)}
            case = f"{method}-{allocation}-{sparsity:g}"
            rows.append(row("wina_quality", case, found, dense.perplexity, fields | own))
            print(line(rows[-1]), flush=True)
    print(f"dense: perplexity {rows[0]['reference_perplexity']}")
    write(asked, rows)
    if asked.plot is not None:
        asked.plot.write_text(wina_plot.picture(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
