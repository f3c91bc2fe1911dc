"""Sparse layers that draft for the dense ones on the same memory: whether the text stays the dense model's own, and
what it gains.

    python -m scrimp.benchmarks.wina_lossless demo-dithered

Pieces of held-out text are continued by the dense model alone and with drafts, batch by batch in turns: greedily, and
with a seed. "every step" reads drafts whatever they cost; "as it pays" is what users get: drafts are read while they
make the text come faster. Exit status 1 says that a token differed.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import scrimp
from scrimp.demo import text
from scrimp.demo.model import named_model
from scrimp.methods.generation import DecoderModel, decoder_model
from scrimp.methods.tree_decoding import SelfDraft, TreeDecoding
from scrimp.methods.wina import ALLOCATIONS, METHODS

from .tree_exact import Free, always

CHOICES: dict[str, dict[str, Any]] = {"greedy": {}, "drawn": {"temperature": 0.8, "seed": 7}}
WAYS = ("every step", "as it pays")


def drafting(view: DecoderModel, way: str, depth: int) -> TreeDecoding:
    """Drafts by the sparse layers."""
    source = SelfDraft(view, depth=depth)
    return scrimp.tree_decoding(*always([source]), cost=Free()) if way == WAYS[0] else scrimp.tree_decoding(source)


def compare(view: DecoderModel, batches: list[list[list[int]]], draft: TreeDecoding, **asked: Any) -> tuple[int, float]:
    """How many sequences are not the dense model's, and the median of the batches' speed-ups."""
    different, ratios = 0, []
    for ids in batches:
        seconds, found = [], []
        for how in (None, draft):
            begin = time.perf_counter()
            found.append(scrimp.generate(view.for_prompts, ids, draft=how, ignore_eos=True, **asked))
            seconds.append(time.perf_counter() - begin)
        different += sum(a.tokens != b.tokens for a, b in zip(*found, strict=True))  # type: ignore[union-attr]
        ratios.append(seconds[0] / seconds[1])
    return different, median(ratios)


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="what scrimp.load takes, or demo-dithered")
    parser.add_argument("--prompts", type=int, default=100, metavar="N", help="how many (default 100)")
    parser.add_argument("--length", type=int, default=32, metavar="N", help="tokens of each (default 32)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="new ones of each (default 64)")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="prompts at once (default 4)")
    parser.add_argument("--depth", type=int, default=4, metavar="N", help="tokens guessed ahead (default 4)")
    parser.add_argument("--sparsity", type=float, default=0.4, metavar="S", help="of the drafts (default 0.4)")
    parser.add_argument("--method", default="wina-centred", choices=METHODS)
    parser.add_argument("--allocation", default="knapsack", choices=ALLOCATIONS)
    parser.add_argument("--choices", nargs="+", default=list(CHOICES), choices=CHOICES)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="read it instead of measuring one")
    parser.add_argument("--texts", type=int, default=8, metavar="N", help="calibration texts of 512 tokens (default 8)")
    asked = parser.parse_args(words)
    model, tokenizer = scrimp.load(named_model(asked.model))
    ids = text.windows(tokenizer, asked.length, "heldout", asked.prompts).tolist()
    if asked.calibration is None:
        calibration = scrimp.calibrate(model, text.windows(tokenizer, 512, "calibration", asked.texts))
    else:
        calibration = scrimp.Calibration.load(asked.calibration, model)
    report = scrimp.sparsify(model, calibration, asked.sparsity, asked.method, asked.allocation)
    view = decoder_model(model)
    batches = [ids[i : i + asked.batch] for i in range(0, len(ids), asked.batch)]
    print(
        f"{len(ids)} prompts of {asked.length} tokens, {asked.tokens} new ones, {asked.batch} at once, "
        f"{torch.get_num_threads()} threads; drafts by {asked.method}, {asked.allocation}, {report.saved:.1%} of the "
        "weights of the decoder layers not read"
    )
    wrong = 0
    for choice in asked.choices:
        for way in asked.ways:
            draft = drafting(view, way, asked.depth)
            settings = CHOICES[choice] | {"max_new_tokens": asked.tokens}
            different, ratio = compare(view, batches, draft, **settings)
            judged, right = draft.report()["self"]
            wrong += different
            print(
                f"{choice}, drafts read {way}: {len(ids) - different} of {len(ids)} texts identical; {right:.1%} of "
                f"{judged:.0f} judged guesses right, {draft.tokens_per_step:.2f} tokens a step; speed-up {ratio:.2f}",
                flush=True,
            )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
