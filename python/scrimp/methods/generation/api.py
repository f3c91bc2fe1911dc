"""scrimp.generate: text or tokens in, completions out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import loop
from .cache import KVCache
from .forward import MAX_ROWS
from .huggingface import decoder_model
from .loop import Drafting
from .model import DecoderModel
from .settings import Completion, Piece, Processor, Settings

Prompt = str | Sequence[int] | Tensor
Prompts = Prompt | Sequence[str] | Sequence[Sequence[int]] | Mapping[str, Any]


def generate(
    model: nn.Module | DecoderModel,
    prompts: Prompts,
    tokenizer: Any = None,
    *,
    cache: KVCache | None = None,
    processors: Sequence[Processor] = (),
    draft: Drafting | None = None,
    callback: Callable[[Piece], object] | None = None,
    **settings: Any,
) -> Completion | list[Completion]:
    """Continues one prompt or several, greedily unless a temperature is given.

    A sequence's tokens do not depend on the batch, the other sequences or the chunks in which prompts are read: the
    logits have the same bits, and a sampled token's noise is a function of (seed, position, token) alone.

    Args:
        model: a Hugging Face Llama, Mistral, Qwen2 or Qwen3 (fp32 or bf16); its weights are not copied.
        prompts: a text or token ids `[n]` for one completion; a list of texts or of lists of ids, ids `[B, n]` or a
            tokenizer's result with `input_ids` and `attention_mask` (padding on either side) for several.
        tokenizer: of transformers; needed for texts and stop strings, and for `text` in the results.
        cache: keys and values to go on from (`KVCache`): tokens that the prompts share with it are not read again.
        processors: callables of (ids int64 `[1, n]`, logits fp32 `[1, V]`) -> logits, such as those of transformers;
            called for one sequence at a time.
        draft: of `scrimp.tree_decoding`: several tokens a step, and the same text.
        callback: called with every `Piece` as it comes.
        **settings: the fields of `Settings`: max_new_tokens, temperature, top_k, top_p, min_p, seed, stop, ...

    Returns:
        A `Completion`, or a list of them.

    Raises:
        UnsupportedModelError: the model computes something that the loop does not.
        ValueError: prompts or settings that do not fit.

    >>> import scrimp
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=None)
    >>> model = LlamaForCausalLM(LlamaConfig(intermediate_size=32, **sizes))
    >>> len(scrimp.generate(model, [1, 2, 3], max_new_tokens=5).tokens)
    5
    """
    view, wanted = decoder_model(model), Settings(**settings)
    ids, single = token_lists(prompts, tokenizer)
    found: list[Completion] = []
    groups = [ids[i : i + MAX_ROWS] for i in range(0, len(ids), MAX_ROWS)] if cache is None else [ids]
    for group in groups:
        first = len(found)
        seeds = wanted.seed if isinstance(wanted.seed, int) else list(wanted.seed)[first : first + len(group)]
        own = wanted if len(groups) == 1 else Settings(**{**settings, "seed": seeds})
        tokens: list[list[int]] = [[] for _ in group]
        texts = ["" for _ in group]
        reasons: list[Any] = [None for _ in group]
        for piece in loop.stream(view, group, own, tokenizer, processors, cache, draft):
            b = piece.sequence
            tokens[b].append(piece.token)
            texts[b] += piece.text
            reasons[b] = piece.reason
            if callback is not None:
                callback(Piece(first + b, piece.token, piece.text, piece.reason))
        found += map(Completion, tokens, texts, reasons, map(len, group))
    return found[0] if single else found


def stream(
    model: nn.Module | DecoderModel,
    prompts: Prompts,
    tokenizer: Any = None,
    *,
    cache: KVCache | None = None,
    processors: Sequence[Processor] = (),
    draft: Drafting | None = None,
    **settings: Any,
) -> Iterator[Piece]:
    """Like `generate`, as an iterator of pieces (at most 64 sequences); closing it cancels.

    What had been read and fed stays in `cache`, which can be used again.
    """
    ids, _ = token_lists(prompts, tokenizer)
    return loop.stream(decoder_model(model), ids, Settings(**settings), tokenizer, processors, cache, draft)


def token_lists(prompts: Prompts, tokenizer: Any) -> tuple[list[list[int]], bool]:
    """Prompts as lists of ids, and whether it was a single one.

    Raises:
        ValueError: texts without a tokenizer, or a tensor or mask of a wrong shape.
        TypeError: something else than prompts.
    """
    if isinstance(prompts, Mapping):
        return _unpadded(prompts)
    if isinstance(prompts, Tensor):
        if prompts.dim() not in (1, 2) or prompts.dtype not in (torch.int64, torch.int32):
            kind = f"{str(prompts.dtype).removeprefix('torch.')} {list(prompts.shape)}"
            raise ValueError(f"prompts must be token ids [n] or [B, n], got {kind}")
        return (prompts.tolist(), False) if prompts.dim() == 2 else ([prompts.tolist()], True)
    if isinstance(prompts, str):
        return [_encode(prompts, tokenizer)], True
    items: list[Any] = list(prompts)
    if all(isinstance(item, int) for item in items):
        return [items], True
    if all(isinstance(item, str) for item in items):
        return [_encode(item, tokenizer) for item in items], False
    if all(isinstance(item, Sequence | Tensor) and not isinstance(item, str) for item in items):
        return [[int(token) for token in item] for item in items], False
    raise TypeError("prompts must be texts, token ids, or lists of one of them")


def _encode(text: str, tokenizer: Any) -> list[int]:
    if tokenizer is None:
        raise ValueError("a prompt that is text needs a tokenizer")
    return list(tokenizer(text, verbose=False)["input_ids"])


def _unpadded(batch: Mapping[str, Any]) -> tuple[list[list[int]], bool]:
    if "input_ids" not in batch:
        raise ValueError(f"prompts has no 'input_ids', only {sorted(batch)}")
    ids = torch.as_tensor(batch["input_ids"]) if isinstance(batch["input_ids"], Tensor) else batch["input_ids"]
    if not isinstance(ids, Tensor):
        return token_lists(ids, None)
    mask = batch.get("attention_mask")
    if mask is None or ids.dim() == 1:
        return token_lists(ids, None)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}, but input_ids {list(ids.shape)}")
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)], False
