"""gelu_mul against its reference and its contract."""

import pytest
import torch

import scrimp
from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle

OP = OPS["gelu_mul"]
IMPLEMENTATIONS = scrimp.implementations("gelu_mul")
SHAPES = [(1,), (3, 19), (2, 5, 111), (64, 1000)]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oracle(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    args = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype), True
    assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args)
