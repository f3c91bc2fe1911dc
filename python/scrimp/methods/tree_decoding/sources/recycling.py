"""Token recycling: the likeliest tokens that the model named the last time a token was read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...generation.cache import KVCache
from ...generation.model import DecoderModel
from ..draft import Accepted, Candidates
from .expand import expand, likeliest


class RecyclingDraft:
    """Drafts from a table token -> its `width` likeliest successors at its last occurrence, kept between texts.

    Args:
        width: successors kept of each token.
        guesses: in a tree at most.
        depth: of a tree at most.

    Source: Token Recycling (2408.08696).
    """

    name = "recycling"
    costly = False

    def __init__(self, width: int = 6, guesses: int = 24, depth: int = 6) -> None:
        if min(width, guesses, depth) < 1:
            raise ValueError(f"RecyclingDraft: width={width}, guesses={guesses}, depth={depth} must be at least 1")
        self.width, self.guesses, self.depth = width, guesses, depth
        self.after: dict[int, list[tuple[int, float]]] = {}

    def start(self, model: DecoderModel, cache: KVCache) -> _Recycling:
        return _Recycling(self)


class _Recycling:
    def __init__(self, source: RecyclingDraft) -> None:
        self._source = source

    def propose(self, texts: Sequence[Sequence[int] | None], depths: Sequence[int]) -> list[Candidates]:
        source = self._source
        return [
            Candidates()
            if text is None
            else expand(
                (text[-1],), lambda last: source.after.get(last[-1], ()), source.guesses, min(depth, source.depth)
            )
            for text, depth in zip(texts, depths, strict=True)
        ]

    @torch.inference_mode()
    def update(self, accepted: Accepted) -> None:
        ids, chances = likeliest(accepted.logits, self._source.width)
        for token, *guesses in zip(accepted.rows, ids.tolist(), chances.tolist(), strict=True):
            self._source.after[token] = list(zip(*guesses, strict=True))
