"""tree_attention in Triton: one program attends from some rows to one split of their keys; a second kernel merges.

Keys are added up by position: a cached key's is its slot, and the i-th new row that row t sees has position prefix + i.
Positions are cut into splits and those into blocks, both of fixed sizes; so a row's sums are the same wherever its
prefix ends and whatever the other rows see. Up to the split in which the prefix ends, all new rows and all query heads
of a key/value head share the loads of K and V. From there on a program works for one row, whose new keys it gathers
along the row's path. All programs have the same tile, of the same layout, whatever the number of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv, power_of_two, unit_last_stride
from .tuning import config

_LOWEST = tl.constexpr(-3e38)  # maxima are finite from the start, so hidden scores (-inf) weigh 0


@triton.jit
def _load(rows, seen, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows [N, D] from pointers [N, 1]; zero where not `seen` [N, 1] if MASKED."""
    d = tl.arange(0, BLOCK_D)[None, :]
    if MASKED:
        loaded = tl.load(rows + d, mask=seen if D == BLOCK_D else seen & (d < D), other=0.0)
    elif D == BLOCK_D:
        loaded = tl.load(rows + d)
    else:
        loaded = tl.load(rows + d, mask=d < D, other=0.0)
    return loaded


@triton.jit
def _add(query, keys, values, seen, state, scale, MASKED: tl.constexpr):
    """One step of the online softmax: query [M, D], keys and values [N, D], state (maxima, totals, sums) so far."""
    top, total, sums = state
    score = tl.dot(query, tl.trans(keys), input_precision="ieee")
    if MASKED:
        score = tl.where(seen, score, -float("inf"))
    high = tl.maximum(top, tl.max(score, 1) * scale)
    weight = tl.exp2(tl.fma(score, scale, -high[:, None]))
    past = tl.exp2(top - high)
    total = tl.fma(total, past, tl.sum(weight, 1))
    sums = tl.dot(weight.to(values.dtype), values, sums * past[:, None], input_precision="ieee")
    return high, total, sums


@triton.jit
def _path(ancestors, t, T):
    """Of new row t: whether it sees each of 64 new rows, int32 [64]; for the chain, the rows up to it."""
    bit = tl.arange(0, 64)
    seen = bit <= t if ancestors is None else (tl.load(ancestors + t) >> bit) & 1
    return tl.where(bit < T, seen, 0).to(tl.int32)


