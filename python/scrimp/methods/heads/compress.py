"""scrimp.compress_head: another module in the place of a model's output head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .exact import dense_head, exact_head

METHODS: dict[str, Callable[..., nn.Module]] = {"dense": dense_head, "exact": exact_head}  # (model, **options)


def compress_head(model: nn.Module, method: str = "exact", **options: Any) -> nn.Module:
    """Replaces the output head of a Hugging Face model by one that computes less; returns the new head.

    | method | the head | options |
    |---|---|---|
    | "exact" | `ExactHead`: the same tokens; a screen of few bits beside the weight | `tokens`, `wide` |
    | "dense" | nn.Linear: undoes "exact" | |

    The weight stays the parameter that it was, tied to the embedding or not: what `parameters`, `state_dict` and
    `save_pretrained` give does not change.

    Args:
        model: of transformers.
        method: one of the table's.
        **options: for "exact": `tokens`, int64 `[B, n]` of typical text (about 2,000 in all are enough), which the
            model reads to find a basis in which fewer bits suffice (without any the screen has 8 bits throughout);
            `wide`, as in `HeadScreen.build`.

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
