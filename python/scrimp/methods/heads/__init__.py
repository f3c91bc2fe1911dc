"""Output heads that compute less: `compress_head` and the modules that it puts in place of a model's head."""

from .compress import METHODS, compress_head
from .exact import ExactHead

__all__ = ["METHODS", "ExactHead", "compress_head"]
