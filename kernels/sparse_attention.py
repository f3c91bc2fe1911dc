"""sparse_attention in Triton: one program attends from a block of rows of one plan tile to the tile's keys.

A row is one query of one head. Where all heads share a plan, the query heads of a key/value head lie side by side in
the rows of a tile (row r is query r // group of head r % group), so they share every load of K and V; elsewhere a
program works on one head. The keys of a tile come in three loops, each a software pipeline:

    whole pieces    BLOCK_N keys in a row that every query of the block sees: no mask
    edges           what is left of the ranges at their ends and under the diagonal, packed by quarters of a piece
    columns         BLOCK_N scattered columns, less those inside a range, which the list is first marked with

A piece is looked up, not walked to: 32 ranges lie in the lanes of a warp with prefix sums of their pieces, and the
range that holds piece p is found by one warp-wide sum. So a range may be short without draining the pipeline. D is cut
into parts of at most PART: with rows no fewer than a part's columns, Triton gives each warp whole rows on sm_80.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv, power_of_two, unit_last_stride
from .tuning import config

_HIDDEN = tl.constexpr(2**31 - 1)  # a key after every query


@triton.jit
def _load(rows, seen, D: tl.constexpr, PART: tl.constexpr, REST: tl.constexpr, MASKED: tl.constexpr):
    """Rows [N, D] in parts of PART columns and one of REST; rows [N, 1] are pointers; zero where not `seen` [N, 1]."""
    parts = ()
    for i in tl.static_range(D // PART):
        at = rows + i * PART + tl.arange(0, PART)[None, :]
        parts = parts + (tl.load(at, mask=seen, other=0.0) if MASKED else tl.load(at),)
    if REST:
        d = D // PART * PART + tl.arange(0, REST)[None, :]
        if D % PART == REST:
            parts = parts + (tl.load(rows + d, mask=seen, other=0.0) if MASKED else tl.load(rows + d),)
        else:
            parts = parts + (tl.load(rows + d, mask=seen & (d < D) if MASKED else d < D, other=0.0),)
    return parts


@triton.jit
def _rows(first_row, count, BLOCK_M: tl.constexpr):
    """first_row + [0, BLOCK_M), computed anew: rows kept over a loop would take registers from it.

    `count` is not negative, which the compiler does not know.
    """
    return first_row + tl.minimum(count, 0) + tl.arange(0, BLOCK_M)


@triton.jit
def _scores(q, k):
    """q k^T [M, N] of the parts of q [M, D] and k [N, D]."""
    score = tl.dot(q[0], tl.trans(k[0]), input_precision="ieee")
    for i in tl.static_range(1, len(q)):
        score = tl.dot(q[i], tl.trans(k[i]), score, input_precision="ieee")
    return score


@triton.jit
def _unhidden(score, key, first, last, FIRST: tl.constexpr):
    """The scores [M, N] of rows i and keys j with key[j] <= last[i] (and first[i] <= key[j], if FIRST); else -inf."""
    seen = key[None, :] <= last[:, None]
    if FIRST:
        seen &= key[None, :] >= first[:, None]
    return tl.where(seen, score, -float("inf"))


@triton.jit
def _add(score, v, state, scale):
    """One step of the online softmax: scores [M, N], parts of v [N, D], state (maxima, totals and sums so far).

    Maxima are finite from the start, so hidden scores (-inf) weigh 0 in rows without any key, too.
    """
    top, total, sums = state
    high = tl.maximum(top, tl.max(score, 1) * scale)
    weight = tl.exp2(tl.fma(score, scale, -high[:, None]))
    past = tl.exp2(top - high)
    total = total * past + tl.sum(weight, 1)
    weight = weight.to(v[0].dtype)
    updated = ()
    for i in tl.static_range(len(v)):
        updated = updated + (tl.dot(weight, v[i], sums[i] * past[:, None], input_precision="ieee"),)
    return high, total, updated


@triton.jit
def _total(bits):
    """How many of bits [R, 32] are set; the last sum is over the lanes of a warp, which all of them are known to share.

    So loops up to it are known to be the same for all threads, and ptxas makes no second copy of their shuffles.
    """
    return tl.sum(tl.sum(bits.to(tl.int32), 0), 0)


@triton.jit
def _columns_to_keep(columns, count, ranges, n_ranges, low, safe_low, safe_high, high):
    """Which of the first 1024 of `count` columns lie in [low, high) and in no range.

    Returns int32 [32], in whose word w bit b stands for column 32 b + w, and how many columns lie before each bound.
    """
    words = tl.zeros((32,), tl.int32)
    begin = 0
    safe_begin = 0
    safe_end = 0
    end = 0
    for done in tl.range(0, tl.minimum(tl.cdiv(count, 32), 32), 8, num_stages=1):  # few at a time: registers
        bit = done + tl.arange(0, 8)[:, None]
        index = 32 * bit + tl.arange(0, 32)[None, :]
        column = tl.load(columns + index, mask=index < count, other=_HIDDEN)
        ended = tl.zeros((8, 32), tl.int32)  # ranges that end before the column, by bisection
        step = 1
        while step <= n_ranges:
            step *= 2
        while step > 0:
            probe = ended + step - 1
            stop = tl.load(ranges + 2 * probe + 1, mask=probe < n_ranges, other=_HIDDEN)
            ended = tl.where((probe < n_ranges) & (stop <= column), ended + step, ended)
            step //= 2
        start = tl.load(ranges + 2 * ended, mask=ended < n_ranges, other=_HIDDEN)
        keep = (column >= low) & (column < high) & (column < start)
        words |= tl.sum(keep.to(tl.int32) << bit, 0)
        begin += _total(column < low)
        safe_begin += _total(column < safe_low)
        safe_end += _total(column < safe_high)
        end += _total(column < high)
    return words, begin, safe_begin, safe_end, end


@triton.jit(
    do_not_specialize=[
        "ranges_b", "ranges_h", "range_slice_b", "range_slice_h", "columns_b", "columns_h", "column_slice_b",
        "column_slice_h", "row_start_b", "R", "C", "n_q", "n_k", "q_block", "q_offset", "group", "shared_by",
    ]
)  # fmt: skip
def sparse_attention_kernel(
    q, k, v, ranges, range_slice, columns, column_slice, row_start, out, lse,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    ranges_b, ranges_h, range_slice_b, range_slice_h, columns_b, columns_h, column_slice_b, column_slice_h, row_start_b,
    R, C, n_q, n_k, q_block, q_offset, group, shared_by, scale,
    D: tl.constexpr, PART: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, H = tl.program_id(2).to(tl.int64), tl.num_programs(1) * group
    head = tl.program_id(1) * group  # the first of this program's `group` query heads
    kv_head = (head // shared_by).to(tl.int64)
    # The last blocks have the most keys where a plan is causal, so they go first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    blocks_of_tile = tl.cdiv(q_block * group, BLOCK_M)
    tile = block // blocks_of_tile
    n_rows = tl.minimum(q_block, n_q - tile * q_block) * group
    first_row = block % blocks_of_tile * BLOCK_M
    if first_row >= n_rows:
        return
    row = tl.minimum(first_row + tl.arange(0, BLOCK_M), n_rows - 1)  # rows past the tile's last repeat it
    token = tile * q_block + row // group
    last = token + q_offset  # the last key that a row sees
    q += b * q_b + head.to(tl.int64) * q_h
    rows = q + token.to(tl.int64)[:, None] * q_n + (row % group).to(tl.int64)[:, None] * q_h
    loaded = _load(rows, True, D, PART, REST, False)
    query = ()
    for i in tl.static_range(len(loaded)):  # negated if need be, so that the largest product is the largest score
        query = query + (tl.where(scale < 0, -loaded[i], loaded[i]),)
    scale = tl.maximum(tl.abs(scale) * 1.44269504, 1e-30)  # log2(e); never zero, for hidden scores are -inf

    # Keys in [low, high) are seen by some row, those in [safe_low, safe_high) by every row.
    lane = tl.arange(0, 32)
    last_row = tl.minimum(first_row + BLOCK_M, n_rows) - 1
    safe_high = tl.maximum(tl.minimum(tile * q_block + first_row // group + q_offset + 1, n_k), 0)
    high = tl.maximum(tl.minimum(tile * q_block + last_row // group + q_offset + 1, n_k), 0)
    FIRST: tl.constexpr = row_start is not None
    low = 0
    safe_low = 0
    first = last
    if FIRST:
        row_start += b * row_start_b
        first = tl.load(row_start + token)
        low = n_k
        for step in tl.static_range(0, BLOCK_M, 32):
            some = tl.load(row_start + tile * q_block + tl.minimum(first_row + step + lane, last_row) // group)
            low, safe_low = tl.minimum(low, tl.min(some, 0)), tl.maximum(safe_low, tl.max(some, 0))
        low = tl.maximum(low, 0)

    part = range_slice + b * range_slice_b + tl.program_id(1).to(tl.int64) * range_slice_h + tile.to(tl.int64) * 2
    skipped = tl.minimum(tl.maximum(tl.load(part), 0), R)
    n_ranges = tl.minimum(tl.maximum(tl.load(part + 1), 0), R - skipped)
    ranges += b * ranges_b + tl.program_id(1).to(tl.int64) * ranges_h + skipped.to(tl.int64) * 2
    part = column_slice + b * column_slice_b + tl.program_id(1).to(tl.int64) * column_slice_h + tile.to(tl.int64) * 2
    skipped = tl.minimum(tl.maximum(tl.load(part), 0), C)
    n_columns = tl.minimum(tl.maximum(tl.load(part + 1), 0), C - skipped)
    columns += b * columns_b + tl.program_id(1).to(tl.int64) * columns_h + skipped

    k += b * k_b + kv_head * k_h
    v += b * v_b + kv_head * v_h
    n = tl.arange(0, BLOCK_N)
    zeros = ()
    for _ in tl.static_range(D // PART):
        zeros = zeros + (tl.zeros((BLOCK_M, PART), tl.float32),)
    if REST:
        zeros = zeros + (tl.zeros((BLOCK_M, REST), tl.float32),)
    state = (tl.full((BLOCK_M,), -3e38, tl.float32), tl.zeros((BLOCK_M,), tl.float32), zeros)

    for done in tl.range(0, n_ranges, 32, num_stages=1):
        # Each lane's range: [start, stop) is seen by some row, its pieces [whole, rest) by all rows.
        ours = done + lane < n_ranges
        start = tl.load(ranges + 2 * (done + lane), mask=ours, other=0)
        stop = tl.load(ranges + 2 * (done + lane) + 1, mask=ours, other=0)
        start, stop = tl.maximum(start, low), tl.minimum(stop, high)
        stop = tl.maximum(start, stop)
        whole = tl.minimum(tl.maximum(start, safe_low), stop)
        pieces = tl.maximum(tl.minimum(stop, safe_high) - whole, 0) // BLOCK_N
        whole = tl.where(pieces > 0, whole, start)
        rest = whole + pieces * BLOCK_N

        upto = tl.cumsum(pieces, 0)
        base = whole - (upto - pieces) * BLOCK_N
        for piece in range(0, tl.sum(pieces, 0)):
            mine = (piece < upto) & (piece >= upto - pieces)
            at = (tl.sum(tl.where(mine, base, 0), 0) + piece * BLOCK_N).to(tl.int64)
            k_parts = _load(k + at * k_n + (n * k_n)[:, None], True, D, PART, REST, False)
            v_parts = _load(v + at * v_n + (n * v_n)[:, None], True, D, PART, REST, False)
            state = _add(_scores(query, k_parts), v_parts, state, scale)

        EDGE: tl.constexpr = BLOCK_N // 4
        heads = tl.cdiv(whole - start, EDGE)
        edges = heads + tl.cdiv(stop - rest, EDGE)
        upto = tl.cumsum(edges, 0)
        for piece in range(0, tl.cdiv(tl.sum(edges, 0), 4)):
            key = tl.full((BLOCK_N,), _HIDDEN, tl.int32)
            for quarter in tl.static_range(4):
                edge = 4 * piece + quarter
                mine = (edge < upto) & (edge >= upto - edges)
                edge -= upto - edges
                in_head = edge < heads
                begin = tl.where(in_head, start + edge * EDGE, rest + (edge - heads) * EDGE)
                begin = tl.sum(tl.where(mine, begin, 0), 0)
                end = tl.sum(tl.where(mine, tl.where(in_head, whole, stop), 0), 0)
                ahead = begin + n - quarter * EDGE
                key = tl.where((n // EDGE == quarter) & (ahead < end), ahead, key)
            seen = (key < n_k)[:, None]
            at = key.to(tl.int64)[:, None]
            k_parts = _load(k + at * k_n, seen, D, PART, REST, True)
            v_parts = _load(v + at * v_n, seen, D, PART, REST, True)
            score = _unhidden(_scores(query, k_parts), key, first, last, FIRST)
            state = _add(score, v_parts, state, scale)

    for done in tl.range(0, n_columns, 1024, num_stages=1, disable_licm=True):  # one round as a rule: registers
        words, begin, safe_begin, safe_end, end = _columns_to_keep(
            columns + done, n_columns - done, ranges, n_ranges, low, safe_low, safe_high, high
        )
        # Row i sees columns after[i] to until[i] of these 1024 where they are kept; rows differ by few.
        token = tile * q_block + tl.minimum(_rows(first_row, n_ranges, BLOCK_M), n_rows - 1) // group
        until = tl.zeros((BLOCK_M,), tl.int32) + (safe_end - 1)
        for late in tl.range(safe_end, end, num_stages=1):
            until += (tl.load(columns + done + late) <= token + q_offset).to(tl.int32)
        after = until
        if FIRST:
            after = tl.zeros((BLOCK_M,), tl.int32) + begin
            start = tl.load(row_start + token)
            for early in tl.range(begin, safe_begin, num_stages=1):
                after += (tl.load(columns + done + early) < start).to(tl.int32)
        index = begin // BLOCK_N * BLOCK_N + n
        key = tl.load(columns + done + index, mask=index < end, other=0)
        for piece in range(begin // BLOCK_N, tl.cdiv(end, BLOCK_N)):
            place = piece * BLOCK_N
            bits = tl.zeros((BLOCK_N,), tl.int32)
            for word in tl.static_range((BLOCK_N + 31) // 32):
                taken = (words >> (place // 32 + word)) & 1
                bits = tl.where(n // 32 == word, tl.sum(taken << lane, 0), bits)
            keep = (bits >> (place + n) % 32) & 1 != 0
            at = key.to(tl.int64)[:, None]
            index = place + BLOCK_N + n  # of the next piece
            key = tl.load(columns + done + index, mask=index < end, other=0)
            k_parts = _load(k + at * k_n, keep[:, None], D, PART, REST, True)
            v_parts = _load(v + at * v_n, keep[:, None], D, PART, REST, True)
            index = tl.where(keep, place + n, _HIDDEN)  # numbers: a mask [M, N] of bits would live through the products
            score = _unhidden(_scores(query, k_parts), index, after, until, FIRST)
            state = _add(score, v_parts, state, scale)

    top, total, sums = state
    inverse = tl.where(total > 0, 1.0 / total, 0.0)
    row = _rows(first_row, n_columns, BLOCK_M)
    real, token, row_head = row < n_rows, tile * q_block + row // group, head + row % group
    to = out + ((b * n_q + token) * H + row_head)[:, None] * D
    for i in tl.static_range(D // PART):
        values = (sums[i] * inverse[:, None]).to(out.dtype.element_ty)
        tl.store(to + i * PART + tl.arange(0, PART)[None, :], values, mask=real[:, None])
    if REST:
        d = D // PART * PART + tl.arange(0, REST)[None, :]
        values = (sums[D // PART] * inverse[:, None]).to(out.dtype.element_ty)
        tl.store(to + d, values, mask=real[:, None] & (d < D))
    result = tl.where(total > 0, top * 0.69314718 + tl.log(total), -float("inf"))  # ln(2)
    tl.store(lse + (b * H + row_head) * n_q + token, result, mask=real)


def launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    range_slice: Tensor,
    columns: Tensor,
    column_slice: Tensor,
    row_start: Tensor | None,
    q_block: int,
    q_offset: int,
    causal: bool,
    scale: float,
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The results, still unwritten, and what writes them."""
    (B, H, n_q, D), (G, n_k) = q.shape, k.shape[1:3]
    size = q.element_size()
    if size > 4:
        raise ValueError(f"sparse_attention: {q.dtype} has no GPU kernel; it must be float16, bfloat16 or float32")
    plan = {"ranges": ranges, "range_slice": range_slice, "columns": columns, "column_slice": column_slice}
    plan = {name: tensor if tensor[:1, :1].is_contiguous() else tensor.contiguous() for name, tensor in plan.items()}
    shared_by = H // max(G, 1)
    group = shared_by if all(tensor.shape[1] == 1 for tensor in plan.values()) else 1
    q_block = min(q_block, max(n_q, 1))
    tuned = functools.partial(config, "sparse_attention", q.device, head_dim=max(D, 1), itemsize=size)
    chosen = tuned(rows=max(q_block * group, 1))
    if 2 * (-q_block * group % chosen["BLOCK_M"]) >= chosen["BLOCK_M"]:  # a tile's last block would be half empty
        chosen = tuned(rows=max(chosen["BLOCK_M"] // 2, 1))
    block_m, block_n, part = chosen["BLOCK_M"], chosen["BLOCK_N"], chosen["PART"]
    q, (k, v) = unit_last_stride(q), (rows_near(tensor, block_n) for tensor in (k, v))
    inputs = {"q": q, "k": k, "v": v, **plan}
    strides = {
        f"{name}_{axis}": tensor.stride(i) if name in "qkv" or tensor.shape[i] > 1 else 0
        for name, tensor in inputs.items()
        for i, axis in enumerate("bhn" if name in "qkv" else "bh")
    }
    if row_start is not None:
        row_start = row_start.contiguous()
    strides["row_start_b"] = n_q if row_start is not None and row_start.shape[0] > 1 else 0
    out = q.new_empty(B, n_q, H, D)
    lse = q.new_empty(B, H, n_q, dtype=torch.float32)
    sizes = {
        "R": ranges.shape[2], "C": columns.shape[2], "n_q": n_q, "n_k": n_k, "q_block": q_block,
        # Without causality every query stands behind the last key.
        "q_offset": min(max(q_offset, -n_q), n_k) if causal else n_k,
        "group": group, "shared_by": shared_by, "scale": scale,
    }  # fmt: skip
    launch = Launch(
        sparse_attention_kernel,
        grid=(cdiv(n_q, q_block) * cdiv(q_block * group, block_m), H // max(group, 1), B),
        args={**inputs, "row_start": row_start, "out": out, "lse": lse, **strides, **sizes},
        constants={
            "D": D, "PART": part, "REST": power_of_two(D % part, 16) if D % part or not D else 0,
            "BLOCK_M": block_m, "BLOCK_N": block_n,
        },
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
    )  # fmt: skip
    return (out.transpose(1, 2), lse), [launch]


def rows_near(tensor: Tensor, rows: int) -> Tensor:
    """The tensor, copied only where its last axis is not contiguous or `rows` tokens span 2^31 elements.

    Heads of one adjacent number each are spread, too: Triton 3.6 multiplies by such a transposed tile wrongly on sm_90.
    """
    if tensor.shape[3] == 1:
        return torch.nn.functional.pad(tensor, (0, 1))[..., :1]
    return unit_last_stride(tensor) if abs(tensor.stride(2)) * rows < 2**31 else tensor.contiguous()
