"""The decoding loop: prompts in, one token of every unfinished sequence per step out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from . import forward
from .cache import KVCache
from .choosing import Chooser
from .model import DecoderModel
from .settings import Piece, Processor, Reason, Settings
from .text import TextStream


class Text:
    """One sequence on its way."""

    def __init__(self, number: int, prompt: list[int], room: int, settings: Settings, batch: int, tokenizer: Any):
        self.number = number
        self.prompt = prompt
        self.new: list[int] = []
        self.limit = min(settings.max_new_tokens, room)
        self.limit_reason: Reason = "length" if self.limit == settings.max_new_tokens else "context"
        self.sampling = settings.sampling(number, batch)
        self.text = None if tokenizer is None else TextStream(tokenizer, prompt, settings.stops)
        self.reason: Reason | None = None

    def add(self, token: int, ends: Mapping[int, Reason]) -> Piece:
        """Takes a new token and decides whether it is the last."""
        self.new.append(token)
        text = ""
        if self.text is not None:
            text = self.text.push(token)
            if self.text.stopped:
                self.reason = "stop"
        if self.reason is None and token in ends:
            self.reason = ends[token]
        if self.reason is None and len(self.new) >= self.limit:
            self.reason = self.limit_reason
        if self.reason is not None and self.text is not None:
            text += self.text.finish()
        return Piece(self.number, token, text, self.reason)


@dataclass(frozen=True)
class Prompted:
    """What the last tokens of prompts left.

    Attributes:
        state: `[B, 1, d]` after all layers.
        logits: `[B, 1, V]`; -inf where a `Head` left one out (`scrimp.methods.generation.linear`).
        watched: states `[B, 1, d]` after some numbers of layers.
    """

    state: Tensor
    logits: Tensor
    watched: forward.Watched

    @classmethod
    def gather(cls, state: Tensor, logits: Tensor, watched: Sequence[forward.Watched]) -> Prompted:
        """With what was watched in each sequence."""
        return cls(state, logits, {layer: torch.cat([each[layer] for each in watched]) for layer in watched[0]})


class Drafted(Protocol):
    """Another way to go on after the first new tokens, for one call.

    Attributes:
        layers: numbers of layers, fewer than all, after which it reads the states of the prompts' last tokens.
    """

    @property
    def layers(self) -> Sequence[int]: ...

    def wanted(self, largest: int) -> int:
        """How many of the largest logits it reads where so many choose the next token; 0 for all."""
        ...

    def decode(self, texts: Sequence[Text], chooser: Chooser, prompted: Prompted) -> Iterator[Piece]:
        """Pieces of the unfinished texts; `cache.tokens` grows as in plain decoding."""
        ...


class Drafting(Protocol):
    """What `draft` of a generation is."""

    def begin(self, model: DecoderModel, cache: KVCache) -> Drafted:
        """Gets ready, before the prompts are read.

        Raises:
            ValueError: it does not fit the model.
        """
        ...


def stream(
    model: DecoderModel,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    tokenizer: Any = None,
    processors: Sequence[Processor] = (),
    cache: KVCache | None = None,
    draft: Drafting | None = None,
) -> Iterator[Piece]:
    """Pieces as they come; closing the iterator cancels, and leaves the cache with what had been read and fed.

    Raises:
        ValueError: a prompt that is empty, too long or has unknown ids; settings that do not fit each other.
        RuntimeError: the cache is in use.
    """
    batch = len(prompts)
    if not 0 < batch <= forward.MAX_ROWS:
        raise ValueError(f"{batch} sequences at once; from 1 to {forward.MAX_ROWS} can be decoded together")
    if settings.stops and tokenizer is None:
        raise ValueError("stop strings need a tokenizer")
    patterns = settings.patterns
    if patterns is not None and (patterns.layers, patterns.heads) != (len(model.layers), model.heads):
        raise ValueError(
            f"the patterns are for {patterns.layers} layers of {patterns.heads} heads, "
            f"but the model has {len(model.layers)} layers of {model.heads} heads"
        )
    longest = max(len(prompt) for prompt in prompts)
    if cache is None:
        cache = KVCache(model, batch, max(1, min(model.context, longest + settings.max_new_tokens)))
    elif cache.batch != batch:
        raise ValueError(f"the cache is for {cache.batch} sequences, but there are {batch}")
    elif not cache.model.is_still(model):
        raise ValueError("the cache was filled by another model, or its weights have changed since")
    sequences = []
    for b, prompt in enumerate(prompts):
        room = cache.capacity - len(prompt)
        if not prompt:
            raise ValueError(f"prompt {b} has no tokens")
        if room < min(1, settings.max_new_tokens):
            what = "the model's context" if cache.capacity == model.context else "the cache"
            raise ValueError(f"prompt {b} has {len(prompt)} tokens, but {what} is of {cache.capacity}")
        if not 0 <= (bad := min(prompt)) <= (bad := max(prompt)) < model.vocabulary:
            raise ValueError(f"prompt {b} has token {bad}; ids are below {model.vocabulary}")
        sequences.append(Text(b, list(prompt), room, settings, batch, tokenizer))
    return _stream(model, cache, sequences, settings, processors, draft)


def _stream(
    model: DecoderModel,
    cache: KVCache,
    sequences: list[Text],
    settings: Settings,
    processors: Sequence[Processor],
    draft: Drafting | None,
) -> Iterator[Piece]:
    ends: dict[int, Reason] = dict.fromkeys(settings.stop_ids, "stop")
    ends |= {} if settings.ignore_eos else dict.fromkeys(model.eos, "eos")
    chooser = Chooser(processors, ends, settings.min_new_tokens)
    with cache.in_use():
        drafted = None if draft is None else draft.begin(model, cache)
        watched = [watching(drafted) for _ in sequences]
        states = [_read(cache, *pair, settings) for pair in zip(sequences, watched, strict=True)]
        if settings.max_new_tokens == 0:
            return
        state = torch.cat(states)  # type: ignore[arg-type]
        while True:
            largest = chooser.largest(sequences)
            logits = _logits(model, state, largest if drafted is None else drafted.wanted(largest))
            tokens = _next_tokens(logits, sequences, chooser)
            for sequence, token in zip(sequences, tokens, strict=True):
                if token is not None:
                    yield sequence.add(token, ends)
            if all(sequence.reason is not None for sequence in sequences):
                return
            if drafted is not None:
                yield from drafted.decode(sequences, chooser, Prompted.gather(state, logits, watched))
                return
            state = step(cache, [None if s.reason is not None else s.new[-1] for s in sequences])


def _read(cache: KVCache, sequence: Text, watched: forward.Watched, settings: Settings) -> Tensor | None:
    """Reads a prompt, in the pieces that were asked for; the state of its last token."""
    how = {"panels": settings.prefill == "panels", "patterns": settings.patterns}
    prompt, b = sequence.prompt, sequence.number
    for end in range(settings.chunk or len(prompt), len(prompt), settings.chunk or len(prompt)):
        if end > cache.common(b, prompt):
            forward.prefill(cache, b, prompt[:end], finish=False, **how)  # type: ignore[arg-type]
    finish = settings.max_new_tokens > 0
    return forward.prefill(cache, b, prompt, finish=finish, watched=watched, **how)  # type: ignore[arg-type]


@torch.inference_mode()
def step(cache: KVCache, tokens: Sequence[int | None]) -> Tensor:
    """Feeds one token to every sequence and returns their states `[B, 1, d]`.

    A sequence without a token goes along on the scratch slot of the cache: its state means nothing, its rows stay.
    """
    model, device = cache.model, cache.model.device
    lengths = [len(held) for held in cache.tokens]
    idle = [token is None for token in tokens]
    ids = torch.tensor([[token or 0] for token in tokens], device=device)
    slots = [cache.capacity if off else length for off, length in zip(idle, lengths, strict=True)]
    start = torch.tensor(slots, dtype=torch.int32, device=device)
    prefix = None
    if any(idle):
        seen = [0 if off else length for off, length in zip(idle, lengths, strict=True)]
        prefix = torch.tensor(seen, dtype=torch.int32, device=device)
    positions = (start if prefix is None else prefix)[:, None]
    state = forward.rows(model, cache.keys, cache.values, ids, start, prefix=prefix, positions=positions)
    for held, token in zip(cache.tokens, tokens, strict=True):
        if token is not None:
            held.append(token)
    return state


def watching(drafted: Drafted | None) -> forward.Watched:
    """Where the states of a prompt's last token that `drafted` reads will be."""
    return {} if drafted is None else dict.fromkeys(drafted.layers, torch.empty(0))


@torch.inference_mode()
def _logits(model: DecoderModel, state: Tensor, largest: int) -> Tensor:
    return forward.logits(model, state, largest)


@torch.inference_mode()
def _next_tokens(logits: Tensor, texts: Sequence[Text], chooser: Chooser) -> list[int | None]:
    """The next token of every sequence; None for finished ones."""
    if not chooser.is_plain(texts):
        pairs = zip(texts, logits[:, 0], strict=True)
        return [None if text.reason is not None else chooser.one(row, text) for text, row in pairs]
    none = torch.full(logits.shape[:2], -1, dtype=torch.int64, device=logits.device)
    return [tokens[0] if tokens else None for tokens in chooser.together(logits, none, none.int(), texts)[1]]
