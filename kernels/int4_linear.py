"""int4_linear in Triton: tiles of y^T = W x^T, the codes straight from their canonical bytes into tensor cores.

A word of 32 bits holds 8 columns of a row of W. Shifted by 4 i and masked, it leaves columns i and 4 + i in its halves,
which under an exponent are the 16-bit floats `base + q`: three instructions for two weights. The columns of a block are
therefore taken in the order (i, word, half), of weights and activations alike; the words of a block are dealt so that a
thread's are neighbours in memory. A block is what shares a scale, at most 128 columns: its product D is exact in the
codes, and scale and zero meet D in fp32.

Up to 64 rows, each of the four warps takes every fourth block and keeps sums of its own, which are added at the end in
one order: so few rows of W keep a multiprocessor busy, and a row's bits depend neither on the tile nor on the other
rows, for all tiles use the same instruction. More rows, and int8 mode, whose blocks are added in order, take the blocks
one by one, the warps side by side along N.

What does not come in such a form is made so first by a small kernel: permuted inputs, integers of int8 mode, and fp32,
which becomes three fp16 numbers (11 bits each) under a power of two for each block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv, unit_last_stride
from .tuning import config

ROWS_INVARIANT = 64  # up to so many rows a row's result is bitwise the same
SLICES = 4  # sums by block number modulo SLICES; the number of warps of such a launch
EXACT, INT8 = 0, 1  # modes
ROWS_AS_THEY_ARE = 16  # up to so many rows of 16 bits are not worth a kernel that makes their order better
BLOCKS_OF_INPUTS = 8  # that a program of the small kernel makes
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _rounded(a, b):
    """a b, rounded by itself: a sum that follows cannot swallow the product into a fused multiply-add."""
    return tl.fma(a, b, 0.0)


@triton.jit(do_not_specialize=["M", "K", "blocks"])
def int4_linear_inputs_kernel(
    x, permutation, made, scale, x_m, M, K, blocks,
    MODE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """made [PARTS, M, blocks, BLOCK] of x [M, K], zeros behind K; scale [blocks, M], if x is to be scaled.

    A thread of the large kernel holds EIGHTS times eight columns of a row. The first eight of each of the LANES threads
    come first, so that what they load together is one piece.
    """
    LANES: tl.constexpr = min(BLOCK // 8, 4)
    EIGHTS: tl.constexpr = BLOCK // 8 // LANES
    tiles = tl.cdiv(blocks, BLOCKS)
    m = (tl.program_id(0) // tiles).to(tl.int64)
    block = tl.program_id(0) % tiles * BLOCKS + tl.arange(0, BLOCKS)
    i = tl.arange(0, BLOCKS * LANES * EIGHTS)[:, None]
    eight = i % LANES * EIGHTS + i // LANES % EIGHTS
    of = tl.program_id(0) % tiles * BLOCKS + i // (LANES * EIGHTS)
    column = of * BLOCK + eight * 8 + tl.arange(0, 8)[None, :]
    inside = of < blocks if WHOLE else column < K
    if permutation is not None:
        column = tl.load(permutation + column, mask=inside, other=0)
    value = tl.reshape(tl.load(x + m * x_m + column, mask=inside, other=0.0), [BLOCKS, BLOCK])
    real = block < blocks
    to = made + (m * blocks + block)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if scale is not None:
        value = value.to(tl.float32)
        largest = tl.max(tl.abs(value), 1)
        finite = tl.min((tl.abs(value) <= _LARGEST).to(tl.int32), 1) > 0
        if MODE == 1:  # int8
            usable = finite & (largest >= 2.0**-100)
            most = tl.full(largest.shape, 127.0, tl.float32)
            factor = tl.where(usable, tl.div_rn(most, tl.where(usable, largest, 1.0)), 0.0)
            back = tl.where(usable, tl.div_rn(largest, most), 0.0)
            # To integers, ties to even: 1.5 2^23 leaves no bit behind the point.
            value = _rounded(tl.where(finite[:, None], value, 0.0), factor[:, None]) + 12582912.0 - 12582912.0
        else:  # a power of two that leaves less than 2^15
            power = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 15)
            factor = ((268 - power) << 23).to(tl.float32, bitcast=True)
            back = ((power - 14) << 23).to(tl.float32, bitcast=True)
            value = tl.where(finite[:, None], value, 0.0) * factor[:, None]
        tl.store(scale + block.to(tl.int64) * M + m, tl.where(finite, back, float("nan")), mask=real)
    for part in tl.static_range(PARTS):
        now = value.to(made.dtype.element_ty)
        tl.store(to + part * M.to(tl.int64) * blocks * BLOCK, now, mask=real[:, None])
        if PARTS > 1:
            value -= now.to(tl.float32)


@triton.jit
def _words(
    qweight, first_n, N, first, blocks, pitch, bytes_of_row, BLOCK_N: tl.constexpr, SLICES: tl.constexpr,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """int32 [SLICES, BLOCK_N, BLOCK / 8] of the blocks from `first` and the rows from `first_n`; zeros past the ends.

    Loaded as two dimensions, so that rows are neighbours in shared memory and no two of them meet in a bank.
    """
    i = tl.arange(0, SLICES * BLOCK_N)[:, None]
    word = tl.arange(0, BLOCK // 8)[None, :]
    n, block = first_n + i % BLOCK_N, first + i // BLOCK_N
    there = (n < N) & (block < blocks)
    n = n.to(tl.int64)
    if ALIGNED:
        words = tl.load(qweight + (n * pitch + block) * (BLOCK // 8) + word, mask=there, other=0)
    else:
        at = block * (BLOCK // 2) + 4 * word
        words = tl.zeros((SLICES * BLOCK_N, BLOCK // 8), tl.int32)
        for byte in tl.static_range(4):
            inside = there & (at + byte < bytes_of_row)
            code = tl.load(qweight + n * bytes_of_row + at + byte, mask=inside, other=0)
            words |= code.to(tl.int32) << 8 * byte
    return tl.reshape(words, [SLICES, BLOCK_N, BLOCK // 8])


@triton.jit
def _halves(words, BLOCK: tl.constexpr, MASK: tl.constexpr, BITS: tl.constexpr):
    """int16 [S, N, BLOCK] in the order of the columns: (a word >> 4 i) & MASK | BITS, its low half and its high one."""
    S: tl.constexpr = words.shape[0]
    N: tl.constexpr = words.shape[1]
    LANES: tl.constexpr = min(BLOCK // 8, 4)  # the threads of a warp that share a row
    words = tl.permute(tl.reshape(words, [S, N, LANES, BLOCK // 8 // LANES]), (0, 1, 3, 2))
    words = words[:, :, None, :, :] >> 4 * tl.arange(0, 4)[None, None, :, None, None]
    pairs = (words & MASK) | BITS
    return tl.reshape(tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)), [S, N, BLOCK])


@triton.jit
def _inputs(
    x, x_m, first_m, M, first, blocks, BLOCK_M: tl.constexpr, SLICES: tl.constexpr, BLOCK: tl.constexpr,
    ORDERED: tl.constexpr,
):  # fmt: skip
    """x [SLICES, BLOCK, BLOCK_M] of the blocks from `first` and the rows from `first_m`, columns as in `_halves`.

    Loaded as [slice and eight and row and lane, 8]: the eights of a row's lanes, then rows, are neighbours in shared
    memory.
    """
    LANES: tl.constexpr = min(BLOCK // 8, 4)
    EIGHTS: tl.constexpr = BLOCK // 8 // LANES
    i = tl.arange(0, SLICES * EIGHTS * BLOCK_M * LANES)[:, None]
    lane, m, eight = i % LANES, first_m + i // LANES % BLOCK_M, i // (LANES * BLOCK_M) % EIGHTS
    block = first + i // (LANES * BLOCK_M * EIGHTS)
    column = (eight * LANES + lane) * 8 if ORDERED else (lane * EIGHTS + eight) * 8
    at = m.to(tl.int64) * x_m + block * BLOCK + column + tl.arange(0, 8)[None, :]
    eights = tl.load(x + at, mask=(m < M) & (block < blocks), other=0.0)
    eights = tl.reshape(eights, [SLICES, EIGHTS, BLOCK_M, LANES, 2, 4])
    return tl.reshape(tl.permute(eights, (0, 5, 1, 3, 4, 2)), [SLICES, BLOCK, BLOCK_M])


@triton.jit
def _codes(words, ZERO: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """q, or q - 8 where there are no zeros, as DTYPE [S, N, BLOCK]: exact."""
    if tl.bfloat16 == DTYPE:
        q = _halves(words, BLOCK, 0x000F000F, 0x43004300).to(tl.bfloat16, bitcast=True)
        base = tl.full(q.shape, 136.0 if ZERO == 0 else 128.0, tl.bfloat16)
    else:
        q = _halves(words, BLOCK, 0x000F000F, 0x64006400).to(tl.float16, bitcast=True)
        base = tl.full(q.shape, 1032.0 if ZERO == 0 else 1024.0, tl.float16)
    return q - base


@triton.jit
def _book_scale(codebook):
    """The power of two that brings the largest of the 16 entries to less than 2^9, and its inverse."""
    largest = tl.max(tl.abs(tl.load(codebook + tl.arange(0, 16))), 0)
    power = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 10), 200)
    return ((262 - power) << 23).to(tl.float32, bitcast=True), ((power - 8) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _flat(tile):
    """[1, A, B] as [A, B]: a product of two dimensions spreads over the warps; of [S, A, B] each warp has its own."""
    return tl.reshape(tile, [tile.shape[1], tile.shape[2]]) if tile.shape[0] == 1 else tile


@triton.jit
def _int8_term(d, ones, s, z, a, ZERO: tl.constexpr):
    """A block's share of int8 mode, each operation rounded by itself."""
    if ZERO == 1 or ZERO == 2:
        d -= _rounded(z, ones)
    if ZERO == 3:
        return _rounded(_rounded(d, s) + _rounded(z, ones), a)
    return _rounded(d * s, a)


