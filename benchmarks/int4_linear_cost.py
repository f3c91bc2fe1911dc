"""What int4_linear's kernels do: codes once for every tile of rows, inputs once for every tile of outputs.

`count` is of the Triton kernels, `count_cuda` of the one in CUDA C++, which runs for up to 64 rows.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from scrimp.kernels.int4_linear import launches
from scrimp.kernels.launch import Launch, cdiv
from torch import Tensor

from .roofline import Against, Count, CountedCase

# name: outputs, inputs; matrices of an 8B and of a 70B model
SHAPES = {"o": (4096, 4096), "up": (14336, 4096), "large": (28672, 8192)}
ROWS = (1, 8, 16, 64, 2048)
CUDA_ROWS = 64  # up to so many rows the kernel in CUDA C++ runs


def size(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def count(*flat: Any) -> Count:
    """Of one call. What a codebook is looked up for is left out: it depends on the codes."""
    out, made = launches(*flat)
    x, qweight, scales, zeros, codebook, permutation, bias = flat[:7]
    total = Count(0, size(qweight, scales, zeros, codebook, permutation, bias, out))
    for launch in made:
        if launch.kernel.__name__ == "int4_linear_inputs_kernel":
            total += prepared(launch)
        else:
            total += products(launch, 0 if len(made) > 1 else size(x))
    return total


def prepared(launch: Launch) -> Count:
    """Of the kernel that makes inputs; those of an index are counted where it is read once."""
    args = launch.args
    written = size(args["made"], args["scale"])
    index = 0 if args["permutation"] is None else args["M"] * size(args["permutation"])
    return Count(args["M"] * args["K"] * args["x"].element_size() + index + written, size(args["x"]) + written)


def products(launch: Launch, inputs: int) -> Count:
    """Of the large kernel; `inputs` are bytes that no other kernel touches."""
    args, constants = launch.args, launch.constants
    M, N, block = args["M"], args["N"], constants["BLOCK"]
    across, down = cdiv(M, constants["BLOCK_M"]), cdiv(N, constants["BLOCK_N"])
    blocks, parts = args["blocks"], constants["PARTS"]
    of_block = sum(args[name].element_size() for name in ("scales", "zeros") if args[name] is not None)
    moved = across * (size(args["qweight"], args["bias"]) + N * blocks * of_block)
    moved += down * (M * blocks * block * parts * args["x"].element_size() + size(args["x_scale"])) + size(args["out"])
    pairs = sum(i + j < max(parts, constants["BOOK"]) for i in range(parts) for j in range(max(constants["BOOK"], 1)))
    if constants["BOOK"] == 1:
        pairs = parts
    rounds = cdiv(blocks, constants["SLICES"]) * constants["SLICES"]
    tile = constants["BLOCK_M"] * constants["BLOCK_N"] * block
    return Count(
        bytes=moved,
        unique_bytes=inputs,
        flops_issued=2 * across * down * rounds * tile * (pairs + (parts if constants["ZERO"] else 0)),
        flops_useful=2 * M * N * min(2 * args["bytes_of_row"], blocks * block),
        resident_bytes=size(args["x"]) if across == 1 else size(args["x"], args["qweight"]),
    )


def cuda_tile(M: int, N: int, codebook: bool) -> tuple[int, int]:
    """Lines of codes and rows of x of a tile of the kernel in CUDA C++."""
    wide = N >= 8192
    if M <= 4 and not wide:
        return 16, 8
    return (64, 32) if not codebook and (M > 16 or (M > 8 and wide)) else (32, 16)


def count_cuda(*flat: Any) -> Count:
    """The same of the kernel in CUDA C++; a bias, which every result reads, counts once for each of its rows.

    Where zeros are floats, one line of a tile is ones. What a permutation costs is torch's and left out.
    """
    x, qweight, scales, zeros, codebook, _, bias = flat[:7]
    N, K, M = qweight.shape[0], 2 * qweight.shape[1], x.shape[:-1].numel()
    inputs = M * K * x.element_size()
    lines, tokens = cuda_tile(M, N, codebook is not None)
    ones = zeros is not None and zeros.dtype != torch.uint8
    across, down, out = cdiv(M, tokens), cdiv(N, lines - ones), M * N * x.element_size()
    products = lines // 16 * cdiv(K, 128) * 8 * cdiv(M, 8) * down
    looked_up = 4 * size(codebook) * across * down  # by each of four warps
    return Count(
        bytes=across * size(qweight, scales, zeros) + down * inputs + looked_up + M * size(bias) + out,
        unique_bytes=inputs + size(qweight, scales, zeros, codebook, bias) + out,
        flops_issued=2 * 16 * 8 * 16 * products,
        flops_useful=2 * M * N * K,
        resident_bytes=inputs,  # tiles that share codes run at the same time
    )


def shaped(M: int, N: int, K: int) -> tuple[Any, ...]:
    """The op's arguments on the meta device: groups of 128 without zeros, bf16."""
    x = torch.empty(M, K, dtype=torch.bfloat16, device="meta")
    qweight = torch.empty(N, K // 2, dtype=torch.uint8, device="meta")
    scales = torch.empty(N, K // 128, dtype=torch.float16, device="meta")
    return x, qweight, scales, None, None, None, None, 128, 0, 0


def cases() -> list[CountedCase]:
    """Groups of 128 without zeros, bf16."""
    return list(_cases())


def _cases() -> Iterator[CountedCase]:
    for name, (N, K) in SHAPES.items():
        for M in ROWS:
            flat, fields = shaped(M, N, K), {"m": M, "n": N, "k": K, "group_size": 128, "mode": "exact"}
            if M <= CUDA_ROWS:
                ours = partial(count_cuda, *flat)
                yield CountedCase(f"{name}-{M}-c++", "bf16", ours, fields | {"kernel": "CUDA C++"})
            yield CountedCase(f"{name}-{M}", "bf16", partial(count, *flat), fields | {"kernel": "Triton"})


def beside_16_bits() -> dict[str, tuple[Count, Count]]:
    """The kernel in CUDA C++, and a product with the same weight in 16 bits that moves and multiplies nothing twice."""
    found = {}
    for name, (N, K) in SHAPES.items():
        for M in ROWS:
            moved, flops = 2 * (N * K + M * (N + K)), 2 * M * N * K
            if M <= CUDA_ROWS:
                dense = Count(bytes=moved, unique_bytes=moved, flops_issued=flops, flops_useful=flops)
                found[f"{name}-{M}"] = count_cuda(*shaped(M, N, K)), dense
    return found


AGAINST: dict[str, Against] = {"16-bit": beside_16_bits}
