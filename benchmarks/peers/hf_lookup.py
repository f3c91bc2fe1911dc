"""Hugging Face's greedy loop with prompt lookup: drafts are copied from the text so far."""

from typing import Any

from torch import Tensor

from ..registry import Peer
from . import hf
from .hf import available

DISTRIBUTION = "transformers"
DRAFT = 10  # tokens, transformers' own example
__all__ = ["DISTRIBUTION", "available", "e2e"]


def e2e(model: Any, ids: Tensor, new: int) -> Peer:
    """`model.generate(prompt_lookup_num_tokens=...)`."""
    return hf.e2e(model, ids, new, prompt_lookup_num_tokens=DRAFT)
