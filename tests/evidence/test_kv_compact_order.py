"""kv_compact's compiled kernel reads all rows of a tile before it writes one of them, and tiles in their order."""

import pytest
import torch
from emulate import execute
from mutations import nth
from scrimp.kernels.kv_compact import launches
from subjects.kv_compact import check, filled
from torch import Tensor

BARRIER = r"(bar\.sync|barrier\.sync)\s+0;"


def call(path: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.tensor([path], dtype=torch.int32)
    return filled((1, 1, 1, 60, 128), dtype), torch.zeros(1, dtype=torch.int32), rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("gap", [1, 3, 16, 20])
def test_overlapping_moves(gap: int, dtype: torch.dtype) -> None:
    """Each of 40 rows moves by `gap`: onto rows of its own tile, of the next one, and past both."""
    args = call(list(range(gap, gap + 40)), dtype)
    execute(launches(*args)[1], "warp")
    check(None, args)


def test_a_missing_barrier_is_seen_warp_by_warp() -> None:
    """The emulator has no checker of races in global memory, but a warp that runs ahead overwrites what others read."""
    args = call(list(range(1, 17)), torch.float16)
    execute(launches(*args)[1], "warp", {"kv_compact_kernel": nth(BARRIER, -1, "")})
    with pytest.raises(AssertionError):
        check(None, args)
