"""exact_head beside the dense head on many real hidden states: mismatches, fallbacks, rows computed; and whole texts.

    python -m scrimp.benchmarks.exact_head_count demo-dithered --states 100000 --prompts 100

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
from scrimp.methods.heads import ExactHead
from scrimp.methods.heads.exact import MOST_ROWS

from .exact_head import STATES, WINDOW, compared, hidden_states

PROMPT = 64  # tokens


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; exit status 1 where a logit or an id differs."""
    parser = argparse.ArgumentParser(prog="exact_head_count", description="exact_head on many real hidden states.")
    parser.add_argument("model", help="for scrimp.load, demo or demo-dithered")
    parser.add_argument("--states", type=int, default=100_000, help="how many (default 100000)")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 64], help="how many largest logits (default 1 64)")
    parser.add_argument("--prompts", type=int, default=0, help="texts to generate with both heads (default 0)")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each text (default 64)")
    args = parser.parse_args(argv)
    model, tokenizer = scrimp.load(named_model(args.model))
    weight = model.get_output_embeddings().weight.detach()
    basis = hidden_states(model, text.windows(tokenizer, WINDOW, "calibration", STATES))
    screen = HeadScreen.build(weight, basis)
    found = count(model, windows(tokenizer, args.states), screen, args.k) if args.states else []
    if args.prompts:
        found.append(texts(model, text.windows(tokenizer, PROMPT, "heldout", args.prompts), screen, args.new_tokens))
    wrong = sum(row["mismatches"] for row in found)
    for row in found:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    return int(wrong > 0)


def windows(tokenizer: Any, states: int) -> torch.Tensor:
    """int64 `[n, WINDOW]` of so many tokens in all; once the texts are through, again from half a window on."""
    parts = []
    for shift in (0, WINDOW // 2):
        for split in ("heldout", "calibration"):
            ids = torch.tensor(tokenizer(text.corpus(split), verbose=False)["input_ids"])[shift:]
            parts.append(ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW))
    return torch.cat(parts)[: -(-states // WINDOW)]


def count(model: Any, texts: torch.Tensor, screen: HeadScreen, ks: Sequence[int]) -> list[dict[str, float]]:
    """For each k the hidden states seen, mismatches, share that fell back, rows computed (mean)."""
    weight = model.get_output_embeddings().weight.detach()
    parts = [
        compared(weight, screen, hidden_states(model, window[None]), ks)
        for window in tqdm(texts, unit="window", disable=None)
    ]
    rows = []
    for k, *own in zip(ks, *parts, strict=True):
        computed = torch.cat([scored for _, scored in own]).double()
        rows.append({"k": k, "states": len(computed), "mismatches": sum(wrong for wrong, _ in own)})
        rows[-1]["fallback_rate"] = float((computed == len(weight)).double().mean())
        rows[-1]["scored"] = round(float(computed.mean()), 1)
    return rows


def texts(model: Any, prompts: torch.Tensor, screen: HeadScreen, new: int) -> dict[str, float]:
    """Greedy texts after prompts `[n, length]` with both heads, in batches: tokens that differ."""
    exact = ExactHead(model.lm_head, screen)
    wrong = 0
    for batch in prompts.split(MOST_ROWS):
        both = []
        for head in (model.lm_head, exact):
            model.lm_head, dense = head, model.lm_head
            found = scrimp.generate(model, batch, max_new_tokens=new, ignore_eos=True)
            model.lm_head = dense
            both.append(torch.tensor([one.tokens for one in found]))  # type: ignore[union-attr]
        wrong += int((both[0] != both[1]).sum())
    rate = exact.counts["fell back"] / max(exact.counts["screened"], 1)
    return {"prompts": len(prompts), "tokens": len(prompts) * new, "mismatches": wrong, "fallback_rate": rate}


if __name__ == "__main__":
    sys.exit(main())
