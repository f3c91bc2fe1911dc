"""Drafts by trained maps of the model's own states: Medusa heads and Hidden Transfer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ....ops import rms_norm
from ...generation import forward
from ...generation.cache import KVCache
from ...generation.linear import DenseLinear, Linear
from ...generation.model import DecoderModel
from ...int4.grid import Grid
from ...int4.linear import Int4Linear
from ...int4.rtn import round_to_nearest
from ..draft import Accepted, Candidates
from ..maps import DraftMaps, Kind
from .expand import expand, likeliest

GROUP_SIZE = 32  # of a head's rows in 4 bits


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
        self._short: tuple[DecoderModel, Linear] | None = None

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
            self._short = (model, _rows(head, maps.tokens))
        return maps, Scores(model, self._width, maps.tokens, self._short[1])


def _rows(head: DenseLinear, tokens: Tensor) -> Linear:
    """A head's rows of some tokens, in 4 bits where they fit: what only guesses may be rough."""
    weight = head.weights[0][tokens]
    bias = head.biases[0][tokens] if head.biases and head.biases[0] is not None else None
    if weight.shape[1] % GROUP_SIZE:
        return DenseLinear([weight], [bias])
    return Int4Linear.engine_linear([Int4Linear(round_to_nearest(weight, GROUP_SIZE, Grid(steps=1)), bias, "int8")])


class Scores:
    """The likeliest tokens after states, by the model's head or by its rows of some tokens."""

    def __init__(self, model: DecoderModel, width: int, tokens: Tensor | None, head: Linear | None) -> None:
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
    """Guesses from states of the tokens ahead, made of what each step leaves behind of each sequence."""

    def __init__(self, scores: Scores, batch: int, guesses: int) -> None:
        self._scores, self._guesses = scores, guesses
        self._left: list[Tensor | None] = [None] * batch

    @torch.inference_mode()
    def propose(self, texts: Sequence[Sequence[int] | None], depths: Sequence[int]) -> list[Candidates]:
        found = [Candidates() for _ in texts]
        pairs = zip(texts, self._left, strict=True)
        known = [(b, left) for b, (text, left) in enumerate(pairs) if text is not None and left is not None]
        if known:
            tokens, chances = self._scores(self._states(torch.stack([left for _, left in known])))
            for (b, _), ids, some in zip(known, tokens, chances, strict=True):
                levels = [list(zip(*level, strict=True)) for level in zip(ids, some, strict=True)]
                found[b] = _product(levels, self._guesses, depths[b])
        return found

    def _states(self, left: Tensor) -> Tensor:
        """`[B, k, d]` of what was left."""
        return left


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

    def update(self, accepted: Accepted) -> None:
        self._left[accepted.sequence] = accepted.state[-1]

    def _states(self, left: Tensor) -> Tensor:
        return self._maps(left)


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
        self._left[accepted.sequence] = accepted.ahead


def trained(maps: DraftMaps | str | Path) -> HiddenTransfer | MedusaHeads:
    """The source of trained maps, or of their file: of the kind that they are."""
    maps = maps if isinstance(maps, DraftMaps) else DraftMaps.load(maps)
    return HiddenTransfer(maps) if maps.kind == "hidden" else MedusaHeads(maps)
