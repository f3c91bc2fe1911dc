"""What linear's kernels do with few rows: every weight is read once, the rows once for each block of outputs."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from scrimp.kernels.launch import Launch, cdiv
from scrimp.kernels.linear import launches
from torch import Tensor

from .linear import SHAPES
from .roofline import Count, CountedCase


def count(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], residual: Tensor | None) -> Count:
    """Of one call; the sums of chunks, where a second kernel adds them up, are written and read."""
    _, made = launches(x, weights, biases, residual)
    return sum((products(one) if "CHUNK" in one.constants else sums(one) for one in made), Count(0, 0))


def size_of(launch: Launch, *names: str) -> int:
    """Bytes of an element of all of these arguments that are there."""
    return sum(launch.args[name].element_size() for name in names if launch.args[name] is not None)


def ends(launch: Launch, M: int) -> int:
    """Bytes of biases and residual when `M` rows ask for the biases on their own."""
    args = launch.args
    found = sum(M * args[f"N{i}"] * size_of(launch, f"bias{i}") for i in range(3))
    return int(found + args["M"] * outputs(launch) * size_of(launch, "residual"))


def outputs(launch: Launch) -> int:
    return sum(launch.args[f"N{i}"] for i in range(3))


def products(launch: Launch) -> Count:
    """Of the kernel that multiplies."""
    args, constants = launch.args, launch.constants
    (tiles, chunks, _), M, K, N, size = launch.grid, args["M"], args["K"], outputs(launch), size_of(launch, "x")
    whole, rest = divmod(K, constants["CHUNK"])
    steps = whole * constants["CHUNK"] // constants["BLOCK_K"] + cdiv(rest, constants["BLOCK_K"])
    once = N * K * size + chunks * M * N * size_of(launch, "out") + ends(launch, 1)
    return Count(
        bytes=once + tiles * M * K * size,
        unique_bytes=once + M * K * size,
        flops_issued=2 * tiles * steps * constants["BLOCK_M"] * constants["BLOCK_N"] * constants["BLOCK_K"],
        flops_useful=2 * M * N * K,
        resident_bytes=M * K * size,
    )


def sums(launch: Launch) -> Count:
    """Of the kernel that adds up chunks."""
    M, N = launch.args["M"], outputs(launch)
    once = M * N * (launch.args["chunks"] * size_of(launch, "chunk") + size_of(launch, "out"))
    return Count(bytes=once + ends(launch, M), unique_bytes=once + ends(launch, 1))


def cases() -> list[CountedCase]:
    """The shapes of the benchmark with one row and with 16."""
    return list(_cases())


def _cases() -> Iterator[CountedCase]:
    for name, (K, widths, added) in SHAPES.items():
        for rows in (1, 16):
            x, y = (torch.empty(rows, n, dtype=torch.bfloat16, device="meta") for n in (K, sum(widths)))
            weights = [torch.empty(n, K, dtype=torch.bfloat16, device="meta") for n in widths]
            fields = {"m": rows, "n": sum(widths), "k": K}
            flat = (x, weights, [], y if added else None)
            yield CountedCase(f"{name}-{rows}", "bf16", partial(count, *flat), fields)
