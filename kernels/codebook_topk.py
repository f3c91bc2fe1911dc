"""codebook_topk in Triton: a program walks codes for 64 rows and keeps each row's best; no score is stored.

    norm     of distances: what is added to the scores of each code
    search   the k best of a range of codes; there are several ranges only where rows are few
    gather   the best of all ranges in order, and their mean or sum

A score and its code are one number, a key, whose order is that of (score, lower code): no two are equal, so the ranges
change no result. A score is the same sum whatever the rows are: their tile has one size. Few scores pass a row's k-th
best after the first tiles; they are put into the place of the worst, one of each row at a time.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from scrimp.ops.codebook_topk import _check

from .launch import Launch, cdiv, power_of_two, unit_last_stride
from .tuning import config

ROWS = 64  # of a program
PROGRAMS = 512  # keep a GPU busy
WALK = 2  # tiles of codes of a program at the least
MOST_KEYS = 1024  # of a row, from all ranges
GATHERED = 2048  # elements of codes that a program adds up at once
EMPTY = tl.constexpr(-(0x7F800001 << 32))  # the key of -inf, which no code has: 64 places count up from it
BROKEN = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # in every place of a row with a score that is NaN


@triton.jit
def key_of(score, code):
    """int64 in the order of (score, lower code); both zeros are one."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) + (0x7FFFFFFF - code)


