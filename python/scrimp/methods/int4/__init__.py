"""4-bit weights: the methods that choose codes, scales and zeros of a matrix."""

from .gptq import gptq
from .grid import Grid, largest_group_size
from .hqq import half_quadratic
from .rtn import round_to_nearest

__all__ = ["Grid", "gptq", "half_quadratic", "largest_group_size", "round_to_nearest"]
