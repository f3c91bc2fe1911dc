"""scrimp.compress_head: another module in the place of a model's output head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .exact import dense_head, exact_head, hidden_states
from .vq import VQLogitsHead


def vq_head(model: nn.Module, codes: int, tokens: Tensor | None = None, **options: Any) -> VQLogitsHead:
    """The `VQLogitsHead` of a model (see `compress_head`)."""
    weight = dense_head(model).weight
    if tokens is not None:
        options["states"] = hidden_states(model, tokens)
        options["counts"] = torch.bincount(tokens.flatten(), minlength=len(weight))
    return VQLogitsHead.from_head(weight, codes, **options)


METHODS: dict[str, Callable[..., nn.Module]] = {  # (model, **options)
    "dense": dense_head,
    "exact": exact_head,
    "vq": vq_head,
}


def compress_head(model: nn.Module, method: str = "exact", **options: Any) -> nn.Module:
    """Replaces the output head of a Hugging Face model by one that computes less; returns the new head.

    | method | the head | options |
    |---|---|---|
    | "exact" | `ExactHead`: the same tokens; a screen of few bits beside the weight | `tokens`, `wide` |
    | "dense" | nn.Linear: undoes "exact" | |
    | "vq" | `VQLogitsHead`: an approximation by a codebook, other tokens | `codes`, `tokens`, those of `from_head` |

    But for "vq" the weight stays the parameter that it was, tied to the embedding or not: what `parameters`,
    `state_dict` and `save_pretrained` give does not change. A "vq" head has parameters of its own; a tied embedding
    keeps the weight, and nothing here brings the dense head back.

    Args:
        model: of transformers.
        method: one of the table's.
        **options: for "exact": `tokens`, int64 `[B, n]` of typical text (about 2,000 in all are enough), which the
            model reads to find a basis in which fewer bits suffice (without any the screen has 8 bits throughout);
            `wide`, as in `HeadScreen.build`. For "vq": `codes`, rows of the codebook; `tokens` of typical text, whose
            frequencies and hidden states make it much better; what `VQLogitsHead.from_head` takes.

    Raises:
        ValueError: an unknown method, a head that the method cannot take, or options that do not fit.
        UnsupportedModelError: "exact" for a model that scrimp's decoding loop, which asks the head, does not run.

    >>> import scrimp
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=999, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, eos_token_id=None)
    >>> model = LlamaForCausalLM(LlamaConfig(intermediate_size=32, **sizes))
    >>> before, head = scrimp.generate(model, [1, 2], max_new_tokens=5), scrimp.compress_head(model, "exact")
    >>> scrimp.generate(model, [1, 2], max_new_tokens=5) == before, head.counts["screened"]
    (True, 5)
    """
    if method not in METHODS:
        raise ValueError(f"compress_head: there is no method {method!r}; methods are {', '.join(sorted(METHODS))}")
    head = METHODS[method](model, **options)
    model.set_output_embeddings(head)  # type: ignore[operator]
    return head
