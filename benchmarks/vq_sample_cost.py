"""What vq_sample's kernels do: the scores of the codes, then the tokens are looked up in every pass over them."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from scrimp.kernels.launch import cdiv
from scrimp.kernels.vq_sample import SHIFTS, launches
from torch import Tensor

from . import linear_cost
from .int4_linear_cost import size as size_of
from .roofline import Count, CountedCase
from .vq_logits import HEADS, ROWS, SHARE
from .vq_logits_cost import in_shared
from .vq_sample import WAYS


def count(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None, *rest: Any) -> Count:
    """Of one call; of the blocks that are drawn from, one for each row."""
    products = linear_cost.count(h, [codebook], [], None)
    M, K, V, size = rest[0].numel(), len(codebook), codes.shape[-1], h.element_size()
    map_bytes = codes.numel() * 4 + (0 if bias is None else V * size)
    passes = [one for one in launches(h, codebook, codes, bias, *rest)[1] if "scores" in one.args]
    looked_up = M * (map_bytes + codes.numel() * size)
    total = products
    for one in passes:
        blocks = one.args["blocks"]
        if "token" in one.args:  # numbers of all blocks, tokens of one
            total += Count(bytes=looked_up // blocks + M * (12 * blocks + 28), unique_bytes=8 * M)
        elif "shift" in one.args:
            weights = 128 * M * blocks
            seen = looked_up if one.args["shift"] >= 0 else 0
            read = weights * blocks if one.args["shift"] != SHIFTS[0] else 0
            total += Count(bytes=seen + read + weights, unique_bytes=weights)
        else:
            total += Count(bytes=looked_up + M * blocks * 32, unique_bytes=M * blocks * 12)
    return total + Count(0, map_bytes + M * K * size, resident_bytes=map_bytes + M * K * size)


TOKENS, DIGITS, WARPS = 4096, 256, 8  # in CUDA C++: of a block, values of a digit, warps


def count_cuda(h: Tensor, codebook: Tensor, *rest: Any) -> Count:
    """The same with the kernels in CUDA C++ behind the scores."""
    return linear_cost.count(h, [codebook], [], None) + chosen(h, codebook, *rest)


def chosen(
    h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None, temperature: Tensor, seed: Tensor,
    position: Tensor, top_k: int, top_p: float, min_p: float,
) -> Count:  # fmt: skip
    """Of the kernels in CUDA C++ alone: every pass over the tokens looks them up; atomic additions are left out.

    Rows at a temperature of 0 are not filtered; on the meta device all are.
    """
    M, K, V, size = temperature.numel(), len(codebook), codes.shape[-1], h.element_size()
    map_bytes, chunks = size_of(codes, bias), cdiv(V, TOKENS)
    scores = chunks * K * size if in_shared(codebook, codes, bias) else codes.numel() * size
    drawn = M if temperature.is_meta else int(((temperature > 0) & (temperature < torch.inf)).sum())
    counts, shares = 0 < top_k < V, top_p < 1
    passes, filters = 4 * (counts + shares), counts or shares or min_p > 0
    in_warps, digits = 4 * WARPS * chunks, 8 * DIGITS * chunks  # numbers that each warp reads, weights of each block
    looked_up = map_bytes + scores
    moved = M * (looked_up + in_warps + 32 * chunks + 12) + drawn * 4 * in_warps
    if filters:  # in every pass, then in another choice; rows that are not drawn end there
        moved += M * (2 * passes + 1) * in_warps
        moved += drawn * ((passes + 1) * looked_up + 6 * in_warps + 16 * chunks)
    if passes:
        thresholds = 5 * (passes - counts - shares) + 3 * (counts and shares)
        moved += drawn * (passes * digits + (passes - 1) * 20 + thresholds * in_warps)
    if shares:
        moved += drawn * (digits + 8 * WARPS * chunks * (chunks - 1) // 2)
    unique = map_bytes + M * (K * size + 16 * chunks + 28)
    return Count(
        bytes=moved,
        unique_bytes=unique + drawn * 8 * DIGITS * (passes + shares * chunks),
        resident_bytes=map_bytes + M * K * size,
    )


def cases() -> list[CountedCase]:
    """The heads of the benchmark, drawn from without and with a filter, with one row and a few."""
    return list(_cases())


def _cases() -> Iterator[CountedCase]:
    for name, (V, d) in HEADS.items():
        for rows in ROWS:
            h, codebook = (torch.empty(n, d, dtype=torch.bfloat16, device="meta") for n in (rows, V // SHARE))
            codes = torch.empty(V, dtype=torch.int32, device="meta")
            heat = torch.empty(rows, device="meta")
            number = torch.empty(rows, dtype=torch.int64, device="meta")
            fields = {"m": rows, "vocab": V, "d": d, "codes": V // SHARE}
            for way in ("drawn", "top-p"):
                flat = (h, codebook, codes, None, heat, number, number, 0, WAYS[way][1], 0.0)
                yield CountedCase(
                    f"{name}-{rows}-{way}", "bf16", partial(count, *flat), fields, partial(count_cuda, *flat)
                )
