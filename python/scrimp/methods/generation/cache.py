"""KVCache: keys and values of all layers and sequences in one allocation, and what they are the rows of."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .huggingface import decoder_model
from .model import MAX_ROWS, DecoderModel


class KVCache:
    """Room for `capacity` tokens (all of the model's context unless given) of each of `batch` sequences.

    It is one allocation, made once.
    After a call that read or wrote tokens (also one that was cancelled or failed) `tokens[b]` are the tokens whose keys
    and values the cache holds; a later call with a prompt that begins with them reads only what is new.

    Attributes:
        model: whose keys and values they are.
        keys: for each layer `[B, G, C, D]`, views of the one allocation; C is capacity + scratch.
        values: like `keys`.
        scratch: last slots, for rows of finished sequences and guesses beyond the capacity; 64 in all.
        tokens: for each sequence the tokens held.
        prompts: for each sequence how many of its first tokens were read as those of a prompt; the rest was decoded.
        panels: for each sequence how many of its first tokens were read in panels, and how (see `prefill`).
    """

    def __init__(self, model: nn.Module | DecoderModel, batch: int = 1, capacity: int | None = None) -> None:
        model = decoder_model(model)
        capacity = model.context if capacity is None else capacity
        if batch < 1 or capacity < 1:
            raise ValueError(f"KVCache: batch={batch} and capacity={capacity} must be at least 1")
        if capacity > model.context:
            raise ValueError(f"KVCache: capacity={capacity} exceeds the model's context of {model.context} tokens")
        self.model = model
        self.batch = batch
        self.capacity = capacity
        self.scratch = max(1, MAX_ROWS // batch)
        shape = (len(model.layers), 2, batch, model.kv_heads, capacity + self.scratch, model.head_dim)
        self.memory = torch.empty(shape, dtype=model.dtype, device=model.device)
        self.keys = [self.memory[layer, 0] for layer in range(shape[0])]
        self.values = [self.memory[layer, 1] for layer in range(shape[0])]
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.prompts = [0] * batch
        self.panels: list[tuple[int, object]] = [(0, None) for _ in range(batch)]
        self._busy = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of the allocation."""
        return self.memory.nbytes

    def of_sequence(self, b: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of one sequence, for each layer `[1, G, C, D]`."""
        one = slice(b, b + 1)
        return [key[one] for key in self.keys], [value[one] for value in self.values]

    def keep(self, b: int, count: int) -> None:
        """Forgets all but the first `count` tokens of sequence `b`."""
        del self.tokens[b][count:]
        self.prompts[b] = min(self.prompts[b], count)
        self.panels[b] = (min(self.panels[b][0], count), self.panels[b][1])

    def common(self, b: int, tokens: Sequence[int]) -> int:
        """How many first tokens of `tokens` the cache holds for sequence `b`."""
        held, tokens = self.tokens[b], list(tokens)
        low, high = 0, min(len(held), len(tokens))
        while low < high:  # the first `low` agree
            middle = (low + high + 1) // 2
            if held[low:middle] == tokens[low:middle]:
                low = middle
            else:
                high = middle - 1
        return low

    def borrow(self, b: int, tokens: Sequence[int]) -> None:
        """Copies to sequence `b` the keys and values of the other sequence that shares most first tokens with `tokens`.

        Nothing is done where none shares more than `b` itself.
        """
        shared, lender = max((self.common(other, tokens), other) for other in range(self.batch))
        if shared > self.common(b, tokens):
            self.memory[:, :, b, :, :shared] = self.memory[:, :, lender, :, :shared]
            self.tokens[b] = self.tokens[lender][:shared]
            self.prompts[b] = min(self.prompts[lender], shared)
            self.panels[b] = (min(self.panels[lender][0], shared), self.panels[lender][1])

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Holds the cache for one call.

        Raises:
            RuntimeError: another call is using it.
        """
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("KVCache: the cache is in use by another generation; close that or use another cache")
        try:
            yield
        finally:
            self._busy.release()
