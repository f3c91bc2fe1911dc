"""What merge_attention's kernels do: they read two states and write one, each byte once."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .merge_attention import SHAPES
from .roofline import Count, CountedCase


def count(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Count:
    """Of one call; no product runs on tensor cores."""
    moved = sum(x.numel() * x.element_size() for x in (out_a, lse_a, out_b, lse_b, out_a, lse_a))
    return Count(bytes=moved, unique_bytes=moved, exps=2 * lse_a.numel())


count_cuda = count


def cases() -> list[CountedCase]:
    """The shapes of the benchmark."""
    return list(_cases())


def _cases() -> Iterator[CountedCase]:
    for name, (B, H, N, D) in SHAPES.items():
        for dtype, word in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            out, lse = torch.empty(B, H, N, D, dtype=dtype, device="meta"), torch.empty(B, H, N, device="meta")
            fields = {"batch": B, "heads": H, "n": N, "head_dim": D}
            flat = (out, lse, out, lse)
            yield CountedCase(name, word, partial(count, *flat), fields, partial(count_cuda, *flat))