@triton.jit
def score_of(key):
    """NaN where it is `BROKEN`."""
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["C", "blocks"])
def codebook_topk_norm_kernel(
    codebook, bias, added, codebook_g, codebook_c, C, D, blocks, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr
):
    """added [G, C]: the bias less half of a code's square."""
    g = (tl.program_id(0) // blocks).to(tl.int64)
    c, d = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    codebook += g * codebook_g + c.to(tl.int64)[:, None] * codebook_c + d[None, :]
    squares = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    for at in range(0, D, BLOCK_D):
        own = tl.load(codebook + at, mask=(c < C)[:, None] & (d < D - at)[None, :], other=0.0).to(tl.float32)
        squares = tl.fma(own, own, squares)
    total = -0.5 * tl.sum(squares, 1)
    if bias is not None:
        total += tl.load(bias + g * C + c, mask=c < C, other=0.0)
    tl.store(added + g * C + c, total, mask=c < C)


@triton.jit(do_not_specialize=["M", "C", "k", "walk", "blocks"])
def codebook_topk_kernel(
    x, codebook, added, keys, x_m, codebook_g, codebook_c, M, C, D, k, walk, blocks,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """keys [M, G, ranges, k] of a block of rows, a codebook and a range of `walk` tiles of its codes, in no order."""
    groups = tl.num_programs(0) // blocks
    g = (tl.program_id(0) // blocks).to(tl.int64)
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    i, d, j = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D), tl.arange(0, KEPT)
    x += m.to(tl.int64)[:, None] * x_m + g * D + d[None, :]
    codebook += g * codebook_g + d[None, :]
    found = tl.where((m < M)[:, None] & (j < k)[None, :], EMPTY + j.to(tl.int64)[None, :], BROKEN)
    worst = tl.min(found, 1)
    first = tl.program_id(1) * walk
    for tile in range(first, tl.minimum(first + walk, tl.cdiv(C, BLOCK_C))):
        c = tile * BLOCK_C + i
        codes_at = codebook + c.to(tl.int64)[:, None] * codebook_c
        scores = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for at in range(0, D, BLOCK_D):
            inside = (d < D - at)[None, :]
            rows = tl.load(x + at, mask=(m < M)[:, None] & inside, other=0.0)
            codes = tl.load(codes_at + at, mask=(c < C)[:, None] & inside, other=0.0)
            scores = tl.dot(rows, tl.trans(codes), scores, input_precision="ieee")
        if added is not None:
            scores += tl.load(added + g * C + c, mask=c < C, other=0.0)[None, :]
        there, missing = (c < C)[None, :], scores != scores
        broken = tl.max((there & missing).to(tl.int32), 1) > 0
        found = tl.where(broken[:, None], BROKEN, found)
        scores = tl.where(there & (missing == 0), scores, -float("inf"))
        best, at_best = tl.max(scores, 1, return_indices=True)
        better = best > score_of(worst)
        while tl.max(better.to(tl.int32), 0) > 0:
            key = key_of(best, tile * BLOCK_C + at_best)
            found = tl.where(better[:, None] & (found == worst[:, None]), key[:, None], found)
            worst = tl.min(found, 1)
            scores = tl.where(i[None, :] == at_best[:, None], -float("inf"), scores)
            best, at_best = tl.max(scores, 1, return_indices=True)
            better = best > score_of(worst)
    to = ((m.to(tl.int64) * groups + g) * tl.num_programs(1) + tl.program_id(1)) * k
    tl.store(keys + to[:, None] + j[None, :], found, mask=(m < M)[:, None] & (j < k)[None, :])


@triton.jit(do_not_specialize=["G", "count", "k", "mean"])
def codebook_topk_gather_kernel(
    keys, codebook, out, index, scores, codebook_g, codebook_c, G, D, count, k, mean,
    KEYS: tl.constexpr, KEPT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row of one codebook: index and scores [.., k] of the best of `count` keys, out [.., D] of their codes."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, KEYS // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]  # a warp loads neighbours
    j, d = tl.arange(0, KEPT), tl.arange(0, BLOCK_D)
    some = tl.load(keys + row * count + i, mask=i < count, other=EMPTY)
    broken = tl.max(some) == BROKEN
    chosen = tl.full((KEPT,), EMPTY, tl.int64)
    for rank in range(0, k):
        best = tl.max(some)
        chosen = tl.where(j == rank, best, chosen)
        some = tl.where(some == best, EMPTY, some)
    score = tl.where(broken, float("nan"), score_of(chosen))
    there = score > -float("inf")
    code = 0x7FFFFFFF - (chosen & 0x7FFFFFFF)
    tl.store(index + row * k + j, tl.where(there, code, -1).to(tl.int32), mask=j < k)
    tl.store(scores + row * k + j, score, mask=j < k)
    share = tl.where(mean > 0, tl.maximum(tl.sum(there.to(tl.int32), 0), 1), 1).to(tl.float32)
    codebook += row % G * codebook_g + code[:, None] * codebook_c + d[None, :]
    for at in range(0, D, BLOCK_D):
        own = tl.load(codebook + at, mask=there[:, None] & (d < D - at)[None, :], other=0.0).to(tl.float32)
        total = tl.where(broken, float("nan"), tl.div_rn(tl.sum(own, 0), share))
        tl.store(out + row * D + at + d, total.to(out.dtype.element_ty), mask=d < D - at)


def ranges(blocks: int, tiles: int, k: int) -> tuple[int, int]:
    """Into how many ranges the tiles of codes are split for some blocks of rows, and the tiles of one."""
    walk = cdiv(tiles, min(cdiv(PROGRAMS, blocks), cdiv(tiles, WALK), MOST_KEYS // k))
    return cdiv(tiles, walk), walk


def launches(
    x: Tensor, codebook: Tensor, bias: Tensor | None, k: int, euclidean: bool, mean: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """The results, still unwritten, and what writes them."""
    _check(x, codebook, bias, k, euclidean, mean)
    if x.dtype == torch.float64:
        raise ValueError("codebook_topk: x is float64; on a GPU it must be float32, bfloat16 or float16")
    books = codebook if codebook.dim() == 3 else codebook[None]
    G, C, D = books.shape
    M = math.prod(x.shape[:-1])
    found = (*x.shape[:-1], *codebook.shape[:-2], k)
    out, index = x.new_empty(x.shape), x.new_empty(found, dtype=torch.int32)
    scores = x.new_empty(found, dtype=torch.float32)
    if M == 0:
        return (out, index, scores), []
    chosen = config("codebook_topk", x.device, inputs=max(D, 1), k=k, itemsize=x.element_size())
    block_c, kept, blocks = chosen["BLOCK_C"], power_of_two(k, 8), cdiv(M, ROWS)
    parts, walk = ranges(blocks * G, cdiv(C, block_c), k)
    rows, added, made = unit_last_stride(x.reshape(M, G * D)), None if bias is None else bias.contiguous(), []
    if D == 1:  # Triton 3.6 multiplies wrongly on sm_90 by a tile whose rows are adjacent numbers
        rows, books = (torch.nn.functional.pad(some, (0, 1))[..., :-1] for some in (rows, books))
    keys = x.new_empty(M, G, parts, k, dtype=torch.int64)
    book = {"codebook": books}
    strides = {"codebook_g": books.stride(0), "codebook_c": books.stride(1)}
    if euclidean:
        before, added = added, x.new_empty(G, C, dtype=torch.float32)
        some = cdiv(C, chosen["NORM_C"])
        made.append(
            Launch(
                codebook_topk_norm_kernel,
                grid=(G * some, 1, 1),
                args={**book, "bias": before, "added": added, **strides, "C": C, "D": D, "blocks": some},
                constants={"BLOCK_C": chosen["NORM_C"], "BLOCK_D": chosen["BLOCK_D"]},
                num_warps=4,
            )
        )
    made.append(
        Launch(
            codebook_topk_kernel,
            grid=(blocks * G, parts, 1),
            args={
                "x": rows, **book, "added": added, "keys": keys, "x_m": rows.stride(0), **strides, "M": M, "C": C,
                "D": D, "k": k, "walk": walk, "blocks": blocks,
            },
            constants={"BLOCK_M": ROWS, "BLOCK_C": block_c, "BLOCK_D": chosen["BLOCK_D"], "KEPT": kept},
            num_warps=chosen["num_warps"],
            num_stages=chosen["num_stages"],
        )
    )  # fmt: skip
    made.append(
        Launch(
            codebook_topk_gather_kernel,
            grid=(M * G, 1, 1),
            args={
                "keys": keys, **book, "out": out, "index": index, "scores": scores, **strides, "G": G, "D": D,
                "count": parts * k, "k": k, "mean": int(mean),
            },
            constants={
                "KEYS": power_of_two(parts * k, 32), "KEPT": kept,
                "BLOCK_D": min(power_of_two(D, 16), GATHERED // kept),
            },
            num_warps=chosen["gather_warps"],
        )
    )  # fmt: skip
    return (out, index, scores), made
