"""Generation: a decoding loop of row-invariant ops over a static cache, for Hugging Face models as they are."""

from .api import generate, stream
from .cache import KVCache
from .huggingface import UnsupportedModelError, decoder_model
from .linear import Linear
from .model import DecoderModel
from .sampling import Sampling
from .settings import Completion, Piece, Settings

__all__ = [
    "Completion",
    "DecoderModel",
    "KVCache",
    "Linear",
    "Piece",
    "Sampling",
    "Settings",
    "UnsupportedModelError",
    "decoder_model",
    "generate",
    "stream",
]
