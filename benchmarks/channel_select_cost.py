"""What channel_select's kernels do: they read a row once, or twice to look for the cut, and write kept and masks."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from scrimp.kernels.channel_select import launches

from .channel_select import CHANNELS, ROWS
from .roofline import Count, CountedCase


def count(*flat: Any) -> Count:
    """Of one call; of the list, an entry for each channel: most of them are written once, if any."""
    x, _, scale, center, whole, rule, common = flat
    M, K = (x.numel() // x.shape[-1] if x.shape[-1] else 0), x.shape[-1]
    made = launches(*flat)[1]
    if not made:
        return Count(0, 0)
    vectors = 4 * K * sum(vector is not None for vector in (scale, center))
    rows, masks, ends = M * K * x.element_size(), M * K, M * (8 + (whole is not None))
    once = 2 * rows + 2 * masks + 4 * K + ends + 4
    done = Count(once + M * (vectors + 4), once - masks + vectors + 4)
    if common:  # made of all rows, then read by each
        done += Count(rows + vectors + 4 * K + 4 * M * K, 4 * K)
    if rule > 0:
        done += Count(4 * M * K if common else rows + M * vectors, 0)
    return done


def cases() -> list[CountedCase]:
    """The shapes of the benchmark: one row that keeps what is above a threshold, and some that share a top-k choice."""
    return list(_cases())


def _cases() -> Iterator[CountedCase]:
    for name, K in CHANNELS.items():
        for rows, rule, common in ((1, 0, False), (ROWS, 2, True)):
            x = torch.empty(rows, K, dtype=torch.bfloat16, device="meta")
            level, scale = torch.empty(1, device="meta"), torch.empty(K, device="meta")
            flat = (x, level, scale, scale, None, rule, common)
            fields = {"m": rows, "k": K}
            yield CountedCase(f"{name}-{'common' if common else 'one'}", "bf16", partial(count, *flat), fields)