@triton.jit(do_not_specialize=["M", "N", "blocks", "pitch", "bytes_of_row", "scales_of_row"])
def int4_linear_kernel(
    x, qweight, scales, zeros, codebook, x_scale, bias, out,
    x_m, x_part, M, N, blocks, pitch, bytes_of_row, scales_of_row,
    MODE: tl.constexpr, ZERO: tl.constexpr, BOOK: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    ORDERED: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr, PER_CHANNEL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SLICES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out [M, N] of x [PARTS, M, blocks, BLOCK] and the codes; x_scale [blocks, M]."""
    tiles = tl.cdiv(M, BLOCK_M)
    first_n = tl.program_id(0) // tiles * BLOCK_N
    first_m = tl.program_id(0) % tiles * BLOCK_M
    n, m = first_n + tl.arange(0, BLOCK_N), first_m + tl.arange(0, BLOCK_M)
    rows, tokens = n < N, m < M
    n, m = n.to(tl.int64), m.to(tl.int64)
    DTYPE: tl.constexpr = x.dtype.element_ty
    scale_row = n * scales_of_row * SLICES if EVEN and not PER_CHANNEL else n * scales_of_row
    if BOOK == 3:
        book_scale, book_back = _book_scale(codebook)
    total = _flat(tl.zeros((SLICES, BLOCK_N, BLOCK_M), tl.float32))
    for first in tl.range(0, blocks, SLICES, num_stages=STAGES):
        block = first + tl.arange(0, SLICES)
        end = first + SLICES if EVEN else blocks  # so that nothing is compared where all blocks are there
        seen = block < end
        words = _words(qweight, first_n, N, first, end, pitch, bytes_of_row, BLOCK_N, SLICES, BLOCK, ALIGNED)
        at = scale_row[None, :, None]
        if not PER_CHANNEL:
            at += block[:, None, None]
        there = rows[None, :, None] & seen[:, None, None]
        s = _flat(tl.load(scales + at, mask=there, other=0.0).to(tl.float32))
        z = 0
        if ZERO > 0:
            z = _flat(tl.load(zeros + at, mask=there, other=0).to(tl.float32))
        if BOOK == 0:
            weights = (_flat(_codes(words, ZERO, BLOCK, DTYPE)),)
        else:
            entry = tl.load(codebook + (_halves(words, BLOCK, 0x000F000F, 0) & 15))
            if BOOK == 1:
                weights = (_flat(entry.to(DTYPE)),)
            else:
                entry *= book_scale
                weights = ()
                for _ in tl.static_range(BOOK):
                    weights = weights + (_flat(entry.to(DTYPE)),)
                    entry -= entry.to(DTYPE).to(tl.float32)
        inputs = ()
        for part in tl.static_range(PARTS):
            one = _inputs(
                x + tl.full((), part, tl.int64) * x_part, x_m, first_m, M, first, end, BLOCK_M, SLICES, BLOCK, ORDERED
            )
            inputs = inputs + (_flat(one),)
        # The small parts first; those whose product is below the last bit are left out.
        d = tl.zeros_like(total)
        for sum_of_parts in tl.static_range(max(PARTS, BOOK) - 1, -1, -1):
            for part in tl.static_range(PARTS):
                if sum_of_parts - part >= 0 and sum_of_parts - part < len(weights):
                    d = tl.dot(weights[sum_of_parts - part], inputs[part], d)
        ones = d
        if ZERO > 0:  # a zero meets the sum of the inputs, which is a product of them, too: summed in one order
            ones = tl.zeros_like(total)
            for part in tl.static_range(PARTS - 1, -1, -1):
                ones = tl.dot(tl.full(weights[0].shape, 1.0, DTYPE), inputs[part], ones)
        if BOOK == 3:
            d *= book_back
        s = tl.broadcast_to(s, total.shape)
        if x_scale is not None:
            at = x_scale + block.to(tl.int64)[:, None, None] * M + m[None, None, :]
            a = _flat(tl.load(at, mask=tokens[None, None, :] & seen[:, None, None], other=0.0))
            if MODE == 0:
                d *= a
                ones *= a
        if MODE == 1:
            total += _int8_term(d, ones, s, z, a, ZERO)
        else:
            if ZERO == 1 or ZERO == 2:
                d = tl.fma(tl.broadcast_to(-z, total.shape), ones, d)
            if ZERO == 3:
                total = tl.fma(tl.broadcast_to(z, total.shape), ones, total)
            total = tl.fma(d, s, total)
    if SLICES > 1:
        total = tl.reshape(tl.permute(total, (1, 2, 0)), [BLOCK_N, BLOCK_M, 2, 2])
        low, high = tl.split(total)
        a, b = tl.split(low)
        c, d = tl.split(high)
        total = (a + c) + (b + d)
    if bias is not None:
        total += tl.load(bias + n, mask=rows, other=0.0).to(tl.float32)[:, None]
    tl.store(out + m[None, :] * N + n[:, None], total.to(out.dtype.element_ty), mask=tokens[None, :] & rows[:, None])


def launches(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor | None,
    permutation: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    zero_kind: int,
    mode: int,
) -> tuple[Tensor, list[Launch]]:
    """The result, still unwritten, and what writes it."""
    N, K = qweight.shape[0], 2 * qweight.shape[1]
    if x.dtype == torch.float64:
        raise ValueError("int4_linear: float64 has no GPU kernel; x must be float16, bfloat16 or float32")
    out = x.new_empty(*x.shape[:-1], N)
    rows = unit_last_stride(x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(x.shape[:-1].numel(), x.shape[-1]))
    M = rows.shape[0]
    if not N or not M:
        return out, []
    block = group_size if group_size in (16, 32, 64, 128) else 128
    qweight, scales = qweight.contiguous(), scales.contiguous()
    zeros, codebook, permutation, bias = (
        None if tensor is None else tensor.contiguous() for tensor in (zeros, codebook, permutation, bias)
    )
    blocks, whole = cdiv(K, block), K % block == 0
    aligned = whole and K > 0 and qweight.storage_offset() % 4 == 0  # so that the bytes of a row are words
    book = 0 if codebook is None else 1 if codebook.dtype == torch.int8 else 3
    scaled = mode == INT8 or x.dtype == torch.float32 or book == 3
    parts = 3 if mode == EXACT and x.dtype == torch.float32 else 1
    made: list[Launch] = []
    x_scale = None
    ordered = scaled or permutation is not None or not whole or M > ROWS_AS_THEY_ARE
    if ordered:
        make, inputs, x_scale = made_inputs(rows, permutation, K, block, mode, parts, scaled)
        made.append(make)
    else:
        inputs = rows[None]
    slices = SLICES if mode == EXACT and M <= ROWS_INVARIANT else 1
    chosen = config("int4_linear", x.device, rows=M, slices=slices, parts=max(parts, book))
    even, per_channel = blocks % slices == 0, group_size == K
    groups = scales.shape[1]
    launch = Launch(
        int4_linear_kernel,
        grid=(cdiv(M, chosen["BLOCK_M"]) * cdiv(N, chosen["BLOCK_N"]), 1, 1),
        args={
            "x": inputs, "qweight": qweight.view(torch.int32) if aligned else qweight, "scales": scales, "zeros": zeros,
            "codebook": codebook, "x_scale": x_scale, "bias": bias, "out": out,
            "x_m": inputs.stride(1), "x_part": inputs.stride(0), "M": M, "N": N, "blocks": blocks, "pitch": blocks,
            "bytes_of_row": K // 2, "scales_of_row": groups // slices if even and not per_channel else groups,
        },
        constants={
            "MODE": mode, "ZERO": zero_kind, "BOOK": book, "PARTS": parts, "BLOCK": block,
            "ORDERED": ordered, "ALIGNED": aligned, "EVEN": even, "PER_CHANNEL": per_channel,
            "BLOCK_N": chosen["BLOCK_N"], "BLOCK_M": chosen["BLOCK_M"], "SLICES": slices,
            "STAGES": chosen["num_stages"],
        },
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
    )  # fmt: skip
    return out, [*made, launch]


def made_inputs(
    x: Tensor, permutation: Tensor | None, K: int, block: int, mode: int, parts: int, scaled: bool
) -> tuple[Launch, Tensor, Tensor | None]:
    """What makes `[parts, M, K rounded up to blocks]` of rows, and scales `[blocks, M]` if they are scaled; both."""
    M, blocks = len(x), cdiv(K, block)
    inputs = x.new_empty(parts, M, blocks * block, dtype=torch.float16 if scaled else x.dtype)
    scale = x.new_empty(blocks, M, dtype=torch.float32) if scaled else None
    make = Launch(
        int4_linear_inputs_kernel,
        grid=(M * cdiv(blocks, BLOCKS_OF_INPUTS), 1, 1),
        args={
            "x": x, "permutation": permutation, "made": inputs, "scale": scale,
            "x_m": x.stride(0), "M": M, "K": K, "blocks": blocks,
        },
        constants={
            "MODE": mode, "BLOCK": block, "BLOCKS": BLOCKS_OF_INPUTS, "PARTS": parts, "WHOLE": K % block == 0,
        },
        num_warps=4,
    )  # fmt: skip
    return make, inputs, scale
