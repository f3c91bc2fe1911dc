"""Int4Weight: 4-bit weight matrices in one canonical form, and the files they come from."""

from .weight import Int4Weight

__all__ = ["Int4Weight"]
