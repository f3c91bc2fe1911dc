"""sparse_linear in Triton: one program multiplies a block of outputs of one chunk of channels with all rows.

The list is made into one number a channel first, and the rows into such that are 0 elsewhere, so that a channel has its
place in a tile whatever else is listed: unlisted ones are zeros there whose weights are not read. So the order of
additions depends on the channels alone. Chunks have a fixed size; another kernel adds their sums up in order. The grid
depends on shapes, nothing on the list.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv, power_of_two, unit_last_stride
from .linear import linear_chunks_kernel
from .tuning import config

MAX_ROWS = 64  # more go through torch's matrix product
CHUNK = 512  # channels of a chunk
PITCH = 64  # channels that a tile may have; rows are padded to a multiple of it
LISTED = (64, 128)  # rows and channels of a program that looks channels up


@triton.jit
def _below(index, index_j, total, k):
    """How many of the list's first `total` channels are below k."""
    place, size = 0, total
    while size > 0:
        half = size // 2
        under = tl.load(index + (place + half) * index_j) < k
        place, size = tl.where(under, place + half + 1, place), tl.where(under, size - half - 1, half)
    return place


@triton.jit(do_not_specialize=["capacity", "M"])
def sparse_linear_inputs_kernel(
    x, index, count, rows, listed, x_m, x_k, index_j, capacity, M, K, pitch,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """listed [pitch], 1 for each channel of the list, else 0; rows [M, pitch] of x in these channels, else 0.

    One search finds the first channel of the block; the others are its neighbours in the list.
    """
    i = tl.arange(0, BLOCK_K)
    first = tl.program_id(0) * BLOCK_K
    k, m = first + i, tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.minimum(tl.load(count), capacity)
    begin = _below(index, index_j, total, first)
    channels = tl.load(index + (begin + i) * index_j, mask=i < total - begin, other=-1)
    found = tl.max((channels[:, None] == k[None, :]).to(tl.int32), 0)
    found = tl.where(k < K, found, 0)
    tl.store(listed + k, found, mask=k < tl.where(tl.program_id(1) == 0, pitch, 0))
    m = m[:, None]
    at = m.to(tl.int64) * x_m + k.to(tl.int64)[None, :] * x_k
    value = tl.load(x + at, mask=(m < M) & (k < K)[None, :], other=0.0)
    value = tl.where((found > 0)[None, :], value, 0.0)
    tl.store(rows + m.to(tl.int64) * pitch + k[None, :], value, mask=(m < M) & (k < pitch)[None, :])


@triton.jit(do_not_specialize=["M"])
def sparse_linear_kernel(
    rows, weight, listed, bias, residual, out, pitch, weight_k, residual_m, out_m, M, N, K,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y of a block of outputs where there is one chunk, else the sums of each, fp32 [chunks, M, N]."""
    n, m, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    begin = tl.program_id(1) * CHUNK
    end = tl.minimum(begin + CHUNK, K)
    weight += (begin + k).to(tl.int64)[:, None] * weight_k + n[None, :]
    rows += m[:, None] * pitch + k[None, :]
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    needed = tl.load(listed + begin + k, mask=k < pitch - begin, other=0)
    for at in range(begin, end, BLOCK_K):
        x = tl.load(rows + at, mask=(m < M)[:, None], other=0.0)
        some = tl.load(weight, mask=(needed > 0)[:, None] & (n < N)[None, :], other=0.0)
        needed = tl.load(listed + at + BLOCK_K + k, mask=k < pitch - BLOCK_K - at, other=0)  # ahead of its use
        sums = tl.dot(tl.trans(some), tl.trans(x), sums, input_precision="ieee")
        weight += BLOCK_K * weight_k
    sums = tl.trans(sums)
    inside = (m < M)[:, None] & (n < N)[None, :]
    if bias is not None:
        sums += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        at = residual + m.to(tl.int64)[:, None] * residual_m + n[None, :]
        sums += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    out += (tl.program_id(1).to(tl.int64) * M + m[:, None]) * out_m + n[None, :]
    tl.store(out, sums.to(out.dtype.element_ty), mask=inside)


def launches(
    x: Tensor, weight: Tensor, index: Tensor, count: Tensor, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, list[Launch]]:
    """The result, still unwritten, and what writes it; more than `MAX_ROWS` rows are multiplied by torch at once.

    A count past the list's end is taken for its length; channels that do not ascend leave the result undefined.
    """
    if x.element_size() > 4:
        raise ValueError(f"sparse_linear: {x.dtype} has no GPU kernel; it must be float16, bfloat16 or float32")
    K, N = weight.shape
    M, out = math.prod(x.shape[:-1]), x.new_empty(*x.shape[:-1], N)
    if 0 in (M, N):
        return out, []
    rows, y = x.reshape(M, K), out.view(M, N)
    beside = None if residual is None else unit_last_stride(residual.reshape(M, N))
    if M > MAX_ROWS:
        multiply(rows, weight, index, count, bias, beside, y)
        return out, []
    ends = {"bias": None if bias is None else unit_last_stride(bias), "residual": beside}
    return out, [*launches_of(rows, weight, index, count, ends, y)]


def multiply(
    x: Tensor, weight: Tensor, index: Tensor, count: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor
) -> None:
    """torch's matrix product with rows that are zero in unlisted channels; rounded before each addition."""
    K = x.shape[1]
    places = torch.arange(len(index), device=x.device)
    listed = torch.zeros(K + 1, dtype=torch.bool, device=x.device)
    listed[torch.where(places < count, index, K).long()] = True
    torch.mm(x.where(listed[:K], 0), weight, out=out)
    for added in (bias, residual):
        if added is not None:
            out += added


def listed_inputs(x: Tensor, index: Tensor, count: Tensor) -> tuple[Launch, Tensor, Tensor]:
    """What makes rows `[M, pitch]` of x, 0 in channels that are not listed, and `[pitch]` that says which are; both."""
    M, K = x.shape
    pitch, (block_m, block_k) = cdiv(K, PITCH) * PITCH, LISTED
    listed, rows = index.new_empty(pitch), x.new_empty(M, pitch)
    find = Launch(
        sparse_linear_inputs_kernel,
        grid=(cdiv(pitch, block_k), cdiv(M, block_m), 1),
        args={
            "x": x, "index": index, "count": count, "rows": rows, "listed": listed, "x_m": x.stride(0),
            "x_k": x.stride(1), "index_j": index.stride(0), "capacity": len(index), "M": M, "K": K, "pitch": pitch,
        },
        constants={"BLOCK_M": block_m, "BLOCK_K": block_k},
        num_warps=4,
    )  # fmt: skip
    return find, rows, listed


def launches_of(
    x: Tensor, weight: Tensor, index: Tensor, count: Tensor, ends: dict[str, Tensor | None], out: Tensor
) -> list[Launch]:
    """Of up to `MAX_ROWS` rows."""
    (M, K), N = x.shape, weight.shape[1]
    chosen = config("sparse_linear", x.device, itemsize=x.element_size())
    chunks, residual = max(cdiv(K, CHUNK), 1), ends["residual"]
    find, rows, listed = listed_inputs(x, index, count)
    written = out if chunks == 1 else x.new_empty(chunks, M, N, dtype=torch.float32)
    product = Launch(
        sparse_linear_kernel,
        grid=(cdiv(N, chosen["BLOCK_N"]), chunks, 1),
        args={
            "rows": rows, "weight": weight, "listed": listed, **(ends if chunks == 1 else dict.fromkeys(ends)),
            "out": written, "pitch": rows.shape[1], "weight_k": weight.stride(0),
            "residual_m": 0 if residual is None else residual.stride(0), "out_m": N, "M": M, "N": N, "K": K,
        },
        constants={
            "CHUNK": CHUNK, "BLOCK_M": power_of_two(M, 16), "BLOCK_N": chosen["BLOCK_N"], "BLOCK_K": chosen["BLOCK_K"],
        },
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
    )  # fmt: skip
    return [find, product] if chunks == 1 else [find, product, added_chunks(written, ends["bias"], residual, out)]


def added_chunks(sums: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> Launch:
    """What adds up sums `[chunks, M, N]` in the order of the chunks."""
    chunks, M, N = sums.shape
    return Launch(
        linear_chunks_kernel,
        grid=(cdiv(N, 128), M, 1),
        args={
            "chunk": sums, "bias0": bias, "bias1": None, "bias2": None, "residual": residual, "out": out,
            "chunk_m": N, "residual_m": 0 if residual is None else residual.stride(0), "out_m": N,
            "M": M, "N0": N, "N1": 0, "N2": 0, "chunks": chunks,
        },
        constants={"BLOCK_N": 128},
        num_warps=4,
    )  # fmt: skip
