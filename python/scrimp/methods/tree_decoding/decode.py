"""The decoding loop with trees: every unfinished sequence gets at least one token a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..generation.choosing import Chooser
from ..generation.loop import Text
from ..generation.settings import Piece
from .session import Session, Step


def decode(session: Session, sequences: Sequence[Text], chooser: Chooser) -> Iterator[Piece]:
    """Pieces after each sequence's first token; closing the iterator cancels."""
    cache = session.cache
    while any(sequence.reason is None for sequence in sequences):
        active = [sequence.reason is None for sequence in sequences]
        depths = [None if s.reason is not None else s.limit - len(s.new) - 1 for s in sequences]
        fed = [text[-1] for text in session.texts]
        step = session.advance(depths, chooser.largest(sequences))
        paths, chosen = accept(step, sequences, chooser)
        session.settle(step, paths, chosen)
        for b, sequence in enumerate(sequences):
            if not active[b]:
                continue
            for row, token in zip([fed[b], *chosen[b]], chosen[b], strict=False):
                cache.tokens[b].append(row)
                yield sequence.add(token, chooser.ends)
                if sequence.reason is not None:
                    break


@torch.inference_mode()
def accept(step: Step, sequences: Sequence[Text], chooser: Chooser) -> tuple[list[list[int]], list[list[int]]]:
    """The path that each sequence's tokens take through its tree, and these tokens; empty for a finished sequence."""
    if chooser.is_plain(sequences):
        return chooser.together(step.logits, step.batch.tokens, step.batch.parents, sequences)
    paths: list[list[int]] = []
    chosen: list[list[int]] = []
    for b, sequence in enumerate(sequences):
        path: list[int] = []
        tokens: list[int] = []
        row = None if sequence.reason is not None else 0
        while row is not None:
            path.append(row)
            tokens.append(chooser.one(step.logits[b, row], sequence, tokens))
            row = step.trees[b].child(row, tokens[-1])
        paths.append(path)
        chosen.append(tokens)
    return paths, chosen
