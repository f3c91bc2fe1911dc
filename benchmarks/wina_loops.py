"""How far Hugging Face's logits are from ours with sparse layers: by its own choices of channels, and by ours.

    python -m scrimp.benchmarks.wina_loops

The demo model skips half of its channels, in fp32 and with 4-bit layers (exact mode), as the cases "sparse" of
`scrimp bench e2e` do. Both loops read the text that ours generates, token by token.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scrimp.methods.generation import decoder_model

from . import e2e
from .same_choices import Chosen, recorded_choices, replayed_choices
from .tree_exact import recorded

PROMPT = 64  # tokens


class Apart(NamedTuple):
    """Of the logits, the largest difference by own choices and by the same ones; channels that one loop alone chose."""

    own: float
    same: float
    channels: int
    calls: int


def apart(model: Any, ids: Tensor, new: int) -> Apart:
    """Compares the loops on a prompt `[1, n]` and `new` tokens after it."""
    with recorded_choices(model) as ours:
        (found,), rows = recorded(decoder_model(model), ids.tolist(), None, max_new_tokens=new, ignore_eos=True)
    got = torch.tensor([found.tokens])
    logits = torch.stack([rows[(*ids[0].tolist(), *found.tokens[:i])] for i in range(new)])
    with torch.no_grad():
        with recorded_choices(model) as theirs:
            own = e2e.stepwise(model, ids, got)[0]
        with replayed_choices(model, ours):
            same = e2e.stepwise(model, ids, got)[0]
    pairs = [pair for name in ours for pair in zip(ours[name].calls, theirs[name].calls, strict=True)]
    channels = sum(len(chosen(a) ^ chosen(b)) for a, b in pairs)
    return Apart(float((own - logits).abs().max()), float((same - logits).abs().max()), channels, len(pairs))


def chosen(call: Chosen) -> set[int]:
    """The channels of one call."""
    index, count = call
    return set(index[: int(count)].tolist())


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="new ones (default 64)")
    asked = parser.parse_args(words)
    _, tokenizer = e2e.loaded(torch.float32)
    ids = e2e.prompts("sparse", tokenizer, PROMPT, 1)
    for name, mode in (("fp32", ""), ("4-bit", "exact")):
        found = apart(e2e.sparsified(mode), ids, asked.tokens)
        print(
            f"{name}: logits up to {found.own:.3g} apart by own choices, {found.same:.2g} by the same; "
            f"{found.channels} channels in {found.calls} choices taken by one loop alone",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
