"""What the tensors of a 4-bit weight must be: layout (shapes and types, free) and content (reads the tensors)."""

import torch
from torch import Tensor

GROUP_SIZES = (16, 32, 64, 128)
TILE = 128  # outputs of `Int4Channels` whose codes of a channel are 64 bytes side by side
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
    if qweight.dim() != 2:
        raise ValueError(f"{who}: qweight must be [N, K/2], got shape {list(qweight.shape)}")
    N, K = qweight.shape[0], 2 * qweight.shape[1]
    _typed(who, "qweight", qweight, torch.uint8)
    _group_size(who, K, group_size)
    rest = {"zeros": zeros, "codebook": codebook, "permutation": permutation}
    _beside(who, K, (N, K // group_size), zero_kind, scales, **rest)
    _one_device(who, qweight=qweight, scales=scales, **rest)


def check_channels(
    who: str,
    *,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor | None,
    permutation: Tensor | None,
    group_size: int,
    zero_kind: str,
) -> None:
    """The same for the tensors of `Int4Channels`."""
    for name, tensor in (("codes", codes), ("scales", scales)):
        if tensor.dim() != 2:
            raise ValueError(f"{who}: {name} must have two dimensions, got shape {list(tensor.shape)}")
    K, N = codes.shape[0], scales.shape[1]
    _typed(who, "codes", codes, torch.uint8)
    _group_size(who, K, group_size)
    _shaped(who, "codes", codes, K, -(-N // TILE) * (TILE // 2))
    rest = {"zeros": zeros, "codebook": codebook, "permutation": permutation}
    _beside(who, K, (K // group_size, N), zero_kind, scales, **rest)
    _one_device(who, codes=codes, scales=scales, **rest)


def _group_size(who: str, K: int, group_size: int) -> None:
    if group_size not in GROUP_SIZES and (group_size != K or K == 0):
        raise ValueError(f"{who}: group_size={group_size} must be 16, 32, 64, 128 or K={K}")
    if K % group_size:
        raise ValueError(f"{who}: K={K} is not a multiple of group_size={group_size}")


def _beside(
    who: str,
    K: int,
    of_groups: tuple[int, int],
    zero_kind: str,
    scales: Tensor,
    *,
    zeros: Tensor | None,
    codebook: Tensor | None,
    permutation: Tensor | None,
) -> None:
    """All but the codes of K columns; `of_groups` is the shape of scales."""
    if zero_kind not in ZERO_KINDS:
        raise ValueError(f"{who}: zero_kind={zero_kind!r} must be one of {', '.join(ZERO_KINDS)}")
    _typed(who, "scales", scales, *SCALE_DTYPES)
    _shaped(who, "scales", scales, *of_groups)
    if (zeros is None) != (zero_kind == "none8"):
        raise ValueError(f"{who}: zero_kind={zero_kind!r} {'takes no' if zeros is not None else 'needs'} zeros")
    if zeros is not None:
        _typed(who, "zeros", zeros, torch.uint8 if zero_kind == "uint8" else scales.dtype)
        _shaped(who, "zeros", zeros, *of_groups)
    if codebook is not None:
        if zero_kind != "none8":
            raise ValueError(f"{who}: a codebook has zero_kind='none8', got {zero_kind!r}")
        _typed(who, "codebook", codebook, torch.int8, torch.float32, torch.float64)
        _shaped(who, "codebook", codebook, 16)
    if permutation is not None:
        _typed(who, "permutation", permutation, torch.int32)
        _shaped(who, "permutation", permutation, K)


def _one_device(who: str, **tensors: Tensor | None) -> None:
    (first_name, first), *rest = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for name, tensor in rest:
        if tensor.device != first.device:
            raise ValueError(f"{who}: {name} is on {tensor.device}, but {first_name} on {first.device}")


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
