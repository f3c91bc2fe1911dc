"""GGUF's names and row order of a Llama-like model, and transformers'."""

import re

from torch import Tensor

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def transformers_name(name: str) -> str | None:
    """The parameter that a tensor is in transformers; None where a Llama-like model has no such tensor.

    >>> transformers_name("blk.3.attn_q.weight"), transformers_name("output.weight"), transformers_name("ssm.weight")
    ('model.layers.3.self_attn.q_proj.weight', 'lm_head.weight', None)
    """
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if found is None:
        return None
    layer, kind, part = found.groups()
    module = WHOLE.get(kind) if layer is None else LAYER.get(kind)
    if module is None:
        return None
    return f"{module}.{part}" if layer is None else f"model.layers.{int(layer)}.{module}.{part}"


def in_halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys from llama.cpp's rotary order (pairs side by side) to transformers' (halves).

    >>> import torch
    >>> in_halves(torch.arange(8), heads=2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
