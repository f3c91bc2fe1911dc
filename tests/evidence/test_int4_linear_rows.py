"""int4_linear's compiled kernels: a row's bits among any rows, and codebooks, whose loads no formula counts."""

import functools

import pytest
import torch
from emulate import compile_launches, execute
from scrimp.kernels.int4_linear import launches
from subjects.int4_linear import check, make

ROWS = (1, 2, 8, 9, 16, 17, 33, 64)  # on both sides of every change of tile
FORMS = {
    "none8": ("none8", 64, torch.bfloat16),
    "offset": ("offset", 32, torch.float16),
    "three parts": ("uint8", 128, torch.float32),
}


def run(args: tuple[object, ...]) -> torch.Tensor:
    out, made = launches(*args)  # type: ignore[arg-type]
    execute(made)
    return out


@pytest.mark.parametrize("form", FORMS)
def test_a_row_has_the_same_bits_among_any_rows(form: str) -> None:
    kind, group_size, dtype = FORMS[form]
    x, *rest = make(64, 24, group_size, False, kind, "exact", dtype, False)
    compile_launches([launch for rows in ROWS for launch in launches(x[:rows], *rest)[1]])
    whole = run((x, *rest))
    check(whole, (x, *rest))
    for rows in ROWS:
        assert torch.equal(run((x[:rows], *rest)), whole[:rows]), rows
    wild = x[:9].clone()
    wild[::2] = torch.nan
    assert torch.equal(run((wild, *rest))[1::2], whole[1:9:2])


CODEBOOKS = {
    "codebook": functools.partial(make, 3, 24, 64, True, "codebook", "exact", torch.bfloat16, False),
    "codebook8": functools.partial(make, 5, 24, 32, False, "codebook8", "exact", torch.float16, True),
    "codebook8 int8": functools.partial(make, 5, 24, 128, True, "codebook8", "int8", torch.bfloat16, False),
}


@pytest.mark.parametrize("name", CODEBOOKS)
def test_codebooks(name: str) -> None:
    args = CODEBOOKS[name]()
    check(run(args), args)
