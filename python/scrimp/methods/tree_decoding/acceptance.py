"""Acceptance: how often guesses of each source come true, measured as texts are generated."""

from __future__ import annotations

from collections import defaultdict

BINS = 16  # of a source's own estimates
WEIGHT = 4.0  # trials that a source's own estimate counts for
MEMORY = 512.0  # trials after which older ones begin to fade


class Acceptance:
    """Counts of guesses tried and found right, by source and by the source's own estimate."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])

    def rate(self, source: str, chance: float) -> float:
        """The measured chance of a guess, which starts from the source's own estimate."""
        tried, right = self._counts.get((source, int(chance * BINS)), (0.0, 0.0))
        return (right + WEIGHT * chance) / (tried + WEIGHT)

    def count(self, source: str, chance: float, right: bool) -> None:
        """Counts a guess after a right one."""
        counts = self._counts[source, int(chance * BINS)]
        if counts[0] >= MEMORY:
            counts[:] = counts[0] / 2, counts[1] / 2
        counts[0] += 1
        counts[1] += right

    def of_source(self, source: str) -> tuple[float, float]:
        """Guesses of a source that were tried and that were right."""
        pairs = [counts for (name, _), counts in list(self._counts.items()) if name == source]
        return sum(tried for tried, _ in pairs), sum(right for _, right in pairs)
