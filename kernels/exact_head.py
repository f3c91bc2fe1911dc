"""exact_head in Triton: a screen of few bits, then the dense head's own products for the rows that it leaves.

    state    a hidden state as pairs of int8 numbers, and the bound that makes centres intervals
    screen   centres of all rows by products of int8 numbers, which are exact, and the best of each tile
    select   a cut that 2 k tiles reach
    count, list    the rows of the head that some state needs: those above its cut
    rerank   their logits by the arithmetic of `linear`, 64 rows at a time
    top      the k largest of each state

The last four run twice: with the cut, for a threshold that k logits reach; then with that and the intervals. A state
whose numbers are not finite has an infinite bound, so that it needs all rows. Nothing is read on the host, and how many
rows are computed is known to the programs alone: those without any end at once.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scrimp.head_screen import GROUP, TILE
from scrimp.ops.exact_head import _check

from .launch import Launch, cdiv, power_of_two, unit_last_stride
from .linear import CHUNK
from .linear import launches as linear_launches
from .tuning import config

MAX_STATES = 64  # of a launch; `linear` has the same bits for as many
BLOCK = 1024  # rows of the head that a program counts
TILES = 4  # of a program of the screen
# What rounding a sum to a logit takes from it at most: a share of the logit, and a number.
ROUNDED = {torch.bfloat16: (2.0**-7, 2.0**-126), torch.float16: (2.0**-10, 2.0**-24)}
# Tensor cores truncate what they align: at most 17/8 of the error of rounded sums, which the screen's slack is.
SLACK = 4


@triton.jit
def coordinate_at(i, is_wide):
    """Which coordinate of a group the codes have in place i: bytes of words of 8 bits; low nibbles, then high ones."""
    swapped = ((i & 1) << 1) | ((i >> 1) & 1)
    narrow = ((i >> 2) & 7) * 8 + (i & 1) * 4 + (i >> 5) * 2 + ((i >> 1) & 1)
    return tl.where(is_wide, (i & ~3) | swapped, narrow)


@triton.jit(do_not_specialize=["x_m", "coordinates_m", "M", "K", "D", "G", "wide"])
def exact_head_state_kernel(
    x, coordinates, error, norm, pieces, step, bound, x_m, coordinates_m, M, K, D, G, wide, slack,
    GROUPS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One state: int8 pieces [2, M, G, 64] in the order of the codes, step [M, G], bound [M]."""
    m = tl.program_id(0)
    i, n = tl.max_contiguous(tl.arange(0, 64), [1])[None, :], tl.arange(0, BLOCK_K)
    x += tl.cast(m, tl.int64) * x_m
    coordinates += tl.cast(m, tl.int64) * coordinates_m
    squares = tl.zeros((BLOCK_K,), tl.float64)
    for first in range(0, K, BLOCK_K):
        own = tl.load(x + first + n, mask=first + n < K, other=0.0).to(tl.float64)
        squares += own * own
    length = tl.sqrt(tl.sum(squares, 0))
    terms, sums = tl.zeros((GROUPS,), tl.float64), tl.zeros((GROUPS,), tl.float64)
    sound = tl.full((GROUPS, 64), 1, tl.int32)
    for first in range(0, G, GROUPS):
        g = first + tl.arange(0, GROUPS)
        inside = (g < G)[:, None]
        at = g[:, None] * 64 + coordinate_at(i, g[:, None] < wide)
        h = tl.load(coordinates + at, mask=inside & (at < D), other=0.0).to(tl.float32)
        fine = tl.abs(h) < 1e30
        sound &= fine.to(tl.int32)
        h = tl.where(fine, h, 0.0)
        steps = tl.div_rn(tl.max(tl.abs(h), 1), tl.full((GROUPS,), 32639.0, tl.float32))
        scaled = tl.where(steps[:, None] > 0, tl.div_rn(h, tl.broadcast_to(steps[:, None], h.shape)), 0.0)
        near = tl.minimum(tl.maximum(tl.floor(scaled + 0.5), -32639.0), 32639.0)
        integer = near.to(tl.int32)
        high = (integer + 128) >> 8
        to = pieces + (tl.cast(m, tl.int64) * G + g[:, None]) * 64 + i
        tl.store(to, high.to(tl.int8), mask=inside)
        tl.store(to + tl.cast(M, tl.int64) * G * 64, (integer - high * 256).to(tl.int8), mask=inside)
        tl.store(step + m * G + g, steps, mask=g < G)
        whole = h.to(tl.float64)
        rest = whole - steps.to(tl.float64)[:, None] * near.to(tl.float64)
        size, left = tl.sqrt(tl.sum(whole * whole, 1)), tl.sqrt(tl.sum(rest * rest, 1))
        by = tl.load(norm + g, mask=g < G, other=0.0).to(tl.float64)
        terms += size * tl.load(error + g, mask=g < G, other=0.0).to(tl.float64) + left * by
        sums += (size + left) * by
    rounding = (2 * G + 8).to(tl.float64) * 5.960464477539063e-08  # 2^-24, of the screen's own fp32 sums
    found = tl.sum(terms, 0) + rounding * tl.sum(sums, 0) + length * slack
    found = (found * (1 + 2.0**-20)).to(tl.float32)
    usable = (tl.min(tl.min(sound, 1), 0) > 0) & (found < float("inf"))
    tl.store(bound + m, tl.where(usable, found, float("inf")))


