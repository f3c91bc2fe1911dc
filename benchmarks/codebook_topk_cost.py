"""What codebook_topk's kernels do: a block of rows reads all codes, a tile of codes all rows; no score is stored."""

from collections.abc import Iterator
from functools import partial

import torch
from scrimp.kernels.codebook_topk import launches
from scrimp.kernels.launch import cdiv
from torch import Tensor

from .codebook_topk import BEST, CODES, SIZES
from .roofline import Count, CountedCase


def count(x: Tensor, codebook: Tensor, bias: Tensor | None, k: int, euclidean: bool, mean: bool) -> Count:
    """Of one call in which every row finds k codes."""
    G, C, D = codebook.shape if codebook.dim() == 3 else (1, *codebook.shape)
    size, made = x.element_size(), launches(x, codebook, bias, k, euclidean, mean)[1]
    M, (search, gather) = x.numel() // (G * D), made[-2:]
    block_m, block_c, block_d = (search.constants[name] for name in ("BLOCK_M", "BLOCK_C", "BLOCK_D"))
    blocks, tiles, steps = cdiv(M, block_m), cdiv(C, block_c), cdiv(D, block_d)
    rows, codes, added = M * G * D * size, G * C * D * size, 4 * G * C
    total = Count(0, 0)
    if euclidean:
        norms = codes + added * (1 if bias is None else 2)
        total += Count(norms, norms)
    if search.args["added"] is None:
        added = 0
    keys, results = 8 * M * G * gather.args["count"], rows + 8 * M * G * k
    total += Count(
        bytes=tiles * rows + blocks * (codes + added) + keys,
        unique_bytes=rows + codes + added + keys,
        flops_issued=2 * G * blocks * block_m * tiles * block_c * steps * block_d,
        flops_useful=2 * M * G * C * D,
        resident_bytes=rows + codes,
    )
    return total + Count(keys + k * rows + results, keys + results)


BLOCK = 64  # in CUDA C++: rows and codes of a tile, their numbers of a step


def count_cuda(x: Tensor, codebook: Tensor, bias: Tensor | None, k: int, euclidean: bool, mean: bool) -> Count:
    """The same of the kernels in CUDA C++; each of four warps asks for what is added to the scores of a tile."""
    G, C, D = codebook.shape if codebook.dim() == 3 else (1, *codebook.shape)
    size = x.element_size()
    M = x.numel() // (G * D)
    blocks, tiles = cdiv(M, BLOCK), cdiv(C, BLOCK)
    most = min(cdiv(512, blocks * G), cdiv(tiles, 2), 512 // k)
    parts = cdiv(tiles, cdiv(tiles, most))
    rows, codes, added = M * G * D * size, G * C * D * size, 4 * G * C
    norms = codes + added * (1 if bias is None else 2) if euclidean else 0
    if bias is None and not euclidean:
        added = 0
    keys, results = 8 * M * G * parts * k, rows + 8 * M * G * k
    return Count(
        bytes=norms + tiles * rows + blocks * (codes + 4 * added) + 2 * keys + k * rows + results,
        unique_bytes=norms + rows + codes + added + 2 * keys + results,
        flops_issued=2 * BLOCK**3 * G * blocks * tiles * cdiv(D, BLOCK),
        flops_useful=2 * M * G * C * D,
        resident_bytes=rows + codes,
    )


def cases() -> list[CountedCase]:
    """The sizes of the benchmark, in bf16."""
    return list(_cases())


def _cases() -> Iterator[CountedCase]:
    for name, (rows, d, dtype) in SIZES.items():
        if dtype is torch.bfloat16 or rows == 1:
            x, codebook = (torch.empty(n, d, dtype=torch.bfloat16, device="meta") for n in (rows, CODES))
            fields = {"m": rows, "d": d, "codes": CODES, "k": BEST}
            flat = (x, codebook, None, BEST, False, True)
            made = partial(count, *flat), fields, partial(count_cuda, *flat)
            yield CountedCase(name.removesuffix("-bf16"), "bf16", *made)
