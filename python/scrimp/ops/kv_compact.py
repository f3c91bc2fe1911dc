"""kv_compact: moves the accepted rows of a token tree to the front of the tree's slots, in place, for all layers."""

import torch
from torch import Tensor

from .._registry import register
from ._check import FLOATS, check_dtype, check_same

SCHEMA = "(Tensor(a!) cache, Tensor start, Tensor path) -> ()"
OP = "kv_compact"


def _check(cache: Tensor, start: Tensor, path: Tensor) -> None:
    if cache.dim() != 5:
        raise ValueError(f"{OP}: cache must be [L, B, G, C, D], got shape {list(cache.shape)}")
    check_dtype(OP, "cache", cache, FLOATS)
    check_dtype(OP, "start", start, (torch.int32,))
    check_dtype(OP, "path", path, (torch.int32,))
    check_same(OP, "device", cache=cache.device, start=start.device, path=path.device)
    B = cache.shape[1]
    if start.shape != (B,):
        raise ValueError(f"{OP}: start has shape {list(start.shape)}, expected [{B}]")
    if path.dim() != 2 or path.shape[0] != B:
        raise ValueError(f"{OP}: path has shape {list(path.shape)}, expected [{B}, T]")


def _check_values(start: Tensor, path: Tensor, capacity: int) -> None:
    """Raises before anything is moved."""
    for b, (first, rows) in enumerate(zip(start.tolist(), path.tolist(), strict=True)):
        before = -1
        for i, row in enumerate(rows):
            if row == -1:
                break
            if row <= before:
                raise ValueError(f"{OP}: path[{b}, {i}]={row} does not come after {before}")
            before = row
        if before >= 0 and not 0 <= first < capacity - before:
            raise ValueError(f"{OP}: start[{b}]={first} and row {before} leave the cache's {capacity} slots")


def _fake(cache: Tensor, start: Tensor, path: Tensor) -> None:
    _check(cache, start, path)


def reference(cache: Tensor, start: Tensor, path: Tensor) -> None:
    _check(cache, start, path)
    _check_values(start, path, cache.shape[3])
    for b, (first, rows) in enumerate(zip(start.tolist(), path.tolist(), strict=True)):
        kept = rows[: rows.index(-1)] if -1 in rows else rows
        moved = cache[:, b, :, [first + row for row in kept]]
        cache[:, b, :, first : first + len(kept)] = moved


_call = register(OP, SCHEMA, fake=_fake, reference=reference)


def kv_compact(cache: Tensor, start: Tensor, path: Tensor) -> None:
    """Moves rows of keys and values together: those of the path follow each other from `start` on.

    cache[:, b, :, start_b + i] = cache[:, b, :, start_b + path_bi] for i = 0, 1, ... while path_bi >= 0

    Rows move in ascending order, so that none is overwritten before it has moved; where path_i = i nothing is done.

    Args:
        cache: `[L, B, G, C, D]` fp32, bf16 or fp16: keys and values of all layers; written in place. The last dimension
            is contiguous, none is expanded.
        start: int32 `[B]`, slot of row 0.
        path: int32 `[B, T]`, ascending rows to keep, then -1 (`scrimp.ops.tree_accept`).

    Returns:
        Nothing.

    Raises:
        ValueError: a shape, device or dtype that does not fit, with the value.
        RuntimeError: paths that do not ascend or leave the cache (ValueError by the reference).

    Source: Medusa (2401.10774), section 2.1.2, which gathers into a temporary and copies back.

    >>> import torch, scrimp
    >>> cache = torch.arange(6.0).view(1, 1, 1, 6, 1)
    >>> scrimp.ops.kv_compact(cache, torch.tensor([1], dtype=torch.int32), torch.tensor([[0, 2, 4, -1]]).int())
    >>> cache.flatten().tolist()
    [0.0, 1.0, 3.0, 5.0, 4.0, 5.0]
    """
    try:
        _call(cache, start, path)
    except RuntimeError:
        _check(cache, start, path)  # names what does not fit
        raise
