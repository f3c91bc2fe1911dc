"""Prompt lookup: what followed the last tokens where they came before in the same text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .... import _ext
from ...generation.cache import KVCache
from ...generation.model import DecoderModel
from ..draft import Accepted, Candidates

if TYPE_CHECKING:
    from ...._host import SuffixAutomaton

LONG = 12  # from so many equal tokens on a match is not likelier to go on
DEEP = 24  # guesses of a chain at most


class LookupDraft:
    """Drafts from a suffix automaton of each text.

    Args:
        chains: places to copy from at most.
        shortest: equal tokens that a place must have.

    Source: prompt lookup (Saxena, 2023); suffix automaton as in SAM Decoding (2411.10666).
    """

    name = "lookup"
    costly = False

    def __init__(self, chains: int = 3, shortest: int = 1) -> None:
        if chains < 1 or shortest < 1:
            raise ValueError(f"LookupDraft: chains={chains} and shortest={shortest} must be at least 1")
        self._chains, self._shortest = chains, shortest

    def start(self, model: DecoderModel, cache: KVCache) -> _Lookup:
        if _ext.host is None:
            raise RuntimeError(f"prompt lookup needs scrimp's compiled module: {_ext.host_missing}")
        return _Lookup(cache.batch, self._chains, self._shortest)


class _Lookup:
    def __init__(self, batch: int, chains: int, shortest: int) -> None:
        self._automata = [_ext.host.SuffixAutomaton() for _ in range(batch)]  # type: ignore[union-attr]
        self._chains, self._shortest = chains, shortest

    def propose(self, texts: Sequence[Sequence[int] | None], depths: Sequence[int]) -> list[Candidates]:
        return [
            Candidates() if text is None else self._of_text(automaton, text, depth)
            for automaton, text, depth in zip(self._automata, texts, depths, strict=True)
        ]

    def _of_text(self, automaton: SuffixAutomaton, text: Sequence[int], depth: int) -> Candidates:
        automaton.extend(text[len(automaton) :])
        found = Candidates()
        for length, end in automaton.matches(self._chains, self._shortest):
            parent = -1
            for i, token in enumerate(text[end : end + min(depth, DEEP)]):
                parent = found.add(token, parent, _chance(length + i))
        return found

    def update(self, accepted: Accepted) -> None:
        pass


def _chance(length: int) -> float:
    """A first guess of the chance that a match of so many tokens goes on; distinct for each length up to LONG."""
    return 0.3 + 0.6 * min(length, LONG) / LONG
