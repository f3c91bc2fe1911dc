"""What kv_compact's kernel does: every head of every layer reads the path, and reads and writes the rows that move."""

from collections.abc import Iterator
from functools import partial

import torch
from scrimp.kernels.kv_compact import launches
from torch import Tensor

from .kv_compact import CAPACITY, MODELS, PATHS
from .roofline import Count, CountedCase


def count(cache: Tensor, start: Tensor, path: Tensor) -> Count:
    """Of one call; start and path have values."""
    made = launches(cache, start, path)[1]
    return _count(cache, start, path, made[0].constants["BLOCK_T"]) if made else Count(0, 0)


def count_cuda(cache: Tensor, start: Tensor, path: Tensor) -> Count:
    """The same of the kernel in CUDA C++, which reads 32 rows of a path at once."""
    return _count(cache, start, path, 32)


def _count(cache: Tensor, start: Tensor, path: Tensor, tile: int) -> Count:
    L, B, G, capacity, D = cache.shape
    moved, touched, read = 0, 0, 0
    for first, rows in zip(start.tolist(), path.tolist(), strict=True):
        kept = rows.index(-1) if -1 in rows else len(rows)
        moves = [(row, i) for i, row in enumerate(rows[:kept]) if row > i and 0 <= first < capacity - row]
        moved += 2 * len(moves)
        touched += len({slot for move in moves for slot in move})
        read += min(kept // tile * tile + tile, len(rows))
    row, looked_up = L * G * D * cache.element_size(), 4 * (read + B)
    return Count(bytes=moved * row + L * G * looked_up, unique_bytes=touched * row + looked_up)


def cases() -> list[CountedCase]:
    """Those of the benchmark."""
    return list(_cases())


def _cases() -> Iterator[CountedCase]:
    for model, (layers, G, D) in MODELS.items():
        for name, rows in PATHS.items():
            for dtype, word in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
                cache = torch.empty(2 * layers, 1, G, CAPACITY, D, dtype=dtype, device="meta")
                start, path = torch.tensor([CAPACITY // 2]).int(), torch.tensor([rows]).int()
                fields = {"m": len(rows), "batch": 1, "layers": layers, "kv_heads": G, "head_dim": D}
                ours, cuda = partial(count, cache, start, path), partial(count_cuda, cache, start, path)
                yield CountedCase(f"{model}-{name}", word, ours, fields, cuda)
