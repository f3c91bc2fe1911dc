"""Models for tests: Llamas of random weights."""

from __future__ import annotations

from typing import Any


def random_llama(vocabulary: int = 64, layers: int = 2, **sizes: Any) -> Any:
    """A Llama (transformers') of freshly made weights: its logits nearly tie, without a larger `initializer_range`.

    Args:
        **sizes: fields of its config in place of these: 48 numbers a state, 64 in between, 6 heads on 2, 512 positions,
            no end of text.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    usual: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 6}
    usual |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "eos_token_id": None}
    config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=layers, **{**usual, **sizes})
    return LlamaForCausalLM(config).eval()
