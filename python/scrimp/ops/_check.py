"""Argument checks shared by the ops: every message names the op, the argument and the value."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GPU_ROWS = 64  # up to so many rows a sparse product reads listed channels alone on a GPU


def check_dtype(op: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raises ValueError unless `tensor` has one of the allowed dtypes."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"{op}: {name} is {str(tensor.dtype).removeprefix('torch.')}; it must be {names}")


def check_same(op: str, what: str, **values: Any) -> None:
    """Raises ValueError unless all values (shapes, dtypes, devices by argument name) are equal."""
    (first_name, first), *rest = values.items()
    for name, value in rest:
        if value != first:
            raise ValueError(f"{op}: {what} of {name} is {value}, but that of {first_name} is {first}")


def check_gate(op: str, gate: Tensor, up: Tensor) -> None:
    """Raises ValueError unless gate and up are rows of equal shape, dtype and device."""
    if gate.dim() == 0:
        raise ValueError(f"{op}: gate must be [..., N], got a scalar")
    check_dtype(op, "gate", gate, FLOATS)
    check_same(op, "dtype", gate=gate.dtype, up=up.dtype)
    check_same(op, "device", gate=gate.device, up=up.device)
    check_same(op, "shape", gate=tuple(gate.shape), up=tuple(up.shape))


def check_attention(op: str, q: Tensor, keys: Mapping[str, Tensor], beside: Mapping[str, Tensor], scale: float) -> None:
    """Raises ValueError unless q and the tensors of keys and values fit together.

    Args:
        op: the op's name.
        q: `[B, H, n_q, D]`.
        keys: name -> `[B, G, n_k, D]`, "k" first.
        beside: name -> other arguments that must lie on the same device.
        scale: factor of the scores.
    """
    named = {"q": q, **keys}
    for name, tensor in named.items():
        if tensor.dim() != 4:
            raise ValueError(f"{op}: {name} must be [batch, heads, tokens, D], got shape {list(tensor.shape)}")
        check_dtype(op, name, tensor, FLOATS)
    check_same(op, "dtype", **{name: tensor.dtype for name, tensor in named.items()})
    check_same(op, "device", **{name: tensor.device for name, tensor in {**named, **beside}.items()})
    check_same(op, "shape", **{name: tuple(tensor.shape) for name, tensor in keys.items()})
    (B, H, _, D), k = q.shape, keys["k"]
    G = k.shape[1]
    if k.shape[0] != B or k.shape[3] != D:
        raise ValueError(f"{op}: k has shape {list(k.shape)}, but q {list(q.shape)}: batch or head size differ")
    if (G == 0) != (H == 0) or (G and H % G):
        raise ValueError(f"{op}: {H} query heads are not a multiple of {G} key/value heads")
    if D > 256:
        raise ValueError(f"{op}: head size D={D} is above 256")
    if not math.isfinite(scale):
        raise ValueError(f"{op}: scale={scale} must be finite")


def before_sm_90(x: Tensor) -> bool:
    """False on GPUs with wgmma, which Triton's kernels use and those in CUDA C++ do not."""
    return x.device.type != "cuda" or torch.cuda.get_device_capability(x.device)[0] < 9


def rows_of_16_bytes(*tensors: Tensor) -> bool:
    """Whether every row of 16-bit numbers is contiguous and begins at a multiple of 16 bytes."""
    return all(
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(x.stride(i) % 8 == 0 or x.shape[i] == 1 for i in range(x.dim() - 1))
        for x in tensors
    )
