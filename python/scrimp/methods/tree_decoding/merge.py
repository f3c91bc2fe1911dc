"""Guesses of all sources in one tree: merged by prefix, the likeliest kept, as many as pay."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from .acceptance import Acceptance
from .draft import Candidates
from .tree import Tree


class Merged:
    """Candidates of several sources after one text, merged by prefix; node 0 is the text's last token.

    Attributes:
        gains: gains[n] is how many guesses of the best n are expected to come true.
    """

    def __init__(self, root: int, found: Sequence[tuple[str, Candidates]], acceptance: Acceptance, chain: bool) -> None:
        self._tokens, self._parents, self._chances = [root], [-1], [1.0]
        self._below: list[dict[int, int]] = [{}]
        self._by: list[list[tuple[str, float]]] = [[]]
        for source, candidates in found:
            self._add(source, candidates, acceptance)
        self._order, self.gains = self._best(chain)

    def _add(self, source: str, candidates: Candidates, acceptance: Acceptance) -> None:
        nodes: list[int] = []
        for token, parent, chance in zip(candidates.tokens, candidates.parents, candidates.chances, strict=True):
            above = nodes[parent] if parent >= 0 else 0
            node = self._below[above].setdefault(token, len(self._tokens))
            if node == len(self._tokens):
                self._tokens.append(token)
                self._parents.append(above)
                self._chances.append(0.0)
                self._below.append({})
                self._by.append([])
            self._by[node].append((source, chance))
            self._chances[node] = max(self._chances[node], acceptance.rate(source, chance))
            nodes.append(node)

    def _best(self, chain: bool) -> tuple[list[int], list[float]]:
        """Nodes by falling chance of their whole path, parents first; with `chain` one child of each at most."""
        order: list[int] = []
        gains = [0.0]
        open_nodes = [(-1.0, 0)]
        while open_nodes:
            chance, node = heapq.heappop(open_nodes)
            if node:
                order.append(node)
                gains.append(gains[-1] - chance)
            below = [(chance * self._chances[child], child) for child in self._below[node].values()]
            for item in [min(below)] if chain and below else below:
                heapq.heappush(open_nodes, item)
        return order, gains

    def tree(self, count: int) -> Tree:
        """The best `count` guesses, each chain of best children in adjacent rows."""
        kept = set(self._order[:count])
        tokens, parents = [self._tokens[0]], [-1]
        stack = [(child, 0) for child in self._ordered(0, kept)]
        while stack:
            node, above = stack.pop()
            tokens.append(self._tokens[node])
            parents.append(above)
            stack += [(child, len(tokens) - 1) for child in self._ordered(node, kept)]
        return Tree(tokens, parents)

    def _ordered(self, node: int, kept: set[int]) -> list[int]:
        """Kept children, the likeliest last."""
        return sorted((c for c in self._below[node].values() if c in kept), key=lambda c: self._chances[c])

    def count(self, chosen: Sequence[int], acceptance: Acceptance) -> None:
        """Counts which guesses were right, where those before them were: `chosen` are the tokens that came."""
        node: int | None = 0
        for token in chosen:
            if node is None:
                return
            for other, child in self._below[node].items():
                for source, chance in self._by[child]:
                    acceptance.count(source, chance, other == token)
            node = self._below[node].get(token)


def worthwhile(
    gains: Sequence[Sequence[float]], rows: int, limit: int, cost: Callable[[int], float]
) -> tuple[int, float]:
    """How many guesses for each sequence give the most tokens per second, 0 where no tree is the fastest; and how many.

    Args:
        gains: of the sequences that are not finished (`Merged.gains`).
        rows: sequences of a pass, finished ones among them.
        limit: guesses for each at most.
        cost: seconds of a step with a pass of so many rows.
    """
    best, fastest = 0, len(gains) / cost(rows)
    for count in range(1, min(limit, max(map(len, gains)) - 1) + 1):
        speed = sum(1 + own[min(count, len(own) - 1)] for own in gains) / cost(rows * (count + 1))
        if speed > fastest:
            best, fastest = count, speed
    return best, fastest
