"""int4_linear in CUDA C++: a row's bits among any rows, the formula of its cost, far rows, and the calls it takes."""

import mmap
import re

import pytest
import torch
from cuda_device import call
from cuda_subjects.int4_linear import BRAIN, BYTES, CASES, HALF, SIXTEEN, check, make
from scrimp.benchmarks.int4_linear_cost import AGAINST, count_cuda, shaped

from scrimp.int4_weight import Int4Weight
from scrimp.int4_weight.check import ZERO_KINDS
from scrimp.ops.int4_linear import _cuda_takes

ROWS = (1, 4, 5, 8, 9, 16, 17, 33, 64)  # on both sides of every change of tile
FORMS = {
    "none8": ((576, 64), "none8", BRAIN),
    "offset": ((352, 32), "offset", HALF),
    "uint8": ((384, 128), "uint8", BRAIN),
    "codebook": ((640, 128), "codebook8", BRAIN),
}


def run(*args: object) -> torch.Tensor:
    return call("int4_linear", *args)[0]


@pytest.mark.parametrize("name", FORMS)
def test_a_row_has_the_same_bits_among_any_rows(name: str) -> None:
    form, kind, dtype = FORMS[name]
    torch.manual_seed(0)
    x, *rest = make(64, 24, form, kind, dtype, HALF, True)
    whole = run(x, *rest)
    check(whole, (x, *rest))
    for rows in ROWS:
        assert torch.equal(run(x[:rows], *rest), whole[:rows]), rows
    wild = x[:9].clone()
    wild[::2] = torch.nan
    assert torch.equal(run(wild, *rest)[1::2], whole[1:9:2])


def test_many_outputs_have_the_same_bits() -> None:
    """From 8,192 outputs on, 9 to 16 rows take the large tile."""
    x, *rest = make(9, 8192, (64, 32), "float", HALF, HALF, False)
    whole = run(x, *rest)
    qweight, scales, zeros, *others = rest
    assert torch.equal(run(x, qweight[:40], scales[:40], zeros[:40], *others), whole[:, :40])
    assert torch.equal(run(x[:1], *rest), whole[:1])


@pytest.mark.parametrize("name", CASES)
def test_formula(name: str) -> None:
    """Products are those of the formula; bytes, too, but for a bias, which a warp reads once for its rows."""
    args = CASES[name]()
    counters = call("int4_linear", *args)[1][0].counters
    formula, bias = count_cuda(*args), args[6]
    asked = sum(row.values["useful"] for row in counters.rows)
    read_by_rows = args[0].shape[:-1].numel() * bias.nbytes if bias is not None else 0
    assert formula.bytes - read_by_rows <= asked <= formula.bytes
    products = 0
    for row in counters.rows:
        if found := re.search(r"mma\.sync\.aligned\.m(\d+)n(\d+)k(\d+)", row.text):
            m, n, k = map(int, found.groups())
            products += 2 * m * n * k * row.values["warps"]
    assert formula.flops_issued == products


# Outputs: lines of the tile for 16 rows of x, and tiles where one of these lines is ones.
OUTPUTS = {1024: (32, 34), 4096: (32, 133), 5120: (32, 166), 8192: (64, 131), 14336: (64, 228), 28672: (64, 456)}


@pytest.mark.parametrize("N", OUTPUTS)
def test_products_at_sixteen_rows(N: int) -> None:
    """At most 15 % more than the useful ones, and exactly: none but for zeros that are floats, which take a line."""
    lines, tiles = OUTPUTS[N]
    x, qweight, scales, _, *rest = shaped(16, N, 4096)
    for zeros in (None, torch.empty_like(scales, dtype=torch.uint8)):
        found = count_cuda(x, qweight, scales, zeros, *rest)
        assert found.flops_issued == found.flops_useful
    found = count_cuda(x, qweight, scales, torch.empty_like(scales), *rest)
    assert found.flops_issued * N == found.flops_useful * lines * tiles
    assert found.flops_issued <= 1.15 * found.flops_useful


@pytest.mark.parametrize("name", [SIXTEEN, BYTES])
def test_all_products_are_useful(name: str) -> None:
    """Of launches that `test_formula` counts."""
    formula = count_cuda(*CASES[name]())
    assert formula.flops_issued == formula.flops_useful


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_codes_less_zeros_of_8_bits_are_exact(dtype: torch.dtype) -> None:
    """Rows of x that are columns of the identity take them from the weight: every code less every zero."""
    codes, zeros = torch.arange(32).repeat(256, 1) % 16, torch.arange(256).view(256, 1)
    weight = Int4Weight.from_codes(codes, torch.ones(256, 1), zeros.to(torch.uint8), zero_kind="uint8")
    kind = ZERO_KINDS.index(weight.zero_kind)
    for rows in (4, 16, 32):
        found = run(torch.eye(32, dtype=dtype)[:rows], *weight.tensors().values(), None, 32, kind, 0)
        assert torch.equal(found, (codes - zeros).T[:rows].to(dtype)), rows


def test_rows_beyond_32_bit_offsets() -> None:
    """Two rows of x 2^31 + 64 elements apart, in memory that is only reserved."""
    stride = 2**31 + 64
    memory = mmap.mmap(-1, 2 * stride + 256, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    far = torch.frombuffer(memory, dtype=HALF).as_strided((2, 64), (stride, 1))
    x, *rest = make(2, 16, (64, 64), "none8", HALF, HALF, False)
    far.copy_(x)
    assert torch.equal(run(far, *rest), run(x, *rest))


def test_calls_that_it_takes() -> None:
    """All that this file runs, whatever the number of rows up to 64; Triton does the rest."""
    for name, case in CASES.items():
        args = case()
        assert _cuda_takes(*args) == (args[0].shape[:-1].numel() <= 64), name
    x, *rest = make(1, 16, (64, 32), "none8", HALF, HALF, False)
    for rows in (1, 64):
        assert _cuda_takes(x.expand(rows, 64), *rest)
        assert not _cuda_takes(x.expand(rows, 64).float(), *rest)
        assert not _cuda_takes(x.expand(rows, 64), *rest[:-1], 1)
        assert not _cuda_takes(x.expand(rows, 64), *make(1, 16, (64, 16), "none8", HALF, HALF, False)[1:])
        assert not _cuda_takes(x.expand(rows, 64), *make(1, 16, (64, 32), "codebook", HALF, HALF, False)[1:])
    assert not _cuda_takes(x.expand(65, 64), *rest)


def test_beside_16_bits() -> None:
    """A weight of 4 bits with scales is 3.88 times smaller; rows of x and results are the same for both."""
    for name, (ours, dense) in AGAINST["16-bit"]().items():
        assert 3.1 < dense.unique_bytes / ours.unique_bytes < 3.88, name
