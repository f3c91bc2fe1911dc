"""Generate and verify in one pass: trees whose rows are followed by pseudo rows in the upper layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..generation import forward
from ..generation.cache import KVCache
from ..generation.model import DecoderModel
from .maps import DraftMaps
from .tree import TreeBatch


def feed(
    model: DecoderModel, cache: KVCache, batch: TreeBatch, start: Tensor, prefix: Tensor, maps: DraftMaps
) -> tuple[Tensor, Tensor]:
    """Trees through all layers, from layer `maps.layer` on with pseudo rows behind every row.

    Real rows see what they would see alone, so that their bits are the same. Keys and values of pseudo rows lie in the
    slots behind those of the real rows until the next step writes there.

    Args:
        batch: trees of T rows; B T (1 + k) at most 64.
        start: int32 `[B]`, slot of each tree's first row.
        prefix: int32 `[B]`, tokens that all rows see.

    Returns:
        States `[B, T, d]` of the rows and `[B, T, k, d]` of the pseudo rows behind each.
    """
    keys, values, last = cache.keys, cache.values, len(model.layers)
    T, k = batch.tokens.shape[1], maps.count
    x = torch.embedding(model.embedding, batch.tokens)
    at = prefix[:, None] + batch.depths
    x = forward.through(
        model, keys, values, x, start, range(maps.layer), prefix=prefix, positions=at, ancestors=batch.words
    )
    after = torch.arange(1, k + 1, dtype=torch.int32, device=at.device)
    x = torch.cat([x, maps(x).flatten(1, 2)], 1)
    at = torch.cat([at, (at[..., None] + after).flatten(1)], 1)
    words = torch.cat([batch.words, pseudo_words(batch.words, k).flatten(1)], 1)
    x = forward.through(
        model, keys, values, x, start, range(maps.layer, last), prefix=prefix, positions=at, ancestors=words
    )
    return x[:, :T], x[:, T:].unflatten(1, (T, k))


def after_prompts(model: DecoderModel, cache: KVCache, states: Tensor, held: Tensor, maps: DraftMaps) -> Tensor:
    """States `[B, k, d]` of the pseudo rows behind the last tokens of prompts, as if these had ridden along there.

    Args:
        states: `[B, 1, d]` of the prompts' last tokens after `maps.layer` layers.
        held: int32 `[B]`, tokens of the prompts, all in the cache; B k at most 64.
    """
    upper = range(maps.layer, len(model.layers))
    return forward.through(model, cache.keys, cache.values, maps(states).flatten(1, 2), held, upper)


def pseudo_words(words: Tensor, k: int) -> Tensor:
    """What pseudo rows see: the path to their row and the pseudo rows up to themselves.

    Args:
        words: int64 `[B, T]` of the real rows.

    Returns:
        int64 `[B, T, k]`; pseudo row i of row t is bit T + k t + i.
    """
    T = words.shape[1]
    run = (1 << torch.arange(1, k + 1, device=words.device)) - 1  # ones up to its own
    first = T + k * torch.arange(T, device=words.device)
    return words[..., None] | (run << first[:, None])


def rows_paid(model: DecoderModel, maps: DraftMaps | None, rows: int) -> int:
    """Rows of a plain pass that takes as long as one of so many real rows, with pseudo rows in the upper layers."""
    if maps is None:
        return rows
    layers = len(model.layers)
    return math.ceil(rows * (1 + maps.count * (layers - maps.layer) / layers))
