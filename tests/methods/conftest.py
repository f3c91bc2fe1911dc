"""Tiny random models of every family that the decoding loop runs."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
import transformers
from transformers import PreTrainedModel

SIZES = {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "eos_token_id": None,
    "initializer_range": 0.3,  # logits of different tokens are far apart, unlike those of a freshly made model
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {}),
    "llama-biases-tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-rope-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-rope-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-gelu-ungrouped": ("Llama", {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 6}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 40}),
    "qwen2": ("Qwen2", {}),
    "qwen2-some-windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),
}


@cache
def make(family: str) -> PreTrainedModel:
    """One model of a family, kept for the whole run: tests must not change it."""
    name, extra = FAMILIES[family]
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **extra})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # norms and biases too, which are born as ones and zeros
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0 if float(parameter.detach().mean()) else 0.0, std=0.2)
    return model


@pytest.fixture
def tiny() -> Callable[[str], PreTrainedModel]:
    return make
