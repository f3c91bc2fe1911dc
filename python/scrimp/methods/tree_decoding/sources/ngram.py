"""N-gram table: what followed the last one and two tokens in all texts seen so far."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ...generation.cache import KVCache
from ...generation.model import DecoderModel
from ..draft import Accepted, Candidates
from .expand import expand

CONTEXTS = 500_000  # the oldest are forgotten


class NgramDraft:
    """Drafts from counts of bigrams and trigrams, kept from one text to the next.

    Args:
        guesses: in a tree at most.
        depth: of a tree at most.
    """

    name = "ngram"
    costly = False

    def __init__(self, guesses: int = 16, depth: int = 5) -> None:
        if guesses < 1 or depth < 1:
            raise ValueError(f"NgramDraft: guesses={guesses} and depth={depth} must be at least 1")
        self._guesses, self._depth = guesses, depth
        self._counts: dict[tuple[int, ...], dict[int, int]] = {}
        self._lock = threading.Lock()

    def learn(self, tokens: Sequence[int], first: int = 0) -> None:
        """Counts what follows what, for tokens from index `first` on."""
        with self._lock:
            for i in range(max(first, 1), len(tokens)):
                for context in ((tokens[i - 1],), tuple(tokens[max(i - 2, 0) : i])):
                    counts = self._counts.setdefault(context, {})
                    counts[tokens[i]] = counts.get(tokens[i], 0) + 1
            while len(self._counts) > CONTEXTS:
                del self._counts[next(iter(self._counts))]

    def follow(self, context: tuple[int, ...]) -> list[tuple[int, float]]:
        """Tokens after a context with their chances, the likeliest first."""
        with self._lock:
            counts = self._counts.get(context[-2:]) or self._counts.get(context[-1:]) or {}
            best = sorted(counts.items(), key=lambda item: -item[1])[:4]
            total = sum(counts.values()) + 1
        return [(token, count / total) for token, count in best]

    def start(self, model: DecoderModel, cache: KVCache) -> _Ngram:
        return _Ngram(self, cache.batch, self._guesses, self._depth)


class _Ngram:
    def __init__(self, table: NgramDraft, batch: int, guesses: int, depth: int) -> None:
        self._table, self._guesses, self._depth = table, guesses, depth
        self._learnt = [0] * batch

    def propose(self, texts: Sequence[Sequence[int] | None], depths: Sequence[int]) -> list[Candidates]:
        found = []
        for b, text in enumerate(texts):
            if text is None:
                found.append(Candidates())
                continue
            self._table.learn(text, self._learnt[b])
            self._learnt[b] = len(text)
            context = tuple(text[-2:])
            found.append(expand(context, self._table.follow, self._guesses, min(depths[b], self._depth)))
        return found

    def update(self, accepted: Accepted) -> None:
        pass
