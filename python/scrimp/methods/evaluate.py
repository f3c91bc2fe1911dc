"""How good a model is, and how far from another one: perplexity, divergence, agreement, and a lookup from far away."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .generation import forward
from .generation.api import generate
from .generation.cache import KVCache
from .generation.huggingface import UnsupportedModelError, decoder_model
from .head_patterns import HeadPatterns

ROWS = 256  # rows of logits in memory at a time
PROTOCOL = (
    "windows that do not overlap, each read on its own from position 0; its first token is not predicted; "
    "perplexity = exp(mean negative log-likelihood per predicted token)"
)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Reader:
    """A model that reads windows: by the decoding engine, or by its own code where the engine does not know it.

    A model whose linears skip work in decoding is read, after each window's first token, as decoding reads.

    Args:
        model: a Hugging Face model for causal language modelling.
        patterns: sparse attention in panels (the engine's).
        stock: read by the model's own code whatever the engine knows.

    Attributes:
        by_engine: which of the two it is.
    """

    def __init__(self, model: nn.Module, patterns: HeadPatterns | None = None, stock: bool = False) -> None:
        self.model: Any = model
        self.patterns = patterns
        self.by_engine = False
        if stock:
            return
        try:
            self.view = decoder_model(model)
            self.by_engine = True
        except UnsupportedModelError:
            if patterns is not None:
                raise
            return
        self.decoded = self.view.for_prompts is not self.view
        if self.decoded and patterns is not None:
            raise ValueError("patterns are for prompts; a model whose linears skip work is read as decoding reads")

    @torch.inference_mode()
    def states(self, tokens: Tensor) -> Tensor:
        """What the head takes, `[n, d]`, for the tokens `[n]` of one window."""
        if not self.by_engine:
            states: Tensor = self.model.base_model(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
            return states
        n = tokens.shape[0]
        cache = KVCache(self.view, 1, n)
        if self.decoded:
            grid, spans = 0, [(0, 1), *forward.spans(1, 0, n)]
        else:
            grid = n // forward.PANEL * forward.PANEL
            spans = list(forward.spans(0, grid, n))
        parts = [
            forward.advance(
                cache, 0, tokens[None, first:end], first, end <= grid, self.patterns, self.decoded and first > 0
            )[0]
            for first, end in spans
        ]
        return torch.cat(parts)

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """fp32 `[n, V]`."""
        if not self.by_engine:
            head: Tensor = self.model.get_output_embeddings()(states)
            return head.float()
        return forward.logits(self.view, states[None])[0].float()


@dataclass(frozen=True)
class Quality:
    """Per predicted token, `[windows, length - 1]`.

    Attributes:
        nll: negative log-likelihood in nats, fp32.
        kl: divergence KL(reference || model) in nats, fp32; None without a reference.
        same: whether both have the same most likely token; None without a reference.
    """

    nll: Tensor
    kl: Tensor | None = None
    same: Tensor | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll.double().mean().item())

    @property
    def perplexity_error(self) -> float:
        """Standard error from the windows' spread; NaN for a single window."""
        means = self.nll.double().mean(1)
        return float(self.perplexity * means.std() / len(means) ** 0.5)

    def figures(self) -> dict[str, float]:
        """Flat numbers for people and files."""
        found = {"perplexity": self.perplexity}
        if len(self.nll) > 1:
            found["perplexity_error"] = self.perplexity_error
        if self.kl is not None and self.same is not None:
            kl = self.kl.double().flatten()
            found["kl_mean"] = float(kl.mean())
            found["kl_median"] = float(kl.median())
            found["kl_p99"] = float(kl.sort().values[min(len(kl) - 1, int(0.99 * len(kl)))])
            found["kl_max"] = float(kl.max())
            found["top1_agreement"] = float(self.same.double().mean())
        return found


def quality(
    reader: Reader, windows: Tensor, reference: Reader | None = None, step: Callable[[], object] = lambda: None
) -> tuple[Quality, Quality | None]:
    """Reads every window; never holds more than ROWS rows of logits.

    Args:
        reader: the model.
        windows: int64 `[windows, length]`, length at least 2.
        reference: another model or configuration with the same vocabulary.
        step: called after each window.

    Returns:
        The quality of the model, beside the reference where there is one, and of the reference.

    Raises:
        ValueError: windows of fewer than two tokens, or vocabularies that differ.
    """
    if windows.dim() != 2 or windows.shape[1] < 2 or not windows.shape[0]:
        raise ValueError(f"windows has shape {list(windows.shape)}; it must be [at least 1, at least 2] tokens")
    parts: list[list[Tensor]] = [[] for _ in range(4)]
    for window in windows:
        states = [who.states(window)[:-1].split(ROWS) for who in (reader, reference) if who is not None]
        for rows, target in zip(zip(*states, strict=True), window[1:].split(ROWS), strict=True):
            mine = reader.logits(rows[0])
            parts[0].append(cross_entropy(mine, target, reduction="none"))
            if reference is not None:
                theirs = reference.logits(rows[1])
                if theirs.shape != mine.shape:
                    raise ValueError(f"vocabularies of {mine.shape[1]} and {theirs.shape[1]} tokens cannot be compared")
                parts[1].append(cross_entropy(theirs, target, reduction="none"))
                parts[2].append(_kl(theirs, mine))
                parts[3].append(mine.argmax(-1) == theirs.argmax(-1))
        step()
    shape = (windows.shape[0], windows.shape[1] - 1)
    nll, other, kl, same = (torch.cat(part).view(shape) if part else None for part in parts)
    return Quality(nll, kl, same), None if other is None else Quality(other)  # type: ignore[arg-type]


def _kl(reference: Tensor, model: Tensor) -> Tensor:
    """KL(reference || model) of each row of logits, in float64 sums of fp32 terms."""
    p, q = reference.log_softmax(-1), model.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1, dtype=torch.float64).clamp(min=0).float()


@dataclass(frozen=True)
class Needle:
    """One pass key hidden in filler text.

    Attributes:
        depth: where it stood, 0 the beginning and 1 the end.
        key: what had to be found.
        answer: what the model said.
    """

    depth: float
    key: str
    answer: str

    @property
    def found(self) -> bool:
        return self.key in self.answer


def needles(
    model: nn.Module, tokenizer: Any, filler: str, length: int, depths: Sequence[float] = DEPTHS, **settings: Any
) -> list[Needle]:
    """Asks for a five-digit pass key hidden in about `length` tokens of filler, once for each depth, greedily.

    Raises:
        ValueError: the filler is too short for `length`.
    """
    ids = list(tokenizer(filler, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < length:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than the {length} of the pass-key test")
    found = []
    for i, depth in enumerate(depths):
        key = str(10_000 + (i + 1) * 7919 % 90_000)
        cut = int(depth * length)
        before, after = (tokenizer.decode(part) for part in (ids[:cut], ids[cut:length]))
        text = f"{before}\n\nThe pass key is {key}. Remember it.\n\n{after}\n\n"
        question = "What is the pass key? Answer with the number."
        if tokenizer.chat_template is None:
            prompt = text + question + " The pass key is"
        else:
            message = [{"role": "user", "content": text + question}]
            prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        tokens = list(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
        answer: Any = generate(model, tokens, tokenizer, max_new_tokens=24, **settings)
        found.append(Needle(depth, key, answer.text.strip()))
    return found
