"""What the ops of 4-bit weights share: words of their numbers, and checks of what may differ from call to call."""

from __future__ import annotations

import torch
from torch import Tensor

from ..int4_weight.check import ZERO_KINDS
from ._check import FLOATS, check_dtype, check_same

MODES = ("exact", "int8")


def check_mode(who: str, mode: str) -> None:
    """Raises ValueError unless a mode is one of MODES."""
    if mode not in MODES:
        raise ValueError(f"{who}: mode={mode!r} must be one of {', '.join(MODES)}")


def check_numbers(op: str, zero_kind: int, mode: int) -> None:
    """Raises ValueError unless both are indices of their words."""
    for name, value, words in (("zero_kind", zero_kind, ZERO_KINDS), ("mode", mode, MODES)):
        if not 0 <= value < len(words):
            raise ValueError(f"{op}: {name}={value} must be an index of {words}")


def check_input(
    op: str,
    x: Tensor,
    N: int,
    K: int,
    codebook: Tensor | None,
    permutation: Tensor | None,
    bias: Tensor | None,
    mode: int,
) -> None:
    """Raises ValueError unless x and bias fit a weight `[N, K]`, and the mode its codebook."""
    if x.dim() < 1:
        raise ValueError(f"{op}: x must be [.., inputs], got a scalar")
    check_dtype(op, "x", x, FLOATS)
    inputs = x.shape[-1]
    if permutation is None and inputs != K:
        raise ValueError(f"{op}: x has {inputs} inputs, but the weight {K}")
    if permutation is not None and not (K > 0) == (0 < inputs <= K):
        raise ValueError(f"{op}: x has {inputs} inputs, but the weight permutes {K}")
    if MODES[mode] == "int8" and codebook is not None and codebook.dtype != torch.int8:
        raise ValueError(f"{op}: mode='int8' needs a codebook of int8, got {codebook.dtype}; use mode='exact'")
    if bias is not None:
        check_same(op, "device", x=x.device, bias=bias.device)
        check_same(op, "dtype", x=x.dtype, bias=bias.dtype)
        check_same(op, "shape", bias=tuple(bias.shape), outputs_of_the_weight=(N,))