@triton.jit
def add_group(total, codes, pieces, step, m, M, G, g, BITS: tl.constexpr):
    """total [64, BLOCK_M] and one group's share of it; codes are uint8 [4, 2 BITS, 16, 4]."""
    WIDTH: tl.constexpr = 8 * BITS
    k = tl.arange(0, WIDTH)
    codes = tl.reshape(tl.permute(codes, (0, 2, 1, 3)), [64, WIDTH])
    at = pieces + (m.to(tl.int64)[None, :] * G + g) * 64 + k[:, None]
    inside = (m < M)[None, :]
    behind = tl.cast(M, tl.int64) * G * 64
    high, low = tl.load(at, mask=inside, other=0), tl.load(at + behind, mask=inside, other=0)
    if BITS == 8:
        q = (codes ^ 128).to(tl.int8, bitcast=True)
        sums = tl.dot(q, high, out_dtype=tl.int32) * 256 + tl.dot(q, low, out_dtype=tl.int32)
    else:
        q = (codes & 15).to(tl.int8, bitcast=True) - 8
        sums = tl.dot(q, high, out_dtype=tl.int32) * 256 + tl.dot(q, low, out_dtype=tl.int32)
        q = (codes >> 4).to(tl.int8, bitcast=True) - 8
        high, low = tl.load(at + 32, mask=inside, other=0), tl.load(at + behind + 32, mask=inside, other=0)
        sums += tl.dot(q, high, out_dtype=tl.int32) * 256 + tl.dot(q, low, out_dtype=tl.int32)
    by = tl.load(step + m * G + g, mask=m < M, other=0.0)
    return tl.fma(tl.broadcast_to(by[None, :], total.shape), sums.to(tl.float32), total)


@triton.jit(do_not_specialize=["M", "V", "T", "G", "wide"])
def exact_head_screen_kernel(
    codes, scales, pieces, step, centre, best, tile_bytes, M, V, T, G, wide, BLOCK_M: tl.constexpr
):
    """centre [M, 16 T] of 64 rows of the head, best [M, T] of their tiles."""
    tile, m = tl.program_id(0) * 4 + tl.arange(0, 4), tl.arange(0, BLOCK_M)
    row = tl.program_id(0) * 64 + tl.arange(0, 64)
    codes += tile.to(tl.int64)[:, None, None, None] * tile_bytes
    codes += tl.arange(0, 16)[None, None, :, None] * 4 + tl.arange(0, 4)[None, None, None, :]
    seen = (tile < T)[:, None, None, None]
    total = tl.zeros((64, BLOCK_M), tl.float32)
    for g in range(0, wide):
        some = tl.load(codes + g * 1024 + tl.arange(0, 16)[None, :, None, None] * 64, mask=seen, other=0)
        total = add_group(total, some, pieces, step, m, M, G, g, 8)
    codes += wide * 1024
    for g in range(wide, G):
        some = tl.load(codes + (g - wide) * 512 + tl.arange(0, 8)[None, :, None, None] * 64, mask=seen, other=0)
        total = add_group(total, some, pieces, step, m, M, G, g, 4)
    total *= tl.load(scales + row, mask=row < 16 * T, other=0.0)[:, None]
    inside = (m < M)[None, :]
    at = m.to(tl.int64)[None, :] * (16 * T) + row[:, None]
    tl.store(centre + at, total, mask=inside & (row < 16 * T)[:, None])
    total = tl.where((row < V)[:, None], total, -float("inf"))
    highest = tl.max(tl.reshape(total, [4, 16, BLOCK_M]), 1)
    tl.store(best + m.to(tl.int64)[None, :] * T + tile[:, None], highest, mask=inside & (tile < T)[:, None])


