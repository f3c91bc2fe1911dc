"""channel_select in Triton: one program chooses the channels of a row, with its scores in registers.

The cut is found bit by bit: 31 times it is asked whether the scores from a number on weigh enough, and where several
scores equal the cut, as often as the channels have bits up to which channel they are needed. Bits of scores, taken as
integers, are in the order of the scores, NaN highest. All sums have one order, and no thread waits for another block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv, power_of_two, unit_last_stride
from .tuning import config

# Of each rule; the scores of more do not fit into the registers of a program. A threshold looks at them one by one.
MAX_CHANNELS = ((1 << 31) - 1, 1 << 14, 1 << 14, 1 << 13)
COMMON_CHANNELS = 256  # of a program that joins the scores of all rows
STEP = 2048  # channels that are written together
THRESHOLD, RELATIVE, TOP_K, TOP_P = (tl.constexpr(rule) for rule in range(4))
INFINITY_BITS = tl.constexpr(0x7F800000)
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def scored(x, scale, center, i, inside):
    """x - center of channels i, and their scores; 0 outside."""
    moved = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
    if center is not None:
        moved -= tl.load(center + i, mask=inside, other=0.0)
    score = moved
    if scale is not None:
        score *= tl.load(scale + i, mask=inside, other=0.0)
    return moved, tl.abs(score)


@triton.jit
def amount(score, chosen, RULE: tl.constexpr):
    """How many are chosen, or the energy that they hold."""
    if RULE == TOP_K:
        found = tl.sum(chosen.to(tl.int32), 0)
    else:
        wide = tl.where(chosen, score, 0.0).to(tl.float64)
        found = tl.sum(wide * wide, 0)
    return found


@triton.jit
def reach(score, i, target, RULE: tl.constexpr, BLOCK_K: tl.constexpr):
    """The cut at which the amount of the largest scores reaches the target, the lower channel of equal scores first."""
    bits = score.to(tl.int32, bitcast=True)
    found = 0
    for digit in range(31):
        tried = found | (1 << (30 - digit))
        found = tl.where(amount(score, bits >= tried, RULE) >= target, tried, found)
    equals = tl.sum((bits == found).to(tl.int32), 0)
    last, step = tl.where(equals > 1, 0, BLOCK_K - 1), tl.where(equals > 1, BLOCK_K // 2, 0)
    while step > 0:
        chosen = (bits > found) | ((bits == found) & (i < last + step))
        last = tl.where(amount(score, chosen, RULE) < target, last + step, last)
        step = step // 2
    return tl.minimum(found, INFINITY_BITS).to(tl.float32, bitcast=True), tl.where(found < INFINITY_BITS + 1, last, -1)


@triton.jit
def cut_of(score, level, i, K, RULE: tl.constexpr, BLOCK_K: tl.constexpr):
    """(cut, last): a rule keeps the scores above the cut, those equal to it up to channel `last`, and NaN."""
    if RULE == RELATIVE:
        cut, last = level * tl.div_rn(tl.sum(score, 0), 1.0 * K), -1
        cut = tl.where(cut > _LARGEST, _LARGEST, cut)
    elif RULE == TOP_K:
        count = tl.where(level > 0, tl.ceil(tl.minimum(level, 1.0 * K)), 0.0).to(tl.int32)
        cut, last = reach(score, i, count, RULE, BLOCK_K)
    else:
        total = amount(score, i >= 0, RULE)
        target = tl.minimum(level, 1.0).to(tl.float64) * total
        cut, last = reach(score, i, tl.where(target > 0, target, 0.0), RULE, BLOCK_K)
        cut, last = tl.where(level >= 1, 0.0, cut), tl.where(level >= 1, -1, last)  # also what is too small for the sum
        cut = tl.where(total == total, cut, -1.0)
    return cut, last


@triton.jit(do_not_specialize=["M"])
def channel_select_common_kernel(x, scale, center, judged, x_m, M, K, BLOCK_K: tl.constexpr):
    """judged [K]: the root of the mean over the rows of the squared scores."""
    i = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_K,), tl.float32)
    for _ in range(M):
        _, score = scored(x, scale, center, i, i < K)
        sums = tl.fma(score, score, sums)
        x += x_m
    tl.store(judged + i, tl.sqrt_rn(tl.div_rn(sums, 1.0 * M)), mask=i < K)


@triton.jit
def channel_select_kernel(
    x, level, scale, center, judged, whole, kept, energy, mask, x_m, K,
    RULE: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """kept, energy and mask of one row; its inputs are read again for them, so that few registers are held."""
    m = tl.program_id(0).to(tl.int64)
    x += m * x_m
    cut, last = tl.load(level), -1
    if RULE != THRESHOLD:
        i = tl.max_contiguous(tl.arange(0, BLOCK_K), [4])  # of every dtype whole sectors
        if judged is not None:
            measure = tl.load(judged + i, mask=i < K, other=0.0)
        else:
            _, measure = scored(x, scale, center, i, i < K)
        cut, last = cut_of(measure, cut, i, K, RULE, BLOCK_K)
    if whole is not None:
        cut = tl.where(tl.load(whole + m) > 0, -1.0, cut)
    dropped, every = tl.zeros((STEP,), tl.float32), tl.zeros((STEP,), tl.float32)
    for begin in range(0, K, STEP):
        k = begin + tl.max_contiguous(tl.arange(0, STEP), [4])
        moved, score = scored(x, scale, center, k, k < K)
        compared = score
        if judged is not None:
            compared = tl.load(judged + k, mask=k < K, other=0.0)
        keep = ((compared <= cut) == 0) | ((compared == cut) & (k <= last))
        tl.store(kept + m * K + k, tl.where(keep, moved, 0.0).to(kept.dtype.element_ty), mask=k < K)
        tl.store(mask + m * K + k, keep.to(tl.int8), mask=k < K)
        every += score * score
        dropped += tl.where(keep, 0.0, score * score)
    tl.store(energy + 2 * m, tl.sum(dropped, 0))
    tl.store(energy + 2 * m + 1, tl.sum(every, 0))


@triton.jit(do_not_specialize=["M"])
def channel_select_list_kernel(mask, index, count, M, K, STEP: tl.constexpr):
    """index and count of the channels that any row keeps."""
    listed = 0
    for begin in range(0, K, STEP):
        i = begin + tl.max_contiguous(tl.arange(0, STEP), [1])  # one a thread, as the scattered stores need it
        needed = tl.zeros((STEP,), tl.int32)
        row = mask + i
        for _ in range(M):
            needed |= tl.load(row, mask=i < K, other=0).to(tl.int32)
            row += K
        tl.store(index + listed + tl.cumsum(needed, 0) - 1, i, mask=needed > 0)
        listed += tl.sum(needed, 0)
    for begin in range(0, K, STEP):
        i = begin + tl.max_contiguous(tl.arange(0, STEP), [1])
        tl.store(index + i, -1, mask=(i >= listed) & (i < K))
    tl.store(count, listed)


def launches(
    x: Tensor, level: Tensor, scale: Tensor | None, center: Tensor | None, whole: Tensor | None, rule: int, common: bool
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], list[Launch]]:
    """The results, still unwritten, and what writes them."""
    if x.element_size() > 4:
        raise ValueError(f"channel_select: x is {x.dtype}; on a GPU it must be float32, bfloat16 or float16")
    *lead, K = x.shape
    if MAX_CHANNELS[rule] < K:
        raise ValueError(f"channel_select: x has {K} channels; on a GPU rule={rule} takes at most {MAX_CHANNELS[rule]}")
    kept, energy = x.new_empty(x.shape), level.new_empty(*lead, 2)
    index, count = x.new_empty(K, dtype=torch.int32), x.new_empty(1, dtype=torch.int32)
    results, M = (kept, index, count, energy), energy.numel() // 2
    if 0 in (M, K):
        index.fill_(-1)
        count.zero_()
        energy.zero_()
        return results, []
    rows = unit_last_stride(x.reshape(M, K))
    vectors = {
        "scale": None if scale is None else unit_last_stride(scale),
        "center": None if center is None else unit_last_stride(center),
    }
    block = power_of_two(K, 32)
    warps = min(config("channel_select", x.device, channels=K)["num_warps"], block // 32)
    made, judged = list[Launch](), None
    if common:
        judged = level.new_empty(K)
        made.append(
            Launch(
                channel_select_common_kernel,
                grid=(cdiv(K, COMMON_CHANNELS), 1, 1),
                args={"x": rows, **vectors, "judged": judged, "x_m": rows.stride(0), "M": M, "K": K},
                constants={"BLOCK_K": COMMON_CHANNELS},
                num_warps=4,
            )
        )
    mask = x.new_empty(M, K, dtype=torch.int8)
    every = None if whole is None else whole.reshape(M).contiguous().view(torch.uint8)
    select = Launch(
        channel_select_kernel,
        grid=(M, 1, 1),
        args={
            "x": rows, "level": level, **vectors, "judged": judged, "whole": every, "kept": kept, "energy": energy,
            "mask": mask, "x_m": rows.stride(0), "K": K,
        },
        constants={"RULE": rule, "BLOCK_K": block, "STEP": min(block, STEP)},
        num_warps=warps,
    )  # fmt: skip
    write = Launch(
        channel_select_list_kernel,
        grid=(1, 1, 1),
        args={"mask": mask, "index": index, "count": count, "M": M, "K": K},
        constants={"STEP": min(block, STEP)},
        num_warps=warps,
    )
    return results, [*made, select, write]
