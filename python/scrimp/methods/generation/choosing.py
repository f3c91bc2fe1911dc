"""Chooser: tokens from logits, alone or down a tree of guesses, by everything that a generation was asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..._registry import OPS
from ...ops._noise import signed
from .sampling import Sampling, check, choose
from .settings import Processor, Reason

_tree_accept = OPS["tree_accept"].call


class Choice(Protocol):
    """What a Chooser needs to know of a sequence."""

    prompt: list[int]
    new: list[int]
    sampling: Sampling
    reason: Reason | None


class Chooser:
    """How the next tokens are chosen.

    Args:
        processors: of logits, called for one sequence at a time.
        ends: tokens that end a text, and why.
        minimum: new tokens before which none of `ends` is chosen.
    """

    def __init__(self, processors: Sequence[Processor], ends: Mapping[int, Reason], minimum: int) -> None:
        self.ends = ends
        self._processors = list(processors)
        self._minimum = minimum

    def is_plain(self, texts: Sequence[Choice]) -> bool:
        """Whether nothing changes the logits of the unfinished sequences any more."""
        return not self._processors and all(
            text.reason is not None or (len(text.new) >= self._minimum and not text.sampling.filters) for text in texts
        )

    def largest(self, texts: Sequence[Choice]) -> int:
        """How many of the largest logits the unfinished sequences' next tokens depend on; 0 for all."""
        wanted = [
            text.sampling.largest + (len(self.ends) if len(text.new) < self._minimum else 0)
            for text in texts
            if text.reason is None and text.sampling.largest
        ]
        everything = self._processors or len(wanted) < sum(text.reason is None for text in texts)
        return 0 if everything else max(wanted, default=1)

    def together(
        self, logits: Tensor, tokens: Tensor, parents: Tensor, texts: Sequence[Choice]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """The rows that each sequence walks down its tree (`scrimp.ops.tree_accept`), and the tokens chosen there.

        Both are empty for a finished sequence.

        Raises:
            ValueError: a logit is NaN, or none is finite.
        """
        device = logits.device
        heat = torch.tensor([text.sampling.temperature for text in texts], dtype=torch.float32, device=device)
        seed = torch.tensor([signed(text.sampling.seed) for text in texts], device=device)
        at = torch.tensor([len(text.prompt) + len(text.new) for text in texts], device=device)
        found = _tree_accept(logits, tokens, parents, heat, seed, at)
        paths: list[list[int]] = []
        chosen: list[list[int]] = []
        for b, (path, picked) in enumerate(zip(*(x.tolist() for x in found), strict=True)):
            length = 0 if texts[b].reason is not None else sum(row >= 0 for row in path)
            paths.append(path[:length])
            chosen.append(picked[:length])
            if -1 in chosen[b]:
                row = logits[b, path[length - 1]]
                check(int(row.argmax()), row)
        return paths, chosen

    def one(self, row: Tensor, text: Choice, more: Sequence[int] = ()) -> int:
        """The token that follows a sequence's tokens and `more` of them, from logits `[V]`."""
        row = row.float()
        if len(text.new) + len(more) < self._minimum:
            row = row.clone()
            row[[token for token in self.ends if 0 <= token < len(row)]] = -math.inf
        if self._processors:
            held = torch.tensor([[*text.prompt, *text.new, *more]], device=row.device)
            for process in self._processors:
                row = process(held, row[None])[0]
        return choose(row, len(text.prompt) + len(text.new) + len(more), text.sampling)
