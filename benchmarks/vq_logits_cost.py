"""What vq_logits' kernels do: the scores of the codes; then a code and a score are read for every logit."""

from collections.abc import Iterator
from functools import partial

import torch
from scrimp.kernels.launch import cdiv
from torch import Tensor

from . import linear_cost
from .int4_linear_cost import size as size_of
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


SHARED, TOKENS = 16 * 1024, 1024  # bytes of scores that a block in CUDA C++ copies, its tokens


def count_cuda(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None) -> Count:
    """The same with the kernel in CUDA C++ behind the scores."""
    return linear_cost.count(h, [codebook], [], None) + looked_up(h, codebook, codes, bias)


def looked_up(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None) -> Count:
    """Of the kernel in CUDA C++ alone: a block copies the scores of up to four rows if they fit its shared memory."""
    M, K, V, size = h.shape[:-1].numel(), len(codebook), codes.shape[-1], h.element_size()
    map_bytes, scores, rows = size_of(codes, bias), M * K * size, 4
    read = M * codes.numel() * size  # a score for each token of a row
    if in_shared(codebook, codes, bias):
        rows, read = min(SHARED // (K * size), 4), cdiv(V, TOKENS) * scores
    return Count(
        bytes=cdiv(M, rows) * map_bytes + read + M * V * size,
        unique_bytes=map_bytes + scores + M * V * size,
        resident_bytes=scores,  # blocks of other rows read the codes at the same time
    )


def in_shared(codebook: Tensor, codes: Tensor, bias: Tensor | None) -> bool:
    """Whether a block copies scores: those of a row fit, and codes and biases of four tokens are read at once."""
    begins = [some for some in (codes, bias) if some is not None and some.is_contiguous()]  # others are copied
    vectors = codes.shape[-1] % 4 == 0 and all(some.data_ptr() % 16 == 0 for some in begins)
    return vectors and len(codebook) * codebook.element_size() <= SHARED


def cases() -> list[CountedCase]:
    """The heads of the benchmark with one row and a few."""
    return list(_cases())


def _cases() -> Iterator[CountedCase]:
    for name, (V, d) in HEADS.items():
        for rows in ROWS:
            h, codebook = (torch.empty(n, d, dtype=torch.bfloat16, device="meta") for n in (rows, V // SHARE))
            codes = torch.empty(V, dtype=torch.int32, device="meta")
            fields = {"m": rows, "vocab": V, "d": d, "codes": V // SHARE}
            flat = (h, codebook, codes, None)
            yield CountedCase(f"{name}-{rows}", "bf16", partial(count, *flat), fields, partial(count_cuda, *flat))
