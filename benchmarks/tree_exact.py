"""Whether tree decoding gives the tokens and the logits of plain decoding, to the bit, for every draft source.

    python -m scrimp.benchmarks.tree_exact

Prompts are continued by a random Llama of four layers of 128, whose logits nearly tie, greedily and with seeds, one
sequence at a time and four; once as users do, once with the logits of every chosen token compared. Exit status 1 says
that something differed. `--model demo-dithered` takes a real model and held-out texts instead. The suite runs the same
on fewer prompts (`tests/methods/tree_decoding/test_exact.py`).
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import scrimp
from scrimp.demo import text
from scrimp.demo.model import named_model
from scrimp.methods.draft_training import FrozenModel, stages
from scrimp.methods.tree_decoding import (
    CostCurve,
    DraftMaps,
    EarlyExit,
    HiddenTransfer,
    LookupDraft,
    MedusaHeads,
    ModelDraft,
    NgramDraft,
    RecyclingDraft,
    SelfDraft,
    TreeDecoding,
)
from scrimp.testing import random_llama, same_bits

VOCABULARY = 512
WIDTH = 128
PROMPT = 48  # tokens of a text that a real model continues
BATCHES = (1, 4)
WAYS: dict[str, dict[str, Any]] = {"greedy": {}, "drawn": {"temperature": 1.0, "seed": 7}}

Logits = dict[tuple[int, ...], Tensor]
Plain = tuple[list[list[int]], list[Any], Logits]  # prompts, and what plain decoding gave


class Free(CostCurve):
    """More rows cost nothing, whatever is measured: every guess is read."""

    def __init__(self) -> None:
        super().__init__({1: 1.0})

    def note(self, rows: int, seconds: float) -> None:
        pass


def llama(layers: int, width: int, vocabulary: int = VOCABULARY) -> Any:
    """Freshly made weights."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 8}
    return random_llama(vocabulary, layers, **sizes)


