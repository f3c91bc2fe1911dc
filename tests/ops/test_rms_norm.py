"""rms_norm against its reference, Hugging Face's module and its contract."""

import pytest
import torch

import scrimp
from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle

OP = OPS["rms_norm"]
IMPLEMENTATIONS = scrimp.implementations("rms_norm")
SHAPES = [(1,), (3, 19), (2, 5, 576), (1, 4, 3, 111), (64, 1000)]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oracle(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    args = torch.randn(shape).to(dtype), torch.randn(shape[-1:]).to(dtype), 1e-5
    assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args)


def test_reference_is_hugging_faces() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for dtype in (torch.float32, torch.bfloat16):
        module, x = LlamaRMSNorm(40, eps=1e-5).to(dtype), torch.randn(3, 40).to(dtype)
        module.weight.data = torch.randn(40).to(dtype)
        with torch.no_grad():
            assert torch.equal(OP.reference(x, module.weight, 1e-5), module(x))
