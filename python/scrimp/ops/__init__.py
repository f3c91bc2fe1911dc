"""The ops: one file each, with schema, checks, fake, reference and the documented public function."""

from .int4_linear import int4_linear
from .merge_attention import merge_attention
from .sparse_attention import sparse_attention
from .vertical_slash_index import vertical_slash_index

__all__ = ["int4_linear", "merge_attention", "sparse_attention", "vertical_slash_index"]
