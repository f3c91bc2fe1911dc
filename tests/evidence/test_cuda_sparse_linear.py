"""sparse_linear in CUDA C++: a row has the bits of its own list, among any rows; far rows, and the calls it takes."""

import mmap

import pytest
import torch
from cuda_device import call
from cuda_subjects.sparse_linear import BAD, CASES, MUTATED
from subjects.sparse_linear import make
from torch import Tensor

from scrimp.ops.sparse_linear import _cuda_takes

ROWS = (1, 2, 4, 5, 8, 9, 33)  # on both sides of every change of tile
TRITONS = {"off the grid", "odd outputs"}


@pytest.mark.parametrize("K", [200, 1104], ids=["one chunk", "chunks"])
def test_a_row_has_the_bits_of_its_own_list(K: int) -> None:
    weight, residual = torch.randn(K, 72).half(), torch.randn(64, 72).half()
    own = torch.rand(64, K) < 0.3
    x = torch.randn(64, K).half().masked_fill(~own, 0)

    def run(x: Tensor, listed: Tensor, residual: Tensor) -> Tensor:
        channels = listed.nonzero().flatten().int()
        return call("sparse_linear", x, weight, channels, torch.tensor([len(channels)]).int(), None, residual)[0]

    everything = torch.ones(K, dtype=torch.bool)
    whole = run(x, everything, residual)
    for rows in ROWS:
        assert torch.equal(run(x[:rows], own[:rows].any(0), residual[:rows]), whole[:rows]), rows
    for row in (3, 40):
        one = slice(row, row + 1)
        assert torch.equal(run(x[one], own[row], residual[one]), whole[one])
    wild = x[:9].clone()
    wild[::2] = torch.nan
    assert torch.equal(run(wild, everything, residual[:9])[1::2], whole[1:9:2])


def test_channels_beyond_32_bit_offsets() -> None:
    """Channels of a weight 2^30 + 64 elements apart, in memory that is only reserved; rows of x, too."""
    apart = 2**30 + 64
    memory = mmap.mmap(-1, 6 * apart + 256, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    far = torch.frombuffer(memory, dtype=torch.float16).as_strided((3, 64), (apart, 1))
    _, weight, index, count, *ends = make(2, 3, 64, torch.float16, "all")
    far.copy_(weight)
    x = torch.randn(3, 3).half()
    expected = call("sparse_linear", x, weight, index, count, *ends)[0]
    assert torch.equal(call("sparse_linear", x, far, index, count, *ends)[0], expected)
    far[:, :3] = x
    assert torch.equal(call("sparse_linear", far[:, :3], weight, index, count, *ends)[0], expected)


def test_a_list_that_does_not_ascend_touches_nothing_else() -> None:
    x, weight, index, count, *ends = make(3, 600, 24, torch.float16, "all", True)
    for wrong in (index.flip(0), torch.randint(-(2**31), 2**31 - 1, (600,), dtype=torch.int32), index * 7):
        call("sparse_linear", x, weight, wrong, count, *ends)
        call("sparse_linear", x, weight, wrong, count - 700, *ends)


def test_calls_that_it_takes() -> None:
    """All cases; of what the launcher refuses, Triton serves some, and the launcher's words are for the rest."""
    assert all(_cuda_takes(*make_case()) for make_case in CASES.values())
    args = CASES[MUTATED]()
    for name, (change, _) in BAD.items():
        assert _cuda_takes(*change(args)) == (name not in {"dtype", "columns", *TRITONS}), name
    x, *rest = args
    assert _cuda_takes(x[:1].expand(64, -1), *rest)
    assert not _cuda_takes(x[:1].expand(65, -1), *rest)
