"""Likely tokens from logits, and a tree from a rule that says what may follow a few tokens."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from torch import Tensor

from ..draft import Candidates


def likeliest(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Ids and chances, each `[.., width]`, the largest first; logits that are no numbers give chances of 0."""
    logits = logits.float()
    best = logits.topk(min(width, logits.shape[-1]))
    return best.indices, (best.values - logits.logsumexp(-1, keepdim=True)).exp().nan_to_num(0.0)


def expand(
    context: tuple[int, ...],
    follow: Callable[[tuple[int, ...]], Sequence[tuple[int, float]]],
    guesses: int,
    depth: int,
) -> Candidates:
    """The likeliest `guesses` continuations, each at most `depth` deep.

    Args:
        context: the last tokens of the text.
        follow: context and the guesses after it -> tokens that may come next and their chances.
    """
    found = Candidates()
    heap: list[tuple[float, int, int, int, tuple[int, ...], float]] = []

    def push(parent: int, level: int, path: float, last: tuple[int, ...]) -> None:
        for rank, (token, chance) in enumerate(follow(last) if level < depth else ()):
            entry = (-path * chance, len(found) * 100 + rank, parent, level + 1, (*last, token), chance)
            heapq.heappush(heap, entry)

    push(-1, 0, 1.0, context)
    while heap and len(found) < guesses:
        path, _, parent, level, last, chance = heapq.heappop(heap)
        push(found.add(last[-1], parent, chance), level, -path, last)
    return found
