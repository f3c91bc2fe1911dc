"""What the ops of a VQ head share: a codebook `[K, d]`, the codes of V tokens `[V]` or `[G, V]`, a bias `[V]`."""

import torch
from torch import Tensor

from ._check import FLOATS, check_dtype, check_same


def check_head(op: str, h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None) -> None:
    """Raises ValueError unless h, codebook, codes and bias fit together."""
    if h.dim() == 0:
        raise ValueError(f"{op}: h must be [.., d], got a scalar")
    check_dtype(op, "h", h, FLOATS)
    check_dtype(op, "codes", codes, (torch.int32,))
    floats = {"h": h, "codebook": codebook} | ({} if bias is None else {"bias": bias})
    check_same(op, "dtype", **{name: tensor.dtype for name, tensor in floats.items()})
    check_same(op, "device", **{name: tensor.device for name, tensor in (floats | {"codes": codes}).items()})
    if codebook.dim() != 2 or codebook.shape[1] != h.shape[-1]:
        raise ValueError(f"{op}: codebook has shape {list(codebook.shape)}, expected [K, {h.shape[-1]}]")
    if codebook.shape[1] > 1 and codebook.stride(1) != 1:
        raise ValueError(f"{op}: codebook has strides {codebook.stride()}; the elements of a row must be adjacent")
    if codes.dim() not in (1, 2) or (codes.dim() == 2 and codes.shape[0] == 0):
        raise ValueError(f"{op}: codes has shape {list(codes.shape)}, expected [V] or [G, V]")
    if bias is not None and list(bias.shape) != [codes.shape[-1]]:
        raise ValueError(f"{op}: bias has shape {list(bias.shape)}, expected [{codes.shape[-1]}]")


def check_values(op: str, codebook: Tensor, codes: Tensor) -> None:
    """Raises ValueError unless every code is a row of the codebook."""
    outside = ((codes < 0) | (codes >= codebook.shape[0])).nonzero()
    if len(outside):
        at = outside[0].tolist()
        value = int(codes[tuple(at)])
        raise ValueError(f"{op}: codes{at}={value} is not one of the {codebook.shape[0]} rows of the codebook")


def token_scores(scores: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    """Logits `[.., V]` from the scores `[.., K]` of the codes."""
    first, *more = torch.atleast_2d(codes).long()
    logits = scores[..., first]
    for level in more:
        logits = logits + scores[..., level]
    return logits if bias is None else logits + bias
