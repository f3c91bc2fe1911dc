"""sparse_linear's compiled kernels: a row has the bits of its own list, among any rows; whole sectors of weights."""

import pytest
import torch
from companies import assert_company_changes_nothing, listing, own_lists
from emulate import compile_launches, execute
from scrimp.kernels.launch import Launch
from scrimp.kernels.sparse_linear import launches
from subjects.sparse_linear import SUBJECT
from torch import Tensor

ROWS = (1, 5, 16, 17, 33, 64)  # on both sides of every change of tile


@pytest.mark.parametrize("K", [200, 1104], ids=["one chunk", "chunks"])
def test_a_row_has_the_bits_of_its_own_list(K: int) -> None:
    N = 72
    weight, residual = torch.randn(K, N).half(), torch.randn(64, N).half()
    own = own_lists(64, K)
    x = torch.randn(64, K).half().masked_fill(~own, 0)

    def prepared(rows: slice, x: Tensor, listed: Tensor) -> tuple[Tensor, list[Launch]]:
        return launches(x, weight, *listing(listed), None, residual[rows])

    def run(rows: slice, x: Tensor, listed: Tensor) -> Tensor:
        out, made = prepared(rows, x, listed)
        execute(made)
        return out

    compile_launches([one for rows in ROWS for one in prepared(slice(rows), x[:rows], own[0])[1]])
    assert_company_changes_nothing(run, x, own, ROWS)


def test_weights_are_read_by_whole_sectors() -> None:
    """All global accesses of the product with half of the channels, the list included."""
    _, made = launches(*SUBJECT.cases[SUBJECT.reference_launch]())
    product = execute(made)[1]
    assert made[1].kernel.__name__ == "sparse_linear_kernel"
    assert product.sector_efficiency >= 0.95
