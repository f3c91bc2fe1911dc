"""Tree: guessed tokens after a text, parents first, and several of them as the tensors of one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tree:
    """Row 0 holds the last token of the text, each other row a guess of what follows its parent.

    Attributes:
        tokens: of each row.
        parents: row of each row's parent, an earlier one; -1 for row 0.
        depths: of each row, 0 for row 0.
        words: of each row the rows that it sees, its own among them, as bits.

    Raises:
        ValueError: no row, or a parent that is not an earlier row.
    """

    tokens: Sequence[int]
    parents: Sequence[int]
    depths: list[int] = field(init=False)
    words: list[int] = field(init=False)

    def __post_init__(self) -> None:
        if not self.tokens or len(self.tokens) != len(self.parents) or self.parents[0] != -1:
            raise ValueError(f"Tree: {len(self.tokens)} tokens and parents {list(self.parents)} make no tree")
        depths, words = [0], [1]
        for row, parent in enumerate(self.parents[1:], 1):
            if not 0 <= parent < row:
                raise ValueError(f"Tree: parents[{row}]={parent} is not an earlier row")
            depths.append(depths[parent] + 1)
            words.append(words[parent] | 1 << row)
        object.__setattr__(self, "depths", depths)
        object.__setattr__(self, "words", words)

    def __len__(self) -> int:
        return len(self.tokens)

    def child(self, row: int, token: int) -> int | None:
        """The row below `row` that holds `token`."""
        pairs = zip(self.parents[row + 1 :], self.tokens[row + 1 :], strict=True)
        return next((r for r, (parent, held) in enumerate(pairs, row + 1) if parent == row and held == token), None)


class TreeBatch(NamedTuple):
    """Trees of T rows, the shorter ones filled up with rows that see only themselves and belong to no tree.

    Attributes:
        tokens: int64 `[B, T]`.
        parents: int32 `[B, T]`.
        depths: int32 `[B, T]`.
        words: int64 `[B, T]`.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    words: Tensor


def together(trees: Sequence[Tree], device: torch.device) -> TreeBatch:
    """Trees of at most 64 rows side by side."""
    T = max(map(len, trees))
    words = [[*tree.words, *(1 << row for row in range(len(tree), T))] for tree in trees]
    signed = [[word - (1 << 64) if word >> 63 else word for word in row] for row in words]

    def filled(rows: Sequence[Sequence[int]], by: int, dtype: torch.dtype) -> Tensor:
        return torch.tensor([[*row, *[by] * (T - len(row))] for row in rows], dtype=dtype, device=device)

    return TreeBatch(
        filled([tree.tokens for tree in trees], 0, torch.int64),
        filled([tree.parents for tree in trees], -1, torch.int32),
        filled([tree.depths for tree in trees], 0, torch.int32),
        torch.tensor(signed, dtype=torch.int64, device=device),
    )
