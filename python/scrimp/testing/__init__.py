"""What tests of ops share: the oracle tolerance, bitwise comparison, the cases of implementations."""

from .oracle import assert_matches_oracle, oracle_tolerance
from .rows import assert_rows_independent, same_bits

__all__ = ["assert_matches_oracle", "assert_rows_independent", "oracle_tolerance", "same_bits"]
