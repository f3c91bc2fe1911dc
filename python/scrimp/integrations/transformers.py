"""Sparse prefill for Hugging Face models: `model.set_attn_implementation("scrimp_sparse")`.

    from scrimp.integrations import transformers as scrimp_transformers
    scrimp_transformers.register()
    scrimp_transformers.configure(model, patterns)        # a HeadPatterns
    model.set_attn_implementation("scrimp_sparse")

    model.generate(ids, custom_generate=scrimp_transformers.custom_generate)  # and decoding by scrimp's own loop

In stock decoding, short prompts and layers where sparse attention would lose by the measured cost model run as "sdpa"
does. Layers with a sliding window see exactly their window, whatever their heads' budgets are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from .. import ops
from ..methods.attention_cost import AttentionCost
from ..methods.generation import KVCache, Sampling, decoder_model, forward
from ..methods.generation.loop import Prompted, step, watching
from ..methods.generation.sampling import choose
from ..methods.head_patterns import HeadPatterns
from ..methods.sparse_attention import sparse_prefill
from ..methods.tree_decoding import TreeDecoding
from ..sparse_plan import SparsePlan

NAME = "scrimp_sparse"
SHORTEST = 128  # queries; below it nothing is measured or planned
PlanObserver = Callable[[int, SparsePlan], None]

_log = logging.getLogger("scrimp")


@dataclass
class _Layer:
    """What an attention module knows of its sparsity."""

    index: int
    patterns: HeadPatterns
    observers: list[PlanObserver]
    choices: dict[tuple[int, int, torch.dtype, int, bool], str] = field(default_factory=dict)


def register() -> None:
    """Makes the attention implementation "scrimp_sparse" known to transformers; twice does no harm."""
    AttentionInterface.register(NAME, sparse_attention_forward)
    AttentionMaskInterface.register(NAME, sparse_attention_mask)


def _attention_modules(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "num_key_value_groups")]


def _layer(module: nn.Module) -> _Layer | None:
    return module.__dict__.get("_scrimp")


def _layers(model: nn.Module) -> list[_Layer]:
    return [layer for layer in map(_layer, _attention_modules(model)) if layer is not None]


def configure(model: PreTrainedModel, patterns: HeadPatterns | None) -> None:
    """Gives every attention layer of `model` its budgets; None makes all of them dense again.

    Raises:
        ValueError: the patterns have other layers or heads than the model.
    """
    modules = _attention_modules(model)
    config = model.config.get_text_config()
    if patterns is not None and (patterns.layers, patterns.heads) != (len(modules), config.num_attention_heads):
        raise ValueError(
            f"the patterns are for {patterns.layers} layers of {patterns.heads} heads, "
            f"but the model has {len(modules)} layers of {config.num_attention_heads} heads"
        )
    for module in modules:
        known = _layer(module)
        observers = known.observers if known else []
        index = int(module.__dict__["layer_idx"])
        module.__dict__["_scrimp"] = None if patterns is None else _Layer(index, patterns, observers)


@contextmanager
def watch_plans(model: PreTrainedModel, observer: PlanObserver) -> Iterator[None]:
    """Calls `observer(layer, plan)` for every sparse prefill inside the `with` block."""
    watched = [layer.observers for layer in _layers(model)]
    for observers in watched:
        observers.append(observer)
    try:
        yield
    finally:
        for observers in watched:
            observers.remove(observer)


def choices(model: PreTrainedModel) -> list[str]:
    """What each layer ran so far, one line per layer and shape, with the predicted times that decided it."""
    return [
        f"layer {layer.index}, {n_q} queries, {n_k} keys: {text}"
        for layer in _layers(model)
        for (n_q, n_k, *_), text in layer.choices.items()
    ]


def sparse_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a forward pass: None if purely causal, bool `[B, kv_length]` if causal with left padding.

    A sliding window, with left padding or without, is int32 `[B, q_length]`: the first key of each row.
    Everything else (short inputs, packed sequences, static caches) gets the 4-D mask of "sdpa".
    """
    window = kwargs.get("local_size")
    if window is not None and not _same(mask_function, sliding_window_causal_mask_function(window)):
        window = None
    causal = window is not None or (mask_function is causal_mask_function and kv_offset == 0)
    if causal and q_offset + q_length == kv_offset + kv_length and q_length >= SHORTEST:
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        if padding is None:
            padding = torch.ones(batch_size, kv_length, dtype=torch.bool, device=kwargs.get("device", "cpu"))
        padding = padding[:, kv_offset : kv_offset + kv_length].bool()
        left = bool((padding[:, 1:] >= padding[:, :-1]).all())  # zeros, then ones
        if left and window is not None:
            row = torch.arange(kv_length - q_length, kv_length, device=padding.device)
            return torch.maximum((row + 1 - window).clamp(min=0), padding.int().argmax(1, keepdim=True)).int()
        if left:
            return None if q_length == kv_length and bool(padding.all()) else padding
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )


