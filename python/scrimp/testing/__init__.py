"""What tests of ops share: the oracle tolerance and the cases of implementations."""

from .oracle import assert_matches_oracle, oracle_tolerance

__all__ = ["assert_matches_oracle", "oracle_tolerance"]
