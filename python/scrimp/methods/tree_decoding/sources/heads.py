"""Drafts by trained maps of the model's own states: Medusa heads and Hidden Transfer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...generation import forward
from ...generation.cache import KVCache
from ...generation.model import DecoderModel
from ..draft import Accepted, Candidates
from ..maps import DraftMaps
from .expand import expand


class MedusaHeads:
    """Drafts by linear heads on the last state, scored by the model's own output head.

    Args:
        maps: of kind "medusa", or their file (of `scrimp train-draft --kind medusa`).
        width: tokens considered at each offset.
        guesses: in a tree at most.

    Source: Medusa (2401.10774), with one linear map a head.
    """

    name = "medusa"
    costly = True

    def __init__(self, maps: DraftMaps | str | Path, width: int = 8, guesses: int = 24) -> None:
        self._maps, self._tree = _checked("MedusaHeads", maps, width, guesses)

    def start(self, model: DecoderModel, cache: KVCache) -> _Medusa:
        return _Medusa(self._maps.for_model(model, "medusa"), model, cache.batch, *self._tree)


class _Ahead:
    """Guesses from states of the tokens ahead, which each step leaves behind for the next one."""

    def __init__(self, model: DecoderModel, batch: int, width: int, guesses: int) -> None:
        self._model, self._width, self._guesses = model, width, guesses
        self._states: list[Tensor | None] = [None] * batch  # [k, d] of each sequence

    @torch.inference_mode()
    def propose(self, texts: Sequence[Sequence[int] | None], depths: Sequence[int]) -> list[Candidates]:
        found = [Candidates() for _ in texts]
        pairs = zip(texts, self._states, strict=True)
        known = [(b, states) for b, (text, states) in enumerate(pairs) if text is not None and states is not None]
        if known:
            logits = forward.logits(self._model, torch.stack([states for _, states in known])).float()
            best = logits.topk(min(self._width, logits.shape[-1]))
            chances = (best.values - logits.logsumexp(-1, keepdim=True)).exp()
            for (b, _), ids, some in zip(known, best.indices.tolist(), chances.tolist(), strict=True):
                levels = [list(zip(*level, strict=True)) for level in zip(ids, some, strict=True)]
                found[b] = _product(levels, self._guesses, depths[b])
        return found


def _product(levels: Sequence[Sequence[tuple[int, float]]], guesses: int, depth: int) -> Candidates:
    """The likeliest paths where each level has its tokens and chances whatever came before."""
    return expand((), lambda path: levels[len(path)], guesses, min(depth, len(levels)))


class _Medusa(_Ahead):
    def __init__(self, maps: DraftMaps, model: DecoderModel, batch: int, width: int, guesses: int) -> None:
        super().__init__(model, batch, width, guesses)
        self._maps = maps

    @torch.inference_mode()
    def update(self, accepted: Accepted) -> None:
        self._states[accepted.sequence] = self._maps(accepted.state[-1])


class HiddenTransfer:
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
    costly = True

    def __init__(self, maps: DraftMaps | str | Path, width: int = 8, guesses: int = 15) -> None:
        self._maps, self._tree = _checked("HiddenTransfer", maps, width, guesses)

    def start(self, model: DecoderModel, cache: KVCache) -> _Transfer:
        if any(layer.window for layer in model.layers):
            raise ValueError("HiddenTransfer: the model has layers with windows, which read chains only")
        return _Transfer(self._maps.for_model(model, "hidden"), model, cache.batch, *self._tree)


class _Transfer(_Ahead):
    def __init__(self, maps: DraftMaps, model: DecoderModel, batch: int, width: int, guesses: int) -> None:
        super().__init__(model, batch, width, guesses)
        self.riding = maps

    def update(self, accepted: Accepted) -> None:
        self._states[accepted.sequence] = accepted.ahead


def _checked(name: str, maps: DraftMaps | str | Path, width: int, guesses: int) -> tuple[DraftMaps, tuple[int, int]]:
    if min(width, guesses) < 1:
        raise ValueError(f"{name}: width={width} and guesses={guesses} must be at least 1")
    return maps if isinstance(maps, DraftMaps) else DraftMaps.load(maps), (width, guesses)