def _same(one: Any, other: Any) -> bool:
    """Whether two mask functions are the same code over the same numbers."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, FunctionType) and isinstance(other, FunctionType):
        closures = (tuple(cell.cell_contents for cell in f.__closure__ or ()) for f in (one, other))
        return one.__code__ is other.__code__ and _same(*closures)
    return isinstance(one, int) and isinstance(other, int) and one == other


def sparse_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: query `[B, H, n_q, D]`, key and value `[B, G, n_k, D]` -> `[B, n_q, H, D]`."""
    layer = _layer(module)
    n_q, n_k = query.shape[2], key.shape[2]
    row_start = attention_mask if attention_mask is not None and attention_mask.dtype == torch.int32 else None
    starts = _padding_starts(attention_mask) if row_start is None else None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    prefill = n_q >= SHORTEST and causal and (n_q == n_k if attention_mask is None else attention_mask.dim() == 2)
    plain = dropout == 0.0 and not kwargs.get("softcap") and kwargs.get("position_bias") is None
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if layer is not None and prefill and plain and not needs_grad and _pays(layer, query, key, row_start):
        if row_start is None:
            out = sparse_prefill(query, key, value, layer.patterns, layer.index, scaling, starts, layer.observers)
        else:
            plan = SparsePlan.dense(n_q, n_k, device=query.device).expand(batch=len(row_start))
            plan = replace(plan, row_start=row_start)
            for observe in layer.observers:
                observe(layer.index, plan)
            out = ops.sparse_attention(query, key, value, plan, scaling)[0]
        return out.transpose(1, 2).contiguous(), None
    if attention_mask is not None and attention_mask.dim() == 2:
        attention_mask = _causal_mask(attention_mask, n_q, n_k)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal, **kwargs
    )


def _padding_starts(mask: Tensor | None) -> list[int] | None:
    """First real key of each sequence, from the 2-D mask of `sparse_attention_mask`."""
    if mask is None or mask.dim() != 2:
        return None
    return mask.int().argmax(1).tolist()


def _causal_mask(mask: Tensor, n_q: int, n_k: int) -> Tensor:
    """The 4-D form of a 2-D mask of `sparse_attention_mask`: bool `[B, 1, n_q, n_k]`."""
    key = torch.arange(n_k, device=mask.device)
    seen = mask[:, None, None, :] if mask.dtype == torch.bool else key >= mask[:, None, :, None]
    return seen & (key <= key[n_k - n_q :, None])


def _pays(layer: _Layer, query: Tensor, key: Tensor, row_start: Tensor | None) -> bool:
    shape = (query.shape[2], key.shape[2], query.dtype, torch.get_num_threads(), row_start is not None)
    if shape not in layer.choices:
        cost = AttentionCost.measured(query.shape[3], query.dtype, query.device.type, torch.get_num_threads())
        sparse, dense = cost.predict(layer.patterns, layer.index, *shape[:2])
        if row_start is not None:
            seen = torch.arange(shape[1] - shape[0], shape[1], device=key.device) + 1 - row_start
            sparse = cost.ranges * query.shape[1] * shape[0] * float(seen.clamp(min=0).float().mean() + 64)
        verdict = "sparse" if sparse < dense else "sdpa"
        layer.choices[shape] = f"{verdict} (predicted {1e3 * sparse:.2f} ms sparse, {1e3 * dense:.2f} ms sdpa)"
        _log.info("layer %d, %d queries, %d keys: %s", layer.index, *shape[:2], layer.choices[shape])
    return layer.choices[shape].startswith("sparse")


