"""What rms_norm's kernel does: it reads each row once, or twice if it is longer than a tile, and writes it once."""

from collections.abc import Iterator
from functools import partial

import torch
from scrimp.kernels.rms_norm import launches
from torch import Tensor

from .rms_norm import EPS, SHAPES
from .roofline import Count, CountedCase


def count(x: Tensor, weight: Tensor, eps: float) -> Count:
    """Of one call; every program reads the weight."""
    unique = 2 * x.numel() * x.element_size() + weight.numel() * weight.element_size()
    bytes_asked = 0
    for launch in launches(x, weight, eps)[1]:
        reads = 1 if launch.constants["BLOCK_K"] >= x.shape[-1] else 2
        bytes_asked = (1 + reads) * x.numel() * x.element_size() + launch.grid[
            0
        ] * weight.numel() * weight.element_size()
    return Count(bytes=bytes_asked, unique_bytes=min(unique, bytes_asked))


def cases() -> list[CountedCase]:
    """The shapes of the benchmark."""
    return list(_cases())


def _cases() -> Iterator[CountedCase]:
    for name, (rows, columns) in SHAPES.items():
        for dtype, word in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            x, weight = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((rows, columns), (columns,)))
            yield CountedCase(name, word, partial(count, x, weight, EPS), {"m": rows, "k": columns})
