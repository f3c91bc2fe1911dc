"""What the quality commands share: a reader that keeps what it read, a row's figures, and where rows go."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from scrimp.methods.evaluate import Quality, Reader

from . import results
from .results import Row
from .rows import origin

FIGURES = ("perplexity", "perplexity_error", "kl_mean", "kl_median", "kl_p99", "top1_agreement")


class Kept(Reader):
    """A reader that reads a window once and keeps what the head takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._kept: dict[tuple[int, ...], Tensor] = {}

    def states(self, tokens: Tensor) -> Tensor:
        key = tuple(tokens.tolist())
        if key not in self._kept:
            self._kept[key] = super().states(tokens)
        return self._kept[key]


def row(op: str, case: str, found: Quality, reference: float, fields: Row) -> Row:
    """One row of results, beside the dense model's perplexity."""
    figures = found.figures()
    shown = {name: float(f"{figures[name]:.6g}") for name in FIGURES if name in figures}
    base: Row = {"op": op, "case": case, "dtype": "fp32", "threads": torch.get_num_threads()}
    ratio = {"reference_perplexity": round(reference, 4), "perplexity_ratio": round(found.perplexity / reference, 5)}
    return base | fields | {"peer": "self-dense"} | shown | ratio | origin("self-dense", "cpu") | {"note": ""}


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """The options that say where rows go."""
    parser.add_argument("--csv", metavar="FILE", help="replace these rows in FILE ('device': the checked-in results)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")


def write(asked: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Writes rows to what `add_outputs` was given."""
    if asked.json is not None:
        results.write_json(asked.json, rows)
    if asked.csv is not None:
        results.update_csv(results.csv_file(asked.csv), rows)
