"""What a draft source is: something that guesses how texts go on. Guesses decide the speed, never the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from ..generation.cache import KVCache
from ..generation.model import DecoderModel
from .maps import DraftMaps


@dataclass
class Candidates:
    """Guesses after a text, as a tree.

    Attributes:
        tokens: of each guess.
        parents: index of the guess before it; -1 where it follows the text.
        chances: the source's estimate that the guess is right where the one before it is.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)

    def add(self, token: int, parent: int, chance: float) -> int:
        """Appends a guess and returns its index."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.chances.append(chance)
        return len(self.tokens) - 1

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Accepted:
    """What the model said about one sequence in one step.

    Attributes:
        sequence: its number in the batch.
        rows: tokens of the rows on the accepted path: the last token of the text before the step, then right guesses.
        logits: `[n, V]` after each of them; some heads give the largest 8 and -inf for the others.
        state: `[n, d]`, the states before the last norm.
        ahead: `[k, d]`, those of the pseudo rows behind the last of them; None where no draft let any ride along.
    """

    sequence: int
    rows: list[int]
    logits: Tensor
    state: Tensor
    ahead: Tensor | None


class Draft(Protocol):
    """One source at work on one batch of texts."""

    def propose(self, texts: Sequence[Sequence[int] | None], depths: Sequence[int]) -> list[Candidates]:
        """Guesses for each sequence.

        Args:
            texts: all tokens of each sequence so far (prompt and new ones); None for a finished one.
            depths: how many tokens deep guesses of a sequence can be of use.
        """
        ...

    def update(self, accepted: Accepted) -> None:
        """Hears what came of a step, once for each sequence."""
        ...


@runtime_checkable
class RidingDraft(Draft, Protocol):
    """A draft whose guesses come of pseudo rows that ride along behind every row of a tree.

    Attributes:
        riding: what makes them.
    """

    riding: DraftMaps


class DraftSource(Protocol):
    """Where drafts come from; may be used by several generations, one after the other or at once.

    Attributes:
        name: under which acceptance is counted.
        costly: whether proposing takes a good part of a step, so that it must be worth its time.
    """

    name: str
    costly: bool

    def start(self, model: DecoderModel, cache: KVCache) -> Draft:
        """A draft for the sequences in `cache`.

        Raises:
            ValueError: the source does not fit the model.
        """
        ...
