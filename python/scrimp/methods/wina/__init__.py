"""Activation sparsity (WINA, TEAL): the channels of a linear layer's input that matter little are not multiplied."""

from .calibrate import calibrate
from .calibration import METHODS, SPARSITIES, Calibration
from .int4_linear import Int4SparseLinear
from .linear import Selection, SparseLinear
from .sparsify import ALLOCATIONS, LayerReport, Report, sparsify
from .usage import LayerUsage, Usage, metered

__all__ = [
    "ALLOCATIONS",
    "METHODS",
    "SPARSITIES",
    "Calibration",
    "Int4SparseLinear",
    "LayerReport",
    "LayerUsage",
    "Report",
    "Selection",
    "SparseLinear",
    "Usage",
    "calibrate",
    "metered",
    "sparsify",
]
