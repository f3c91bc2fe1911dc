"""What a generation can be asked for, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..head_patterns import HeadPatterns
from .sampling import Sampling

Prefill = Literal["panels", "rows"]
Reason = Literal["eos", "stop", "length", "context"]
Processor = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """What to generate.

    Attributes:
        max_new_tokens: of each sequence; 0 only reads the prompts.
        min_new_tokens: before it eos and `stop_ids` are not chosen.
        temperature: 0 is greedy; for this and the next three see `Sampling`.
        top_k: 0 is off.
        top_p: 1 is off.
        min_p: 0 is off.
        seed: of every sequence (equal prompts then give equal texts), or one for each.
        stop: strings that end a sequence and are not part of its text; they need a tokenizer.
        stop_ids: tokens that end a sequence, besides the model's eos.
        ignore_eos: go on after the model's eos.
        prefill: "panels" reads prompts by matrix products in panels of 512 tokens counted from position 0, and the
            rest by row-invariant kernels; "rows" reads everything by those: then logits are a function of the tokens
            before them alone, at a lower speed for long prompts.
        patterns: sparse attention in panels, with these budgets.
        chunk: read prompts in pieces of so many tokens; whatever it is, the result is the same.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | Sequence[int] = 0
    stop: str | Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    ignore_eos: bool = False
    prefill: Prefill = "panels"
    patterns: HeadPatterns | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        for name, low in (("max_new_tokens", 0), ("min_new_tokens", 0), ("chunk", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name}={value} must be at least {low}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens={self.min_new_tokens} exceeds max_new_tokens={self.max_new_tokens}")
        if self.prefill not in ("panels", "rows"):
            raise ValueError(f"prefill={self.prefill!r} is not 'panels' or 'rows'")
        if self.patterns is not None and self.prefill == "rows":
            raise ValueError("patterns make panels sparse, but prefill='rows' uses none")
        if "" in self.stops:
            raise ValueError("stop: an empty string would end every text before it begins")
        self.sampling(0, 1)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, b: int, batch: int) -> Sampling:
        """How tokens of sequence b of `batch` are chosen."""
        if not isinstance(self.seed, int) and len(self.seed) != batch and batch > 1:
            raise ValueError(f"seed has {len(self.seed)} numbers for {batch} sequences")
        seed = self.seed if isinstance(self.seed, int) else self.seed[b]
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, seed)


@dataclass(frozen=True)
class Piece:
    """One new token of one sequence.

    Attributes:
        sequence: its number in the batch.
        token: its id.
        text: what can be shown now; a token's text may come later, with the next or the last one.
        reason: set with the last token: "eos", "stop" (a stop string or id), "length" or "context" (no room is left).
    """

    sequence: int
    token: int
    text: str = ""
    reason: Reason | None = None


@dataclass(frozen=True)
class Completion:
    """What one prompt gave.

    Attributes:
        tokens: new tokens, the one that ended the text among them.
        text: without the stop string; empty where there is no tokenizer.
        reason: as in `Piece`; None only if nothing was asked for.
        prompt_tokens: tokens of the prompt.
    """

    tokens: list[int]
    text: str
    reason: Reason | None
    prompt_tokens: int
