"""scrimp.tree_decoding: several tokens a step by guesses that the model checks, and the text of plain decoding."""

from __future__ import annotations

from collections.abc import Sequence

from ..generation.cache import KVCache
from ..generation.model import DecoderModel
from .begun import Begun
from .cost import CostCurve
from .draft import DraftSource
from .knowledge import Knowledge, Running, Worth
from .sources import LookupDraft, NgramDraft, RecyclingDraft


class TreeDecoding:
    """What `tree_decoding` returns: sources, and what was learnt of them."""

    def __init__(self, sources: Sequence[DraftSource], guesses: int, cost: CostCurve | None) -> None:
        self.sources = list(sources)
        self.guesses = guesses
        self.knowledge = Knowledge(cost)
        self._worths: dict[str, Worth] = {}

    def begin(self, model: DecoderModel, cache: KVCache) -> Begun:
        """Starts the sources, before the prompts are read.

        Raises:
            ValueError: a source does not fit the model.
        """
        running = Running(self.sources, self._worths, model, cache)
        return Begun(model, cache, running, self.knowledge, self.guesses)

    @property
    def tokens_per_step(self) -> float:
        """Mean number of tokens that a sequence got in a step, over all generations; 1 is plain decoding."""
        return self.knowledge.tokens / max(self.knowledge.steps, 1)

    def report(self) -> dict[str, tuple[float, float]]:
        """For each source the guesses that could be judged (those after right ones), and the share that was right."""
        counts = {source.name: self.knowledge.acceptance.of_source(source.name) for source in self.sources}
        return {name: (tried, right / tried if tried else 0.0) for name, (tried, right) in counts.items()}


def tree_decoding(*sources: DraftSource, guesses: int = 32, cost: CostCurve | None = None) -> TreeDecoding:
    """Makes `scrimp.generate(..., draft=...)` read trees of guessed tokens, and keep those that it would have chosen.

    The text, and the bits of the logits it was chosen by, are those of plain decoding, greedy or sampled: guesses
    decide the speed alone. Which are read follows from how often each source was right and from what more rows cost on
    this machine, both measured as texts are generated; where no tree is the fastest, none is read.

    Args:
        *sources: of guesses (`scrimp.methods.tree_decoding`): `LookupDraft`, `NgramDraft`, `RecyclingDraft`,
            `EarlyExit`, `ModelDraft`, `SelfDraft`, or anything with their methods; the first three unless given.
        guesses: of a sequence in one step at most; a batch of B reads at most 64 // B rows of each.
        cost: what passes cost, measured at the first use (for a second or so) unless given.

    Returns:
        An object that may be used for any number of generations, and gets better at it.

    Raises:
        ValueError: guesses out of range, or two sources of one name.

    >>> import scrimp
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=None)
    >>> model = LlamaForCausalLM(LlamaConfig(intermediate_size=32, **sizes))
    >>> trees, plain = (scrimp.generate(model, [1, 2], draft=how) for how in (scrimp.tree_decoding(), None))
    >>> trees == plain
    True
    """
    chosen = list(sources) or [LookupDraft(), NgramDraft(), RecyclingDraft()]
    if not 0 <= guesses < 64:
        raise ValueError(f"tree_decoding: guesses={guesses} must be from 0 to 63")
    names = [source.name for source in chosen]
    if len(set(names)) < len(names):
        raise ValueError(f"tree_decoding: sources {names} must have different names")
    return TreeDecoding(chosen, guesses, cost)
