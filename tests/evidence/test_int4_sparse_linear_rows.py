"""int4_sparse_linear's compiled kernels: a row has the bits of its own list, among any rows; and codebooks."""

import pytest
import torch
from companies import assert_company_changes_nothing, listing, own_lists
from emulate import compile_launches, execute
from scrimp.kernels.int4_sparse_linear import launches
from scrimp.kernels.launch import Launch
from subjects.int4_sparse_linear import check, make
from torch import Tensor

ROWS = (1, 8, 9, 17, 33, 64)  # on both sides of every change of tile
FORMS = {"none8, chunks": (640, 64, "none8", torch.bfloat16), "offset": (96, 32, "offset", torch.float16)}


@pytest.mark.parametrize("form", FORMS)
def test_a_row_has_the_bits_of_its_own_list(form: str) -> None:
    K, group_size, kind, dtype = FORMS[form]
    x, *weight, _, _, bias, size, number, mode = make(64, 24, K, group_size, kind, "exact", dtype, "all")
    own = own_lists(64, K)
    x = x.masked_fill(~own, 0)

    def prepared(x: Tensor, listed: Tensor) -> tuple[Tensor, list[Launch]]:
        return launches(x, *weight, *listing(listed), bias, size, number, mode)

    def run(rows: slice, x: Tensor, listed: Tensor) -> Tensor:
        out, made = prepared(x, listed)
        execute(made)
        return out

    compile_launches([one for rows in ROWS for one in prepared(x[:rows], own[0])[1]])
    assert_company_changes_nothing(run, x, own, ROWS)


@pytest.mark.parametrize("kind", ["codebook", "codebook8"])
def test_codebooks(kind: str) -> None:
    args = make(3, 24, 128, 64, kind, "exact", torch.bfloat16)
    out, made = launches(*args)
    execute(made)
    check(out, args)
