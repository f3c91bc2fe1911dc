"""Rows of compiled kernels have the same bits alone, in company, and wherever they lie in memory."""

import pytest
import torch
from emulate import execute
from scrimp.kernels import rms_norm
from torch import Tensor


def normed(x: Tensor, weight: Tensor) -> Tensor:
    out, launches = rms_norm.launches(x, weight, 1e-5)
    execute(launches)
    return out


@pytest.mark.parametrize("columns", [64, 65, 576, 9000])
def test_rms_norm(columns: int) -> None:
    """Also off every multiple of 16 bytes, and as every third head of a token."""
    x, weight = torch.randn(6, columns).bfloat16(), torch.randn(columns).bfloat16()
    alone = torch.cat([normed(row[None], weight) for row in x])
    assert torch.equal(normed(x, weight), alone)
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    assert torch.equal(normed(shifted, weight), alone)
    heads = torch.stack([x, x, x], 1).view(2, 9, columns)[:, ::3]
    assert torch.equal(normed(heads, weight), alone.view(2, 3, columns))
