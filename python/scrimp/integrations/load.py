"""scrimp.load: the door to `quantizer.load` that imports transformers only when it is used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load(path: str | Path, *, dtype: torch.dtype | str = "auto", mode: str | None = None) -> PreTrainedModel:
    """A causal language model from a folder of 4-bit weights: scrimp's own, GPTQ, AWQ or compressed-tensors.

    Weights stay 4-bit and keep their values to the bit; nothing of the producers' packages is needed.

    Args:
        path: folder with config.json and safetensors files.
        dtype: of everything else; "auto" as the checkpoint says.
        mode: arithmetic of the 4-bit layers, "exact" or "int8"; by default what the checkpoint says, else "exact".

    Raises:
        ValueError: files that are damaged or in a layout that is not read, tensors that are missing.
    """
    from . import quantizer

    return quantizer.load(path, dtype=dtype, mode=mode)