def regressed(model: Any, layers: Sequence[int]) -> list[DraftMaps]:
    """Draft maps of the states after each layer by ridge regression on random texts; one guesses among some tokens."""
    frozen = FrozenModel(model)
    vocabulary = frozen.view.vocabulary
    texts = list(torch.randint(vocabulary, (16, 128), generator=torch.Generator().manual_seed(3)))
    moments = stages.gather(frozen, texts, layers, 3, lambda: None)
    some = stages.frequent(texts, vocabulary, vocabulary // 2)
    return [
        stages.finished(frozen, layer, moments.solve(layer, layer), "random", None if i else some)
        for i, layer in enumerate(layers)
    ]


def sources(model: Any) -> dict[str, Callable[[], list[Any]]]:
    """Every source, and mixes of them."""
    depth = model.config.num_hidden_layers
    half = depth // 2
    small = llama(2, 64, model.config.vocab_size)
    medusa, low, high = regressed(model, [depth, 0, half])
    return {
        "lookup": lambda: [LookupDraft()],
        "ngram": lambda: [NgramDraft()],
        "recycling": lambda: [RecyclingDraft()],
        "early exit": lambda: [EarlyExit(half)],
        "skipped layers": lambda: [EarlyExit([0, depth - 1])],
        "other model": lambda: [ModelDraft(small)],
        "self": lambda: [SelfDraft(model)],
        "medusa": lambda: [MedusaHeads(medusa)],
        "hidden, low": lambda: [HiddenTransfer(low)],
        "hidden, half": lambda: [HiddenTransfer(high)],
        "cheap mix": lambda: [LookupDraft(), NgramDraft(), RecyclingDraft(), HiddenTransfer(high)],
        "mix": lambda: [
            LookupDraft(),
            NgramDraft(),
            RecyclingDraft(),
            EarlyExit(half),
            ModelDraft(small),
            SelfDraft(model),
            MedusaHeads(medusa),
            HiddenTransfer(high),
        ],
    }


def prompts(count: int) -> list[list[int]]:
    """Random tokens, every third prompt repeating itself."""
    random = torch.Generator().manual_seed(1)
    found = []
    for i in range(count):
        length = int(torch.randint(1, 60, (), generator=random))
        text = torch.randint(VOCABULARY, (length,), generator=random).tolist()
        found.append((3 * text)[:90] if i % 3 == 0 else text)
    return found


def recorded(model: Any, ids: list[list[int]], draft: TreeDecoding | None, **asked: Any) -> tuple[Any, Logits]:
    """Completions, and the logits after each text on the way."""
    seen: Logits = {}

    def record(text: Tensor, logits: Tensor) -> Tensor:
        seen[tuple(text[0].tolist())] = logits[0].clone()
        return logits

    return scrimp.generate(model, ids, draft=draft, processors=[record], **asked), seen


@dataclass
class Count:
    """What was compared with plain decoding for one source, batch and way to choose."""

    draft: TreeDecoding
    tokens: int = 0
    rows: int = 0
    different: int = 0

    def compare(self, model: Any, ids: list[list[int]], expected: list[Any], logits: Logits, **asked: Any) -> None:
        """Decodes some prompts twice: as users do, and with the logits."""
        plain = scrimp.generate(model, ids, draft=self.draft, **asked)
        found, seen = recorded(model, ids, self.draft, **asked)
        for got in (plain, found):
            self.tokens += sum(len(completion.tokens) for completion in expected)
            self.different += sum(a != b for a, b in zip(got, expected, strict=True))  # type: ignore[call-overload]
        for before, row in seen.items():
            self.rows += 1
            self.different += before not in logits or not same_bits(row, logits[before])


def always(made: list[Any]) -> list[Any]:
    """Sources that the clock does not turn off."""
    for source in made:
        source.costly = False
    return made


def plainly(model: Any, texts: list[list[int]], **asked: Any) -> list[Plain]:
    """Plain decoding of prompts, four at a time."""
    groups = [texts[i : i + max(BATCHES)] for i in range(0, len(texts), max(BATCHES))]
    return [(ids, *recorded(model, ids, None, **asked)) for ids in groups]


def run(model: Any, made: list[Any], guesses: int, batch: int, wanted: list[Plain], **asked: Any) -> Count:
    """Compares a mix of sources with plain decoding."""
    count = Count(scrimp.tree_decoding(*always(made), guesses=guesses, cost=Free()))
    for ids, expected, logits in wanted:
        for i in range(0, len(ids), batch):
            count.compare(model, ids[i : i + batch], expected[i : i + batch], logits, **asked)
    return count


def main(words: Sequence[str] | None = None) -> int:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=500, metavar="N", help="continued greedily (default 500)")
    parser.add_argument("--drawn", type=int, default=100, metavar="N", help="continued with a seed (default 100)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="new ones of each (default 64)")
    parser.add_argument("--sources", nargs="+", metavar="NAME", help="default: all and mixes")
    parser.add_argument("--guesses", type=int, default=32, metavar="N", help="in a tree at most (default 32)")
    parser.add_argument("--model", metavar="MODEL", help="what scrimp.load takes, or demo-dithered")
    asked = parser.parse_args(words)
    torch.manual_seed(0)
    if asked.model is None:
        model, texts = llama(4, WIDTH), prompts(max(asked.prompts, asked.drawn))
    else:
        model, tokenizer = scrimp.load(named_model(asked.model))
        texts = text.windows(tokenizer, PROMPT, "heldout", max(asked.prompts, asked.drawn)).tolist()
    known = sources(model)
    chosen = asked.sources or list(known)
    if unknown := set(chosen) - set(known):
        parser.error(f"there is no source {sorted(unknown)}; there are {', '.join(known)}")
    different = 0
    for how, number in (("greedy", asked.prompts), ("drawn", asked.drawn)):
        settings = {**WAYS[how], "max_new_tokens": asked.tokens}
        wanted = plainly(model, texts[:number], **settings)
        print(f"{how}, {number} prompts, {asked.tokens} new tokens each")
        for name in chosen:
            for batch in BATCHES:
                count = run(model, known[name](), asked.guesses, batch, wanted, **settings)
                different += count.different
                print(
                    f"  {name:<16} batch {batch}: {count.different} differences in {count.tokens} tokens and "
                    f"{count.rows} rows of logits; {count.draft.tokens_per_step:.2f} tokens a step",
                    flush=True,
                )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
