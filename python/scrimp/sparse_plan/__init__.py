"""SparsePlan: which keys each tile of queries sees; what estimators produce and kernels consume."""

from .plan import SparsePlan

__all__ = ["SparsePlan"]
