"""AWQ files in the "gemm" layout (AutoAWQ, llm-awq).

qweight int32 [K, N/8]   word c of a row holds columns 8c to 8c + 7, nibble i holds column 8c + ORDER[i]
qzeros  int32 [G, N/8]   likewise
scales  fp16  [G, N]     w = (q - z) s
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .groups import regroup
from .pack import pack_nibbles, unpack_nibbles, words_to_bytes
from .tensor_file import TensorFiles
from .weight import Int4Weight

SUFFIXES = ("qweight", "qzeros", "scales")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def check(config: Mapping[str, Any]) -> None:
    """Raises ValueError, with the field's value, for a layout that is not read."""
    bits = config.get("bits", config.get("w_bit", 4))
    if bits != 4:
        raise ValueError(f"bits={bits!r}: only 4-bit weights are read")
    layout = str(config.get("version", config.get("format", "gemm"))).lower()
    if layout != "gemm":
        raise ValueError(f"version={layout!r}: only the gemm layout is read")


def modules(names: Iterable[str]) -> list[str]:
    """The modules whose weights are in this layout."""
    return [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]


def _columns(words: Tensor) -> Tensor:
    """int32 `[R, N/8]` -> codes uint8 `[R, N]` in order."""
    nibbles = unpack_nibbles(words_to_bytes(words)).view(*words.shape, 8)
    place = torch.tensor([ORDER.index(column) for column in range(8)])
    return nibbles[..., place].flatten(1)


def read(files: TensorFiles, module: str, config: Mapping[str, Any]) -> Int4Weight:
    """One module's weight; each error names the tensor and the value."""
    qweight, qzeros, scales = (f"{module}.{suffix}" for suffix in SUFFIXES)
    K, words = files.shape(qweight, 2)
    G, N = files.shape(scales, 2)[0], 8 * words
    if K % 2 or G == 0 or K % G:
        raise files.fail(scales, f"{G} groups do not divide {K} rows, an even number")
    q = files.read(qweight, (torch.int32,), (K, words))
    s = files.read_finite(scales, (G, N))
    z = files.read(qzeros, (torch.int32,), (G, words))
    try:
        return regroup(pack_nibbles(_columns(q).T.contiguous()), s.T, _columns(z).T, group_size=K // G)
    except ValueError as error:
        raise files.fail(scales, str(error)) from error
