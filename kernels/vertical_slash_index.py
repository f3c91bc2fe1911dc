"""vertical_slash_index in Triton: one small kernel for what needs no scores, one for the columns.

The programs of the second kernel take work from a queue, longest first: one head and a few segments, whose sampled rows
are the columns of an MMA tile `[BLOCK_K, ROWS]`.

    pass 1: S^T = K Q^T; maximum and sum of exp2 of each row           softmax_rows
    pass 2: score[segment, key] = sum of exp2(S^T - maximum) / sum     score_keys, into the program's workspace
    the k-th best score: a search over the bits of the floats          choose: narrow,
    the keys above it, in order, and how many each tile sees           write_columns; write_slices

Each program has a workspace of its own, so only its own threads must agree on it: tl.debug_barrier() orders their
global accesses as it does shared ones.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv, power_of_two, unit_last_stride
from .tuning import config

LOG2E = 1.4426950408889634
INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def window_start(row, window, q_block, q_offset, sinks, n_k):
    """First key of the window of a row's tile; 0 where it would touch the sinks. A window may be 2^31 - 1."""
    low = (row // q_block * q_block).to(tl.int64) + q_offset - window
    low = tl.minimum(tl.maximum(low, 0), n_k).to(tl.int32)
    return tl.where(low <= sinks, 0, low)


@triton.jit(do_not_specialize=["n_q", "n_k", "sinks", "q_block", "segment", "q_offset", "max_columns"])
def vertical_slash_ranges_kernel(
    window, ranges, range_slice, chosen, column_slice, queue,
    window_h, n_q, n_k, sinks, q_block, segment, q_offset, max_columns,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Ranges and slices of BLOCK_T tiles, no column in any; BLOCK_C zeros of the column list; the queue's start."""
    block, h = tl.program_id(0), tl.program_id(1)
    H = tl.num_programs(1)
    head = (tl.program_id(2) * H + h).to(tl.int64)
    T, S = tl.cdiv(n_q, q_block), tl.cdiv(n_q, segment)
    tl.store(queue, 0, mask=(block == 0) & (head == 0))

    tile = block * BLOCK_T + tl.arange(0, BLOCK_T)
    low = window_start(tile * q_block, tl.load(window + h * window_h), q_block, q_offset, sinks, n_k)
    high = tl.minimum((tile + 1) * q_block, n_q).to(tl.int64) + q_offset
    high = tl.minimum(tl.maximum(high, 0), n_k).to(tl.int32)
    has_sinks = (low > 0) & (sinks > 0)
    # Whole lines of [ranges of a tile] = first, stop of the sinks or the window; first, stop of the window.
    part = tl.arange(0, 4)[None, :]
    low, high, has_sinks = low[:, None], high[:, None], has_sinks[:, None]
    bounds = tl.where(part % 2 == 0, low, high)
    bounds = tl.where(has_sinks & (part == 0), 0, tl.where(has_sinks & (part == 1), sinks, bounds))
    inside = (tile < T)[:, None]
    at = head * T + tile[:, None]
    tl.store(ranges + 4 * at + part, bounds, mask=inside)
    part = tl.arange(0, 2)[None, :]
    count = has_sinks.to(tl.int32) + (high > low).to(tl.int32)
    tl.store(range_slice + 2 * at + part, tl.where(part == 0, 2 * tile[:, None], count), mask=inside)
    first = tile * q_block // segment * max_columns
    tl.store(column_slice + 2 * at + part, tl.where(part == 0, first[:, None], 0), mask=inside)

    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(chosen + head * S * max_columns + c, tl.zeros((BLOCK_C,), tl.int32), mask=c < S * max_columns)


@triton.jit
def logits(rows, at, n, n_k, factor, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """`[BLOCK_K, ROWS]`: k . q of the keys `n` at pointers `at`, times `factor`; `rows` are `[BLOCK_D, ROWS]`."""
    inside = (n < n_k)[:, None]
    if D < BLOCK_D:
        inside = inside & (tl.arange(0, BLOCK_D) < D)[None, :]
    return factor * tl.dot(tl.load(at, mask=inside, other=0.0), rows, input_precision="ieee")


@triton.jit
def softmax_rows(
    rows, end, least_end, limit, keys, k_n, n_k, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Maximum and sum `[ROWS]` over the keys below `end`; the sum is 0 without keys, NaN where a score is not finite.

    Every element of the tile keeps a maximum and a sum of its own, so that no thread waits for another and one
    exponential serves both cases: 2^-|gap| scales the old sum where the new score is larger, else it is added.
    """
    n, d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    offset = n[:, None] * k_n + d[None, :]
    high = tl.full((BLOCK_K, ROWS), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((BLOCK_K, ROWS), tl.float32)
    for start in range(0, limit, BLOCK_K):
        score = logits(rows, keys + offset, start + n, n_k, factor, D, BLOCK_D)
        if start + BLOCK_K > least_end:
            score = tl.where((start + n)[:, None] < end[None, :], score, -float("inf"))
        gap = score - high
        weight = tl.exp2(-tl.abs(gap))
        total = tl.where(gap > 0, total * weight + 1.0, total + weight)
        high = tl.maximum(high, score)
        keys += BLOCK_K * k_n
    top = tl.max(high, 0)
    return top, tl.sum(total * tl.exp2(high - top[None, :]), 0)


@triton.jit
def score_keys(
    rows, top, inverse, low, least_low, add, sinks, limit, scores, pitch, keys, k_n, n_k, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, SAMPLES: tl.constexpr, MORE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """scores[segment, key] = sum over its rows of the key's share, 0 outside [sinks, low of the row)."""
    LOW: tl.constexpr = min(SAMPLES, 8)
    n, d, segment = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D), tl.arange(0, ROWS // SAMPLES)
    first = sinks // BLOCK_K * BLOCK_K
    offset = n[:, None] * k_n + d[None, :]
    keys += tl.cast(first, tl.int64) * k_n
    for start in range(first, limit, BLOCK_K):
        key = start + n
        share = tl.exp2(logits(rows, keys + offset, key, n_k, factor, D, BLOCK_D) - top[None, :]) * inverse[None, :]
        if (start < sinks) | (start + BLOCK_K > least_low):
            share = tl.where((key >= sinks)[:, None] & (key[:, None] < low[None, :]), share, 0.0)
        sums = tl.sum(tl.sum(tl.reshape(share, (BLOCK_K, SAMPLES // LOW, ROWS // SAMPLES, LOW)), 1), 2)
        to = scores + segment[None, :] * pitch + key[:, None]
        if MORE:
            sums += tl.load(to, mask=add, other=0.0)
        tl.store(to, sums)
        keys += BLOCK_K * k_n


@triton.jit
def count_from(x, least):
    """How many of four neighbours are at least `least`: `[n]` of x `[4 n]`, within a thread; both are below 2^31."""
    return -tl.sum(tl.reshape((least - 1 - x) >> 31, (x.shape[0] // 4, 4)), 1)


@triton.jit
def narrow(bits, first, stop, wanted, enough, low, n_low, high, n_high, a, b, c, BLOCK_S: tl.constexpr):
    """Raises `low` and lowers `high` until the scores from `low` on are `enough` or fewer, or the best are found.

    n_low scores have bits >= low, more than `wanted` if low > 0; n_high <= wanted have bits >= high. The best are found
    where n_high == wanted or high == low + 1. Every pass tries a < b < c; later ones quarter what is left.
    """
    while (n_low > enough) & (n_high < wanted) & (high - low > 1):
        n_a = tl.zeros((BLOCK_S // 4,), tl.int32)
        n_b, n_c = n_a, n_a
        for start in range(first, stop, BLOCK_S):
            at = start + tl.arange(0, BLOCK_S)
            x = tl.load(bits + at, mask=at < stop, other=0)
            n_a += count_from(x, a)
            n_b += count_from(x, b)
            n_c += count_from(x, c)
        n_a, n_b, n_c = tl.sum(n_a, 0), tl.sum(n_b, 0), tl.sum(n_c, 0)
        # The counts fall from a to c; the last that is above wanted gives low, the first that is not gives high.
        if n_c > wanted:
            low, n_low = c, n_c
        elif n_b > wanted:
            low, n_low, high, n_high = b, n_b, c, n_c
        elif n_a > wanted:
            low, n_low, high, n_high = a, n_a, b, n_b
        else:
            high, n_high = a, n_a
        step = (high - low + 3) // 4
        a, b, c = low + step, tl.minimum(low + 2 * step, high), tl.minimum(low + 3 * step, high)
    return low, n_low, high, n_high, a, b, c


@triton.jit
def write_columns(bits, keys, listed, first, stop, low, high, equals, to, to_bits, BLOCK_W: tl.constexpr):
    """Lists what has bits >= high and the first `equals` of those in [low, high), in order; how many.

    Scores below number `listed` are of the keys in a list; others are of the key of their number, and listed, too.
    """
    count, ties = 0, 0
    for start in range(first, stop, BLOCK_W):
        at = tl.max_contiguous(start + tl.arange(0, BLOCK_W), [1])  # one a thread, as the scattered stores need it
        x = tl.load(bits + at, mask=at < stop, other=0)
        key = tl.load(keys + at, mask=at < listed, other=0)
        key = tl.where(at < listed, key, at)
        sure = (x >= high).to(tl.int32)
        tie = ((x >= low) & (x < high) & (equals > 0)).to(tl.int32)
        both = sure + (tie << 16)  # one scan for two counts, each below 2^16
        upto = tl.cumsum(both, 0)
        earlier = ties + (upto >> 16) - tie
        place = count + (upto & 0xFFFF) - sure + tl.minimum(earlier, equals)
        taken = (sure > 0) | ((tie > 0) & (earlier < equals))
        tl.store(to + place, key, mask=taken)
        tl.store(to_bits + place, x, mask=taken & (at >= listed))
        total = tl.sum(both, 0)
        count += total & 0xFFFF
        ties += total >> 16
    return count + tl.minimum(ties, equals)


@triton.jit
def choose(
    bits, first, stop, wanted, guess, spread, listed, chosen, capacity, BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr
):
    """Writes the keys of the `wanted` best positive scores, ascending, the lower of equals; (how many, the last score).

    First of all keys, until `capacity` or fewer are left, which are listed; then of those.
    """
    low, n_low, high, n_high = 0, stop - first, INFINITY_BITS, 0
    a, b, c = tl.maximum(guess - spread, 1), guess, guess + spread
    to, count, end = listed, 0, 0
    for _ in range(2):
        enough = tl.where(end == 0, capacity, wanted)
        low, n_low, high, n_high, a, b, c = narrow(
            bits, first, stop, wanted, enough, low, n_low, high, n_high, a, b, c, BLOCK_S
        )
        all_left = n_low <= enough
        cut = tl.where(all_left, tl.maximum(low, 1), high)
        equals = tl.where(all_left | (low == 0), 0, wanted - n_high)
        count = write_columns(bits, listed, end, first, stop, low, cut, equals, to, listed + capacity, BLOCK_W)
        if end == 0:  # whole lines of 16, as of all keys
            tl.store(listed + capacity + count + tl.arange(0, 16), tl.zeros((16,), tl.int32))
        tl.debug_barrier()  # other threads read this list
        bits, to, n_low = listed + capacity, chosen, count
        first, stop = 0, tl.cdiv(count, 16) * 16
        end = stop
    return count, tl.where(low > 0, low, guess)


@triton.jit
def write_slices(
    chosen, count, base, slices, first_tile, last_tile, window, q_block, q_offset, sinks, n_k,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(base, chosen keys before the tile's window) of every tile."""
    for start in range(first_tile, last_tile, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        low = window_start(tile * q_block, window, q_block, q_offset, sinks, n_k)
        below = tl.zeros((BLOCK_T,), tl.int32)
        for at in range(0, count, BLOCK_C):
            c = at + tl.arange(0, BLOCK_C)
            key = tl.load(chosen + c, mask=c < count, other=0x7FFFFFFF)
            below += tl.sum((key[None, :] < low[:, None]).to(tl.int32), 1)
        part = tl.arange(0, 2)[None, :]
        pair = tl.where(part == 0, base, below[:, None])
        tl.store(slices + 2 * tile[:, None] + part, pair, mask=(tile < last_tile)[:, None])


@triton.jit(
    do_not_specialize=[
        "H", "group_heads", "heads", "items", "T", "S", "pitch", "capacity", "n_q", "n_k", "sinks", "q_block",
        "segment", "q_offset", "max_columns", "stride", "samples",
    ]
)  # fmt: skip
def vertical_slash_index_kernel(
    q, k, window, columns, chosen, column_slice, queue, workspace,
    q_b, q_h, q_n, k_b, k_h, k_n, window_h, columns_h,
    H, group_heads, heads, items, T, S, pitch, capacity, n_q, n_k, sinks, q_block, segment, q_offset, max_columns,
    stride, samples, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, SAMPLES: tl.constexpr, MORE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Columns and their slices of the heads that have a budget; SEGMENTS = ROWS // SAMPLES segments at a time.

    Rows of S^T that are no sample of their segment repeat its last row; their `low` is 0, so that they count nothing.
    """
    SEGMENTS: tl.constexpr = ROWS // SAMPLES
    # A workspace: scores of every segment, a list of keys, their scores. Each starts on a line of memory.
    pitch, capacity = pitch.to(tl.int64) * 16, capacity * 16
    scores = workspace + tl.program_id(0) * (SEGMENTS * pitch + 2 * capacity + 16)
    bits = scores.to(tl.pointer_type(tl.int32), bitcast=True)
    item = tl.program_id(0)
    while item < items:
        head, group = item % heads, (items - 1 - item) // heads
        b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
        width = tl.load(window + h * window_h)
        wanted = tl.minimum(tl.load(columns + h * columns_h), max_columns)
        last = tl.minimum((group + 1) * SEGMENTS * segment, n_q) - 1
        limit = window_start(last, width, q_block, q_offset, sinks, n_k)
        if (wanted > 0) & (limit > 0):
            keys = k + b * k_b + h // group_heads * k_h
            r, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
            # Row r = (high * SEGMENTS + segment) * LOW + low of sample high * LOW + low: 8 neighbours share a warp.
            LOW: tl.constexpr = min(SAMPLES, 8)
            start = (group * SEGMENTS + r // LOW % SEGMENTS) * segment
            stop = tl.minimum(start + segment, n_q)
            for first_sample in range(0, samples if MORE else 1, SAMPLES):
                sample = first_sample + r // (LOW * SEGMENTS) * LOW + r % LOW
                row = start + (sample + 1) * stride - 1
                counts = (sample < samples) & (row - stride < stop - 1)
                row = tl.minimum(row, tl.maximum(stop, 1) - 1)
                row = tl.minimum(row, n_q - 1)
                low = tl.where(counts, window_start(row, width, q_block, q_offset, sinks, n_k), 0)
                end = tl.minimum(tl.maximum(row.to(tl.int64) + q_offset + 1, 0), n_k).to(tl.int32)
                at = q + b * q_b + h * q_h + row.to(tl.int64)[None, :] * q_n + d[:, None]
                rows = tl.load(at, mask=(low > 0)[None, :] & (d < D)[:, None], other=0.0)
                furthest, nearest = tl.max(tl.where(low > 0, end, 0), 0), tl.min(tl.where(low > 0, end, 0x7FFFFFFF), 0)
                top, total = softmax_rows(
                    rows, end, nearest, furthest, keys, k_n, n_k, factor, D, BLOCK_D, ROWS, BLOCK_K
                )
                # A row that counts nothing gets 2^(S - infinity) = 0, but NaN of scores that are not finite. Those have
                # made its sum NaN, as pass 1 met all keys below the least `low`: then pass 2 masks every tile, and also
                # where no row counts.
                low = tl.where(total > 0, low, 0)
                top, inverse = tl.where(low > 0, top, float("inf")), tl.where(low > 0, 1.0 / total, 0.0)
                nearest = tl.min(tl.where(low > 0, low, 0x7FFFFFFF), 0)
                nearest = tl.min(tl.where((total == total) & (nearest <= limit), nearest, 0), 0)
                score_keys(
                    rows, top, inverse, low, nearest, first_sample > 0, sinks, limit, scores, pitch,
                    keys, k_n, n_k, factor, D, BLOCK_D, ROWS, SAMPLES, MORE, BLOCK_K,
                )  # fmt: skip
                tl.debug_barrier()  # other threads read these scores
            # The k-th best score is a few times the mean at first, then near that of the segment before.
            guess = (1.0 * samples / limit).to(tl.int32, bitcast=True)
            spread = 3 << 23
            for i in range(SEGMENTS):
                s = group * SEGMENTS + i
                last = tl.minimum((s + 1) * segment, n_q) - 1
                low_end = window_start(last, width, q_block, q_offset, sinks, n_k)
                if (s < S) & (low_end > 0):
                    # Whole lines of 16: scores outside [sinks, low_end) are 0.
                    begin, finish = sinks // 16 * 16, tl.cdiv(low_end, 16) * 16
                    to = chosen + ((b * H + h) * S + s) * max_columns
                    count, guess = choose(
                        bits + i * pitch, begin, finish, wanted, guess, spread, bits + SEGMENTS * pitch, to,
                        capacity, BLOCK_S, BLOCK_W,
                    )  # fmt: skip
                    spread = 1 << 21
                    first_tile, tiles = s * segment // q_block, segment // q_block
                    write_slices(
                        to, count, s * max_columns, column_slice + (b * H + h) * T * 2, first_tile,
                        tl.minimum(first_tile + tiles, T), width, q_block, q_offset, sinks, n_k, BLOCK_T, BLOCK_C,
                    )  # fmt: skip
            tl.debug_barrier()  # all scores are read before the next item's are written
        item = tl.num_programs(0) + tl.atomic_add(queue, 1, sem="relaxed")


def check_sizes(q: Tensor, n_k: int, lists: int, q_offset: int) -> None:
    """Raises ValueError for what the kernels cannot do, before any memory is touched."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"vertical_slash_index: q is {q.dtype}; on a GPU it must be float16, bfloat16 or float32")
    for name, size in (("n_q", q.shape[2]), ("n_k", n_k), ("columns of a head", lists), ("q_offset", abs(q_offset))):
        if size >= 2**30:
            raise ValueError(f"vertical_slash_index: {name}={size} is not below 2^30")


def launches(
    q: Tensor, k: Tensor, window: Tensor, columns: Tensor, max_columns: int, sinks: int, segment: int, samples: int,
    q_block: int, q_offset: int, scale: float,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], list[Launch]]:  # fmt: skip
    """The results, still unwritten, and what writes them."""
    B, H, n_q, D = q.shape
    G, n_k = k.shape[1:3]
    T, S = cdiv(n_q, q_block), cdiv(n_q, segment)
    check_sizes(q, n_k, S * max_columns, q_offset)
    results = tuple(window.new_empty(B, H, *shape) for shape in ((2 * T, 2), (T, 2), (S * max_columns,), (T, 2)))
    names = ("ranges", "range_slice", "chosen", "column_slice")
    written = dict(zip(names, results, strict=True)) | {"queue": window.new_empty(1)}
    # What is longer than the prompt is as long as the prompt, so that no product of sizes leaves int32.
    block = max(min(q_block, n_q), 1)
    numbers = {
        "n_q": n_q, "n_k": n_k, "sinks": min(sinks, n_k), "q_block": block, "segment": min(segment, max(T, 1) * block),
        "q_offset": q_offset, "max_columns": max_columns,
    }  # fmt: skip
    tiles, zeros = 64, 1024
    small = Launch(
        vertical_slash_ranges_kernel,
        grid=(max(cdiv(T, tiles), cdiv(S * max_columns, zeros)), H, B),
        args={"window": window, **written, "window_h": window.stride(0), **numbers},
        constants={"BLOCK_T": tiles, "BLOCK_C": zeros},
        num_warps=4,
    )
    if 0 in (max_columns, n_k, B * H * n_q):
        return results, [small]
    chosen = config("vertical_slash_index", q.device, head_dim=max(D, 1), segments=B * H * S)
    if q.dtype == torch.float32:  # exact products leave no room for larger tiles
        chosen |= {"ROWS": 16, "BLOCK_K": 32, "num_warps": 4}
    ROWS, wanted = chosen["ROWS"], power_of_two(min(samples, n_q))
    SAMPLES = min(max(wanted, ROWS // 4), ROWS)  # at most four segments at a time share a workspace
    groups = cdiv(S, ROWS // SAMPLES)
    programs = min(B * H * groups, chosen["programs"])
    pitch, capacity = cdiv(n_k, 256) * 16, cdiv(max_columns, 512) * 64  # lines of 16 scores
    workspace = 16 * (ROWS // SAMPLES * pitch + 2 * capacity + 1)
    q, k = unit_last_stride(q), unit_last_stride(k)
    if k.stride(2) >= 2**24:  # offsets within a tile of keys are int32
        k = k.contiguous()
    inputs = {"q": q, "k": k, "window": window, "columns": columns}
    strides = {f"{name}_{axis}": inputs[name].stride(i) for name in "qk" for i, axis in enumerate("bhn")}
    large = Launch(
        vertical_slash_index_kernel,
        grid=(programs, 1, 1),
        args={
            **inputs, "chosen": written["chosen"], "column_slice": written["column_slice"], "queue": written["queue"],
            "workspace": q.new_empty(programs, workspace, dtype=torch.float32),
            **strides, "window_h": window.stride(0), "columns_h": columns.stride(0), "H": H, "group_heads": H // G,
            "heads": B * H, "items": B * H * groups, "T": T, "S": S, "pitch": pitch, "capacity": capacity, **numbers,
            "stride": min(segment // samples, n_q),
            "samples": min(samples, n_q), "factor": scale * LOG2E,
        },
        constants={
            "D": D, "BLOCK_D": power_of_two(D, 16), "ROWS": ROWS, "SAMPLES": SAMPLES, "MORE": wanted > ROWS,
            "BLOCK_K": chosen["BLOCK_K"], "BLOCK_S": chosen["BLOCK_S"], "BLOCK_W": chosen["BLOCK_W"], "BLOCK_T": 16,
            "BLOCK_C": 128,
        },
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
    )  # fmt: skip
    return results, [small, large]
