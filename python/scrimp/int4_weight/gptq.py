"""GPTQ files (AutoGPTQ, GPTQModel), version 1 and 2.

qweight int32 [K/8, N]   word r of a column holds rows 8r to 8r + 7, the first in the lowest nibble
qzeros  int32 [G, N/8]   nibbles along N; version 1 stores every zero less one
scales  fp16  [G, N]     w = (q - z) s
g_idx   int32 [K]        group of each row, unsorted with desc_act
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .groups import regroup
from .pack import unpack_nibbles, words_to_bytes
from .tensor_file import TensorFiles
from .weight import Int4Weight

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
# Version 1 subtracts this from a whole word, so that the borrow of a zero of 0 runs into its neighbours: adding it
# back, carry included, restores them.
_ONES = 0x11111111


def version(config: Mapping[str, Any]) -> int:
    """1 or 2, from a quantization_config.

    Raises: ValueError for another layout, another word size or other than 4 bits, with the field's value.
    """
    if config.get("bits", 4) != 4:
        raise ValueError(f"bits={config['bits']!r}: only 4-bit weights are read")
    if config.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise ValueError(f"pack_dtype={config['pack_dtype']!r}: only int32 is read")
    if config.get("is_marlin_format"):
        raise ValueError("is_marlin_format: the Marlin layout is not read")
    name = config.get("checkpoint_format") or config.get("format") or "gptq"
    if name not in ("gptq", "gptq_v2"):
        raise ValueError(f"checkpoint_format={name!r}: only gptq and gptq_v2 are read")
    return 2 if name == "gptq_v2" else 1


def modules(names: Iterable[str]) -> list[str]:
    """The modules whose weights are in this layout."""
    return [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]


def read(files: TensorFiles, module: str, config: Mapping[str, Any]) -> Int4Weight:
    """One module's weight; each error names the tensor and the value."""
    qweight, qzeros, scales, g_idx = (f"{module}.{suffix}" for suffix in SUFFIXES)
    words, N = files.shape(qweight, 2)
    G, K = files.shape(scales, 2)[0], 8 * words
    q = files.read(qweight, (torch.int32,), (words, N))
    s = files.read_finite(scales, (G, N))
    z = files.read(qzeros, (torch.int32,), (G, -(-N // 8)))
    if version(config) == 1:
        z = z + _ONES
    zeros = unpack_nibbles(words_to_bytes(z))[:, :N].T
    group_of = None
    if g_idx in files.layout:
        rows = files.shape(g_idx, 1)[0]
        if rows != K:
            raise files.fail(qweight, f"{words} words a column are {K} rows of 4 bits, but g_idx has {rows}")
        group_of = files.read(g_idx, (torch.int32, torch.int64), (K,)).long()
    group_size = config.get("group_size", -1)
    if not isinstance(group_size, int):
        raise files.fail(scales, f"group_size={group_size!r} of the configuration is no integer")
    if group_size < 1 or -(-K // group_size) != G:
        group_size = K // G if G and K % G == 0 else 0
    try:
        return regroup(words_to_bytes(q.T.contiguous()), s.T, zeros, group_size=group_size, group_of=group_of)
    except ValueError as error:
        raise files.fail(scales if group_of is None else g_idx, str(error)) from error
