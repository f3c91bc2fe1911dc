"""sparse_linear's compiled kernels: a row has the bits of its own list, among any rows; whole sectors of weights."""

import pytest
import torch
from emulate import compile_launches, execute
from scrimp.kernels.sparse_linear import launches
from subjects.sparse_linear import SUBJECT
from torch import Tensor

ROWS = (1, 5, 16, 17, 33, 64)  # on both sides of every change of tile


def prepared(x: Tensor, weight: Tensor, listed: Tensor, residual: Tensor) -> tuple:
    channels = listed.nonzero().flatten().int()
    return launches(x, weight, channels, torch.tensor([len(channels)]).int(), None, residual)


@pytest.mark.parametrize("K", [200, 1104], ids=["one chunk", "chunks"])
def test_a_row_has_the_bits_of_its_own_list(K: int) -> None:
    N = 72
    weight, residual = torch.randn(K, N).half(), torch.randn(64, N).half()
    own = torch.rand(64, K) < 0.3
    x = torch.randn(64, K).half().masked_fill(~own, 0)

    def run(x: Tensor, listed: Tensor, residual: Tensor) -> Tensor:
        out, made = prepared(x, weight, listed, residual)
        execute(made)
        return out

    everything = torch.ones(K, dtype=torch.bool)
    compile_launches([one for rows in ROWS for one in prepared(x[:rows], weight, own[0], residual[:rows])[1]])
    whole = run(x, everything, residual)
    for rows in ROWS:
        assert torch.equal(run(x[:rows], own[:rows].any(0), residual[:rows]), whole[:rows]), rows
    for row in (3, 40):
        one = slice(row, row + 1)
        assert torch.equal(run(x[one], own[row], residual[one]), whole[one])
    wild = x[:9].clone()
    wild[::2] = torch.nan
    assert torch.equal(run(wild, everything, residual[:9])[1::2], whole[1:9:2])


def test_weights_are_read_by_whole_sectors() -> None:
    """All global accesses of the product with half of the channels, the list included."""
    _, made = launches(*SUBJECT.cases[SUBJECT.reference_launch]())
    product = execute(made)[1]
    assert made[1].kernel.__name__ == "sparse_linear_kernel"
    assert product.sector_efficiency >= 0.95
