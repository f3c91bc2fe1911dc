"""ONNX Runtime's MatMulNBits computing in fp32 (accuracy level 1)."""

from torch import Tensor

from scrimp import Int4Weight

from ..registry import Peer
from . import onnxruntime
from .onnxruntime import DISTRIBUTION, available

__all__ = ["DISTRIBUTION", "available", "int4_linear"]


def int4_linear(x: Tensor, weight: Int4Weight) -> Peer:
    """As the other one, with floating activations."""
    return onnxruntime.int4_linear(x, weight, onnxruntime.FP32)
