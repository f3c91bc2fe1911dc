"""What exact_head's kernels do at the least: the screen is read once, and for each logit wanted three rows of the head.

How many rows are computed exactly depends on values; here 2 k for the threshold and k behind it.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from scrimp.kernels.exact_head import launches
from scrimp.kernels.launch import cdiv
from torch import Tensor

from scrimp.head_screen import GROUP, TILE, tile_bytes

from . import linear_cost
from .roofline import Count, CountedCase
from .vq_logits import HEADS, ROWS

SCREENED = 4 * TILE  # rows of the head of one program


def count(
    x: Tensor, weight: Tensor, codes: Tensor, scales: Tensor, basis: Tensor | None, error: Tensor, norm: Tensor,
    slack: float, wide: int, k: int,
) -> Count:  # fmt: skip
    """Of one call for at most 64 states."""
    (V, K), M, T, G, size = weight.shape, math.prod(x.shape[:-1]), len(codes), len(error), x.element_size()
    made = launches(x, weight, codes, scales, basis, error, norm, slack, wide, k)[1]
    total = Count(0, 0)
    if basis is not None:
        products = linear_cost.count(x.float(), [basis], [], None)
        total += replace(products, flops_issued=0, flops_useful=0)  # in fp32, on no tensor core
    for one in made:
        args, constants = one.args, one.constants
        if "tile_bytes" in args:
            programs, pieces = one.grid[0], 2 * M * G * GROUP
            work = 2 * programs * SCREENED * constants["BLOCK_M"] * 2 * GROUP * G
            moved = codes.numel() + 4 * TILE * T * (1 + M) + 4 * M * T
            total += Count(moved + programs * (pieces + 4 * M * G), moved + pieces, work, 4 * M * V * GROUP * G)
        elif "listed" in args and "weight" in args:
            wanted = k if args is made[-2].args else 2 * k
            tiles, step = cdiv(wanted, constants["BLOCK_N"]), constants["BLOCK_K"]
            whole, rest = divmod(K, constants["CHUNK"])
            steps = whole * constants["CHUNK"] // step + cdiv(rest, step)
            rows = wanted * K * size
            total += Count(
                rows + tiles * M * K * size, rows,
                2 * tiles * steps * constants["BLOCK_M"] * constants["BLOCK_N"] * step, 2 * M * wanted * K,
            )  # fmt: skip
        elif "some" in args:
            total += Count(4 * M * TILE * T, 0)
    return total


STATES, LISTED, WARPS = 64, 64, 8  # in CUDA C++: of a launch, rows of a block of the re-rank, warps of the other blocks


def count_cuda(
    x: Tensor, weight: Tensor, codes: Tensor, scales: Tensor, basis: Tensor | None, error: Tensor, norm: Tensor,
    slack: float, wide: int, k: int,
) -> Count:  # fmt: skip
    """The same of the kernels in CUDA C++."""
    total = screened(x, weight, codes, scales, basis, error, norm, slack, wide, k)
    if basis is not None:
        products = linear_cost.count(x.float(), [basis], [], None)
        total += replace(products, flops_issued=0, flops_useful=0)
    M = math.prod(x.shape[:-1])
    return total + reranked(x, M, 2 * k, k) + reranked(x, M, k, k)


def screened(
    x: Tensor, weight: Tensor, codes: Tensor, scales: Tensor, basis: Tensor | None, error: Tensor, norm: Tensor,
    slack: float, wide: int, k: int,
) -> Count:  # fmt: skip
    """Of the kernels whose work no value changes: states, screen, cut, and what both lists are chosen from."""
    (V, K), M, T, G = weight.shape, math.prod(x.shape[:-1]), len(codes), len(error)
    padded, size = 8 if M <= 8 else STATES, x.element_size()
    states = M * K * size + (M * K * size if basis is None else 4 * M * GROUP * G) + 8 * padded * G
    made = padded * G * (2 * GROUP + 8) + 4 * M
    warps, lists = cdiv(T, 2 * WARPS) * WARPS, cdiv(TILE * T, 128)  # of the screen, of a list
    centres, best = 4 * TILE * T * M, 4 * T * M
    asked = warps * G * (2 * GROUP * M + 16 * cdiv(M, 2))  # pieces and steps, by each warp
    return Count(
        bytes=states + made + codes.numel() + asked + 2 * scales.nbytes + 3 * centres + 17 * best
        + 8 * M + cdiv(lists, WARPS) * WARPS * 12 * M,
        unique_bytes=states + made + codes.numel() + scales.nbytes + centres + best,
        flops_issued=4 * warps * 2 * TILE * padded * GROUP * G,
        flops_useful=4 * M * V * GROUP * G,
        resident_bytes=made + centres + best,
    )  # fmt: skip


def reranked(x: Tensor, M: int, listed: int, k: int) -> Count:
    """Of a list of `listed` rows that all states need: their products, then k passes over the logits."""
    K, size, tiles = x.shape[-1], x.element_size(), cdiv(listed, LISTED)
    rows, logits = listed * K * size, M * listed * size
    return Count(
        bytes=rows + tiles * M * K * size + logits + 16 * listed + M * k * listed * (12 + size),
        unique_bytes=rows + logits + 12 * listed,
        flops_issued=2 * tiles * LISTED * (8 if M <= 8 else STATES) * cdiv(K, 64) * 64,
        flops_useful=2 * M * listed * K,
        resident_bytes=M * K * size + logits,
    )


def cases() -> list[CountedCase]:
    """The heads of the benchmark, without a basis and with one, k = 1."""
    return list(_cases())


def _cases() -> Iterator[CountedCase]:
    for name, (V, K) in HEADS.items():
        for rows in ROWS:
            for word in ("plain", "basis"):
                G, T = cdiv(K, GROUP), cdiv(V, TILE)
                wide = G if word == "plain" else cdiv(2 * G, 5)
                meta = partial(torch.empty, device="meta")
                x, weight = (meta(n, K, dtype=torch.bfloat16) for n in (rows, V))
                codes, basis = meta(T, tile_bytes(G, wide), dtype=torch.uint8), meta(GROUP * G, K)
                parts = meta(T * TILE), None if word == "plain" else basis, meta(G), meta(G)
                fields = {"m": rows, "vocab": V, "d": K, "k": 1}
                flat = (x, weight, codes, *parts, 1e-3, wide, 1)
                yield CountedCase(
                    f"{name}-{rows}-{word}", "bf16", partial(count, *flat), fields, partial(count_cuda, *flat)
                )
