"""exact_head beside the dense head on many real hidden states: mismatches, fallbacks, rows computed.

    python -m scrimp.benchmarks.exact_head_count demo-dithered --states 100000

The texts are those of the benchmarks, calibration and held-out documents alike; the basis is made of the first windows
of the calibration documents alone.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

import scrimp
from scrimp import HeadScreen
from scrimp.demo import text
from scrimp.demo.model import named_model

from .exact_head import STATES, WINDOW, compared, hidden_states


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; exit status 1 where a logit or an id differs."""
    parser = argparse.ArgumentParser(prog="exact_head_count", description="exact_head on many real hidden states.")
    parser.add_argument("model", help="for scrimp.load, demo or demo-dithered")
    parser.add_argument("--states", type=int, default=100_000, help="how many (default 100000)")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 64], help="how many largest logits (default 1 64)")
    args = parser.parse_args(argv)
    model, tokenizer = scrimp.load(named_model(args.model))
    weight = model.get_output_embeddings().weight.detach()
    basis = hidden_states(model, text.windows(tokenizer, WINDOW, "calibration", STATES))
    found = count(model, windows(tokenizer, args.states), HeadScreen.build(weight, basis), args.k)
    wrong = sum(row["mismatches"] for row in found)
    for row in found:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    return int(wrong > 0)


def windows(tokenizer: Any, states: int) -> torch.Tensor:
    """int64 `[n, WINDOW]`, of at least so many tokens in all where the texts have them."""
    parts = []
    for split in ("heldout", "calibration"):
        ids = torch.tensor(tokenizer(text.corpus(split), verbose=False)["input_ids"])
        parts.append(ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW))
    return torch.cat(parts)[: -(-states // WINDOW)]


def count(model: Any, texts: torch.Tensor, screen: HeadScreen, ks: Sequence[int]) -> list[dict[str, float]]:
    """For each k the hidden states seen, mismatches, share that fell back, rows computed (mean)."""
    weight = model.get_output_embeddings().weight.detach()
    wrong = dict.fromkeys(ks, 0)
    scored: dict[int, list[torch.Tensor]] = {k: [] for k in ks}
    for window in tqdm(texts, unit="window", disable=None):
        states = hidden_states(model, window[None])
        for k in ks:
            more, computed = compared(weight, screen, states, k)
            wrong[k] += more
            scored[k].append(computed)
    rows = []
    for k in ks:
        computed = torch.cat(scored[k]).double()
        rate = float((computed == len(weight)).double().mean())
        rows.append({"k": k, "states": len(computed), "mismatches": wrong[k], "fallback_rate": rate})
        rows[-1]["scored"] = round(float(computed.mean()), 1)
    return rows


if __name__ == "__main__":
    sys.exit(main())
