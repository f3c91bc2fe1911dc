"""sparse_linear in CUDA C++: a row has the bits of its own list, among any rows; far rows, and the calls it takes."""

import mmap

import pytest
import torch
from companies import assert_company_changes_nothing, listing, own_lists
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
    own = own_lists(64, K)

    def run(rows: slice, x: Tensor, listed: Tensor) -> Tensor:
        return call("sparse_linear", x, weight, *listing(listed), None, residual[rows])[0]

    assert_company_changes_nothing(run, torch.randn(64, K).half().masked_fill(~own, 0), own, ROWS)


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
