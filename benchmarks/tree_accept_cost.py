"""What tree_accept's kernels do where all rows belong to the tree: all logits are read once, then what is on the walk.

How long the walk is depends on the logits, so bytes are an estimate.
"""

from collections.abc import Iterator
from functools import partial

import torch
from scrimp.kernels.tree_accept import launches
from torch import Tensor

from .roofline import Count, CountedCase
from .tree_accept import STEPS, VOCABULARY

BEST = 12  # bytes of a chunk's choice: fp64 and int32


def count(*flat: Tensor) -> Count:
    """Of one call whose walks take `STEPS` rows; every program climbs half of them to find its depth."""
    logits, tokens = flat[:2]
    made = launches(*flat)[1]
    if not made:
        return Count(0, 0)
    (B, T, V), chunks = logits.shape, made[0].grid[0]
    walked, tree = B * min(STEPS, T), 12 * B * T
    read = B * T * V * logits.element_size()
    choices = (B * T + walked) * chunks * BEST
    looked_up = B * T * chunks * (4 * min(STEPS, T) // 2 + 20)
    return Count(
        bytes=read + choices + looked_up + walked * tree + tree,
        unique_bytes=read + B * T * chunks * BEST + 2 * tree + tokens.shape[0] * 20,
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
            yield CountedCase(f"{model}-{T}", word, partial(count, *flat), {"m": T, "batch": 1, "vocab": V})
