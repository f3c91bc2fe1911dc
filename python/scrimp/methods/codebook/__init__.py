"""Codebook Features: activations replaced by a few codes of a large codebook, in any Hugging Face model."""

from .layer import LOSSES, CodebookLayer
from .model import PLACES, add_codebooks, codebook_loss, codebooks, remove_codebooks

__all__ = [
    "LOSSES",
    "PLACES",
    "CodebookLayer",
    "add_codebooks",
    "codebook_loss",
    "codebooks",
    "remove_codebooks",
]
