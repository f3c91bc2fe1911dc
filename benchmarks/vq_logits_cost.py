"""What vq_logits' kernels do: the scores of the codes; then a code and a score are read for every logit."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from . import linear_cost
from .roofline import Count, CountedCase
from .vq_logits import HEADS, ROWS, SHARE


def count(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None) -> Count:
    """Of one call; a score is asked for once for each token that has it."""
    M, K, V, size = h.numel() // h.shape[-1], len(codebook), codes.shape[-1], h.element_size()
    map_bytes = codes.numel() * 4 + (0 if bias is None else V * size)
    return linear_cost.count(h, [codebook], [], None) + Count(
        bytes=M * (map_bytes + (codes.numel() + V) * size),
        unique_bytes=map_bytes + M * (K + V) * size,
        resident_bytes=map_bytes + M * K * size,
    )


def cases() -> list[CountedCase]:
    """The heads of the benchmark with one row and a few."""
    return list(_cases())


def _cases() -> Iterator[CountedCase]:
    for name, (V, d) in HEADS.items():
        for rows in ROWS:
            h, codebook = (torch.empty(n, d, dtype=torch.bfloat16, device="meta") for n in (rows, V // SHARE))
            codes = torch.empty(V, dtype=torch.int32, device="meta")
            fields = {"m": rows, "vocab": V, "d": d, "codes": V // SHARE}
            yield CountedCase(f"{name}-{rows}", "bf16", partial(count, h, codebook, codes, None), fields)
