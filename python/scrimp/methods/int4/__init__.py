"""4-bit weights: the methods that choose codes, scales and zeros, layer by layer or for a whole model."""

from .gptq import gptq
from .grid import Grid, largest_group_size
from .hqq import half_quadratic
from .linear import Int4Linear, int4_layers
from .quantize import quantize
from .report import LayerReport, Report
from .rtn import round_to_nearest

__all__ = [
    "Grid",
    "Int4Linear",
    "LayerReport",
    "Report",
    "gptq",
    "half_quadratic",
    "int4_layers",
    "largest_group_size",
    "quantize",
    "round_to_nearest",
]
