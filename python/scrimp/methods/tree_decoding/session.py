"""Session: one batch of texts decoded in steps of one tree each; what is accepted stays in the cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._registry import OPS
from ..generation import forward
from ..generation.cache import KVCache
from ..generation.loop import Prompted
from ..generation.model import DecoderModel
from . import ahead
from .draft import Accepted, Candidates
from .knowledge import Knowledge, Running
from .maps import DraftMaps
from .merge import Merged, worthwhile
from .tree import Tree, TreeBatch, together

LEARNT = 8  # largest logits of which sources learn

_compact = OPS["kv_compact"].call


@dataclass(frozen=True)
class Step:
    """One pass of trees.

    Attributes:
        trees: of each sequence; those of finished ones are a single row.
        batch: the trees as tensors.
        logits: `[B, T, V]` after each row; -inf where a `Head` left one out (`scrimp.methods.generation.linear`).
        state: `[B, T, d]`.
        ahead: `[B, T, k, d]`, states of the pseudo rows behind each row, or None.
        merged: what the trees were made of; None for finished sequences.
    """

    trees: list[Tree]
    batch: TreeBatch
    logits: Tensor
    state: Tensor
    ahead: Tensor | None
    merged: list[Merged | None]


class Session:
    """Texts on their way: `advance` feeds a tree after each, `settle` keeps the right part of it.

    Args:
        model: the decoder.
        cache: holds all tokens of each text but the last.
        texts: of each sequence, the first new token among them; they grow by what is accepted.
        running: the sources at work.
        knowledge: acceptance and cost curve, which it adds to.
        guesses: in a tree at most.
    """

    def __init__(
        self,
        model: DecoderModel,
        cache: KVCache,
        texts: Sequence[Sequence[int]],
        running: Running,
        knowledge: Knowledge,
        guesses: int,
    ) -> None:
        self.model = model
        self.cache = cache
        self.texts = [list(text) for text in texts]
        self._guesses = guesses
        self.limit = self._room(1)
        self._running = running
        self._knowledge = knowledge
        self._chain = any(layer.window for layer in model.layers)

    @torch.inference_mode()
    def begin(self, prompted: Prompted) -> None:
        """Tells the sources what the last tokens of the prompts left; each text has one new token."""
        riding = self._riding()
        pseudo = None
        if riding is not None:
            held = torch.tensor([len(text) - 1 for text in self.texts], dtype=torch.int32, device=self.model.device)
            pseudo = ahead.after_prompts(self.model, self.cache, prompted.watched[riding.layer], held, riding)
        for b, text in enumerate(self.texts):
            behind = None if pseudo is None else pseudo[b]
            self._running.update(Accepted(b, [text[-2]], prompted.logits[b], prompted.state[b], behind))

    @torch.inference_mode()
    def advance(self, depths: Sequence[int | None], largest: int = 0) -> Step:
        """Feeds a tree to every sequence.

        Args:
            depths: how deep guesses of each sequence can be of use; None for a finished sequence.
            largest: how many of the largest logits the choice of tokens depends on; 0 for all.
        """
        proposed = self._propose(depths)
        merged, riding = self._merge(depths, proposed), self._riding()
        worths = self._running.worths(name for name, _ in proposed)
        spent = sum(worth.seconds for worth in worths.values())
        count, speed = self._plan(merged, riding, spent)
        for name, worth in worths.items():
            others = self._merge(depths, [pair for pair in proposed if pair[0] != name])
            worth.judge(speed / self._plan(others, self._riding(but=name), spent - worth.seconds)[1])
        trees = [Tree([0], [-1]) if one is None else one.tree(count) for one in merged]
        batch = together(trees, self.model.device)
        begin = time.perf_counter()
        state, pseudo = self._feed(batch, [depth is None for depth in depths], riding)
        logits = forward.logits(self.model, state, learnt(largest))
        paid = ahead.rows_paid(self.model, riding, batch.tokens.numel())
        self._knowledge.curve(self.model).note(paid, time.perf_counter() - begin)
        return Step(trees, batch, logits, state, pseudo, merged)

    def _room(self, rows: int) -> int:
        """Guesses in a tree at most where every row of it takes so many."""
        return min(self._guesses, forward.MAX_ROWS // (self.cache.batch * rows) - 1)

    def _riding(self, but: str = "") -> DraftMaps | None:
        """What makes pseudo rows in a step, without the source of a name, if they leave room for a tree."""
        riding = self._running.riding(but)
        return None if riding is None or self._room(1 + riding.count) <= 0 else riding

    def _plan(self, merged: Sequence[Merged | None], riding: DraftMaps | None, spent: float) -> tuple[int, float]:
        """How many guesses to read, and the tokens per second expected of it, where guessing took `spent` seconds."""
        curve = self._knowledge.curve(self.model)
        limit = self.limit if riding is None else self._room(1 + riding.count)
        gains = [one.gains for one in merged if one is not None]
        return worthwhile(
            gains, self.cache.batch, limit, lambda rows: spent + curve(ahead.rows_paid(self.model, riding, rows))
        )

    def _propose(self, depths: Sequence[int | None]) -> list[tuple[str, list[Candidates]]]:
        """Guesses of each source that is used, for each sequence."""
        useful = [min(depth or 0, self.limit) for depth in depths]
        if not any(useful):
            return []
        texts = [None if depth is None else text for text, depth in zip(self.texts, depths, strict=True)]
        found = self._running.propose(texts, useful)
        return [(name, [_cut(own, depth) for own, depth in zip(each, useful, strict=True)]) for name, each in found]

    def _merge(
        self, depths: Sequence[int | None], proposed: Sequence[tuple[str, list[Candidates]]]
    ) -> list[Merged | None]:
        """The guesses after each text; None for a finished sequence."""
        acceptance, chain = self._knowledge.acceptance, self._chain
        return [
            None if depth is None else Merged(text[-1], [(name, own[b]) for name, own in proposed], acceptance, chain)
            for b, (text, depth) in enumerate(zip(self.texts, depths, strict=True))
        ]

    def _feed(self, batch: TreeBatch, idle: Sequence[bool], riding: DraftMaps | None) -> tuple[Tensor, Tensor | None]:
        """Rows of finished sequences go to the scratch slots, as if after an empty text."""
        device, capacity = self.model.device, self.cache.capacity
        held = [len(text) - 1 for text in self.texts]
        start = [capacity if off else count for off, count in zip(idle, held, strict=True)]
        prefix = [0 if off else count for off, count in zip(idle, held, strict=True)]
        start_t, prefix_t = (torch.tensor(x, dtype=torch.int32, device=device) for x in (start, prefix))
        if riding is not None:
            return ahead.feed(self.model, self.cache, batch, start_t, prefix_t, riding)
        state = forward.rows(
            self.model,
            self.cache.keys,
            self.cache.values,
            batch.tokens,
            start_t,
            prefix=prefix_t,
            positions=prefix_t[:, None] + batch.depths,
            ancestors=None if self._chain else batch.words,
        )
        return state, None

    @torch.inference_mode()
    def settle(self, step: Step, paths: Sequence[Sequence[int]], chosen: Sequence[Sequence[int]]) -> None:
        """Keeps the rows of each path, ascending from row 0 on; empty for a finished sequence.

        Args:
            chosen: as many tokens for each sequence: those of the path's rows but the first, and the one after them.
        """
        device = self.model.device
        if any(row != i for path in paths for i, row in enumerate(path)):
            T = max(map(len, paths))
            rows = torch.tensor([[*path, *[-1] * (T - len(path))] for path in paths], dtype=torch.int32, device=device)
            start = torch.tensor([len(text) - 1 for text in self.texts], dtype=torch.int32, device=device)
            _compact(self.cache.memory.flatten(0, 1), start, rows)
        for b, (path, tokens) in enumerate(zip(paths, chosen, strict=True)):
            merged = step.merged[b]
            if merged is None or not path:
                continue
            merged.count(tokens, self._knowledge.acceptance)
            fed = [step.trees[b].tokens[row] for row in path]
            pseudo = None if step.ahead is None else step.ahead[b, path[-1]]
            self._running.update(Accepted(b, fed, step.logits[b, list(path)], step.state[b, list(path)], pseudo))
            self.texts[b] += tokens
            self._knowledge.steps += 1
            self._knowledge.tokens += len(tokens)


def learnt(largest: int) -> int:
    """How many of the largest logits to ask for where so many choose a token; 0 for all."""
    return max(largest, LEARNT) if largest else 0


def _cut(candidates: Candidates, depth: int) -> Candidates:
    """The guesses that are at most so deep."""
    depths: list[int] = []
    for parent in candidates.parents:
        depths.append(1 + (depths[parent] if parent >= 0 else 0))
    if not depths or max(depths) <= depth:
        return candidates
    kept, new = Candidates(), dict[int, int]()
    for i, own in enumerate(depths):
        if own <= depth:
            parent = candidates.parents[i]
            new[i] = kept.add(candidates.tokens[i], new[parent] if parent >= 0 else -1, candidates.chances[i])
    return kept