@triton.jit
def ordered(score):
    """int32 in the order of the fp32 numbers, NaN above all; both zeros are one."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(score != score, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit(do_not_specialize=["T", "wanted"])
def exact_head_select_kernel(best, bound, cut, T, wanted, BLOCK: tl.constexpr):
    """A number that at least `wanted` of the T tiles reach, the largest of 16 bits; -inf if they are fewer."""
    m = tl.program_id(0)
    best += tl.cast(m, tl.int64) * T
    found = tl.full((), -32768, tl.int32)
    for bit in range(0, 16):
        trial = found + (32768 >> bit)
        count = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, T, BLOCK):
            t = tl.max_contiguous(first + tl.arange(0, BLOCK), [1])
            some = tl.load(best + t, mask=t < T, other=-float("inf"))
            count += ((ordered(some) >> 16 >= trial) & (t < T)).to(tl.int32)
        found = tl.where(tl.sum(count, 0) >= wanted, trial, found)
    bits = found << 16
    reached = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    reached = tl.where((wanted > T) | (reached != reached), -float("inf"), reached)
    tl.store(cut + m, tl.where(tl.load(bound + m) < float("inf"), reached, float("inf")))


@triton.jit
def needed(centre, scales, bound, cut, m, row, V, T):
    """Whether state m needs the rows: those whose intervals (without a bound: whose centres) reach its cut; 1 or 0."""
    inside = row < 16 * T
    upper = tl.load(centre + tl.cast(m, tl.int64) * (16 * T) + row, mask=inside, other=0.0)
    if bound is not None:
        upper += tl.load(scales + row, mask=inside, other=0.0) * tl.load(bound + m)
    return ((row < V) & ((upper < tl.load(cut + m)) == 0)).to(tl.int32)


@triton.jit(do_not_specialize=["M", "V", "T", "blocks"])
def exact_head_count_kernel(centre, scales, bound, cut, own, some, M, V, T, blocks, BLOCK: tl.constexpr):
    """own [M, blocks]: rows of a block that each state needs; some [blocks]: that any state needs."""
    block = tl.program_id(0)
    row = block * BLOCK + tl.arange(0, BLOCK)
    by_any = tl.zeros((BLOCK,), tl.int32)
    for m in range(0, M):
        need = needed(centre, scales, bound, cut, m, row, V, T)
        tl.store(own + m * blocks + block, tl.sum(need, 0))
        by_any |= need
    tl.store(some + block, tl.sum(by_any, 0))


@triton.jit(do_not_specialize=["M", "V", "T", "blocks"])
def exact_head_list_kernel(
    centre, scales, bound, cut, some, listed, total, needs, M, V, T, blocks, pitch, BLOCK: tl.constexpr
):
    """listed: the rows that any state needs, ascending; needs [M, pitch]: which each state does; total: how many."""
    block, i = tl.program_id(0), tl.arange(0, BLOCK)
    row = block * BLOCK + i
    by_any = tl.zeros((BLOCK,), tl.int32)
    for m in range(0, M):
        by_any |= needed(centre, scales, bound, cut, m, row, V, T)
    before = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, block, BLOCK):
        before += tl.load(some + first + i, mask=first + i < block, other=0)
    upto = tl.sum(before, 0) + tl.cumsum(by_any, 0)
    tl.store(listed + upto - 1, row, mask=by_any > 0)
    for m in range(0, M):
        need = needed(centre, scales, bound, cut, m, row, V, T)
        tl.store(needs + tl.cast(m, tl.int64) * pitch + upto - 1, need.to(tl.int8), mask=by_any > 0)
    tl.store(total, tl.max(upto, 0), mask=block == blocks - 1)


@triton.jit(do_not_specialize=["M"])
def exact_head_rerank_kernel(
    x, weight, listed, total, logits, x_m, weight_n, M, K, pitch,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """logits [M, pitch] of the rows in the list, by their places in it: `linear_kernel`'s order of additions."""
    n, m, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    count = tl.load(total)
    if tl.program_id(0) * BLOCK_N < count:
        row = tl.load(listed + n, mask=n < count, other=0)
        rows_at = x + m.to(tl.int64)[:, None] * x_m + k[None, :]
        outputs_at = weight + row.to(tl.int64)[:, None] * weight_n + k[None, :]
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        chunk = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for at in range(0, K, BLOCK_K):
            inside = (k < K - at)[None, :]
            rows = tl.load(rows_at + at, mask=(m < M)[:, None] & inside, other=0.0)
            outputs = tl.load(outputs_at + at, mask=(n < count)[:, None] & inside, other=0.0)
            chunk = tl.dot(outputs, tl.trans(rows), chunk, input_precision="ieee")
            if at % CHUNK == CHUNK - BLOCK_K:
                sums += chunk
                chunk = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        sums = tl.trans(sums + chunk)
        to = logits + m.to(tl.int64)[:, None] * pitch + n[None, :]
        tl.store(to, sums.to(logits.dtype.element_ty), mask=(m < M)[:, None] & (n < count)[None, :])