@torch.no_grad()
def custom_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    seed: int | list[int] | None = None,
    streamer: Any = None,
    draft: TreeDecoding | None = None,
    **kwargs: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """Greedy or sampled decoding by scrimp's loop, for `model.generate(..., custom_generate=custom_generate)`.

    What generate prepares (processors, warpers, stopping criteria, left padding) works as it does in stock decoding.
    Long prompts are read sparsely where the model's attention is "scrimp_sparse" and configured.

    Args:
        seed: of the sampling, one for all sequences or one each (`generate(..., seed=1)`); unless given, torch's
            generator draws one for each.
        draft: of `scrimp.tree_decoding`, bound with functools.partial; a batch goes on with a tree while it holds the
            next token of every sequence.
        streamer: transformers 5 does not pass its own on to callables; bind it with functools.partial.

    Raises:
        ValueError: beams, a filled cache, embeddings as inputs, more than 64 sequences, or a model the loop cannot run.
    """
    view = decoder_model(model)
    batch, length = input_ids.shape
    _refuse(generation_config, kwargs)
    mask = kwargs.get("attention_mask")
    real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask[:, -length:].bool()
    prompts = [row[keep].tolist() for row, keep in zip(input_ids, real, strict=True)]
    if not 0 < batch <= forward.MAX_ROWS or not all(prompts):
        raise ValueError(
            f"{batch} sequences of {sorted(map(len, prompts))} tokens; 1 to {forward.MAX_ROWS} are decoded"
        )
    longest = max(map(len, prompts))
    room = min(view.context, longest + generation_config.max_length - length)
    if longest >= view.context:
        raise ValueError(f"a prompt of {longest} tokens leaves no room in the model's context of {view.context}")
    cache = KVCache(view, batch, room)
    known = _layers(model) if model.config._attn_implementation == NAME else []
    patterns = known[0].patterns if known else None
    drafted = None if draft is None else draft.begin(view, cache)
    how_read: dict[str, Any] = {"panels": True, "patterns": patterns}
    watched = [watching(drafted) for _ in prompts]
    states = [forward.prefill(cache, b, p, watched=watched[b], **how_read) for b, p in enumerate(prompts)]
    largest = _largest(generation_config, logits_processor)
    with torch.inference_mode():
        state = torch.cat(states)  # type: ignore[arg-type]
        logits = forward.logits(view, state, largest if drafted is None else drafted.wanted(largest))
    ahead = None if drafted is None else drafted.lockstep(prompts, Prompted.gather(state, logits, watched), largest)
    logits = logits[:, 0]
    seeds = (
        torch.randint(2**62, (batch,)).tolist() if seed is None else [seed] * batch if isinstance(seed, int) else seed
    )
    how = [Sampling(float(generation_config.do_sample), seed=seeds[b]) for b in range(batch)]
    done = [False] * batch
    raw: list[Tensor] = []
    scores: list[Tensor] = []
    while True:
        with torch.inference_mode():
            logits = logits.float()
            processed = logits_processor(input_ids, logits.clone())
            positions = [len(held) for held in cache.tokens]
            tokens = [0 if done[b] else choose(processed[b], positions[b], how[b]) for b in range(batch)]
        raw += [logits.clone()] if generation_config.output_logits else []
        scores += [processed.clone()] if generation_config.output_scores else []
        shown = [int(generation_config.pad_token_id or 0) if d else t for t, d in zip(tokens, done, strict=True)]
        chosen = torch.tensor(shown, device=input_ids.device)
        input_ids = torch.cat([input_ids, chosen[:, None]], 1)
        if streamer is not None:
            streamer.put(chosen.cpu())
        stopped = stopping_criteria(input_ids, tuple(scores)).tolist()
        done = [before or now for before, now in zip(done, stopped, strict=True)]
        if all(done) or max(positions) + 1 >= room:
            break
        fed = [None if d else t for t, d in zip(tokens, done, strict=True)]
        with torch.inference_mode():
            logits = ahead.logits(fed) if ahead else forward.logits(view, step(cache, fed), largest)[:, 0]
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    return GenerateDecoderOnlyOutput(
        sequences=input_ids,
        scores=tuple(scores) if generation_config.output_scores else None,
        logits=tuple(raw) if generation_config.output_logits else None,
    )


def _largest(config: GenerationConfig, processors: LogitsProcessorList) -> int:
    """How many of the largest logits the tokens depend on (`scrimp.methods.generation.forward.logits`); 0 for all.

    After a top-k warper all other logits are -inf; before it only a temperature may have been at work.
    """
    if config.output_logits or config.output_scores:
        return 0
    if not config.do_sample:
        return 0 if processors else 1
    temperature = 1.0
    for processor in processors:
        if type(processor) is TopKLogitsWarper and processor.filter_value == -math.inf:
            return Sampling(temperature, int(processor.top_k)).largest
        if type(processor) is not TemperatureLogitsWarper or temperature != 1:
            return 0
        temperature = float(processor.temperature)
    return 0


def _refuse(config: GenerationConfig, kwargs: dict[str, Any]) -> None:
    """Raises ValueError for what generate was asked and the loop does not do."""
    if config.num_beams != 1:
        raise ValueError(f"custom_generate: num_beams={config.num_beams}; scrimp decodes greedily or by sampling")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise ValueError(f"custom_generate: {name} is not available from scrimp's kernels")
    held = kwargs.get("past_key_values")
    if held is not None and held.get_seq_length():
        raise ValueError("custom_generate: past_key_values holds tokens; scrimp.generate goes on from a scrimp.KVCache")
    if kwargs.get("inputs_embeds") is not None:
        raise ValueError("custom_generate: inputs_embeds instead of token ids are not supported")
