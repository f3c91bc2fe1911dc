"""How often maps are right: per offset, the text's token among the likeliest, and the model's own choice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .frozen import FrozenModel, Reading

TOPS = (1, 5, 10)
ROWS = 64  # rows of a text that are judged at a time


@dataclass(frozen=True)
class Accuracy:
    """Shares of guesses at one offset.

    Attributes:
        offset: tokens ahead; 1 is the one that the row itself chooses.
        guesses: that were judged.
        top: for each of TOPS, how often the text's token is among so many likeliest.
        same: how often the likeliest is the one that the model itself finds likeliest there.
    """

    offset: int
    guesses: int
    top: tuple[float, ...]
    same: float


class Counter:
    """Counts right guesses of one set of maps over several texts.

    Args:
        model: whose texts they are.
        layer: layers after which states are mapped.
        maps: weight `[k, d, d]` and bias `[k, d]`.
        upper: whether what they give goes through the layers that are left, or to the head at once.
    """

    def __init__(self, model: FrozenModel, layer: int, maps: tuple[Tensor, Tensor], upper: bool = True) -> None:
        self._model, self._layer, self._maps, self._upper = model, layer, maps, upper
        self._right = torch.zeros(len(maps[1]), len(TOPS) + 1, dtype=torch.int64)
        self._guesses = 0

    @torch.no_grad()
    def add(self, text: Reading, rows: Tensor) -> None:
        """Judges the guesses behind some rows `[A]` of a text; k + 1 tokens must follow each."""
        after = torch.arange(1, len(self._right) + 1, device=rows.device)
        for some in rows.split(ROWS):
            ahead = self._model.ahead(text, self._layer, some, self._maps, self._upper)
            best = self._model.logits(ahead).topk(max(TOPS)).indices
            at = some[:, None] + after
            chosen = self._model.logits(text.states[-1][at]).argmax(-1)
            found = best == text.tokens[at + 1][..., None]
            hits = [found[..., :top].any(-1) for top in TOPS]
            self._right += torch.stack([*hits, best[..., 0] == chosen], -1).sum(0).cpu()
            self._guesses += len(some)

    def result(self) -> list[Accuracy]:
        """The shares, offset by offset."""
        shares = (self._right / max(self._guesses, 1)).tolist()
        return [Accuracy(2 + i, self._guesses, tuple(share[:-1]), share[-1]) for i, share in enumerate(shares)]
