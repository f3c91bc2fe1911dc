"""Output heads that compute less: `compress_head` and the modules that it puts in place of a model's head."""

from .compress import METHODS, compress_head
from .exact import ExactHead
from .vq import VQLogitsHead
from .vq_loss import vq_cross_entropy
from .vq_training import VQTraining

__all__ = ["METHODS", "ExactHead", "VQLogitsHead", "VQTraining", "compress_head", "vq_cross_entropy"]
