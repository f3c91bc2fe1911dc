"""What each draft source is worth on several kinds of text: guesses that were right, tokens a step, time.

    python -m scrimp.benchmarks.tree_sources --csv device

The demo model continues prompts greedily, each with fresh sources that are always used (`scrimp.tree_decoding` itself
leaves those alone that do not pay), in turns with plain decoding, by the clock and by processor time, which other
programs disturb less. First comes the cost curve: what a step of so many
rows costs. Maps are trained at the first use (`draft_maps.py`).
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

import scrimp
from scrimp.demo import text
from scrimp.demo.model import named_model
from scrimp.methods.generation import DecoderModel, KVCache, decoder_model
from scrimp.methods.tree_decoding import (
    CostCurve,
    DraftSource,
    EarlyExit,
    LookupDraft,
    NgramDraft,
    RecyclingDraft,
    trained,
)

from . import draft_maps, e2e
from .measure import Spread, threads
from .quality import add_outputs, write
from .results import Row
from .rows import origin
from .tree_exact import always

READ_TOKENS = 300  # of a prompt with a text to read
ASKED = {
    "code": (
        e2e.QUESTIONS["tree-code"],
        "Write a Python function that returns all words of a text that are longer than five letters.",
        "Write a Python class for a library that lends books.",
    ),
    "chat": (
        e2e.QUESTIONS["tree-chat"],
        "How do I take care of a houseplant?",
        "Why does the moon have phases?",
    ),
    "story": (
        e2e.QUESTIONS["tree-story"],
        "Tell me a story about a clockmaker who finds a map.",
        "Write a tale about a whale and a child.",
    ),
}
KINDS = ("summary", *ASKED)


def free() -> list[DraftSource]:
    """The sources that need no training."""
    return [LookupDraft(), NgramDraft(), RecyclingDraft()]


SOURCES: dict[str, Callable[[], list[DraftSource]]] = {
    "lookup": lambda: [LookupDraft()],
    "ngram": lambda: [NgramDraft()],
    "recycling": lambda: [RecyclingDraft()],
    "early-exit": lambda: [EarlyExit(20)],
    "medusa": lambda: [trained(draft_maps.path("medusa"))],
    "hidden": lambda: [trained(draft_maps.path("hidden"))],
    "free": free,
    "free+medusa": lambda: [*free(), trained(draft_maps.path("medusa"))],
    "free+hidden": lambda: [*free(), trained(draft_maps.path("hidden"))],
}


def prompts(kind: str, tokenizer: Any, count: int) -> list[list[int]]:
    """The first prompts of a kind."""
    if kind == "summary":
        read = text.windows(tokenizer, READ_TOKENS, "heldout", count)
        found = [text.prompt(tokenizer, READ_TOKENS, tokenizer.decode(ids)) for ids in read]
    else:
        found = [e2e.chat(tokenizer, asked) for asked in ASKED[kind][:count]]
    return [ids[0].tolist() for ids in found]


@dataclass
class Tally:
    """What one mix of sources did on the prompts of one kind."""

    ours: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    work: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0})
    steps: int = 0
    tokens: int = 0
    judged: dict[str, list[float]] = field(default_factory=dict)

    def add(self, view: DecoderModel, ids: list[int], new: int, sources: list[DraftSource], curve: CostCurve) -> None:
        """Decodes one prompt both ways.

        Raises:
            AssertionError: the texts differ.
        """
        draft = scrimp.tree_decoding(*always(sources), cost=CostCurve(curve.points))
        found = []
        for times, how in ((self.ours, draft), (self.plain, None)):
            start, work = time.perf_counter(), time.process_time()
            found.append(scrimp.generate(view, ids, max_new_tokens=new, ignore_eos=True, draft=how))
            times.append(time.perf_counter() - start)
            self.work[how is draft] += time.process_time() - work
        if found[0] != found[1]:
            raise AssertionError("a text is not that of plain decoding")
        self.steps += draft.knowledge.steps
        self.tokens += draft.knowledge.tokens
        for name, (tried, share) in draft.report().items():
            counts = self.judged.setdefault(name, [0.0, 0.0])
            counts[0], counts[1] = counts[0] + tried, counts[1] + tried * share

    def row(self, case: str, new: int) -> Row:
        """The figures."""
        ratio = Spread.of([plain / ours for plain, ours in zip(self.plain, self.ours, strict=True)])
        shares = {name: f"{right / tried:.3f} of {tried:.0f}" for name, (tried, right) in self.judged.items() if tried}
        return base(case, 1) | {
            "new_tokens": new,
            "ours_ms": shown(1e3 * median(self.ours)),
            "peer_ms": shown(1e3 * median(self.plain)),
            "ratio": shown(ratio.median),
            "ratio_p20": shown(ratio.p20),
            "ratio_p80": shown(ratio.p80),
            "pairs": len(self.ours),
            "work_ratio": shown(self.work[False] / self.work[True]),
            "tokens_per_step": shown(self.tokens / max(self.steps, 1)),
            "right": ", ".join(f"{name} {share}" for name, share in shares.items()),
        }


def shown(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")


def base(case: str, rows: int) -> Row:
    """The fields that every row begins with."""
    first: Row = {"op": "tree_sources", "case": case, "dtype": "fp32", "threads": torch.get_num_threads(), "m": rows}
    return first | {"peer": "self-plain"} | origin("self-plain", "cpu") | {"note": ""}


def cost_rows(curve: CostCurve) -> list[Row]:
    """The cost curve: what plain decoding takes for so many tokens over the time of one step with them."""
    one = curve(1)
    found = []
    for rows, seconds in curve.points.items():
        figures = {"ours_ms": shown(1e3 * seconds), "peer_ms": shown(1e3 * one * rows)}
        found.append(base(f"cost-{rows}", rows) | figures | {"ratio": shown(one * rows / seconds)})
    return found


def compact_row(view: DecoderModel, step: float) -> Row:
    """`kv_compact` on the model's cache, four rows of which three move, beside a step of one row."""
    cache = KVCache(view, 1, 1024).memory.flatten(0, 1)
    start, rows = torch.tensor([512], dtype=torch.int32), torch.tensor([[0, 2, 7, 9]], dtype=torch.int32)
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        scrimp.ops.kv_compact(cache, start, rows)
        times.append(time.perf_counter() - begin)
    spent = median(times)
    figures = {"ours_ms": shown(1e3 * spent), "peer_ms": shown(1e3 * step), "ratio": shown(step / spent)}
    return base("compact", 4) | figures


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), choices=SOURCES)
    parser.add_argument("--prompts", type=int, default=3, choices=(2, 3), help="of each kind (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=96, metavar="N", help="new ones of each (default 96)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    add_outputs(parser)
    asked = parser.parse_args(words)
    with threads(asked.threads):
        rows = measured(asked)
    write(asked, rows)
    return 0


def measured(asked: argparse.Namespace) -> list[Row]:
    """The rows, printed as they come."""
    model, tokenizer = scrimp.load(named_model(draft_maps.MODEL))
    view = decoder_model(model)
    curve = CostCurve.measure(view, repeats=5)
    rows = cost_rows(curve)
    print("rows of a step -> milliseconds (against as many plain steps)")
    print(", ".join(f"{row['m']}: {row['ours_ms']:.1f} ({row['ratio']:.1f}x)" for row in rows))
    rows.append(compact := compact_row(view, curve(1)))
    print(f"kv_compact: {compact['ours_ms']:.3f} ms, {1 / compact['ratio']:.2%} of a step of one row")
    print(
        f"{'text':<8} {'sources':<12} {'tokens a step':>13}  {'beside plain decoding':<24} {'by work':>7}  "
        "guesses that were right"
    )
    for kind in asked.kinds:
        for name in asked.sources:
            tally = Tally()
            for ids in prompts(kind, tokenizer, asked.prompts):
                tally.add(view, ids, asked.tokens, SOURCES[name](), curve)
            rows.append(row := tally.row(f"{kind}-{name}", asked.tokens))
            spread = f"{row['ratio']:.2f}x ({row['ratio_p20']:.2f} to {row['ratio_p80']:.2f})"
            figures = f"{row['tokens_per_step']:>13.2f}  {spread:<24} {row['work_ratio']:>6.2f}x"
            print(f"{kind:<8} {name:<12} {figures}  {row['right']}", flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
