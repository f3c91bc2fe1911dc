"""linear against its reference, its definition and its contract."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import scrimp
from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle

OP = OPS["linear"]
IMPLEMENTATIONS = scrimp.implementations("linear") or {"reference": OP.call}
Args = tuple[Tensor, list[Tensor], list[Tensor | None], Tensor | None]


def arguments(lead: tuple[int, ...], K: int, sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Args:
    """Weights of `sizes` outputs, every second one with a bias, and a residual."""
    x = torch.randn(*lead, K).to(dtype)
    weights = [torch.randn(N, K).to(dtype) for N in sizes]
    biases = [None if i % 2 else torch.randn(N).to(dtype) for i, N in enumerate(sizes)]
    return x, weights, biases, torch.randn(*lead, sum(sizes)).to(dtype)


SHAPES = [((1,), 1, (1,)), ((3,), 19, (5, 2)), ((2, 3), 64, (33,)), ((), 100, (7, 1, 1)), ((17,), 577, (50,))]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oracle(name: str, dtype: torch.dtype, shape: tuple[tuple[int, ...], int, tuple[int, ...]]) -> None:
    args = arguments(*shape, dtype)
    assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args)


def test_reference_by_hand() -> None:
    x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    got = OP.reference(x, [weight, weight[:1]], [torch.tensor([0.5, 0.0]), None], torch.tensor([[0.0, 1.0, 2.0]]))
    assert got.tolist() == [[11.5, 18.0, 13.0]]


def test_opcheck() -> None:
    for shape in SHAPES[:3]:
        opcheck(OP.call, arguments(*shape))
