"""Random 4-bit weights of every kind."""

from typing import Any

import torch

from ..int4_weight import Int4Weight

KINDS = ("none8", "uint8", "float", "offset", "codebook", "codebook8")


def random_int4_weight(
    n: int,
    k: int,
    group_size: int = 32,
    kind: str = "none8",
    *,
    dtype: torch.dtype = torch.float16,
    permuted: bool = False,
) -> Int4Weight:
    """A weight `[n, k]` of about unit row norm.

    Args:
        n: rows.
        k: inputs.
        group_size: 16, 32, 64, 128 or k.
        kind: a zero_kind, "codebook" (fp32) or "codebook8" (int8).
        dtype: of scales and floating zeros.
        permuted: whether the columns name the inputs in random order.

    >>> import torch
    >>> random_int4_weight(3, 64, kind="float")
    Int4Weight(N=3, K=64, group_size=32, float, scales=float16)
    """
    groups = k // group_size if group_size else 0
    scales = ((0.5 + torch.rand(n, groups)) / (4.6 * max(1, k) ** 0.5)).to(dtype)
    extra: dict[str, Any] = {}
    if kind == "uint8":
        extra = {"zeros": torch.randint(0, 16, (n, groups), dtype=torch.uint8), "zero_kind": kind}
    elif kind == "float":
        extra = {"zeros": (15 * torch.rand(n, groups)).to(dtype), "zero_kind": kind}
    elif kind == "offset":
        extra = {"zeros": (-8 * scales * (0.5 + torch.rand(n, groups))).to(dtype), "zero_kind": kind}
    elif kind == "codebook":
        extra = {"codebook": (8 * torch.randn(16)).sort().values}
    elif kind == "codebook8":
        extra = {"codebook": torch.randint(-127, 128, (16,), dtype=torch.int8)}
        scales = scales / 16
    elif kind != "none8":
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    if permuted:
        extra["permutation"] = torch.randperm(k).int()
    qweight = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    return Int4Weight(qweight, scales, group_size=group_size, **extra).validate()
