"""Families that only transformers' own generate runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import scrimp
from scrimp import Calibration
from scrimp.methods.generation.huggingface import UnsupportedModelError
from scrimp.methods.wina import METHODS, SparseLinear, metered

Calibrated = Callable[[str], tuple[Any, Calibration]]
PROMPT = torch.randint(1, 256, (1, 9), generator=torch.Generator().manual_seed(2))
GATED = ("Gemma", "Gemma2", "Gemma3")


def generated(model: Any) -> tuple[list[int], Tensor]:
    """New tokens of transformers' own generate, and the logits that chose them."""
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 256}
    asked |= {"return_dict_in_generate": True, "output_logits": True}
    found = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **asked)
    return found.sequences[0].tolist(), torch.cat(found.logits)


@pytest.mark.parametrize("family", [*GATED, "Phi", "Phi3"])
def test_stock_generate(family: str, calibrated: Calibrated) -> None:
    """No sparsity changes nothing; half of the weights is half of the weights."""
    model, calibration = calibrated(family)
    expected = generated(model)
    for sparsity in (0.0, 0.5):
        model, calibration = calibrated(family)
        report = scrimp.sparsify(model, calibration, sparsity)
        assert report.saved == pytest.approx(sparsity, abs=1e-6)
        with metered(model) as usage:
            found = generated(model)
        torch.testing.assert_close(found[1][0], expected[1][0], rtol=1e-3, atol=1e-3)  # of the prompt
        assert torch.allclose(found[1][1:], expected[1][1:], rtol=1e-3, atol=1e-3) == (sparsity == 0)
        assert found[0] == expected[0] or sparsity
        assert usage.dropped == pytest.approx(sparsity, abs=0.12)
    dense = {"Phi": 12, "Phi3": 8}.get(family, 14)
    assert sum(isinstance(module, SparseLinear) for module in model.modules()) == dense


@pytest.mark.parametrize("family", [*GATED, "Phi", "Phi3"])
@pytest.mark.parametrize("method", METHODS)
def test_prompts_are_read_densely(method: str, family: str, calibrated: Calibrated) -> None:
    """Whatever the method, and whatever norms a family has around its layers."""
    model, calibration = calibrated(family)
    with torch.no_grad():
        expected = model(PROMPT).logits
        if method == "cats" and family not in GATED:
            with pytest.raises(
                ValueError, match=r"sparsify: method='cats' skips at most 0\.0% of this model's weights"
            ):
                scrimp.sparsify(model, calibration, 0.3, method)
            return
        scrimp.sparsify(model, calibration, 0.3, method)
        found = model(PROMPT).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_the_loop_refuses_them_by_name(calibrated: Calibrated) -> None:
    model, calibration = calibrated("Gemma2")
    scrimp.sparsify(model, calibration, 0.5)
    with pytest.raises(UnsupportedModelError, match="cannot run this Gemma2ForCausalLM"):
        scrimp.generate(model, PROMPT)
