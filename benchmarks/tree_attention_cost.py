"""What tree_attention's kernels do: keys and steps of every program, from prefixes, paths and the kernel's sizes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from scrimp.kernels.launch import Launch, cdiv
from scrimp.kernels.tree_attention import launches
from torch import Tensor

from .roofline import Count, CountedCase
from .tree_attention import MODELS, tree


@dataclass(frozen=True)
class Program:
    """One program of the first kernel: its rows, the keys it loads, the blocks of them."""

    rows: int
    keys: int
    steps: int


def programs(launch: Launch, cached: int, paths: list[int]) -> Iterator[Program]:
    """Those of one sequence and key/value head that have work; `paths` are the new rows that each new row sees."""
    group, window, T = (launch.args[name] for name in ("group", "window", "T"))
    block_m, block_n, split = (launch.constants[name] for name in ("BLOCK_M", "BLOCK_N", "SPLIT"))

    def program(t: int, rows: int, begin: int, end: int) -> Iterator[Program]:
        low = max(cached + t + 1 - window, 0) if launch.constants["WINDOW"] else 0
        first = max(begin, low // block_n * block_n)
        if first < end:
            yield Program(rows, end - max(first, low), cdiv(end - first, block_n))

    last = cached // split
    for t in range(T):
        for part in range(0, group, block_m):
            for begin in (last * split, (last + 1) * split):
                yield from program(t, min(block_m, group - part), begin, min(begin + split, cached + paths[t]))
    for tile in range(0, T * group, block_m):
        for begin in range(0, last * split, split):
            yield from program(tile // group, min(block_m, T * group - tile), begin, begin + split)


def _words(ancestors: Tensor | None, b: int, T: int) -> list[int]:
    """The new rows that each new row of sequence `b` sees, as bits."""
    if ancestors is None:
        return [(1 << t + 1) - 1 for t in range(T)]
    return [word & (1 << T) - 1 for word in ancestors[min(b, len(ancestors) - 1)].tolist()]


def count(
    q: Tensor, k: Tensor, v: Tensor, prefix: Tensor, ancestors: Tensor | None, window: int, scale: float
) -> Count:
    """Of one call; prefixes and ancestor words are read, everything else may be on the meta device."""
    _, made = launches(q, k, v, prefix, ancestors, window, scale)
    if not made:
        return Count(0, 0)
    attend, merge = made
    (B, H, T, D), G, size = q.shape, k.shape[1], q.element_size()
    block_m, block_n, block_d, split = (attend.constants[n] for n in ("BLOCK_M", "BLOCK_N", "BLOCK_D", "SPLIT"))
    row, key = D * size, 2 * D * size
    moved = touched = steps = states = pairs = merged = 0
    for b, cached in enumerate(prefix.tolist()):
        words = _words(ancestors, b, T)
        paths = [word.bit_count() for word in words]
        for program in programs(attend, cached, paths):
            moved += G * (program.rows * (row + 8 + 4 * D) + program.keys * key)
            steps += G * program.steps
        seen_by_all = functools.reduce(operator.or_, words)
        first = [max(cached + t + 1 - window, 0) if window else 0 for t in range(T)]
        touched += G * key * (cached + seen_by_all.bit_count() - min(first))
        pairs += H * sum(cached + path - low for path, low in zip(paths, first, strict=True))
        spans = [cdiv(cached + path, split) - low // split for path, low in zip(paths, first, strict=True)]
        states += H * sum(spans)
        chunk = merge.constants["BLOCK_S"]
        merged += H * sum(
            cdiv(cdiv(cached + path, split) - low // split // chunk * chunk, chunk)
            for path, low in zip(paths, first, strict=True)
        )
    results = B * H * T * (row + 4)
    weighed = 32 * merge.num_warps + merge.constants["BLOCK_S"] * block_d // 4  # every thread weighs what it adds up
    return Count(
        bytes=moved + results + states * (12 + 4 * D),
        unique_bytes=touched + B * H * T * row + results + states * (8 + 4 * D),
        flops_issued=4 * block_m * block_n * block_d * steps,
        flops_useful=4 * D * pairs,
        exps=steps * block_m * (block_n + 1) + merged * weighed,
        resident_bytes=B * G * split * key,
    )


def count_cuda(
    q: Tensor, k: Tensor, v: Tensor, prefix: Tensor, ancestors: Tensor | None, window: int, scale: float
) -> Count:
    """The same of the kernels in CUDA C++: blocks of 16 keys in units of 128 and splits of 512, 32 rows at a time."""
    (B, H, T, D), G = q.shape, k.shape[1]
    group = H // G
    key, state, row = 4 * D, 4 * D + 8, 2 * D
    moved = states = keys = touched = products = pairs = exps = 0
    for b, cached in enumerate(prefix.tolist()):
        paths = [word.bit_count() for word in _words(ancestors, b, T)]
        whole, last = cached // 16 * 16, cached // 16 * 16 // 512
        units = cdiv(whole % 512, 128)
        keys += G * cdiv(T * group, 32) * whole
        moved += H * T * row * cdiv(whole, 512)
        products += G * cdiv(T * group, 16) * whole // 16 * 2
        exps += G * cdiv(T * group, 16) * whole // 16 * 320
        states += H * T * (last + units)
        for path in paths:
            tail = cached - whole + path
            keys += G * tail
            # Each of four warps multiplies all heads with the keys, and its part of the values.
            products += G * cdiv(group, 16) * cdiv(tail, 16) * 5
            exps += G * cdiv(group, 16) * cdiv(tail, 16) * 4 * 320
        touched += G * (cached + functools.reduce(operator.or_, _words(ancestors, b, T)).bit_count())
        pairs += H * sum(cached + path for path in paths)
    results = B * H * T * (row + 4)
    return Count(
        bytes=keys * key + moved + 2 * states * state + B * H * T * row + results,
        unique_bytes=touched * key + B * H * T * row + states * state + results,
        flops_issued=2 * 16 * 16 * D * products,
        flops_useful=4 * D * pairs,
        exps=exps,
        resident_bytes=B * G * 512 * key,
    )


def cases() -> list[CountedCase]:
    """One token and a tree of 16 over caches of 4K and 32K tokens."""
    return list(_cases())


def _cases() -> Iterator[CountedCase]:
    shapes = ("smollm2", 8000, 1), ("smollm2", 8000, 16), ("8b", 4096, 1), ("8b", 32768, 1), ("8b", 32768, 16)
    for model, n, T in shapes:
        H, G, D = MODELS[model]
        q = torch.empty(1, H, T, D, dtype=torch.bfloat16, device="meta")
        k = torch.empty(1, G, n + T, D, dtype=torch.bfloat16, device="meta")
        flat = (q, k, k, torch.tensor([n], dtype=torch.int32), tree(T) if T > 1 else None, 0, D**-0.5)
        fields = {"m": T, "batch": 1, "heads": H, "kv_heads": G, "n": n, "head_dim": D}
        yield CountedCase(f"{model}-{n}-{T}", "bf16", partial(count, *flat), fields, partial(count_cuda, *flat))
