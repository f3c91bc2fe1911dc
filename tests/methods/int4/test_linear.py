"""Int4Linear: the op with a state dict that no cast changes."""

import pytest
import torch
from torch import nn

import scrimp
from scrimp.methods.int4 import Int4Linear
from scrimp.testing import random_int4_weight
from scrimp.testing.int4 import KINDS

# int8 mode needs an int8 codebook.
PAIRS = [(kind, mode) for kind in KINDS for mode in ("exact", "int8") if (kind, mode) != ("codebook", "int8")]


@pytest.mark.parametrize(("kind", "mode"), PAIRS)
def test_forward_is_the_op(kind: str, mode: str) -> None:
    weight, bias, x = random_int4_weight(5, 64, kind=kind, permuted=True), torch.randn(5), torch.randn(2, 3, 64)
    layer = Int4Linear(weight, bias, mode)
    assert torch.equal(layer(x), scrimp.ops.int4_linear(x, weight, bias, mode=mode))
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_casts_change_no_weight(kind: str) -> None:
    weight = random_int4_weight(5, 64, kind=kind)
    layer = Int4Linear(weight, torch.randn(5))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        layer = layer.to(dtype)
        assert layer.bias is not None
        assert layer.bias.dtype == dtype
        assert torch.equal(layer.weight.dequantize(), weight.dequantize())
        assert layer.weight.scales.dtype == torch.float16
        assert layer(torch.randn(2, 64, dtype=dtype)).dtype == dtype
    assert layer.to("meta").weight.qweight.device.type == "meta"


def test_state_dict_brings_its_own_sizes() -> None:
    """A layer made for another kind of weight takes over what the state dict holds."""
    saved = nn.ModuleDict({"a": Int4Linear(random_int4_weight(5, 64, 16, "uint8", permuted=True), torch.randn(5))})
    fresh = nn.ModuleDict({"a": Int4Linear(random_int4_weight(5, 64, 32), torch.zeros(5))})
    fresh.load_state_dict(saved.state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(fresh["a"](x), saved["a"](x))
    assert repr(fresh) == repr(saved)
    broken = saved.state_dict()
    broken["a.scales"][2, 1] = torch.inf
    with pytest.raises(ValueError, match=r"Int4Weight: a: scales\[2, 1\] is inf"):
        fresh.load_state_dict(broken)
