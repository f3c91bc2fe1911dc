"""int4_sparse_linear in Triton: one program multiplies 128 outputs of one chunk of columns with some rows.

As in `sparse_linear`, the list becomes one number an input, and the rows zeros elsewhere: a column has its place in a
tile whatever else is listed, and the codes of the others are not read. As in `int4_linear`, whose kernel makes
integers, parts and permuted rows, a block is what shares a scale: its product D is exact in the codes, and scale and
zero meet D in fp32. Exact mode adds up chunks of a fixed size apart, and another kernel their sums in order; int8 mode,
whose blocks are added in order, has one chunk.

A word of 32 bits holds 8 outputs of a column. Shifted by 4 i and masked, it leaves two in its halves, which under an
exponent are the 16-bit floats `base + q`. The outputs of a tile are taken in an order that keeps the halves of
neighbours together, so that no two threads meet in a bank of shared memory: scales are dealt alike, results back.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .int4_linear import EXACT, INT8, _book_scale, _int8_term, made_inputs
from .launch import Launch, cdiv, unit_last_stride
from .sparse_linear import added_chunks, listed_inputs
from .tuning import config

CHUNK = 512  # columns of a chunk in exact mode


@triton.jit
def _needed(listed, permutation, column, K):
    """1 for each of some columns whose input is listed, else 0."""
    at = column
    if permutation is not None:
        at = tl.load(permutation + column, mask=column < K, other=0)
    return tl.load(listed + at, mask=column < K, other=0)


@triton.jit
def _halves(words, MASK: tl.constexpr, BITS: tl.constexpr):
    """int16 [8 W, BLOCK] of words [BLOCK, W], outputs dealt: the halves of (a word >> 4 i) & MASK | BITS."""
    BLOCK: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    two = tl.arange(0, 2)
    shift = 8 * two[None, :, None, None, None] + 4 * two[None, None, None, :, None]
    pairs = ((tl.reshape(words, [BLOCK, 1, W // 8, 1, 8]) >> shift) & MASK) | BITS
    halves = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    return tl.trans(tl.reshape(tl.permute(halves, (0, 1, 2, 3, 5, 4)), [BLOCK, 8 * W]))


@triton.jit
def _codes(words, ZERO: tl.constexpr, DTYPE: tl.constexpr):
    """q, or q - 8 where there are no zeros, as DTYPE [8 W, BLOCK]: exact."""
    EIGHT: tl.constexpr = 8 if ZERO == 0 else 0
    if tl.bfloat16 == DTYPE:
        q = _halves(words, 0x000F000F, 0x43004300).to(tl.bfloat16, bitcast=True)
        base = tl.full(q.shape, 128.0 + EIGHT, tl.bfloat16)
    else:
        q = _halves(words, 0x000F000F, 0x64006400).to(tl.float16, bitcast=True)
        base = tl.full(q.shape, 1024.0 + EIGHT, tl.float16)
    return q - base


@triton.jit
def _dealt(values):
    """Values of outputs [N], a tile's 128 after the other, in the order of `_halves`.

    Output 32 r + 16 h + 4 a + 2 u + b of a tile is in half u of word 4 a + r, shifted by 8 b + 4 h.
    """
    N: tl.constexpr = values.shape[0]
    return tl.reshape(tl.permute(tl.reshape(values, [N // 128, 4, 2, 2, 2, 2, 2]), (6, 0, 3, 2, 5, 4, 1)), [N])


@triton.jit
def _collected(sums):
    """Sums [N, M] of dealt outputs, in the order of the outputs."""
    N: tl.constexpr = sums.shape[0]
    M: tl.constexpr = sums.shape[1]
    sums = tl.reshape(sums, [2, N // 128, 2, 2, 2, 2, 4, M])
    return tl.reshape(tl.permute(sums, (1, 6, 3, 2, 5, 4, 0, 7)), [N, M])


@triton.jit(do_not_specialize=["M", "K", "blocks", "chunk", "scales_g", "zeros_g"])
def int4_sparse_linear_kernel(
    x, codes, listed, permutation, scales, zeros, codebook, x_scale, bias, out,
    x_m, x_part, codes_k, scales_g, zeros_g, M, N, K, blocks, chunk,
    MODE: tl.constexpr, ZERO: tl.constexpr, BOOK: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    ORDERED: tl.constexpr, PER_CHANNEL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """y of a block of outputs where there is one chunk, else the sums of each, fp32 [chunks, M, N].

    x [PARTS, M, blocks, BLOCK], the columns of a block in the order of `int4_linear_inputs_kernel` where ORDERED.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK)
    column = k
    if ORDERED:
        LANES: tl.constexpr = min(BLOCK // 8, 4)
        column = (k // 8 % LANES * (BLOCK // 8 // LANES) + k // 8 // LANES) * 8 + k % 8
    DTYPE: tl.constexpr = x.dtype.element_ty
    first = tl.program_id(1) * chunk
    end = tl.minimum(first + chunk, blocks)
    word = tl.program_id(0) * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
    x += m.to(tl.int64)[:, None] * x_m + k[None, :]
    if BOOK == 3:
        book_scale, book_back = _book_scale(codebook)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    needed = _needed(listed, permutation, first * BLOCK + column, K)
    for block in range(first, end):
        far = tl.full((), block, tl.int64)
        at = codes + (far * BLOCK + column)[:, None] * codes_k + word[None, :]
        words = tl.load(at, mask=(needed > 0)[:, None], other=0)
        needed = _needed(listed, permutation, (block + 1) * BLOCK + column, K)  # ahead of its use
        group = 0 if PER_CHANNEL else far
        s = _dealt(tl.load(scales + group * scales_g + n, mask=n < N, other=0.0).to(tl.float32))
        z = s
        if ZERO > 0:
            z = _dealt(tl.load(zeros + group * zeros_g + n, mask=n < N, other=0).to(tl.float32))
        if BOOK == 0:
            weights = (_codes(words, ZERO, DTYPE),)
        else:
            entry = tl.load(codebook + (_halves(words, 0x000F000F, 0) & 15))
            if BOOK == 1:
                weights = (entry.to(DTYPE),)
            else:
                entry *= book_scale
                weights = ()
                for _ in tl.static_range(BOOK):
                    weights = weights + (entry.to(DTYPE),)
                    entry -= entry.to(DTYPE).to(tl.float32)
        inputs = ()
        for part in tl.static_range(PARTS):
            rows = x + tl.full((), part, tl.int64) * x_part + block * BLOCK
            inputs = inputs + (tl.trans(tl.load(rows, mask=(m < M)[:, None], other=0.0)),)
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
        s, z = tl.broadcast_to(s[:, None], total.shape), tl.broadcast_to(z[:, None], total.shape)
        if x_scale is not None:
            a = tl.load(x_scale + far * M + m, mask=m < M, other=0.0)[None, :]
            if MODE == 0:
                d *= a
                ones *= a
        if MODE == 1:
            total += _int8_term(d, ones, s, z, a, ZERO)
        else:
            if ZERO == 1 or ZERO == 2:
                d = tl.fma(-z, ones, d)
            if ZERO == 3:
                total = tl.fma(z, ones, total)
            total = tl.fma(d, s, total)
    total = tl.trans(_collected(total))
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    out += (tl.program_id(1).to(tl.int64) * M + m)[:, None] * N + n[None, :]
    tl.store(out, total.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def launches(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    codebook: Tensor | None,
    permutation: Tensor | None,
    index: Tensor,
    count: Tensor,
    bias: Tensor | None,
    group_size: int,
    zero_kind: int,
    mode: int,
) -> tuple[Tensor, list[Launch]]:
    """The result, still unwritten, and what writes it.

    A count past the list's end is taken for its length; inputs that do not ascend leave the result undefined.
    """
    if x.element_size() > 4:
        raise ValueError(f"int4_sparse_linear: {x.dtype} has no GPU kernel; x must be float16, bfloat16 or float32")
    K, N = codes.shape[0], scales.shape[1]
    M, out = math.prod(x.shape[:-1]), x.new_empty(*x.shape[:-1], N)
    if 0 in (M, N):
        return out, []
    block = group_size if group_size in (16, 32, 64, 128) else 128
    blocks, zeros = cdiv(K, block), None if zeros is None else unit_last_stride(zeros)
    codes, scales = words_of(codes), unit_last_stride(scales)
    codebook, permutation, bias = (None if t is None else t.contiguous() for t in (codebook, permutation, bias))
    book = 0 if codebook is None else 1 if codebook.dtype == torch.int8 else 3
    scaled = mode == INT8 or x.dtype == torch.float32 or book == 3
    parts = 3 if mode == EXACT and x.dtype == torch.float32 else 1
    find, rows, listed = listed_inputs(x.reshape(M, x.shape[-1]), index, count)
    made, inputs, x_scale = [find], rows[None], None
    ordered = scaled or permutation is not None or K % block > 0
    if ordered:
        make, inputs, x_scale = made_inputs(rows, permutation, K, block, mode, parts, scaled)
        made.append(make)
    chosen = config("int4_sparse_linear", x.device, rows=M, parts=max(parts, book))
    chunk = max(CHUNK // block if mode == EXACT else blocks, 1)
    chunks = max(cdiv(blocks, chunk), 1)
    written = out.view(M, N) if chunks == 1 else x.new_empty(chunks, M, N, dtype=torch.float32)
    product = Launch(
        int4_sparse_linear_kernel,
        grid=(cdiv(N, chosen["BLOCK_N"]), chunks, cdiv(M, chosen["BLOCK_M"])),
        args={
            "x": inputs, "codes": codes, "listed": listed, "permutation": permutation, "scales": scales, "zeros": zeros,
            "codebook": codebook, "x_scale": x_scale, "bias": bias if chunks == 1 else None, "out": written,
            "x_m": inputs.stride(1), "x_part": inputs.stride(0), "codes_k": codes.stride(0),
            "scales_g": scales.stride(0), "zeros_g": 0 if zeros is None else zeros.stride(0), "M": M, "N": N, "K": K,
            "blocks": blocks, "chunk": chunk,
        },
        constants={
            "MODE": mode, "ZERO": zero_kind, "BOOK": book, "PARTS": parts, "BLOCK": block, "ORDERED": ordered,
            "PER_CHANNEL": group_size == K, "BLOCK_N": chosen["BLOCK_N"], "BLOCK_M": chosen["BLOCK_M"],
        },
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
    )  # fmt: skip
    made.append(product)
    return out, made if chunks == 1 else [*made, added_chunks(written, bias, None, out.view(M, N))]


def words_of(codes: Tensor) -> Tensor:
    """The codes as int32, copied only where their bytes are not words."""
    if codes.stride(1) != 1 or codes.stride(0) % 4 or codes.storage_offset() % 4:
        codes = codes.clone(memory_format=torch.contiguous_format)
    return codes.view(torch.int32)
