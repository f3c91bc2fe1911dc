"""ggml's Q4_K: groups of 32 with minima, their scales in 6 bits for each 256."""

from functools import partial

from . import ggml
from .ggml import DISTRIBUTION, available

__all__ = ["DISTRIBUTION", "available", "int4_linear"]
int4_linear = partial(ggml.int4_linear, "Q4_K")