@triton.jit(do_not_specialize=["ancestors_b", "T", "C", "group", "window", "splits"])
def tree_attention_kernel(
    q, k, v, prefix, ancestors, tops, totals, sums,
    q_b, q_h, q_t, k_b, k_g, k_n, v_b, v_g, v_n, ancestors_b, T, C, group, window, splits, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Maxima, totals and sums of one split, [B, G, T * group, splits(, D)]."""
    b, g, G = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    cached = tl.minimum(tl.maximum(tl.load(prefix + b), 0), C - T)
    # First come the programs of one row: for each part of its heads the split where the prefix ends and the next one.
    parts = tl.cdiv(group, BLOCK_M)
    alone = tl.program_id(0) < 2 * parts * T
    t = tl.where(alone, tl.program_id(0) // (2 * parts), 0)
    tiles = tl.cdiv(T * group, BLOCK_M)
    shared = tl.program_id(0) - 2 * parts * T
    split = tl.where(alone, cached // SPLIT + tl.program_id(0) % 2, shared // tiles)
    if (not alone) & (split >= cached // SPLIT):
        return
    first_row = tl.where(alone, t * group + tl.program_id(0) // 2 % parts * BLOCK_M, shared % tiles * BLOCK_M)
    last_row = tl.where(alone, (t + 1) * group, T * group) - 1
    if ancestors is not None:
        ancestors += b * ancestors_b
    path = _path(ancestors, t, T)
    begin, end = split * SPLIT, (split + 1) * SPLIT
    end = tl.where(alone, tl.minimum(end, cached + tl.sum(path, 0)), end)
    row = first_row + tl.arange(0, BLOCK_M)
    start = cached + row // group + 1 - window  # the first position that a row sees
    if WINDOW:
        low = cached + first_row // group + 1 - window
        begin = tl.maximum(begin, tl.maximum(low, 0) // BLOCK_N * BLOCK_N)
    if begin >= end:
        return

    q += b * q_b + g * group * q_h
    rows = q + (row // group).to(tl.int64)[:, None] * q_t + (row % group).to(tl.int64)[:, None] * q_h
    query = _load(rows, (row <= last_row)[:, None], D, BLOCK_D, True)
    query = tl.where(scale < 0, -query, query)  # so that the largest product is the largest score
    scale = tl.maximum(tl.abs(scale) * 1.44269504, 1e-30)  # log2(e); never zero, for hidden scores are -inf
    k += b * k_b + g * k_g
    v += b * v_b + g * v_g
    n = tl.arange(0, BLOCK_N)
    zeros = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    state = (tl.full((BLOCK_M,), _LOWEST, tl.float32), tl.zeros((BLOCK_M,), tl.float32), zeros)

    whole = tl.maximum(begin, tl.minimum(end, cached // BLOCK_N * BLOCK_N))  # up to here blocks are of cached keys
    for position in range(begin, whole, BLOCK_N):
        slot = position + n
        at = slot.to(tl.int64)[:, None]
        seen = slot >= tl.maximum(low, 0) if WINDOW else slot >= 0
        keys = _load(k + at * k_n, seen[:, None], D, BLOCK_D, WINDOW)
        values = _load(v + at * v_n, seen[:, None], D, BLOCK_D, WINDOW)
        state = _add(query, keys, values, slot[None, :] >= start[:, None], state, scale, WINDOW)

    if ancestors is not None:  # the new row at every place of the path
        bit = tl.arange(0, 64)
        path = _path(ancestors, t + tl.minimum(whole, 0), T)  # anew: kept over the loop it would take registers from it
        place = tl.cumsum(path, 0) - 1
        mine = (path > 0)[:, None] & (place[:, None] == bit[None, :])
        new_rows = tl.sum(tl.where(mine, bit[:, None], 0), 0)
    for position in range(whole, end, BLOCK_N):
        slot = position + n
        seen = slot < end
        if WINDOW:
            seen &= slot >= low
        if ancestors is not None:
            new = tl.gather(new_rows, tl.maximum(slot - cached, 0) % 64, 0)
            slot = tl.where(slot < cached, slot, cached + new)
        at = slot.to(tl.int64)[:, None]
        keys = _load(k + at * k_n, seen[:, None], D, BLOCK_D, True)
        values = _load(v + at * v_n, seen[:, None], D, BLOCK_D, True)
        state = _add(query, keys, values, seen[None, :], state, scale, True)

    top, total, summed = state
    r = first_row + tl.arange(0, BLOCK_M)
    at = ((b * G + g) * T * group + r) * splits + split
    tl.store(tops + at, top, mask=r <= last_row)
    tl.store(totals + at, total, mask=r <= last_row)
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(sums + at[:, None] * D + d, summed, mask=(r <= last_row)[:, None] & (d < D))


@triton.jit(do_not_specialize=["ancestors_b", "T", "C", "group", "window", "splits"])
def tree_attention_merge_kernel(
    tops, totals, sums, prefix, ancestors, out, lse, ancestors_b, T, C, group, window, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """out and lse of one row and head from its splits, added up in blocks of BLOCK_S."""
    b, g, row = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0)
    t, h, H = row // group, g * group + row % group, tl.num_programs(1) * group
    cached = tl.minimum(tl.maximum(tl.load(prefix + b), 0), C - T)
    if ancestors is not None:
        ancestors += b * ancestors_b
    stop = tl.cdiv(cached + tl.sum(_path(ancestors, t, T), 0), SPLIT)
    first = tl.maximum(cached + t + 1 - window, 0) // SPLIT if WINDOW else 0
    start = first // BLOCK_S * BLOCK_S
    at = (b * tl.num_programs(1) + g) * T * group + row
    tops += at * splits
    totals += at * splits
    sums += at * splits * D
    s, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    top = tl.full((BLOCK_S,), _LOWEST, tl.float32)
    for split in range(start, stop, BLOCK_S):
        inside = (split + s >= first) & (split + s < stop)
        top = tl.maximum(top, tl.load(tops + split + s, mask=inside, other=_LOWEST))
    highest = tl.max(top, 0)
    total, summed = tl.zeros((BLOCK_S,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    for split in range(start, stop, BLOCK_S):
        inside = (split + s >= first) & (split + s < stop)
        weight = tl.exp2(tl.load(tops + split + s, mask=inside, other=_LOWEST) - highest)
        total = tl.fma(tl.load(totals + split + s, mask=inside, other=0.0), weight, total)
        rows = sums + (split + s).to(tl.int64)[:, None] * D + d[None, :]
        part = tl.load(rows, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        summed += tl.sum(weight[:, None] * part, 0)
    all_of_it = tl.sum(total, 0)
    inverse = tl.where(all_of_it == 0, 0.0, 1.0 / all_of_it)
    tl.store(out + ((b * T + t) * H + h) * D + d, (summed * inverse).to(out.dtype.element_ty), mask=d < D)
    result = tl.where(all_of_it == 0, -float("inf"), highest * 0.69314718 + tl.log(all_of_it))  # ln(2)
    tl.store(lse + (b * H + h) * T + t, result)


def launches(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, prefix: Tensor, ancestors: Tensor | None, window: int, scale: float
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The results, still unwritten, and what writes them. Prefixes and words out of range are clamped."""
    (B, H, T, D), (G, C) = q.shape, k_cache.shape[1:3]
    size = q.element_size()
    if size > 4:
        raise ValueError(f"tree_attention: {q.dtype} has no GPU kernel; it must be float16, bfloat16 or float32")
    out, lse = q.new_empty(B, T, H, D), q.new_empty(B, H, T, dtype=torch.float32)
    if B * H * T == 0:
        return (out.transpose(1, 2), lse), []
    chosen = config("tree_attention", q.device, head_dim=max(D, 1), itemsize=size)
    split, block_m = chosen["SPLIT"], chosen["BLOCK_M"]
    group, splits = H // G, cdiv(C, split)
    inputs = {"q": rows_apart(q), "k": rows_apart(k_cache), "v": rows_apart(v_cache)}
    words = {"prefix": prefix.contiguous(), "ancestors": None if ancestors is None else ancestors.contiguous()}
    states = {
        "tops": lse.new_empty(B * H * T, splits), "totals": lse.new_empty(B * H * T, splits),
        "sums": lse.new_empty(B * H * T, splits, D),
    }  # fmt: skip
    strides = {
        f"{name}_{axis}": tensor.stride(i)
        for name, tensor in inputs.items()
        for i, axis in enumerate("bht" if name == "q" else "bgn")
    }
    sizes = {
        "ancestors_b": T if ancestors is not None and len(ancestors) > 1 else 0, "T": T, "C": C, "group": group,
        "window": min(window, C), "splits": splits,
    }  # fmt: skip
    both = {"D": D, "BLOCK_D": power_of_two(D, 16), "SPLIT": split, "WINDOW": window > 0}
    attend = Launch(
        tree_attention_kernel,
        grid=(2 * T * cdiv(group, block_m) + (C - T) // split * cdiv(T * group, block_m), G, B),
        args={**inputs, **words, **states, **strides, **sizes, "scale": scale},
        constants={**both, "BLOCK_M": block_m, "BLOCK_N": chosen["BLOCK_N"]},
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
    )
    merge = Launch(
        tree_attention_merge_kernel,
        grid=(T * group, G, B),
        args={**states, **words, "out": out, "lse": lse, **sizes},
        constants={**both, "BLOCK_S": 16},
        num_warps=4,
    )
    return (out.transpose(1, 2), lse), [attend, merge]


def rows_apart(tensor: Tensor) -> Tensor:
    """The tensor, copied only where its last axis is not contiguous, or where its rows are single adjacent numbers.

    Triton 3.6 multiplies by a tile of such rows, which lies transposed in memory, wrongly on sm_90.
    """
    return torch.nn.functional.pad(tensor, (0, 1))[..., :1] if tensor.shape[3] == 1 else unit_last_stride(tensor)
