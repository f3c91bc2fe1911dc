"""Writes GPTQ version 2, which GPTQModel, vLLM and SGLang load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .groups import refine
from .pack import bytes_to_words, pack_nibbles
from .weight import Int4Weight


def _group_size(weights: Mapping[str, Int4Weight]) -> int:
    """The one group size that a configuration can name: -1 if all are per channel, else the smallest."""
    if all(weight.group_size == weight.columns for weight in weights.values()):
        return -1
    smallest = min(weight.group_size for weight in weights.values())
    for name, weight in weights.items():
        if weight.group_size % smallest:
            raise ValueError(f"GPTQ: {name} has groups of {weight.group_size}, not a multiple of {smallest}")
    return smallest


def _tensors(name: str, weight: Int4Weight) -> dict[str, Tensor]:
    N, K = weight.out_features, weight.columns
    if weight.codebook is not None or weight.zero_kind not in ("none8", "uint8"):
        kind = weight.zero_kind if weight.codebook is None else "a codebook"
        raise ValueError(f"GPTQ: {name} has {kind}; the format has integer zeros only: quantize with them")
    if weight.in_features != K:
        raise ValueError(f"GPTQ: {name} has {K} columns for {weight.in_features} inputs, which the format cannot say")
    if K % 8 or N % 8:
        raise ValueError(f"GPTQ: {name} is {N} x {K}; the format packs multiples of 8")
    scales = weight.scales.to(torch.float16)
    if not torch.equal(scales.float(), weight.scales.float()):
        worst = int((scales.float() - weight.scales.float()).abs().argmax())
        value = weight.scales.flatten()[worst].item()
        raise ValueError(f"GPTQ: {name} has the scale {value}, which fp16 cannot hold: quantize with fp16 scales")
    zeros = torch.full_like(scales, 8, dtype=torch.uint8) if weight.zeros is None else weight.zeros
    if zeros.numel() and int(zeros.max()) > 15:
        raise ValueError(f"GPTQ: {name} has the zero {int(zeros.max())}; the format holds 0 to 15")
    codes, group_of = weight.codes(), torch.arange(K, dtype=torch.int32) // weight.group_size
    if weight.permutation is not None:
        inputs = weight.permutation.long()
        codes, group_of = torch.empty_like(codes).index_copy_(1, inputs, codes), group_of[inputs.argsort()]
    return {
        f"{name}.qweight": bytes_to_words(pack_nibbles(codes)).T.contiguous(),
        f"{name}.qzeros": bytes_to_words(pack_nibbles(zeros.T.contiguous())),
        f"{name}.scales": scales.T.contiguous(),
        f"{name}.g_idx": group_of,
    }


def save_gptq(
    folder: str | Path, weights: Mapping[str, Int4Weight], plain: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Writes `model.safetensors` and `quantize_config.json` in GPTQ version 2 and returns the quantization_config.

    The weights keep their values to the bit: what the format cannot say is refused, and weights of several group
    sizes are written in the smallest. For a model, put the returned object into its config.json.

    Args:
        folder: an existing folder.
        weights: module name -> weight with fp16-representable scales, integer zeros of 0 to 15, N and K multiples
            of 8, and no input named twice.
        plain: name -> ordinary tensor (biases, norms, embeddings).

    Raises:
        ValueError: what the format cannot say, with module and value.

    >>> import tempfile
    >>> weight = Int4Weight.from_codes(torch.ones(8, 32).int(), torch.ones(8, 1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_gptq(folder, {"layer": weight})["checkpoint_format"]
    'gptq_v2'
    """
    from safetensors.torch import save_file

    if not weights:
        raise ValueError("GPTQ: there is no weight to write")
    group_size = _group_size(weights)
    tensors = {name: tensor.contiguous() for name, tensor in (plain or {}).items()}
    for name, weight in weights.items():
        tensors |= _tensors(name, weight if group_size == -1 else refine(weight, group_size))
    config = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": 4,
        "group_size": group_size,
        "desc_act": any(weight.permutation is not None for weight in weights.values()),
        "sym": all(weight.zeros is None for weight in weights.values()),
        "lm_head": any(name.split(".")[-1] == "lm_head" for name in weights),
    }
    save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    (Path(folder) / "quantize_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config
