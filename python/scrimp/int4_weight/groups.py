"""Groups as files have them (any size, a short last one, in any order of columns) made into those of an Int4Weight."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .check import GROUP_SIZES
from .pack import pack_nibbles, unpack_nibbles
from .weight import Int4Weight


def _common_size(sizes: Tensor, K: int) -> int:
    """The largest group size into which groups of `sizes` can be cut."""
    if sizes.numel() == 1:
        return K
    for size in reversed(GROUP_SIZES):
        if bool((sizes % size == 0).all()):
            return size
    raise ValueError(
        f"groups of {sorted(set(sizes.tolist()))[:4]} columns cannot be cut into groups of 16, 32, 64 or 128; "
        "dequantize and quantize anew"
    )


def regroup(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    group_size: int | None = None,
    group_of: Tensor | None = None,
) -> Int4Weight:
    """The weight whose column k has the scale `group_of[k]`, or k // group_size.

    Lossless: scales are repeated where a group is cut, columns are sorted by group once where `group_of` scatters
    them (a permutation), and zeros that are all 8 are dropped.

    Args:
        qweight: uint8 `[N, K/2]`.
        scales: `[N, G]`.
        zeros: uint8 `[N, G]`, or None for 8.
        group_size: columns of a group; the last one may be short.
        group_of: int `[K]`.

    Raises:
        ValueError: groups outside `[0, G)`, or of sizes that have no allowed divisor.

    >>> qweight, scales = torch.zeros(1, 40, dtype=torch.uint8), torch.tensor([[1.0, 2.0, 3.0]])
    >>> regroup(qweight, scales, group_size=32).scales.tolist()
    [[1.0, 1.0, 2.0, 2.0, 3.0]]
    """
    K, G = 2 * qweight.shape[1], scales.shape[1]
    permutation = None
    if group_of is None:
        if not group_size or group_size < 1 or -(-K // group_size) != G:
            raise ValueError(f"{K} columns in groups of {group_size} do not make {G} groups")
        sizes = torch.full((G,), group_size)
        if G:
            sizes[-1] = K - (G - 1) * group_size
    else:
        outside = (group_of < 0) | (group_of >= G)
        if bool(outside.any()):
            k = int(outside.nonzero()[0])
            raise ValueError(f"column {k} is in group {int(group_of[k])}, but there are {G} groups")
        order = torch.argsort(group_of, stable=True)
        sizes = torch.bincount(group_of, minlength=G)
        if not torch.equal(order, torch.arange(K)):
            permutation = order.to(torch.int32)
            qweight = pack_nibbles(unpack_nibbles(qweight)[:, order])
    used = (sizes > 0).nonzero()[:, 0]
    size = _common_size(sizes[used], K)
    groups = used.repeat_interleave(sizes[used] // size)
    if zeros is not None and bool((zeros == 8).all()):
        zeros = None
    if not torch.equal(groups, torch.arange(G)):
        scales, zeros = scales[:, groups], None if zeros is None else zeros[:, groups]
    return Int4Weight(
        qweight.contiguous(),
        scales.contiguous(),
        None if zeros is None else zeros.contiguous(),
        permutation=permutation,
        group_size=size,
        zero_kind="none8" if zeros is None else "uint8",
    )


def refine(weight: Int4Weight, group_size: int) -> Int4Weight:
    """The same weight with smaller groups: scales and zeros are repeated.

    >>> refine(Int4Weight.from_codes(torch.zeros(1, 32).int(), torch.ones(1, 1)), 16)
    Int4Weight(N=1, K=32, group_size=16, none8, scales=float32)
    """
    if weight.group_size % group_size:
        raise ValueError(f"groups of {weight.group_size} cannot be cut into groups of {group_size}")
    times = weight.group_size // group_size
    zeros = None if weight.zeros is None else weight.zeros.repeat_interleave(times, 1)
    return replace(weight, scales=weight.scales.repeat_interleave(times, 1), zeros=zeros, group_size=group_size)
