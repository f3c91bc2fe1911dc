"""kv_compact in Triton: one program moves the rows of one head of one layer and sequence, a tile of the path at a time.

Rows ascend, so row `path[i]` lies at or behind its place `i`. What a tile writes therefore lies before all that later
tiles read: it is enough that all of a tile's rows are read before the first of them is written.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, power_of_two
from .tuning import config


@triton.jit(do_not_specialize=["B", "G", "T", "capacity"])
def kv_compact_kernel(
    cache, start, path, cache_l, cache_b, cache_g, cache_c, start_b, path_b, path_t, B, G, T, capacity,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    g, b, layer = (item % G).to(tl.int64), (item // G % B).to(tl.int64), (item // G // B).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    cache += layer * cache_l + b * cache_b + g * cache_g + d[None, :]
    first = tl.load(start + b * start_b).to(tl.int64)
    behind = tl.where(first >= 0, capacity - first, 0)  # the first row that lies outside
    begin, end = 0, T
    while begin < end:
        i = begin + tl.arange(0, BLOCK_T)
        row = tl.load(path + b * path_b + i.to(tl.int64) * path_t, mask=i < T, other=-1)
        end = tl.minimum(end, tl.min(tl.where(row < 0, i, T), 0))
        moves = (i < end) & (row > i) & (row < behind)
        inside = moves[:, None] & (d < D)[None, :]
        x = tl.load(cache + (first + row)[:, None] * cache_c, mask=inside)
        tl.debug_barrier()  # other threads write what this one reads
        tl.store(cache + (first + i)[:, None] * cache_c, x, mask=inside)
        begin += BLOCK_T


def launches(cache: Tensor, start: Tensor, path: Tensor) -> tuple[None, list[Launch]]:
    """Nothing, and what moves the rows. Rows outside the cache and behind a negative one stay where they are."""
    for i, (size, stride) in enumerate(zip(cache.shape, cache.stride(), strict=True)):
        if size > 1 and (stride != 1 if i == 4 else stride == 0):
            raise ValueError(
                "kv_compact: cache must have a contiguous last dimension and no expanded one, got stride "
                f"{stride} in dimension {i}"
            )
    L, B, G, capacity, D = cache.shape
    T = path.shape[1]
    if cache.numel() == 0 or T == 0:
        return None, []
    chosen = config("kv_compact", cache.device, head_dim=D, itemsize=cache.element_size())
    strides = {f"cache_{axis}": cache.stride(i) if cache.shape[i] > 1 else 0 for i, axis in enumerate("lbgc")}
    launch = Launch(
        kv_compact_kernel,
        grid=(L * B * G, 1, 1),
        args={
            "cache": cache, "start": start, "path": path, **strides, "start_b": start.stride(0),
            "path_b": path.stride(0), "path_t": path.stride(1), "B": B, "G": G, "T": T, "capacity": capacity,
        },
        constants={"D": D, "BLOCK_T": chosen["BLOCK_T"], "BLOCK_D": power_of_two(D)},
        num_warps=chosen["num_warps"],
    )  # fmt: skip
    return None, [launch]
