"""The ops: one file each, with schema, checks, fake, reference and the documented public function."""

from .merge_attention import merge_attention

__all__ = ["merge_attention"]
