"""What int4_sparse_linear's kernels do: codes of listed columns once for every tile of rows, scales of all blocks."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from scrimp.kernels.int4_sparse_linear import launches
from scrimp.kernels.launch import Launch, cdiv

from .int4_linear_cost import prepared, size
from .int4_sparse_linear import SHAPES
from .linear_cost import sums
from .roofline import Count, CountedCase
from .sparse_linear import CHOICES
from .sparse_linear_cost import CHUNK, chunk_sums, list_bytes, search


def count(*flat: Any) -> Count:
    """Of one call; index, count and permutation have values. What a codebook is looked up for is left out."""
    made = {launch.kernel.__name__: launch for launch in launches(*flat)[1]}
    codes, permutation, index = flat[1], flat[5], flat[6][: int(flat[7])]
    columns = len(index) if permutation is None else int(torch.isin(permutation, index).sum())
    total = Count(0, 0)
    for name, launch in made.items():
        if 0 in launch.grid:
            continue
        if name == "sparse_linear_inputs_kernel":
            total += search(launch, index)
        elif name == "int4_linear_inputs_kernel":
            total += prepared(launch)
        elif name == "linear_chunks_kernel":
            total += sums(launch)
        else:
            total += products(launch, columns * codes.shape[1])
    return total


def products(launch: Launch, codes: int) -> Count:
    """Of the kernel that multiplies; `codes` are the bytes of the listed columns."""
    args, constants = launch.args, launch.constants
    (across, chunks, down), M, N, blocks = launch.grid, args["M"], args["N"], args["blocks"]
    parts, book, block = constants["PARTS"], constants["BOOK"], constants["BLOCK"]
    flags = 4 * (1 if args["permutation"] is None else 2) * (args["K"] + (chunks - 1) * block)  # a block ahead
    of_group = sum(args[name].element_size() for name in ("scales", "zeros") if args[name] is not None)
    inputs = M * blocks * block * parts * args["x"].element_size() + size(args["x_scale"])
    moved = down * (codes + N * blocks * of_group + across * flags) + across * inputs + size(args["out"])
    moved += down * size(args["bias"])
    pairs = parts if book == 1 else sum(i + j < max(parts, book) for i in range(parts) for j in range(max(book, 1)))
    tile = constants["BLOCK_M"] * constants["BLOCK_N"] * block
    return Count(
        bytes=moved,
        unique_bytes=codes + size(args["scales"], args["zeros"], args["bias"], args["out"]),
        flops_issued=2 * across * down * blocks * tile * (pairs + (parts if constants["ZERO"] else 0)),
        flops_useful=2 * M * codes // cdiv(N, 128) // 64 * N,
        resident_bytes=inputs + codes * (down > 1),
    )


def count_cuda(*flat: Any) -> Count:
    """The same of the kernels in CUDA C++, which multiply on no tensor core."""
    x, codes, scales, zeros, codebook, _, index, counted, bias, group, *_ = flat
    M, (K, width), N = x.shape[:-1].numel(), codes.shape, scales.shape[1]
    listed, rows = min(int(counted), len(index)), 1 if M == 1 else 4
    across, down, chunks = cdiv(M, rows), cdiv(N, 256), max(cdiv(K, CHUNK), 1)
    groups = sum(cdiv(min(CHUNK, K - begin), group) for begin in range(0, K, CHUNK))
    of_group = sum(some.element_size() for some in (scales, zeros) if some is not None)
    inputs, sums, out = M * K * x.element_size(), chunk_sums(M, N, K), M * N * x.element_size()
    of_tile = listed * width + groups * N * of_group + down * (list_bytes(index, listed, K) + chunks * size(codebook))
    return Count(
        bytes=across * of_tile + down * inputs + 2 * sums + out + M * size(bias),
        unique_bytes=listed * (width + 4) + 4 + size(scales, zeros, codebook, bias) + inputs + 2 * sums + out,
        resident_bytes=inputs + sums + 4 * listed,  # tiles of rows that share codes run at the same time
    )


def cases() -> list[CountedCase]:
    """The shapes of the benchmark, exact mode, bf16; as many channels as each row keeps are listed."""
    return list(_cases())


def _cases() -> Iterator[CountedCase]:
    for shape, (N, K, group, kind) in SHAPES.items():
        for choice, (rows, sparsity) in CHOICES.items():
            listed = round(K * (1 - sparsity**rows))
            x = torch.empty(rows, K, dtype=torch.bfloat16, device="meta")
            codes = torch.empty(K, 64 * cdiv(N, 128), dtype=torch.uint8, device="meta")
            scales = torch.empty(K // group, N, dtype=torch.float16, device="meta")
            zeros = scales.to(torch.uint8) if kind == "uint8" else None
            index = torch.linspace(0, K - 1, listed).int()
            weight, numbers = (codes, scales, zeros, None, None), (group, 0 if zeros is None else 1, 0)
            flat = (x, *weight, index, torch.tensor([listed]).int(), None, *numbers)
            fields = {"m": rows, "n": N, "k": K, "group_size": group, "mode": "exact"}
            yield CountedCase(f"{shape}-{choice}", "bf16", partial(count, *flat), fields, partial(count_cuda, *flat))
