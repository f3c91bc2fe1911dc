"""What 4 bits cost a model: perplexity, divergence and agreement of each method beside the dense model.

    python -m scrimp.benchmarks.int4_quality demo-dithered --group-size 64 --csv device

The methods are calibrated on texts of the calibration documents and judged on windows of the held-out ones; a row is
one method. `--also` adds other programs' ways to quantize the same weights (`peers/`), as dense models.
"""

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

import scrimp
from scrimp.demo import text
from scrimp.demo.model import named_model
from scrimp.methods.evaluate import PROTOCOL, Reader, quality
from scrimp.methods.int4 import int4_layers, quantize
from scrimp.methods.int4.quantize import METHODS
from scrimp.ops.int4_linear import MODES

from .quality import FIGURES, Kept, add_outputs, row, write
from .results import Row

__all__ = ["FIGURES", "Kept", "main"]


def quantized(model: Any, method: str, group_size: int, tokens: Tensor, **options: Any) -> tuple[Any, float]:
    """A 4-bit copy of the model, and its bits a weight."""
    other = copy.deepcopy(model)
    report = quantize(other, method, group_size, tokens, kl_tokens=0, **options)
    sizes = [layer.shape[0] * layer.shape[1] for layer in report.layers]
    bits = sum(layer.bits * size for layer, size in zip(report.layers, sizes, strict=True)) / sum(sizes)
    return other, bits


def line(row: Row) -> str:
    """A row for people."""
    return (
        f"{row['case']:<18} {row['mode']:<6} {row['bits']:5.2f}  {row['perplexity']:8.4f}  "
        f"{100 * (row['perplexity_ratio'] - 1):+6.2f} %  {row['kl_mean']:8.5f}  {row['kl_p99']:8.4f}  "
        f"{row['top1_agreement']:7.2%}"
    )


HEAD = f"{'method':<18} {'mode':<6} {'bits':>5}  {'perplex.':>8}  {'change':>8}  {'KL mean':>8}  {'KL p99':>8}  top-1"


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="what scrimp.load takes, or demo-dithered")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--modes", nargs="+", default=["exact"], choices=MODES)
    parser.add_argument("--group-size", type=int, default=64, metavar="N")
    parser.add_argument("--order", default="groups", choices=["columns", "groups", "activations"], help="of gptq")
    parser.add_argument("--texts", type=int, default=24, metavar="N", help="calibration texts (default 24)")
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens of each (default 512)")
    parser.add_argument("--window", type=int, default=1024, metavar="N", help="tokens of a window (default 1024)")
    parser.add_argument("--windows", type=int, default=16, metavar="N", help="held-out windows (default 16)")
    add_outputs(parser)
    asked = parser.parse_args(words)
    model, tokenizer = scrimp.load(named_model(asked.model))
    calibration = text.windows(tokenizer, asked.length, "calibration", asked.texts)
    windows = text.windows(tokenizer, asked.window, "heldout", asked.windows)
    print(f"protocol: {PROTOCOL}")
    print(f"{len(windows)} windows of {asked.window} tokens; calibrated on {len(calibration)} texts of {asked.length}")
    reference = Kept(model)
    fields = {"group_size": asked.group_size, "windows": len(windows), "window_tokens": asked.window}
    rows: list[Row] = []
    print(HEAD)
    for method in asked.methods:
        start = time.perf_counter()
        other, bits = quantized(model, method, asked.group_size, calibration, order=asked.order)
        spent = time.perf_counter() - start
        for mode in asked.modes:
            for _, layer in int4_layers(other):
                layer.mode = mode
            found, dense = quality(Reader(other), windows, reference)
            more = {"mode": mode, "bits": round(bits, 3), "quantize_s": round(spent, 1)}
            rows.append(row("int4_quality", f"{method}-{mode}", found, dense.perplexity, fields | more))
            print(line(rows[-1]), flush=True)
    print(f"fp32: perplexity {rows[0]['reference_perplexity']}")
    write(asked, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
