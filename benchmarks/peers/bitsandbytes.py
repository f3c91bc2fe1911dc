"""bitsandbytes' NF4 in blocks of 64, quantized by itself from what our weights stand for."""

from collections.abc import Iterator
from copy import copy
from functools import lru_cache
from typing import Any

from torch import Tensor

from scrimp import Int4Weight

from ..int4_linear import REQUANTIZED, cold
from ..registry import Peer

DISTRIBUTION = "bitsandbytes"


def available() -> str | None:
    """Its CPU build is part of the wheel."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed; make setup-peers, or pip install bitsandbytes"
    return None


def int4_linear(x: Tensor, weight: Int4Weight) -> Peer:
    """`bitsandbytes.matmul_4bit`, which Linear4bit calls."""
    import bitsandbytes

    turns = quantized(weight)

    def call() -> Tensor:
        codes, state = next(turns)
        result: Tensor = bitsandbytes.matmul_4bit(x, codes.t(), state)
        return result

    return Peer(call, within=REQUANTIZED)


@lru_cache(maxsize=1)
def quantized(weight: Int4Weight) -> Iterator[tuple[Tensor, Any]]:
    """Codes and what belongs to them."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(weight.dequantize(), blocksize=64, quant_type="nf4")

    def another() -> tuple[Tensor, Any]:
        own = copy(state)
        own.absmax = state.absmax.clone()
        return codes.clone(), own

    return cold(another, codes.nbytes + state.absmax.nbytes)
