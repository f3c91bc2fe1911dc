"""compressed-tensors files, format "pack-quantized" with 4-bit integers (llm-compressor, vLLM).

weight_packed      int32 [N, ceil(K/8)]    nibbles along K, lowest first; the code is the signed value + 8
weight_scale       [N, G], [N, 1] or [1]   w = (q - z) s
weight_zero_point  int32 [ceil(N/8), G] nibbles along N, or int8 [N, G] as signed values; absent if symmetric
weight_shape       int [2]                 N, K
weight_g_idx       int32 [K]               group of each column; absent, or -1 throughout, for neighbours
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .groups import regroup
from .pack import unpack_nibbles, words_to_bytes
from .tensor_file import TensorFiles
from .weight import Int4Weight

SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_INTEGERS = (torch.int32, torch.int64)


def check(config: Mapping[str, Any]) -> None:
    """Raises ValueError, with the field's value, for a format that is not read."""
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"config_groups={groups!r} names no group")
    for name, group in groups.items():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise ValueError(f"config_groups[{name!r}] has no 'weights'")
        layout = group.get("format") or config.get("format")
        if layout != "pack-quantized":
            raise ValueError(f"format={layout!r} of config_groups[{name!r}]: only pack-quantized is read")
        weights = group["weights"]
        if weights.get("num_bits") != 4 or weights.get("type", "int") != "int":
            bits = f"{weights.get('num_bits')!r} bits of type {weights.get('type')!r}"
            raise ValueError(f"config_groups[{name!r}] has {bits}: only 4-bit integers are read")


def modules(names: Iterable[str]) -> list[str]:
    """The modules whose weights are in this layout."""
    return [name.removesuffix(".weight_packed") for name in names if name.endswith(".weight_packed")]


def _zeros(files: TensorFiles, name: str, N: int, G: int) -> Tensor | None:
    if name not in files.layout:
        return None
    if files.layout[name][0] == "I8":
        signed = files.read(name, (torch.int8,), (N, G))
        if N and G and (int(signed.min()) < -8 or int(signed.max()) > 7):
            raise files.fail(name, f"values from {int(signed.min())} to {int(signed.max())}; they must be -8 to 7")
        return (signed + 8).to(torch.uint8)
    packed = files.read(name, (torch.int32,), (-(-N // 8), G))
    return unpack_nibbles(words_to_bytes(packed.T.contiguous()))[:, :N].T


def read(files: TensorFiles, module: str, config: Mapping[str, Any]) -> Int4Weight:
    """One module's weight; each error names the tensor and the value."""
    packed, scale, zero_point, shape, g_idx = (f"{module}.{suffix}" for suffix in SUFFIXES)
    N, K = files.read(shape, _INTEGERS, (2,)).tolist()
    if files.shape(packed, 2) != (N, -(-K // 8)) or K < 0:
        raise files.fail(
            packed, f"shape {list(files.shape(packed, 2))} cannot hold the {N} x {K} codes of weight_shape"
        )
    if K % 2:
        raise files.fail(shape, f"K={K} must be even")
    q = words_to_bytes(files.read(packed, (torch.int32,)))[:, : K // 2]
    found = files.layout[scale][1] if scale in files.layout else ()
    if found in ((1,), ()):  # one for the whole matrix
        s = files.read_finite(scale, found).view(1, 1).expand(N, 1)
    else:
        s = files.read_finite(scale, (N, files.shape(scale, 2)[1]))
    G, group_of = s.shape[1], None
    if g_idx in files.layout:
        group_of = files.read(g_idx, _INTEGERS, (K,)).long()
        group_of = None if bool((group_of == -1).all()) else group_of
    if group_of is None and (G == 0 or K % G):
        raise files.fail(scale, f"{G} groups do not divide K={K}")
    zeros = _zeros(files, zero_point, N, G)
    try:
        return regroup(q, s, zeros, group_size=K // G if G else 0, group_of=group_of)
    except ValueError as error:
        raise files.fail(scale if group_of is None else g_idx, str(error)) from error
