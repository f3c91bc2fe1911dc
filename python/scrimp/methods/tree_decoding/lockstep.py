"""Lockstep: trees for a loop that chooses tokens itself and feeds one of every sequence at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..generation.cache import KVCache
from .session import Session, Step


class Lockstep:
    """Answers from the last tree as long as it holds the token of every sequence, else reads a new one.

    Args:
        begin: makes a session for texts with their first new tokens.
        cache: holds the prompts.
        prompts: of the sequences.
        largest: how many of the largest logits are asked for, 0 for all.
    """

    def __init__(
        self,
        begin: Callable[[list[list[int]]], Session],
        cache: KVCache,
        prompts: Sequence[Sequence[int]],
        largest: int = 0,
    ) -> None:
        self._begin, self._cache, self._largest = begin, cache, largest
        self._prompts = [list(prompt) for prompt in prompts]
        self._session: Session | None = None
        self._step: Step | None = None
        self._paths: list[list[int]] = []
        self._fed: list[list[int]] = []

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int | None]) -> Tensor:
        """Logits `[B, V]` after one more token of each sequence; None for a finished one, whose row means nothing."""
        rows = self._rows(tokens)
        if rows is None:
            rows = self._advance(tokens)
        for held, token in zip(self._cache.tokens, tokens, strict=True):
            if token is not None:
                held.append(token)
        step = self._step
        return torch.stack([step.logits[b, row] for b, row in enumerate(rows)])  # type: ignore[union-attr]

    def _rows(self, tokens: Sequence[int | None]) -> list[int] | None:
        """The tree's rows of the tokens; None unless it has all."""
        if self._step is None:
            return None
        found: list[int] = []
        for b, token in enumerate(tokens):
            row = 0 if token is None else self._step.trees[b].child(self._paths[b][-1], token)
            if row is None:
                return None
            found.append(row)
        for b, token in enumerate(tokens):
            if token is not None:
                self._paths[b].append(found[b])
                self._fed[b].append(token)
        return found

    def _advance(self, tokens: Sequence[int | None]) -> list[int]:
        if self._session is None or self._step is None:
            texts = [[*prompt, token or 0] for prompt, token in zip(self._prompts, tokens, strict=True)]
            self._session = self._begin(texts)
        else:
            chosen = [[] if t is None else [*fed, t] for fed, t in zip(self._fed, tokens, strict=True)]
            paths = [[] if t is None else path for path, t in zip(self._paths, tokens, strict=True)]
            self._session.settle(self._step, paths, chosen)
        room = [self._cache.capacity - len(text) for text in self._session.texts]
        depths = [None if t is None else r for r, t in zip(room, tokens, strict=True)]
        self._step = self._session.advance(depths, self._largest)
        self._paths = [[0] for _ in tokens]
        self._fed = [[] for _ in tokens]
        return [0] * len(tokens)
