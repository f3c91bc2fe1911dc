"""What codes cost a model: perplexity and agreement with codebooks at one place, after k-means and after training.

    python -m scrimp.benchmarks.codebook_quality demo-dithered --layers 14

The codes are the centroids of activations on calibration texts. With `--steps` they are then trained on these texts, a
text a step, the model itself fixed. All is judged on windows of the held-out documents, by the model's own modules.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import scrimp
from scrimp.demo import text
from scrimp.demo.model import named_model
from scrimp.methods.codebook import PLACES, codebook_loss, codebooks

from . import results
from .results import Row

RATE = 1e-3  # of Adam


@torch.no_grad()
def judged(model: Any, windows: Tensor) -> tuple[float, Tensor]:
    """Perplexity on windows `[B, n]`, and the most likely token behind each token `[B, n]`."""
    logits = [model(window[None]).logits[0] for window in windows]
    losses = [cross_entropy(own[:-1].float(), window[1:]) for own, window in zip(logits, windows, strict=True)]
    return math.exp(float(torch.stack(losses).mean())), torch.stack([own.argmax(-1) for own in logits])


def train(model: Any, texts: Tensor, steps: int) -> None:
    """Trains the codes of a model, whose own parameters are fixed."""
    model.requires_grad_(False)
    layers = codebooks(model).values()
    optimiser = torch.optim.Adam([layer.codebook.requires_grad_() for layer in layers], RATE)
    for step in range(steps):
        ids = texts[step % len(texts)][None]
        optimiser.zero_grad()
        (model(ids, labels=ids).loss + codebook_loss(model)).backward()
        optimiser.step()


def measured(model: Any, texts: Tensor, windows: Tensor, asked: argparse.Namespace) -> list[Row]:
    """A row for each place and number of codes, another where they are trained as well."""
    plain, best = judged(model, windows)
    rows: list[Row] = []
    for where in asked.where:
        for codes in asked.codes:
            scrimp.add_codebooks(
                model,
                where,
                codes=codes,
                k=asked.k,
                layers=asked.layers,
                tokens=texts,
                iterations=asked.iterations,
                euclidean=asked.euclidean,
            )
            for steps in dict.fromkeys((0, asked.steps)):
                train(model, texts, steps)
                perplexity, found = judged(model, windows)
                rows.append(
                    {"where": where, "codes": codes, "k": asked.k, "layers": asked.layers, "steps": steps}
                    | {"reference_perplexity": round(plain, 4), "perplexity_ratio": round(perplexity / plain, 5)}
                    | {"top1_agreement": round(float((found == best).float().mean()), 5)}
                )
                print(line(rows[-1]), flush=True)
            scrimp.remove_codebooks(model)
    return rows


def line(row: Row) -> str:
    """A row for people."""
    return (
        f"{row['where']:<10} {row['codes']:6}  {row['steps']:5}  {row['perplexity_ratio']:8.4f}x"
        f"  {row['top1_agreement']:8.2%}"
    )


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="what scrimp.load takes, or demo-dithered")
    parser.add_argument("--where", nargs="+", default=["mlp", "heads"], choices=PLACES)
    parser.add_argument("--layers", nargs="+", type=int, metavar="N", help="decoder layers (default: all)")
    parser.add_argument("--codes", nargs="+", type=int, default=[256, 1024], metavar="C")
    parser.add_argument("--k", type=int, default=8, metavar="N", help="codes of a row (default 8)")
    parser.add_argument("--euclidean", action="store_true", help="choose by distance, not by inner product")
    parser.add_argument("--texts", type=int, default=6, metavar="N", help="calibration texts (default 6)")
    parser.add_argument("--windows", type=int, default=2, metavar="N", help="held-out windows (default 2)")
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens of each (default 512)")
    parser.add_argument("--iterations", type=int, default=4, metavar="N", help="of k-means (default 4)")
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="of training (default 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    asked = parser.parse_args(words)
    model, tokenizer = scrimp.load(named_model(asked.model))
    texts = text.windows(tokenizer, asked.length, "calibration", asked.texts)
    windows = text.windows(tokenizer, asked.length, "heldout", asked.windows)
    print(f"{'where':<10} {'codes':>6}  {'steps':>5}  {'perplexity':>9}  {'top-1':>8}")
    rows = measured(model, texts, windows, asked)
    print(f"without codes: perplexity {rows[0]['reference_perplexity']}")
    if asked.json is not None:
        results.write_json(asked.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
