"""What the tensors of a 4-bit weight must be: layout (shapes and types, free) and content (reads the tensors)."""

import torch
from torch import Tensor

GROUP_SIZES = (16, 32, 64, 128)
ZERO_KINDS = ("none8", "uint8", "float", "offset")
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _typed(who: str, name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    if tensor.dtype not in allowed:
        raise ValueError(f"{who}: {name} is {_name(tensor.dtype)}; it must be {', '.join(map(_name, allowed))}")


def _shaped(who: str, name: str, tensor: Tensor, *shape: int) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{who}: {name} has shape {list(tensor.shape)}, expected {list(shape)}")


def check_layout(
    who: str,
    *,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor | None,
    permutation: Tensor | None,
    group_size: int,
    zero_kind: str,
) -> None:
    """Raises ValueError, beginning with `who`, unless shapes, types and devices fit together; reads no tensor."""
    if zero_kind not in ZERO_KINDS:
        raise ValueError(f"{who}: zero_kind={zero_kind!r} must be one of {', '.join(ZERO_KINDS)}")
    if qweight.dim() != 2:
        raise ValueError(f"{who}: qweight must be [N, K/2], got shape {list(qweight.shape)}")
    _typed(who, "qweight", qweight, torch.uint8)
    _typed(who, "scales", scales, *SCALE_DTYPES)
    N, K = qweight.shape[0], 2 * qweight.shape[1]
    if group_size not in GROUP_SIZES and (group_size != K or K == 0):
        raise ValueError(f"{who}: group_size={group_size} must be 16, 32, 64, 128 or K={K}")
    if K % group_size:
        raise ValueError(f"{who}: K={K} is not a multiple of group_size={group_size}")
    _shaped(who, "scales", scales, N, K // group_size)
    if (zeros is None) != (zero_kind == "none8"):
        raise ValueError(f"{who}: zero_kind={zero_kind!r} {'takes no' if zeros is not None else 'needs'} zeros")
    if zeros is not None:
        _typed(who, "zeros", zeros, torch.uint8 if zero_kind == "uint8" else scales.dtype)
        _shaped(who, "zeros", zeros, N, K // group_size)
    if codebook is not None:
        if zero_kind != "none8":
            raise ValueError(f"{who}: a codebook has zero_kind='none8', got {zero_kind!r}")
        _typed(who, "codebook", codebook, torch.int8, torch.float32, torch.float64)
        _shaped(who, "codebook", codebook, 16)
    if permutation is not None:
        _typed(who, "permutation", permutation, torch.int32)
        _shaped(who, "permutation", permutation, K)
    for name, tensor in (("scales", scales), ("zeros", zeros), ("codebook", codebook), ("permutation", permutation)):
        if tensor is not None and tensor.device != qweight.device:
            raise ValueError(f"{who}: {name} is on {tensor.device}, but qweight on {qweight.device}")


def check_finite(who: str, name: str, tensor: Tensor) -> None:
    """Raises ValueError naming the first element of `tensor` that is not finite."""
    bad = ~torch.isfinite(tensor)
    if bool(bad.any()):
        at = [int(i) for i in bad.nonzero()[0]]
        raise ValueError(f"{who}: {name}{at} is {tensor[tuple(at)].item()}; it must be finite")


def check_permutation(who: str, permutation: Tensor, in_features: int) -> None:
    """Raises ValueError unless every input of `[0, in_features)` is named at least once and nothing else is."""
    outside = (permutation < 0) | (permutation >= in_features)
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise ValueError(f"{who}: permutation[{at}] is {int(permutation[at])}, outside the {in_features} inputs")
    missing = torch.bincount(permutation, minlength=in_features) == 0
    if bool(missing.any()):
        raise ValueError(f"{who}: permutation names input {int(missing.nonzero()[0])} of {in_features} nowhere")
