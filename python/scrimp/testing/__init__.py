"""What tests of ops share: the oracle tolerance and random 4-bit weights."""

from .int4 import random_int4_weight
from .oracle import assert_matches_oracle, oracle_tolerance

__all__ = ["assert_matches_oracle", "oracle_tolerance", "random_int4_weight"]
