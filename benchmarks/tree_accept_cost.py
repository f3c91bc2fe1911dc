"""What tree_accept's kernels do where all rows belong to the tree: all logits are read once, then what is on the walk.

How long the walk is depends on the logits, so bytes are an estimate.
"""

from collections.abc import Iterator
from functools import partial

import torch
from scrimp.kernels.launch import cdiv
from scrimp.kernels.tree_accept import launches
from torch import Tensor

from .roofline import Count, CountedCase
from .tree_accept import STEPS, VOCABULARY


def count(*flat: Tensor) -> Count:
    """Of one call whose walks take `STEPS` rows; every program climbs half of them to find its depth."""
    made = launches(*flat)[1]
    return _count(flat[0], made[0].grid[0], best=12) if made else Count(0, 0)  # a choice is fp64 and int32


def count_cuda(*flat: Tensor) -> Count:
    """The same of the kernels in CUDA C++: chunks of 4096 tokens, of which one thread climbs."""
    return _count(flat[0], cdiv(flat[0].shape[2], 4096), best=16)


def _count(logits: Tensor, chunks: int, best: int) -> Count:
    B, T, V = logits.shape
    walked, tree = B * min(STEPS, T), 12 * B * T
    read = B * T * V * logits.element_size()
    choices = (B * T + walked) * chunks * best
    looked_up = B * T * chunks * (4 * min(STEPS, T) // 2 + 20)
    return Count(
        bytes=read + choices + looked_up + walked * tree + tree,
        unique_bytes=read + B * T * chunks * best + 2 * tree + B * 20,
    )


def cases() -> list[CountedCase]:
    """The shapes of the benchmark."""
    return list(_cases())


def _cases() -> Iterator[CountedCase]:
    for model, T in (("smollm2", 1), ("smollm2", 16), ("8b", 64)):
        for dtype, word in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            V = VOCABULARY[model]
            logits = torch.empty(1, T, V, dtype=dtype, device="meta")
            tokens = torch.empty(1, T, dtype=torch.int64, device="meta")
            number = torch.empty(1, dtype=torch.int64, device="meta")
            flat = (logits, tokens, tokens.int(), number.float(), number, number)
            fields = {"m": T, "batch": 1, "vocab": V}
            yield CountedCase(f"{model}-{T}", word, partial(count, *flat), fields, partial(count_cuda, *flat))
