"""What silu_mul's kernel does: it reads both operands and writes the product, each byte once."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .roofline import Count, CountedCase
from .silu_mul import SHAPES


def count(gate: Tensor, up: Tensor) -> Count:
    """Of one call."""
    moved = 3 * gate.numel() * gate.element_size()
    return Count(bytes=moved, unique_bytes=moved, exps=gate.numel())


def cases() -> list[CountedCase]:
    """The shapes of the benchmark."""
    return list(_cases())


def _cases() -> Iterator[CountedCase]:
    for name, (rows, columns) in SHAPES.items():
        for dtype, word in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            x = torch.empty(rows, columns, dtype=dtype, device="meta")
            yield CountedCase(name, word, partial(count, x, x), {"m": rows, "n": columns})
