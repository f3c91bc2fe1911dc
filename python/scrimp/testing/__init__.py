"""What tests of ops share: the oracle tolerance, bitwise comparison, the cases of implementations, weights, models."""

from .int4 import random_int4_weight
from .models import random_llama
from .oracle import assert_matches_oracle, oracle_tolerance
from .rows import assert_rows_independent, same_bits

__all__ = [
    "assert_matches_oracle",
    "assert_rows_independent",
    "oracle_tolerance",
    "random_int4_weight",
    "random_llama",
    "same_bits",
]
