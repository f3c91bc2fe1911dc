"""linear in Triton: one program multiplies a block of outputs of one weight with all rows.

Inputs are summed in chunks of a fixed size and the sums of the chunks are added in their order, either by the program
that made them or, where the outputs alone are too few programs to keep the memory busy, by a second kernel from one
program per chunk. So the order of additions depends on nothing but K. Weights are the left operand: their outputs fill
the tensor core's larger side, and the number of rows changes no bit of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv, power_of_two, unit_last_stride
from .tuning import config

MAX_ROWS = 64  # more go through torch's matrix product
CHUNK = 1024  # inputs of a chunk
TOGETHER = 3  # weights of one launch


@triton.jit
def _finished(
    sums, m, n, inside, bias0, bias1, bias2, residual, residual_m, N0, N1, N2
):  # fmt: skip
    """sums [M, N] of rows m and outputs n, both numbered from the launch's first on, with biases and the residual."""
    if bias0 is not None:
        sums += tl.load(bias0 + n, mask=n < N0, other=0.0).to(tl.float32)[None, :]
    n1 = n - N0
    if bias1 is not None:
        sums += tl.load(bias1 + n1, mask=(n1 >= 0) & (n1 < N1), other=0.0).to(tl.float32)[None, :]
    n2 = n1 - N1
    if bias2 is not None:
        sums += tl.load(bias2 + n2, mask=(n2 >= 0) & (n2 < N2), other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        at = residual + m.to(tl.int64)[:, None] * residual_m + n[None, :]
        sums += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return sums


@triton.jit(do_not_specialize=["M", "N0", "N1", "N2"])
def linear_kernel(
    x, weight0, weight1, weight2, bias0, bias1, bias2, residual, out,
    x_m, weight_n, residual_m, out_m, M, N0, N1, N2, K,
    CHUNK: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y of a block of outputs; where SPLIT, the sum of one chunk, fp32 [chunks, M, N], instead."""
    tile = tl.program_id(0)
    weight, first, count = weight0, 0, N0  # this program's weight, its first output among all, its outputs
    if weight1 is not None:
        tiles = tl.cdiv(N0, BLOCK_N)
        behind = tile >= tiles
        tile = tl.where(behind, tile - tiles, tile)
        weight, first, count = tl.where(behind, weight1, weight), tl.where(behind, N0, 0), tl.where(behind, N1, N0)
        if weight2 is not None:
            tiles = tl.cdiv(N1, BLOCK_N)
            behind &= tile >= tiles
            tile = tl.where(behind, tile - tiles, tile)
            weight, first, count = (
                tl.where(behind, weight2, weight), tl.where(behind, N0 + N1, first), tl.where(behind, N2, count),
            )  # fmt: skip
    n, m, k = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    begin = tl.program_id(1) * CHUNK if SPLIT else 0
    end = tl.minimum(begin + CHUNK, K) if SPLIT else K
    weight += n.to(tl.int64)[:, None] * weight_n + k[None, :]
    x += m.to(tl.int64)[:, None] * x_m + k[None, :]
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    chunk = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for at in range(begin, end, BLOCK_K):
        inside = (k < K - at)[None, :]
        rows = tl.load(x + at, mask=(m < M)[:, None] & inside, other=0.0)
        outputs = tl.load(weight + at, mask=(n < count)[:, None] & inside, other=0.0)
        chunk = tl.dot(outputs, tl.trans(rows), chunk, input_precision="ieee")
        if not SPLIT:
            whole = at % CHUNK == CHUNK - BLOCK_K
            if whole:
                sums += chunk
                chunk = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    sums = tl.trans(sums + chunk)
    inside = (m < M)[:, None] & (n < count)[None, :]
    n += first
    if SPLIT:
        out += tl.program_id(1).to(tl.int64) * M * out_m
    else:
        sums = _finished(sums, m, n, inside, bias0, bias1, bias2, residual, residual_m, N0, N1, N2)
    tl.store(out + m.to(tl.int64)[:, None] * out_m + n[None, :], sums.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "N0", "N1", "N2", "chunks"])
def linear_chunks_kernel(
    chunk, bias0, bias1, bias2, residual, out, chunk_m, residual_m, out_m, M, N0, N1, N2, chunks, BLOCK_N: tl.constexpr
):
    """y of a block of outputs of one row from the sums of its chunks."""
    m, n = tl.program_id(1) + tl.arange(0, 1), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    N = N0 + N1 + N2
    inside = (n < N)[None, :]
    chunk += m.to(tl.int64)[:, None] * chunk_m + n[None, :]
    sums = tl.zeros((1, BLOCK_N), tl.float32)
    for first in range(0, chunks, 8):
        for i in tl.static_range(8):  # many loads at a time
            sums += tl.load(chunk, mask=(n < tl.where(first + i < chunks, N, 0))[None, :], other=0.0)
            chunk += M.to(tl.int64) * chunk_m
    sums = _finished(sums, m, n, inside, bias0, bias1, bias2, residual, residual_m, N0, N1, N2)
    tl.store(out + m.to(tl.int64)[:, None] * out_m + n[None, :], sums.to(out.dtype.element_ty), mask=inside)


def launches(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], residual: Tensor | None
) -> tuple[Tensor, list[Launch]]:
    """The result, still unwritten, and what writes it; more than `MAX_ROWS` rows are multiplied by torch at once."""
    if x.element_size() > 4:
        raise ValueError(f"linear: {x.dtype} has no GPU kernel; it must be float16, bfloat16 or float32")
    *lead, K = x.shape
    M, N = math.prod(lead), sum(len(weight) for weight in weights)
    out = x.new_empty(*lead, N)
    if 0 in (M, N):
        return out, []
    rows, y = unit_last_stride(x.reshape(M, K)), out.view(M, N)
    beside = None if residual is None else unit_last_stride(residual.reshape(M, N))
    if M > MAX_ROWS:
        multiply(rows, weights, biases, beside, y)
        return out, []
    biases = [None if bias is None else unit_last_stride(bias) for bias in biases] or [None] * len(weights)
    return out, [launch for some in groups(weights, biases) for launch in launches_of(rows, *some, beside, y)]


def multiply(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], residual: Tensor | None, out: Tensor
) -> None:
    """torch's matrix product into the columns of `out`; rounded before each addition."""
    first = 0
    for i, weight in enumerate(weights):
        part = out[:, first : first + len(weight)]
        torch.mm(x, weight.T, out=part)
        if biases and (bias := biases[i]) is not None:
            part += bias
        first += len(weight)
    if residual is not None:
        out += residual


def groups(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Iterator[tuple[int, list[Tensor], list[Tensor | None]]]:
    """Neighbours with equal strides, to be launched together: their first output, the weights, their biases."""
    first, start = 0, 0
    while start < len(weights):
        stop = start + 1
        while stop < min(start + TOGETHER, len(weights)) and weights[stop].stride(0) == weights[start].stride(0):
            stop += 1
        yield first, list(weights[start:stop]), list(biases[start:stop])
        first += sum(len(weight) for weight in weights[start:stop])
        start = stop


def launches_of(
    x: Tensor, first: int, weights: list[Tensor], biases: list[Tensor | None], residual: Tensor | None, out: Tensor
) -> Iterator[Launch]:
    """Those of weights that are launched together; their outputs begin in column `first` of `out`."""
    (M, K), outputs = x.shape, [len(weight) for weight in weights]
    N = sum(outputs)
    if N == 0:
        return
    chosen = config("linear", x.device, rows=M, outputs=N, inputs=max(K, 1), itemsize=x.element_size())
    chunks, block_n = cdiv(K, CHUNK), chosen["BLOCK_N"]
    split = bool(chosen["SPLIT"]) and chunks > 1
    part = out[:, first:]
    missing = [None] * (TOGETHER - len(weights))
    sizes = {"M": M} | {f"N{i}": count for i, count in enumerate([*outputs, *[0] * len(missing)])}
    ends = {f"bias{i}": bias for i, bias in enumerate([*biases, *missing])}
    ends |= {"residual": None if residual is None else residual[:, first:]}
    strides = {"residual_m": 0 if residual is None else residual.stride(0)}
    nothing = dict.fromkeys(ends)
    written = x.new_empty(chunks, M, N, dtype=torch.float32) if split else part
    yield Launch(
        linear_kernel,
        grid=(sum(cdiv(count, block_n) for count in outputs), chunks if split else 1, 1),
        args={
            "x": x, **{f"weight{i}": weight for i, weight in enumerate([*weights, *missing])},
            **(nothing if split else ends), "out": written,
            "x_m": x.stride(0), "weight_n": weights[0].stride(0), **strides, "out_m": written.stride(-2),
            **sizes, "K": K,
        },
        constants={
            "CHUNK": CHUNK, "SPLIT": split, "BLOCK_M": power_of_two(M, 16), "BLOCK_N": block_n,
            "BLOCK_K": chosen["BLOCK_K"],
        },
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
    )  # fmt: skip
    if split:
        yield Launch(
            linear_chunks_kernel,
            grid=(cdiv(N, 128), M, 1),
            args={
                "chunk": written, **ends, "out": part, "chunk_m": N, **strides, "out_m": part.stride(0), **sizes,
                "chunks": chunks,
            },
            constants={"BLOCK_N": 128},
            num_warps=4,
        )  # fmt: skip
