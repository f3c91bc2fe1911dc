"""What channel_select's kernels do: they read a row once, or twice to look for the cut, and write kept and masks."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from scrimp.kernels.channel_select import launches
from scrimp.kernels.launch import cdiv

from scrimp.ops.channel_select import RULES

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


WARPS = 16  # of a block in CUDA C++; each reads what is one number for a row


def count_cuda(*flat: Any) -> Count:
    """The same of the kernels in CUDA C++, whose masks are bits."""
    x, _, scale, center, whole, rule, common = flat
    M, K = x.shape[:-1].numel(), x.shape[-1]
    vectors, numbers, masks = 4 * K * sum(v is not None for v in (scale, center)), K * x.element_size(), 4 * cdiv(K, 32)
    scored, searched = numbers + vectors, RULES[rule] in ("top_k", "top_p")
    compared, choices = (4 * K, 1) if common else (scored, M)
    of_row = scored + 4 * K * common + numbers + masks + 8 + WARPS * ((8 if searched else 4) + (whole is not None))
    moved = M * (of_row + masks + compared * (RULES[rule] == "relative")) + 4 * K + 4
    return Count(
        bytes=moved + (M * scored + 4 * K) * common + choices * (compared + 4 * WARPS + 8) * searched,
        unique_bytes=M * (2 * numbers + masks + 8 + (whole is not None)) + vectors + 4 * K * (1 + common) + 8
        + 8 * choices * searched,
        resident_bytes=M * (numbers + masks) + vectors + 4 * K * common,
    )  # fmt: skip


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
            yield CountedCase(
                f"{name}-{'common' if common else 'one'}",
                "bf16",
                partial(count, *flat),
                fields,
                partial(count_cuda, *flat),
            )
