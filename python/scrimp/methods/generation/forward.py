"""One pass of new rows through a DecoderModel over a KVCache. Nothing here chooses tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ... import ops
from ..._registry import OPS
from ...sparse_plan import SparsePlan
from ..head_patterns import HeadPatterns
from .cache import KVCache
from .linear import Head
from .model import MAX_ROWS, DecoderLayer, DecoderModel

PANEL = 512  # tokens of a panel: a segment of the estimated plans, enough rows for a full-speed matrix product

_rms_norm = OPS["rms_norm"].call
_rotary_append = OPS["rotary_append"].call
_tree_attention = OPS["tree_attention"].call

GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": OPS["silu_mul"].call,
    "gelu": partial(OPS["gelu_mul"].call, tanh=False),
    "gelu_tanh": partial(OPS["gelu_mul"].call, tanh=True),
}

Attend = Callable[[int, DecoderLayer, Tensor, Tensor, Tensor], Tensor]
Watched = dict[int, Tensor]  # numbers of layers -> states `[B, 1, d]` of the last rows after so many


def _layers(
    model: DecoderModel,
    x: Tensor,
    positions: Tensor,
    start: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    attend: Attend,
    layers: Iterable[int],
) -> Tensor:
    """Some layers on x `[B, T, d]`; `attend` gives `[B, H, T, D]` in the memory order B, T, H, D."""
    B, T, _ = x.shape
    cos, sin = model.positions.tables(keys[0].shape[2])
    D, activation = model.head_dim, GATES[model.activation]
    parts = [model.heads, model.kv_heads, model.kv_heads]
    split = (B, T, sum(parts), D)
    for i in layers:
        layer = model.layers[i]
        q, k, v = layer.qkv(_rms_norm(x, *layer.attention_norm)).view(split).split_with_sizes(parts, 2)
        if layer.q_norm is not None:
            q = _rms_norm(q, *layer.q_norm)
        if layer.k_norm is not None:
            k = _rms_norm(k, *layer.k_norm)
        k_cache, v_cache = keys[i], values[i]
        q = _rotary_append(q, k, v, cos, sin, positions, start, k_cache, v_cache)
        out = attend(i, layer, q, k_cache, v_cache)
        x = layer.o(out.transpose(1, 2).flatten(2), x)
        gate, up = layer.gate_up(_rms_norm(x, *layer.mlp_norm)).chunk(2, -1)
        x = layer.down(activation(gate, up), x)
    return x


def _watching(
    x: Tensor, layers: Sequence[int], watched: Watched | None, run: Callable[[Tensor, Sequence[int]], Tensor]
) -> Tensor:
    """Some layers by `run`, in pieces that begin where the state is watched."""
    wanted = {} if watched is None else watched
    cuts = [at for at, layer in enumerate(layers) if layer in wanted]
    for first, end in pairwise(sorted({0, *cuts, len(layers)})):
        if layers[first] in wanted:
            wanted[layers[first]] = x[:, -1:]
        x = run(x, layers[first:end])
    return x


def rows(
    model: DecoderModel,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    tokens: Tensor,
    start: Tensor,
    *,
    prefix: Tensor | None = None,
    positions: Tensor | None = None,
    ancestors: Tensor | None = None,
    watched: Watched | None = None,
) -> Tensor:
    """T new tokens of each sequence through all layers, row-invariantly; their keys and values enter the cache.

    Args:
        model: the decoder.
        keys: for each layer `[B, G, C, D]`; slots start[b] + t are written.
        values: like `keys`.
        tokens: int64 `[B, T]`, B T at most 64.
        start: int32 `[B]`, slot of each sequence's first new token.
        prefix: int32 `[B]`, tokens that every new one sees; `start` unless given.
        positions: int32 `[B, T]`; start[b] + t unless given.
        ancestors: int64 `[1 or B, T]`, which new tokens each one sees (`scrimp.ops.tree_attention`); all up to itself
            unless given.
        watched: gets the states of the last tokens after each of its numbers of layers, fewer than all.

    Returns:
        `[B, T, d]`, the state before the last norm (`logits` takes it).
    """
    x, layers = torch.embedding(model.embedding, tokens), range(len(model.layers))
    return through(
        model, keys, values, x, start, layers, prefix=prefix, positions=positions, ancestors=ancestors, watched=watched
    )


def through(
    model: DecoderModel,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    x: Tensor,
    start: Tensor,
    layers: Sequence[int],
    *,
    prefix: Tensor | None = None,
    positions: Tensor | None = None,
    ancestors: Tensor | None = None,
    watched: Watched | None = None,
) -> Tensor:
    """New rows `[B, T, d]` through some of the layers only; the rest as in `rows`."""
    if positions is None:
        positions = start[:, None]
        if x.shape[1] > 1:
            positions = positions + torch.arange(x.shape[1], dtype=torch.int32, device=start.device)
    seen = start if prefix is None else prefix
    scale = model.scale

    def attend(_: int, layer: DecoderLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _tree_attention(q, k, v, seen, ancestors, layer.window, scale)[0]

    def run(x: Tensor, some: Sequence[int]) -> Tensor:
        if together := model.packed(some):
            caches = [keys[i] for i in some], [values[i] for i in some]
            return together(x, *model.positions.tables(keys[0].shape[2]), positions, start, seen, ancestors, *caches)
        return _layers(model, x, positions, start, keys, values, attend, some)

    return _watching(x, layers, watched, run)


def panel(
    model: DecoderModel,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    tokens: Tensor,
    first: int,
    patterns: HeadPatterns | None = None,
    watched: Watched | None = None,
) -> Tensor:
    """PANEL tokens `[1, PANEL]` of one sequence from position `first` on, by matrix products; deterministic.

    With `patterns`, layers whose budgets show at most half of the keys attend sparsely.
    """
    n, end = tokens.shape[1], first + tokens.shape[1]
    device, scale = tokens.device, model.scale
    plans: dict[int, SparsePlan] = {}

    def dense(window: int) -> SparsePlan:
        if window not in plans:
            make = SparsePlan.sliding_window(n, window, n_k=end, device=device) if window else None
            plans[window] = make or SparsePlan.dense(n, end, device=device)
        return plans[window]

    def attend(i: int, layer: DecoderLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k[:, :, :end], v[:, :, :end]
        few = patterns is not None and not layer.window and pays(patterns, i, n, end)
        plan = patterns.plan(i, q, k, scale) if few and patterns else dense(layer.window)
        return ops.sparse_attention(q, k, v, plan, scale)[0]

    start = torch.tensor([first], dtype=torch.int32, device=device)
    positions = torch.arange(first, end, dtype=torch.int32, device=device)[None]
    x, layers = torch.embedding(model.embedding, tokens), range(len(model.layers))

    def run(x: Tensor, some: Sequence[int]) -> Tensor:
        return _layers(model, x, positions, start, keys, values, attend, some)

    return _watching(x, layers, watched, run)


def pays(patterns: HeadPatterns, layer: int, n_q: int, n_k: int) -> bool:
    """Whether a layer's budgets show at most half of its keys; a rule of numbers alone, so that runs agree."""
    ranges, columns = patterns.expected_keys(layer, n_q, n_k)
    return ranges + columns <= patterns.heads * (n_k - n_q / 2) / 2


