"""ggml's Q4_0: groups of 32, symmetric."""

from functools import partial

from . import ggml
from .ggml import DISTRIBUTION, available

__all__ = ["DISTRIBUTION", "available", "int4_linear"]
int4_linear = partial(ggml.int4_linear, "Q4_0")
