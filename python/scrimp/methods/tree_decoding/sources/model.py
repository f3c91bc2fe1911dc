"""Drafts by a model: another one, the same one with layers left out, or another view of the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...generation import forward
from ...generation.cache import KVCache
from ...generation.huggingface import decoder_model
from ...generation.model import DecoderModel
from ..draft import Accepted, Candidates
from .expand import likeliest

WIDTH = 4  # guesses at each depth: the best one goes on


class ModelDraft:
    """Drafts by another model of the same vocabulary, with a cache of its own.

    Args:
        model: a model that the decoding loop runs.
        depth: tokens guessed ahead.

    Source: speculative decoding (2211.17192, 2302.01318).
    """

    name = "model"
    costly = True

    def __init__(self, model: nn.Module | DecoderModel, depth: int = 4) -> None:
        if depth < 1:
            raise ValueError(f"ModelDraft: depth={depth} must be at least 1")
        self._view = decoder_model(model)
        self._depth = depth

    def start(self, model: DecoderModel, cache: KVCache) -> _OwnCache:
        if self._view.vocabulary != model.vocabulary:
            raise ValueError(
                f"ModelDraft: the draft model has {self._view.vocabulary} tokens, but the model {model.vocabulary}"
            )
        own = KVCache(self._view, cache.batch, min(self._view.context, cache.capacity))
        return _OwnCache(self._view, own, self._depth)


class _OwnCache:
    def __init__(self, view: DecoderModel, cache: KVCache, depth: int) -> None:
        self._view, self._cache, self._depth = view, cache, depth

    @torch.inference_mode()
    def propose(self, texts: Sequence[Sequence[int] | None], depths: Sequence[int]) -> list[Candidates]:
        cache = self._cache
        room = min(cache.capacity - len(text) for text in texts if text is not None)
        depth = min(self._depth, max(depths), room)
        if depth < 1:
            return [Candidates() for _ in texts]
        empty = torch.zeros(1, 1, self._view.embedding.shape[1], dtype=self._view.dtype, device=self._view.device)
        states = [
            empty if text is None else forward.prefill(cache, b, text, panels=True, patterns=None)
            for b, text in enumerate(texts)
        ]
        held = [0 if text is None else len(text) for text in texts]
        return chains(self._view, cache.keys, cache.values, torch.cat(states), held, depth)  # type: ignore[arg-type]

    def update(self, accepted: Accepted) -> None:
        pass


class SelfDraft:
    """Drafts by a view of the model itself that shares its cache: fewer layers, or cheaper ones of the same sizes.

    Guesses read the keys and values that the model itself wrote, and their own go to the slots that the next step
    writes anew, so that there is nothing to read twice.

    Args:
        view: a DecoderModel with as many key/value heads as the model, a layer for each of `layers`.
        layers: whose keys and values each layer of the view reads.
        depth: tokens guessed ahead.
        name: under which acceptance is counted.
    """

    costly = True

    def __init__(
        self, view: nn.Module | DecoderModel, layers: Sequence[int] | None = None, depth: int = 4, name: str = "self"
    ) -> None:
        if depth < 1:
            raise ValueError(f"SelfDraft: depth={depth} must be at least 1")
        self._view = decoder_model(view)
        self._layers = list(range(len(self._view.layers)) if layers is None else layers)
        self._depth = depth
        self.name = name

    def start(self, model: DecoderModel, cache: KVCache) -> _SharedCache:
        view, known = self._view, len(model.layers)
        sizes = (view.vocabulary, view.kv_heads, view.head_dim, view.dtype)
        wanted = (model.vocabulary, model.kv_heads, model.head_dim, model.dtype)
        if sizes != wanted:
            raise ValueError(f"SelfDraft: vocabulary, key/value heads, head size and dtype {sizes} are not {wanted}")
        if len(self._layers) != len(view.layers) or not all(0 <= layer < known for layer in self._layers):
            raise ValueError(f"SelfDraft: layers {self._layers} for {len(view.layers)} of a model with {known}")
        return _SharedCache(view, cache, self._layers, self._depth)


class EarlyExit:
    """Drafts by some of the model's own layers.

    Args:
        layers: which, ascending; a number takes the first so many.
        depth: tokens guessed ahead.

    Source: Draft & Verify (2309.08168), LayerSkip (2404.16710).
    """

    name = "early-exit"
    costly = True

    def __init__(self, layers: int | Sequence[int], depth: int = 3) -> None:
        self._layers = list(range(layers)) if isinstance(layers, int) else list(layers)
        self._depth = depth
        if not self._layers or min(self._layers) < 0 or self._layers != sorted(set(self._layers)):
            raise ValueError(f"EarlyExit: layers {layers} are not ascending layer numbers")

    def start(self, model: DecoderModel, cache: KVCache) -> _SharedCache:
        if self._layers[-1] >= len(model.layers):
            raise ValueError(f"EarlyExit: layer {self._layers[-1]} of a model with {len(model.layers)} layers")
        view = replace(model, layers=tuple(model.layers[i] for i in self._layers))
        return SelfDraft(view, self._layers, self._depth, self.name).start(model, cache)


class _SharedCache:
    def __init__(self, view: DecoderModel, cache: KVCache, layers: Sequence[int], depth: int) -> None:
        self._view, self._cache, self._depth = view, cache, depth
        self._keys = [cache.keys[layer] for layer in layers]
        self._values = [cache.values[layer] for layer in layers]

    @torch.inference_mode()
    def propose(self, texts: Sequence[Sequence[int] | None], depths: Sequence[int]) -> list[Candidates]:
        cache, device = self._cache, self._view.device
        depth = min(self._depth, max(depths), cache.scratch)
        if depth < 1:
            return [Candidates() for _ in texts]
        held = [cache.capacity if text is None else len(text) - 1 for text in texts]
        last = torch.tensor([[0 if text is None else text[-1]] for text in texts], device=device)
        state = feed(self._view, self._keys, self._values, last, held)
        after = [cache.capacity if text is None else len(text) for text in texts]
        return chains(self._view, self._keys, self._values, state, after, depth)

    def update(self, accepted: Accepted) -> None:
        pass


def feed(
    view: DecoderModel, keys: Sequence[Tensor], values: Sequence[Tensor], tokens: Tensor, held: Sequence[int]
) -> Tensor:
    """One token `[B, 1]` of each sequence after `held` cached ones: states `[B, 1, d]`."""
    start = torch.tensor(held, dtype=torch.int32, device=view.device)
    return forward.rows(view, keys, values, tokens, start)


def chains(
    view: DecoderModel, keys: Sequence[Tensor], values: Sequence[Tensor], state: Tensor, held: Sequence[int], depth: int
) -> list[Candidates]:
    """The likeliest token `depth` times over, each with its nearest rivals.

    Args:
        state: `[B, 1, d]` of each sequence's last token.
        held: tokens of each sequence in the cache, that one among them; the slots after them are written.
    """
    found = [Candidates() for _ in held]
    parents = [-1] * len(held)
    for level in range(depth):
        best, chances = likeliest(forward.logits(view, state, WIDTH)[:, 0], WIDTH)
        for b, (ids, some) in enumerate(zip(best.tolist(), chances.tolist(), strict=True)):
            new = [found[b].add(*guess) for guess in zip(ids, [parents[b]] * len(ids), some, strict=True)]
            parents[b] = new[0]
        if level + 1 < depth:
            state = feed(view, keys, values, best[:, :1], [count + level for count in held])
    return found
