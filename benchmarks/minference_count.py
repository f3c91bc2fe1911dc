"""What MInference's published Triton kernels do with its three patterns (microsoft/MInference fb56c91), in bf16.

Tiles of 64 x 64, a mask on every block. K and V are repeated to all query heads first, and that copy is counted; the
estimates of the patterns are not.
"""

import torch
from torch import Tensor

from .roofline import Count

BLOCK, SIZE = 64, 2  # rows and keys of a tile; bytes of a number


def slashes(n: int, head: int, columns: int = 1000, diagonals: int = 6096) -> tuple[Tensor, Tensor]:
    """Columns int64 [columns] and diagonals, bands int64 [runs, 2] (start, width), of a head.

    The first 30 columns and the nearest 100 diagonals are there, as MInference forces them. The other columns are
    scattered; the other diagonals lie in runs of 1 to 100 (50 on average) that do not touch, at random distances.
    """
    chance = torch.Generator().manual_seed(head)
    scattered = 30 + torch.randperm(n - 30, generator=chance)[: columns - 30]
    widths, left = [], diagonals - 100
    while left:
        widths.append(min(int(torch.randint(1, 101, (), generator=chance)), left))
        left -= widths[-1]
    width = torch.tensor(widths, dtype=torch.int64)
    # Distances between the runs: points thrown on what the runs leave free.
    free = n - 101 - int((width + 1).sum())
    gaps = torch.randint(0, free, (len(widths),), generator=chance).sort().values
    start = 101 + gaps + (width + 1).cumsum(0) - (width + 1)
    bands = torch.cat([torch.tensor([[0, 100]]), torch.stack([start, width], 1)])
    return torch.cat([torch.arange(30), scattered]).sort().values, bands


def top_blocks(n: int, head: int) -> Tensor:
    """bool [n / 64, n / 64]: 100 blocks in every row, or all up to the diagonal."""
    chance = torch.Generator().manual_seed(head)
    tiles = n // BLOCK
    score = torch.rand(tiles, tiles, generator=chance).tril() + torch.ones(tiles, tiles).tril()
    picked = torch.zeros(tiles, tiles, dtype=torch.bool).scatter_(1, score.topk(min(100, tiles)).indices, True)
    return picked.tril()


def repetition(n: int, heads: int, D: int) -> Count:
    """K and V of one head copied to all query heads."""
    moved = 2 * n * D * SIZE * (1 + heads)
    return Count(bytes=moved, unique_bytes=moved)


def attention(n: int, heads: int, D: int, blocks: int, columns: int, column_steps: int, useful: int) -> Count:
    """Of the kernel for blocks and columns, their numbers summed over tiles and heads, after the repetition."""
    per_head = n * D * SIZE
    indices = 4 * (blocks + columns + 2 * heads * n // BLOCK)
    steps = blocks + column_steps
    kernel = Count(
        bytes=2 * per_head * heads + 2 * D * SIZE * (blocks * BLOCK + columns) + indices,
        unique_bytes=4 * per_head * heads + indices,
        flops_issued=4 * BLOCK * BLOCK * D * steps,
        flops_useful=useful,
        exps=steps * BLOCK * (BLOCK + 1),
        resident_bytes=2 * per_head,
    )
    return repetition(n, heads, D) + kernel


def a_shape_count(n: int, heads: int, D: int, useful: int, sink: int = 1024, window: int = 4096) -> Count:
    """The window's blocks, then in a second pass all blocks of the sinks, whatever the window has seen of them.

    The sums (fp32), maxima and totals go through memory in between; the result is fp32. The caller repeats K and V.
    """
    tile = torch.arange(n // BLOCK)
    steps = heads * int(((tile + 1) - (tile - window // BLOCK).clamp(min=0)).sum() + len(tile) * (sink // BLOCK))
    rows = heads * n
    moved = rows * (2 * D * SIZE + 3 * 4 * D + 6 * 4) + 2 * D * SIZE * BLOCK * steps
    kernel = Count(
        bytes=moved,
        unique_bytes=rows * (3 * D * SIZE + 4 * D + 8),
        flops_issued=4 * BLOCK * BLOCK * D * steps,
        flops_useful=useful,
        exps=steps * BLOCK * (BLOCK + 1),
        resident_bytes=2 * n * D * SIZE,
    )
    return repetition(n, heads, D) + kernel


def vertical_slash_count(n: int, heads: int, D: int, useful: int) -> Count:
    """What `convert_vertical_slash_indexes` makes of `slashes`."""
    sums = [converted(n, *slashes(n, head)) for head in range(heads)]
    blocks, columns, column_steps = (sum(part) for part in zip(*sums, strict=True))
    return attention(n, heads, D, blocks, columns, column_steps, useful)


def top_blocks_count(n: int, heads: int, D: int, useful: int) -> Count:
    """100 blocks a tile, or all up to the diagonal."""
    blocks = heads * int(torch.arange(1, n // BLOCK + 1).clamp(max=100).sum())
    return attention(n, heads, D, blocks, 0, 0, useful)


def converted(n: int, columns: Tensor, bands: Tensor) -> tuple[int, int, int]:
    """Blocks, columns and steps over columns of all tiles of one head: the loop of MInference's conversion.

    A diagonal at distance d is the 64 keys from end - 64 - d; one that begins at most 64 keys past the current range
    makes that longer by 64; columns before the range or between two ranges stay columns.
    """
    end = torch.arange(1, n // BLOCK + 1) * BLOCK
    start, stop = torch.full_like(end, -1), torch.full_like(end, -1)  # no range yet
    blocks, covered = torch.zeros_like(end), torch.zeros_like(end)

    def close(which: Tensor) -> None:
        blocks[which] += ceil_div((stop - start)[which])
        covered[which] += torch.searchsorted(columns, stop[which]) - torch.searchsorted(columns, start[which])

    distances = torch.cat([torch.arange(a, a + width) for a, width in bands.tolist()]).sort(descending=True).values
    for distance in distances.tolist():
        here = (end - distance).clamp(min=BLOCK)
        seen = end > distance
        fresh = seen & ((stop < 0) | (here > stop + BLOCK))
        close(fresh & (stop >= 0))
        longer = seen & ~fresh & (here > stop)
        stop = torch.where(fresh, here, torch.where(longer, stop + BLOCK, stop))
        start = torch.where(fresh, here - BLOCK, start)
    close(stop >= 0)
    scattered = torch.searchsorted(columns, stop) - covered
    return int(blocks.sum()), int(scattered.sum()), int(ceil_div(scattered).sum())


def ceil_div(a: Tensor) -> Tensor:
    return -(-a // BLOCK)
