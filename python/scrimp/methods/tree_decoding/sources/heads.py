"""Drafts by trained maps of the model's own states: Medusa heads and Hidden Transfer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ....ops import rms_norm
from ...generation import forward
from ...generation.cache import KVCache
from ...generation.linear import DenseLinear
from ...generation.model import DecoderModel
from ..draft import Accepted, Candidates
from ..maps import DraftMaps, Kind
from .expand import expand, likeliest


class _Trained:
    """Trained maps as a source: what both kinds share.

    Args:
        maps: of that kind, or their file.
        width: tokens considered at each offset.
        guesses: in a tree at most.
    """

    name: str
    costly = True
    _kind: Kind

    def __init__(self, maps: DraftMaps | str | Path, width: int = 8, guesses: int = 24) -> None:
        if min(width, guesses) < 1:
            raise ValueError(f"{type(self).__name__}: width={width} and guesses={guesses} must be at least 1")
        self._maps = maps if isinstance(maps, DraftMaps) else DraftMaps.load(maps)
        self._width, self._guesses = width, guesses
        self._short: tuple[DecoderModel, DenseLinear] | None = None

    @torch.no_grad()
    def fitted(self, model: DecoderModel) -> tuple[DraftMaps, Scores]:
        """The maps for the model, and how to score what they give.

        Raises:
            ValueError: they are not for this model.
        """
        maps, head = self._maps.for_model(model, self._kind), model.head
        if maps.tokens is None or not isinstance(head, DenseLinear):
            return maps, Scores(model, self._width, None, None)
        if self._short is None or not self._short[0].is_still(model):
            rows = [None if tensor is None else tensor[maps.tokens] for tensor in (head.weights[0], *head.biases)]
            self._short = (model, DenseLinear(rows[:1], rows[1:] or [None]))  # type: ignore[arg-type]
        return maps, Scores(model, self._width, maps.tokens, self._short[1])


class Scores:
    """The likeliest tokens after states, by the model's head or by its rows of some tokens."""

    def __init__(self, model: DecoderModel, width: int, tokens: Tensor | None, head: DenseLinear | None) -> None:
        self._model, self._width, self._tokens, self._head = model, width, tokens, head

    def __call__(self, states: Tensor) -> tuple[list[list[list[int]]], list[list[list[float]]]]:
        """States `[B, k, d]` before the last norm -> tokens and chances, `[B, k, width]`."""
        if self._head is None:
            logits = forward.logits(self._model, states, self._width)
        else:
            logits = self._head(rms_norm(states, *self._model.norm))
        ids, chances = likeliest(logits, self._width)
        return (ids if self._tokens is None else self._tokens[ids]).tolist(), chances.tolist()


class _Ahead:
    """Guesses from states of the tokens ahead, which each step leaves behind for the next one."""

    def __init__(self, scores: Scores, batch: int, guesses: int) -> None:
        self._scores, self._guesses = scores, guesses
        self._states: list[Tensor | None] = [None] * batch  # [k, d] of each sequence

    @torch.inference_mode()
    def propose(self, texts: Sequence[Sequence[int] | None], depths: Sequence[int]) -> list[Candidates]:
        found = [Candidates() for _ in texts]
        pairs = zip(texts, self._states, strict=True)
        known = [(b, states) for b, (text, states) in enumerate(pairs) if text is not None and states is not None]
        if known:
            tokens, chances = self._scores(torch.stack([states for _, states in known]))
            for (b, _), ids, some in zip(known, tokens, chances, strict=True):
                levels = [list(zip(*level, strict=True)) for level in zip(ids, some, strict=True)]
                found[b] = _product(levels, self._guesses, depths[b])
        return found


def _product(levels: Sequence[Sequence[tuple[int, float]]], guesses: int, depth: int) -> Candidates:
    """The likeliest paths where each level has its tokens and chances whatever came before."""
    return expand((), lambda path: levels[len(path)], guesses, min(depth, len(levels)))


class MedusaHeads(_Trained):
    """Drafts by linear heads on the last state, scored by the model's own output head.

    Args:
        maps: of kind "medusa", or their file (of `scrimp train-draft --kind medusa`).
        width: tokens considered at each offset.
        guesses: in a tree at most.

    Source: Medusa (2401.10774), with one linear map a head.
    """

    name = "medusa"
    _kind = "medusa"

    def start(self, model: DecoderModel, cache: KVCache) -> _Medusa:
        return _Medusa(*self.fitted(model), cache.batch, self._guesses)


class _Medusa(_Ahead):
    def __init__(self, maps: DraftMaps, scores: Scores, batch: int, guesses: int) -> None:
        super().__init__(scores, batch, guesses)
        self._maps = maps

    @torch.inference_mode()
    def update(self, accepted: Accepted) -> None:
        self._states[accepted.sequence] = self._maps(accepted.state[-1])


class HiddenTransfer(_Trained):
    """Drafts by pseudo states of the tokens ahead, which go through the upper layers behind each row of the tree.

    A linear map of a row's state after some layers stands for each of the next k positions. These pseudo rows see the
    text, the path to their row and each other, so that one pass checks a tree and guesses after every row of it.

    Args:
        maps: of kind "hidden", or their file (of `scrimp train-draft --kind hidden`).
        width: tokens considered at each offset.
        guesses: in a tree at most; a step has at most 64 rows with the pseudo rows among them.

    Source: Hidden Transfer (2404.12022).
    """

    name = "hidden"
    _kind = "hidden"

    def __init__(self, maps: DraftMaps | str | Path, width: int = 8, guesses: int = 15) -> None:
        super().__init__(maps, width, guesses)

    def start(self, model: DecoderModel, cache: KVCache) -> _Transfer:
        if any(layer.window for layer in model.layers):
            raise ValueError("HiddenTransfer: the model has layers with windows, which read chains only")
        return _Transfer(*self.fitted(model), cache.batch, self._guesses)


class _Transfer(_Ahead):
    def __init__(self, maps: DraftMaps, scores: Scores, batch: int, guesses: int) -> None:
        super().__init__(scores, batch, guesses)
        self.riding = maps

    def update(self, accepted: Accepted) -> None:
        self._states[accepted.sequence] = accepted.ahead


def trained(maps: DraftMaps | str | Path) -> HiddenTransfer | MedusaHeads:
    """The source of trained maps, or of their file: of the kind that they are."""
    maps = maps if isinstance(maps, DraftMaps) else DraftMaps.load(maps)
    return HiddenTransfer(maps) if maps.kind == "hidden" else MedusaHeads(maps)
