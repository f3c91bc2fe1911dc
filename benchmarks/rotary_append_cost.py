"""What rotary_append's kernel does: it moves every head once; programs that rotate read their token's angles."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from scrimp.kernels.launch import cdiv
from scrimp.kernels.rotary_append import launches
from torch import Tensor

from .roofline import Count, CountedCase
from .rotary_append import CAPACITY, SHAPES


def count(*flat: Any) -> Count:
    """Of one call; where `start` has values, tokens without a slot in the cache cost no more than the look at it."""
    q, k, _, cos, sin, positions, start, k_cache, _ = flat
    (B, T, H, D), G, size = q.shape, k.shape[2], q.element_size()
    found = launches(*flat)[1]
    if not found:
        return Count(0, 0)
    heads = found[0].constants["HEADS"]
    kept = B * T if start.device.type == "meta" else with_slot(start, T, k_cache.shape[2])
    moved = 2 * size * D * (B * T * H + 2 * kept * G)
    angles = cos.shape[1] * (cos.element_size() + sin.element_size())
    rotated = B * T * cdiv(H, heads) + kept * cdiv(G, heads)
    looked_up = 4 * (found[0].grid[0] + (rotated if angles else 0))
    unique = moved + B * T * (angles + positions.element_size()) + start.nbytes
    asked = moved + rotated * angles + looked_up
    return Count(bytes=asked, unique_bytes=min(unique, asked))


def with_slot(start: Tensor, T: int, capacity: int) -> int:
    """How many of the new tokens have a slot in the cache."""
    slots = start.long()[:, None] + torch.arange(T)
    return int(((slots >= 0) & (slots < capacity)).sum())


def cases() -> list[CountedCase]:
    """The shapes of the benchmark."""
    return list(_cases())


def _cases() -> Iterator[CountedCase]:
    for name, (T, H, G, D) in SHAPES.items():
        for dtype, word in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            x = torch.empty(1, T, H + 2 * G, D, dtype=dtype, device="meta")
            angle = torch.empty(CAPACITY, D, device="meta")
            integers = [torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((1, T), (1,))]
            cache = torch.empty(1, G, CAPACITY, D, dtype=dtype, device="meta")
            args = (*x.split((H, G, G), 2), angle, angle, *integers, cache, cache)
            fields = {"m": T, "batch": 1, "heads": H, "kv_heads": G, "head_dim": D}
            yield CountedCase(name, word, partial(count, *args), fields)
