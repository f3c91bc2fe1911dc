"""int4_sparse_linear's compiled kernels: a row has the bits of its own list, among any rows; and codebooks."""

import pytest
import torch
from emulate import compile_launches, execute
from scrimp.kernels.int4_sparse_linear import launches
from subjects.int4_sparse_linear import check, make
from torch import Tensor

ROWS = (1, 8, 9, 17, 33, 64)  # on both sides of every change of tile
FORMS = {"none8, chunks": (640, 64, "none8", torch.bfloat16), "offset": (96, 32, "offset", torch.float16)}


def prepared(x: Tensor, listed: Tensor, weight: tuple, rest: tuple) -> tuple:
    channels = listed.nonzero().flatten().int()
    return launches(x, *weight, channels, torch.tensor([len(channels)]).int(), *rest)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_has_the_bits_of_its_own_list(form: str) -> None:
    K, group_size, kind, dtype = FORMS[form]
    x, *weight, _, _, bias, size, number, mode = make(64, 24, K, group_size, kind, "exact", dtype, "all")
    own = torch.rand(64, K) < 0.3
    x = x.masked_fill(~own, 0)

    def run(x: Tensor, listed: Tensor) -> Tensor:
        out, made = prepared(x, listed, tuple(weight), (bias, size, number, mode))
        execute(made)
        return out

    everything = torch.ones(K, dtype=torch.bool)
    rest = (bias, size, number, mode)
    compile_launches([one for rows in ROWS for one in prepared(x[:rows], own[0], tuple(weight), rest)[1]])
    whole = run(x, everything)
    for rows in ROWS:
        assert torch.equal(run(x[:rows], own[:rows].any(0)), whole[:rows]), rows
    for row in (3, 40):
        assert torch.equal(run(x[row : row + 1], own[row]), whole[row : row + 1])
    wild = x[:9].clone()
    wild[::2] = torch.nan
    assert torch.equal(run(wild, everything)[1::2], whole[1:9:2])


@pytest.mark.parametrize("kind", ["codebook", "codebook8"])
def test_codebooks(kind: str) -> None:
    args = make(3, 24, 128, 64, kind, "exact", torch.bfloat16)
    out, made = launches(*args)
    execute(made)
    check(out, args)
