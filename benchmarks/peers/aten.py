"""torch's own 4-bit product on a CPU: weights packed by `_convert_weight_to_int4pack_for_cpu`."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from scrimp import Int4Weight

from ..int4_linear import cold
from ..registry import Peer

DISTRIBUTION = "torch"
GROUP_SIZES = (32, 64, 128, 256)


def available() -> str | None:
    """Always there."""
    return None


def int4_linear(x: Tensor, weight: Int4Weight) -> Peer:
    """w = (q - 8) s + z with s and z in the dtype of x."""
    if weight.group_size not in GROUP_SIZES:
        raise ValueError(f"aten has groups of {GROUP_SIZES}, not {weight.group_size}")
    turns, g = packed(weight, x.dtype), weight.group_size

    def call() -> Tensor:
        codes, numbers = next(turns)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, g, numbers)

    return Peer(call)


@lru_cache(maxsize=1)
def packed(weight: Int4Weight, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Codes, and scales and zeros `[K / g, N, 2]`."""
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes().int(), 2)
    scales = weight.scales.float()
    zeros = torch.zeros_like(scales) if weight.zeros is None else (8 - weight.zeros.float()) * scales
    numbers = torch.stack((scales, zeros), -1).transpose(0, 1).contiguous().to(dtype)
    return cold(lambda: (codes.clone(), numbers.clone()), codes.nbytes + numbers.nbytes)
