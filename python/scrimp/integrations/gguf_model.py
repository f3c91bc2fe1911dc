"""A GGUF file of a Llama-like model as a Hugging Face model: matrices of Q4_0, Q4_1 and Q8_0 stay packed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from ..int4_weight import GgufFile, Int4Weight
from .gguf_names import in_halves, transformers_name
from .quantizer import from_weights

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
PAIRED = ("llama", "mistral")  # whose queries and keys llama.cpp stores in its own rotary order
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def is_packed(file: GgufFile) -> bool:
    """Whether there is anything to keep packed in a model of a family that this module knows."""
    return file.metadata.get("general.architecture") in FAMILIES and bool(file.weights)


def load(file: GgufFile, dtype: torch.dtype | str = torch.float32, mode: str | None = None) -> PreTrainedModel:
    """The model. The embedding, and matrices of other types, become `dtype`; a packed head stays packed.

    Raises:
        ValueError: metadata or tensors that do not fit such a model, with file, tensor and value.
    """
    config = _config(file.path)
    weights: dict[str, Int4Weight] = {}
    plain: dict[str, Tensor] = {}
    for name in (*file.weights, *file.plain, *file.other):
        new = transformers_name(name)
        if new is None:
            raise ValueError(f"{file.path}: tensor {name!r}: a {config.model_type} model has no place for it")
        heads = _paired_heads(config, new)
        if name in file.weights:
            weight = file.weight(name)
            weights[new] = weight if heads is None else _rows_in_halves(file, name, weight, heads)
        else:
            value = file.tensor(name) if name in file.plain else _dequantized(file, name)
            plain[new] = value if heads is None else _checked_halves(file, name, value, heads)
    if EMBEDDING in weights:
        embedding = weights.pop(EMBEDDING)
        plain[EMBEDDING] = embedding.dequantize()
        if HEAD not in (weights | plain):
            weights[HEAD] = embedding
    config.tie_word_embeddings = HEAD not in (weights | plain)
    modules = {name.removesuffix(".weight"): weight for name, weight in weights.items()}
    return from_weights(file.path, config, modules, plain, dtype, mode)


def _config(path: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:  # transformers reads metadata without checks of its own
        raise ValueError(f"{path}: transformers cannot make a configuration of its metadata: {error}") from error


def _paired_heads(config: Any, name: str) -> int | None:
    """How many heads' rows are in llama.cpp's order."""
    if config.model_type not in PAIRED:
        return None
    if ".q_proj." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".k_proj." in name else None


def _checked_halves(file: GgufFile, name: str, rows: Tensor, heads: int) -> Tensor:
    if heads < 1 or rows.shape[0] % (2 * heads):
        raise ValueError(f"{file.path}: tensor {name!r}: {rows.shape[0]} rows are not made of {heads} heads of pairs")
    return in_halves(rows, heads)


def _rows_in_halves(file: GgufFile, name: str, weight: Int4Weight, heads: int) -> Int4Weight:
    order = _checked_halves(file, name, torch.arange(weight.out_features), heads)
    zeros = None if weight.zeros is None else weight.zeros[order]
    return replace(weight, qweight=weight.qweight[order], scales=weight.scales[order], zeros=zeros)


def _dequantized(file: GgufFile, name: str) -> Tensor:
    """A tensor of one of llama.cpp's other types, by the gguf package."""
    import gguf

    number, shape, data = file.raw(name)
    rows = data.view(math.prod(shape[:-1]), -1).numpy()
    return torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(number))).view(shape)