def logits(model: DecoderModel, state: Tensor, largest: int | None = None) -> Tensor:
    """Logits `[.., V]` of states `[.., d]` as `rows` and `panel` return them; row-invariant for up to 64 rows.

    Args:
        model: the decoder.
        state: `[.., d]`.
        largest: how many of the largest logits the choice of a token depends on, 0 for all: a `Head` may give -inf for
            the others. None where it is not about choosing a token.
    """
    x = _rms_norm(state, *model.norm)
    if largest is not None and isinstance(model.head, Head):
        return model.head.largest(x, largest)
    return model.head(x)


@torch.inference_mode()
def prefill(
    cache: KVCache,
    b: int,
    tokens: Sequence[int],
    *,
    panels: bool,
    patterns: HeadPatterns | None,
    finish: bool = True,
    watched: Watched | None = None,
) -> Tensor | None:
    """Reads a prompt into sequence `b` and returns the state `[1, 1, d]` of its last token.

    With `panels`, tokens of whole panels of PANEL tokens, counted from position 0, are read by `panel`, the rest by
    `rows`; without, all by `rows`. Which it is depends on the whole prompt alone: what the cache holds already is kept
    as far as it was read in the way that this prompt asks for; so is what another sequence holds, which is copied. The
    state after a prompt is a function of its tokens, however it got there.

    Args:
        cache: where to read to; tokens after the common prefix are forgotten.
        b: which sequence.
        tokens: the whole prompt, from position 0.
        panels: whether to use panels.
        patterns: sparse attention in panels.
        finish: without it, tokens after the last whole panel are left for a later call, and None is returned.
        watched: gets the last token's states after each of its numbers of layers, fewer than all.
    """
    model, how = cache.model, patterns
    n = len(tokens)
    grid = n // PANEL * PANEL if panels else 0
    cache.borrow(b, tokens)
    done = cache.common(b, tokens)
    if model.for_prompts is not model:  # tokens that were decoded skipped work that a prompt's do not
        done = min(done, cache.prompts[b])
    by_panel = cache.panels[b][0] if cache.panels[b][1] is how else 0
    if by_panel != cache.panels[b][0]:
        done = 0
    if by_panel != grid:  # tokens between the two were not read as this prompt asks
        done = min(done, by_panel, grid)
    done = min(done, n - 1) if finish else done
    if done < grid:
        done = done // PANEL * PANEL
    cache.keep(b, done)
    cache.panels[b] = (min(by_panel, done), how)
    ids = torch.tensor(tokens[done:], dtype=torch.int64, device=model.device)[None]
    state = None
    for first, end in spans(done, grid, n if finish or not panels else grid):
        state = advance(cache, b, ids[:, first - done : end - done], first, end <= grid, patterns, watched=watched)
        cache.tokens[b].extend(tokens[first:end])
        cache.prompts[b] = end
        if end <= grid:
            cache.panels[b] = (end, how)
    return None if state is None or not finish else state[:, -1:]


def spans(done: int, grid: int, n: int) -> Iterator[tuple[int, int]]:
    """Pieces [first, end) of the tokens from `done` to `n`: panels up to `grid`, then at most MAX_ROWS at a time."""
    first = done
    while first < n:
        end = first + PANEL if first < grid else min(first + MAX_ROWS, n)
        yield first, end
        first = end


def advance(
    cache: KVCache,
    b: int,
    tokens: Tensor,
    first: int,
    whole: bool,
    patterns: HeadPatterns | None = None,
    decoded: bool = False,
    watched: Watched | None = None,
) -> Tensor:
    """Tokens `[1, n]` of sequence b from position `first` on, as a `whole` panel or as rows: states `[1, n, d]`.

    They are read as those of a prompt; with `decoded` as decoding reads them, to the bit where they are rows.
    """
    model = cache.model if decoded else cache.model.for_prompts
    keys, values = cache.of_sequence(b)
    if whole:
        return panel(model, keys, values, tokens, first, patterns, watched)
    start = torch.tensor([first], dtype=torch.int32, device=tokens.device)
    return rows(model, keys, values, tokens, start, watched=watched)
