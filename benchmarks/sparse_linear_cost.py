"""What sparse_linear's kernels do: listed weights are read once, the few rows once for each block of outputs."""

from collections.abc import Iterator
from functools import partial

import torch
from scrimp.kernels.launch import Launch, cdiv
from scrimp.kernels.sparse_linear import launches
from torch import Tensor

from .linear_cost import size_of, sums
from .roofline import Count, CountedCase
from .sparse_linear import CHOICES, SHAPES


def count(
    x: Tensor, weight: Tensor, index: Tensor, counted: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Count:
    """Of one call; index and count have values."""
    made = launches(x, weight, index, counted, bias, residual)[1]
    if not made:
        return Count(0, 0)
    listed = min(int(counted), len(index))
    done = products(made[1], listed)
    if made[0].grid[0]:
        done += search(made[0], index[:listed])
    return done + sums(made[2]) if len(made) > 2 else done


def search(launch: Launch, listed: Tensor) -> Count:
    """Of the kernel that looks channels up; the few numbers that a block's search meets are left out."""
    M, K, pitch, size, block = (
        launch.args["M"], launch.args["K"], launch.args["pitch"], size_of(launch, "x"), launch.constants["BLOCK_K"],
    )  # fmt: skip
    begins = torch.searchsorted(listed.contiguous(), torch.arange(0, pitch, block))
    asked = int((len(listed) - begins).clamp(max=block).sum())  # whose channels may lie in the next block
    once = 4 * pitch + M * (pitch + K) * size
    return Count(once + launch.grid[1] * 4 * asked, once + 4 * len(listed))


def products(launch: Launch, listed: int) -> Count:
    """Of the kernel that multiplies; unlisted channels of weights and rows are masked."""
    args, constants = launch.args, launch.constants
    (tiles, chunks, _), M, K, N, size = launch.grid, args["M"], args["K"], args["N"], size_of(launch, "rows")
    whole, rest = divmod(K, constants["CHUNK"])
    steps = whole * cdiv(constants["CHUNK"], constants["BLOCK_K"]) + cdiv(rest, constants["BLOCK_K"])
    ends = N * size_of(launch, "bias") + M * N * size_of(launch, "residual")
    once = listed * N * size + chunks * M * N * size_of(launch, "out") + ends
    return Count(
        bytes=once + tiles * args["pitch"] * (M * size + 4),
        unique_bytes=once + args["pitch"] * (M * size + 4),
        flops_issued=2 * tiles * steps * constants["BLOCK_M"] * constants["BLOCK_N"] * constants["BLOCK_K"],
        flops_useful=2 * M * N * listed,
        resident_bytes=args["pitch"] * (M * size + 4),
    )


# In CUDA C++: channels of a block, its warps, entries of the list that it looks at first.
CHUNK, WARPS, PROBES = 512, 8, 64


def count_cuda(
    x: Tensor, weight: Tensor, index: Tensor, counted: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Count:
    """The same of the kernels in CUDA C++, which multiply on no tensor core."""
    M, (K, N), size = x.shape[:-1].numel(), weight.shape, x.element_size()
    listed, rows = min(int(counted), len(index)), 1 if M == 1 else 4 if M <= 4 else 8
    across, down = cdiv(M, rows), cdiv(N, 512 // size)  # tiles of rows, of outputs
    weights, inputs = listed * N * size, M * K * size
    ends = M * N * size * (1 + (bias is not None) + (residual is not None))
    sums = chunk_sums(M, N, K)
    return Count(
        bytes=across * (weights + down * list_bytes(index, listed, K)) + down * inputs + 2 * sums + ends,
        unique_bytes=weights + inputs + 4 * listed + 4 + 2 * sums + ends - (0 if bias is None else (M - 1) * N * size),
        resident_bytes=inputs + sums + 4 * listed,  # tiles of rows that share weights run at the same time
    )


def list_bytes(index: Tensor, listed: int, K: int) -> int:
    """What blocks, one for each chunk, read of a list: probes, its length in each warp, entries around their chunk."""
    apart = max(cdiv(len(index), PROBES), 1)
    read = 0
    for begin in range(0, K, CHUNK):
        below = int((index[:listed:apart] < begin).sum())
        first = max(below - 1, 0) * apart
        read += cdiv(len(index), apart) + WARPS + max(min(apart + CHUNK, listed - first), 0)
    return 4 * read


def chunk_sums(M: int, N: int, K: int) -> int:
    """Bytes of the sums of chunks, which a second kernel adds up where there are several."""
    return 4 * cdiv(K, CHUNK) * M * N if K > CHUNK else 0


def cases() -> list[CountedCase]:
    """The shapes of the benchmark; as many channels as each row keeps are listed."""
    return list(_cases())


def _cases() -> Iterator[CountedCase]:
    for shape, (K, N) in SHAPES.items():
        for choice, (rows, sparsity) in CHOICES.items():
            listed = round(K * (1 - sparsity**rows))
            x, weight = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((rows, K), (K, N)))
            index = torch.linspace(0, K - 1, listed).int()
            flat, fields = (x, weight, index, torch.tensor([listed]).int(), None, None), {"m": rows, "n": N, "k": K}
            yield CountedCase(f"{shape}-{choice}", "bf16", partial(count, *flat), fields, partial(count_cuda, *flat))