@triton.jit(do_not_specialize=["blocks", "k"])
def exact_head_top_kernel(
    listed, total, needs, logits, own, threshold, values, ids, scored, blocks, pitch, k, relative, least,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One state: of the listed rows that it needs the k largest, or without `ids` a threshold that they reach."""
    m, count = tl.program_id(0), tl.load(total)
    i, j = tl.max_contiguous(tl.arange(0, BLOCK), [1]), tl.arange(0, 64)
    logits, needs = logits + tl.cast(m, tl.int64) * pitch, needs + tl.cast(m, tl.int64) * pitch
    last, places = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64), tl.zeros((64,), tl.int32)
    for rank in range(0, k):
        top = tl.full((BLOCK,), -0x7FFFFFFFFFFFFFFF, tl.int64)
        for first in range(0, count, BLOCK):
            at = first + i
            need = tl.load(needs + at, mask=at < count, other=0) > 0
            value = tl.load(logits + at, mask=at < count, other=0.0).to(tl.float32)
            key = (ordered(value).to(tl.int64) << 32) + (0x7FFFFFFF - at)  # of equal values the first in the list
            top = tl.where(need & (key < last), tl.maximum(top, key), top)
        last = tl.max(top, 0)
        places = tl.where(j == rank, (0x7FFFFFFF - (last & 0x7FFFFFFF)).to(tl.int32), places)
    if ids is None:
        bits = (last >> 32).to(tl.int32)
        value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        reached = value - tl.abs(value) * relative - least  # that is below the sum which was rounded to this logit
        fine = (tl.abs(value) < float("inf")) & (last > -0x7FFFFFFFFFFFFFFF)
        tl.store(threshold + m, tl.where(fine, reached, -float("inf")))
    else:
        there = (j < k) & (places < count)  # all, if the screen is this head's
        tl.store(values + m * k + j, tl.load(logits + places, mask=there, other=0.0), mask=j < k)
        tl.store(ids + m * k + j, tl.load(listed + places, mask=there, other=0).to(tl.int64), mask=j < k)
        rows = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, blocks, BLOCK):
            rows += tl.load(own + m * blocks + first + i, mask=first + i < blocks, other=0)
        tl.store(scored + m, tl.sum(rows, 0))


def launches(
    x: Tensor,
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    basis: Tensor | None,
    error: Tensor,
    norm: Tensor,
    slack: float,
    wide: int,
    k: int,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """The results, still unwritten, and what writes them."""
    _check(x, weight, codes, scales, basis, error, norm, slack, wide, k)
    if x.dtype == torch.float64:
        raise ValueError("exact_head: x is float64; on a GPU it must be float32, bfloat16 or float16")
    lead, K = x.shape[:-1], x.shape[-1]
    M = math.prod(lead)
    values, ids = x.new_empty(M, k), x.new_empty(M, k, dtype=torch.int64)
    scored = x.new_empty(M, dtype=torch.int32)
    made: list[Launch] = []
    states = unit_last_stride(x.reshape(M, K)).split(MAX_STATES) if M else ()
    for rows, *found in zip(states, *(t.split(MAX_STATES) for t in (values, ids, scored)), strict=False):
        made += _launches(rows, weight, codes, scales, basis, error, norm, slack, wide, k, *found)
    return (values.view(*lead, k), ids.view(*lead, k), scored.view(lead)), made


def _launches(
    x: Tensor, weight: Tensor, codes: Tensor, scales: Tensor, basis: Tensor | None, error: Tensor, norm: Tensor,
    slack: float, wide: int, k: int, values: Tensor, ids: Tensor, scored: Tensor,
) -> list[Launch]:  # fmt: skip
    """Those of at most `MAX_STATES` states."""
    (M, K), V, T, G = x.shape, weight.shape[0], codes.shape[0], len(error)
    coordinates, made = (x, []) if basis is None else linear_launches(x.float(), [basis], [], None)
    chosen = config("exact_head", x.device, rows=M, tokens=V)
    exact = config("linear", x.device, rows=M, outputs=V, inputs=max(K, 1), itemsize=x.element_size())
    blocks, new = cdiv(V, BLOCK), codes.new_empty
    pieces, step = new(2, M, G, GROUP, dtype=torch.int8), new(M, G, dtype=torch.float32)
    bound, cut, threshold = (new(M, dtype=torch.float32) for _ in range(3))
    centre, best = new(M, TILE * T, dtype=torch.float32), new(M, T, dtype=torch.float32)
    own, some, total = (new(shape, dtype=torch.int32) for shape in ((M, blocks), (blocks,), (1,)))
    pitch = 64 * cdiv(V, 64)  # so that rows begin with lines of memory
    listed, needs, logits = new(V, dtype=torch.int32), new(M, pitch, dtype=torch.int8), x.new_empty(M, pitch)
    sizes = {"M": M, "V": V, "T": T}
    relative, least = ROUNDED.get(x.dtype, (0.0, 0.0))

    def add(
        kernel: Any, programs: int, args: dict[str, Any], constants: dict[str, int], by: dict[str, int] = chosen
    ) -> None:
        made.append(Launch(kernel, (programs, 1, 1), args, constants, by["num_warps"], by["num_stages"]))

    add(
        exact_head_state_kernel, M,
        {
            "x": x, "coordinates": coordinates, "error": error, "norm": norm, "pieces": pieces, "step": step,
            "bound": bound, "x_m": x.stride(0), "coordinates_m": coordinates.stride(0), "M": M, "K": K,
            "D": coordinates.shape[1], "G": G, "wide": wide, "slack": slack * SLACK * (1 + 2.0**-20),
        },
        {"GROUPS": 4, "BLOCK_K": 256}, {"num_warps": 1, "num_stages": 1},
    )  # fmt: skip
    add(
        exact_head_screen_kernel, cdiv(T, TILES),
        {
            "codes": codes, "scales": scales, "pieces": pieces, "step": step, "centre": centre, "best": best,
            "tile_bytes": codes.shape[1], **sizes, "G": G, "wide": wide,
        },
        {"BLOCK_M": power_of_two(M, 16)},
    )  # fmt: skip
    add(
        exact_head_select_kernel, M, {"best": best, "bound": bound, "cut": cut, "T": T, "wanted": 2 * k},
        {"BLOCK": BLOCK},
    )  # fmt: skip
    for final in (False, True):
        test = {
            "centre": centre, "scales": scales, "bound": bound if final else None, "cut": threshold if final else cut,
        }  # fmt: skip
        found, size = {"listed": listed, "total": total}, {"BLOCK": BLOCK}
        ends = {"values": values, "ids": ids, "scored": scored}
        ends = {"threshold": None} | ends if final else {"threshold": threshold} | dict.fromkeys(ends)
        add(exact_head_count_kernel, blocks, {**test, "own": own, "some": some, **sizes, "blocks": blocks}, size)
        add(
            exact_head_list_kernel, blocks,
            {**test, "some": some, **found, "needs": needs, **sizes, "blocks": blocks, "pitch": pitch}, size,
        )  # fmt: skip
        add(
            exact_head_rerank_kernel, cdiv(V, exact["BLOCK_N"]),
            {
                "x": x, "weight": weight, **found, "logits": logits, "x_m": x.stride(0), "weight_n": weight.stride(0),
                "M": M, "K": K, "pitch": pitch,
            },
            {
                "CHUNK": CHUNK, "BLOCK_M": power_of_two(M, 16), "BLOCK_N": exact["BLOCK_N"],
                "BLOCK_K": exact["BLOCK_K"],
            },
            exact,
        )  # fmt: skip
        add(
            exact_head_top_kernel, M,
            {
                **found, "needs": needs, "logits": logits, "own": own, **ends, "blocks": blocks, "pitch": pitch,
                "k": k, "relative": relative, "least": least,
            },
            size,
        )  # fmt: skip
    return made
