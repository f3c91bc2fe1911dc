"""codebook_topk in CUDA C++: a row's bits among any rows, and the calls it takes."""

import torch
from cuda_device import call
from subjects.codebook_topk import make

from scrimp.ops.codebook_topk import _cuda_takes

HALF, BRAIN = torch.float16, torch.bfloat16


def run(x: torch.Tensor, *rest: object) -> torch.Tensor:
    results = call("codebook_topk", x, *rest)[0]
    return torch.cat([result.flatten(1).float() for result in results], 1)


def test_a_row_has_the_same_bits_among_any_rows() -> None:
    """Random numbers; also beside wild rows."""
    x, *rest = make(70, 2, 150, 72, 5, BRAIN, bias=True, euclidean=True, exact=False)
    whole = run(x, *rest)
    for rows in (1, 15, 17, 64):
        assert torch.equal(run(x[:rows], *rest), whole[:rows]), rows
    wild = x.clone()
    wild[::2] = torch.nan
    assert torch.equal(run(wild, *rest)[1::2], whole[1::2])


def test_what_it_takes() -> None:
    """16-bit codes whose vectors of 16 bytes are whole; the number of rows has no say in it."""
    x, codebook, *rest = make(3, 2, 30, 16, 5, HALF)
    assert _cuda_takes(x, codebook, *rest)
    assert _cuda_takes(x[:0], codebook, *rest)
    assert _cuda_takes(x, codebook[:, ::2], *rest)
    assert not _cuda_takes(x.float(), codebook.float(), *rest)
    assert not _cuda_takes(x[:, 12:24], codebook[..., :6], *rest)
    assert not _cuda_takes(x, torch.cat([codebook, codebook], -1)[..., 4:20], *rest)
