"""scrimp: LLM inference made cheaper by not doing work that does not matter."""

from importlib import metadata

from . import ops
from ._registry import implementations, which
from .head_screen import HeadScreen
from .int4_weight import Int4Weight
from .loading import load
from .methods.codebook import add_codebooks, remove_codebooks
from .methods.generation import KVCache, generate
from .methods.head_patterns import HeadPatterns
from .methods.heads import compress_head
from .methods.int4 import quantize
from .methods.tree_decoding import tree_decoding
from .methods.wina import Calibration, calibrate, sparsify
from .sparse_plan import SparsePlan

try:
    __version__ = metadata.version("scrimp")
except metadata.PackageNotFoundError:  # a source tree on sys.path, not installed
    __version__ = "0+unknown"

__all__ = [
    "Calibration",
    "HeadPatterns",
    "HeadScreen",
    "Int4Weight",
    "KVCache",
    "SparsePlan",
    "__version__",
    "add_codebooks",
    "calibrate",
    "compress_head",
    "generate",
    "implementations",
    "load",
    "ops",
    "quantize",
    "remove_codebooks",
    "sparsify",
    "tree_decoding",
    "which",
]
