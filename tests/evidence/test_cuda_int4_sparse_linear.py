"""int4_sparse_linear in CUDA C++: a row has the bits of its own list, among any rows; far rows, calls it takes."""

import mmap
from typing import Any

import pytest
import torch
from companies import assert_company_changes_nothing, listing, own_lists
from cuda_device import call
from cuda_subjects.int4_sparse_linear import BAD, CASES, MUTATED
from subjects.int4_sparse_linear import make
from torch import Tensor

from scrimp.ops.int4_sparse_linear import _cuda_takes

ROWS = (1, 2, 4, 5, 33)  # on both sides of every change of tile
FORMS = {"none8": (1120, 32), "offset": (320, 64), "codebook8": (300, 300)}
TRITONS = {"dtype", "mode", "int8 mode", "permuted", "codes off the grid", "group size"}


@pytest.mark.parametrize("kind", FORMS)
def test_a_row_has_the_bits_of_its_own_list(kind: str) -> None:
    K, group_size = FORMS[kind]
    _, *weight, _, _, bias, group_size, zero_kind, mode = make(
        1, 40, K, group_size, kind, "exact", torch.float16, bias=True
    )
    own = own_lists(64, K)

    def run(rows: slice, x: Tensor, listed: Tensor) -> Tensor:
        rest: Any = (*listing(listed), bias, group_size, zero_kind, mode)
        return call("int4_sparse_linear", x, *weight, *rest)[0]

    assert_company_changes_nothing(run, torch.randn(64, K).half().masked_fill(~own, 0), own, ROWS)


def test_channels_beyond_32_bit_offsets() -> None:
    """Codes of a channel 2^30 + 64 bytes apart, in memory that is only reserved; rows of x, too."""
    apart = 2**30 + 64
    memory = mmap.mmap(-1, 32 * apart + 256, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    x, codes, *rest = make(3, 40, 32, 32, "none8", "exact", torch.float16, "all")
    far = torch.frombuffer(memory, dtype=torch.uint8).as_strided((32, 64), (apart, 1))
    far.copy_(codes)
    expected = call("int4_sparse_linear", x, codes, *rest)[0]
    assert torch.equal(call("int4_sparse_linear", x, far, *rest)[0], expected)
    rows = torch.frombuffer(memory, dtype=torch.float16).as_strided((3, 32), (3 * apart, 1))
    rows.copy_(x)
    assert torch.equal(call("int4_sparse_linear", rows, codes, *rest)[0], expected)


def test_calls_that_it_takes() -> None:
    """All cases; of what the launcher refuses, Triton serves some, and the launcher's words are for the rest."""
    assert all(_cuda_takes(*make_case()) for make_case in CASES.values())
    args = CASES[MUTATED]()
    for name, (change, _) in BAD.items():
        assert _cuda_takes(*change(args)) == (name not in TRITONS), name
    x, *rest = args
    assert _cuda_takes(x[:1].expand(64, -1), *rest)
    assert not _cuda_takes(x[:1].expand(65, -1), *rest)
