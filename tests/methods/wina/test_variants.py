"""Rotated bases and CATS: what they compute, in stock code and in the decoding loop."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import scrimp
from scrimp import Calibration
from scrimp.methods.wina import SparseLinear, metered
from scrimp.methods.wina.cats import CatsGate
from scrimp.methods.wina.rotation import axes

Calibrated = Callable[[str], tuple[Any, Calibration]]
PROMPTS = torch.randint(1, 256, (2, 11), generator=torch.Generator().manual_seed(3))


def stock(model: Any, new: int = 12) -> list[list[int]]:
    asked = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": 256}
    found = model.generate(PROMPTS, attention_mask=torch.ones_like(PROMPTS), **asked)
    return found[:, PROMPTS.shape[1] :].tolist()


def tokens(model: Any, new: int = 12) -> list[list[int]]:
    found: Any = scrimp.generate(model, PROMPTS, max_new_tokens=new)
    return [each.tokens for each in found]


def test_axes_make_columns_orthogonal() -> None:
    weight = torch.randn(40, 24) @ torch.randn(24, 24)
    basis = axes(weight)
    torch.testing.assert_close(basis @ basis.T, torch.eye(24))
    gram = (weight @ basis.T).T @ (weight @ basis.T)
    assert float((gram - gram.diag().diag()).abs().max()) < 1e-4 * float(gram.max())


@pytest.mark.parametrize("family", ["llama-biases-tied", "qwen3"])
def test_a_rotated_model_is_the_same_model(family: str, calibrated: Calibrated, tmp_path: Path) -> None:
    """With nothing dropped; tied embeddings stay tied, norms stay, and it is saved as the dense one."""
    model, calibration = calibrated(family)
    dense = copy.deepcopy(model)
    report = scrimp.sparsify(model, calibration, 0.0, "wina-rotated")
    assert tokens(model) == tokens(dense) == stock(model)
    assert torch.equal(model.model.layers[0].input_layernorm.weight, dense.model.layers[0].input_layernorm.weight)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (dense.config.tie_word_embeddings or False)
    model.save_pretrained(tmp_path)
    found = type(dense).from_pretrained(tmp_path)
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-4, atol=1e-4)
    d, weights = 48, sum(layer.weights for layer in report.layers)
    assert sum(layer.rotation for layer in report.layers) == 2 * 2 * d * d
    assert report.saved == pytest.approx(-2 * 2 * d * d / weights)
    assert f"(rotations read {4 * d * d / weights:.1%} more)" in str(report)


def test_rotated_layers_choose_among_orthogonal_columns(calibrated: Calibrated) -> None:
    """The energy that is dropped is then the error of the layers of one input, exactly."""
    model, calibration = calibrated("llama")
    attention = copy.deepcopy(model.model.layers[0].self_attn)
    weight = torch.cat([getattr(attention, f"{name}_proj").weight for name in "qkv"])
    scrimp.sparsify(model, calibration, 0.5, "wina-rotated", "uniform")
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(1, 1, 48)
    parts = [getattr(model.model.layers[0].self_attn, f"{name}_proj")(x) for name in "qkv"]
    missed = (torch.cat(parts, -1) - functional.linear(x, weight)).square().sum()
    dropped = layer.selection(x)[3][0, 0, 0]
    assert float(dropped) > 0
    torch.testing.assert_close(missed, dropped, rtol=1e-3, atol=0)
    shared = {model.get_submodule(f"model.layers.0.self_attn.{name}_proj").selection for name in "qkv"}
    assert len(shared) == 1
    assert model.model.layers[0].self_attn.o_proj.selection.axes is None


def test_rotations_follow_the_model_to_another_type(calibrated: Calibrated) -> None:
    model, calibration = calibrated("llama")
    scrimp.sparsify(model, calibration, 0.3, "wina-rotated")
    model.to(torch.bfloat16)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.selection is attention.v_proj.selection
    assert attention.q_proj.selection.axes.dtype == torch.bfloat16
    assert attention.q_proj.selection.scale.dtype == torch.float32
    assert len(tokens(model)[0]) == 12


@pytest.mark.parametrize("family", ["llama-biases-tied", "llama-gelu-ungrouped", "qwen2"])
def test_cats_in_the_loop_and_in_stock_generate(family: str, calibrated: Calibrated) -> None:
    model, calibration = calibrated(family)
    dense = tokens(model)
    scrimp.sparsify(model, calibration, 0.2, "cats")
    with metered(model) as usage:
        found = tokens(model)
    assert found == stock(model)
    assert found != dense
    sizes = [(group.outputs * len(group.norms), group.names) for layer in calibration.layers for group in layer]
    total = sum(size for size, _ in sizes)
    down = sum(size for size, names in sizes if names[0].endswith("down_proj"))
    assert {layer.name.rpartition(".")[2] for layer in usage.layers()} == {"down_proj"}
    assert 2 * usage.dropped * down / total == pytest.approx(0.2, abs=0.06)
    kinds = [type(module) for module in model.modules()]
    assert (kinds.count(CatsGate), kinds.count(SparseLinear)) == (2, 2)


def test_cats_drops_channels_with_small_gates(calibrated: Calibrated) -> None:
    model, calibration = calibrated("llama")
    mlp = model.model.layers[1].mlp
    dense = copy.deepcopy(mlp)
    scrimp.sparsify(model, calibration, 0.25, "cats", "knapsack")
    x = torch.randn(3, 1, 48)
    with torch.no_grad():
        gate = functional.silu(dense.gate_proj(x))
        score = gate.abs() / gate.abs().mean(-1, keepdim=True)
        hidden = gate.masked_fill(score <= mlp.gate_proj.level, 0) * dense.up_proj(x)
        torch.testing.assert_close(mlp(x), dense.down_proj(hidden))
        assert not torch.allclose(mlp(x), dense(x), rtol=1e-3)
        torch.testing.assert_close(mlp(x.view(1, 3, 48)), dense(x.view(1, 3, 48)))  # a prompt
        x[0, 0, 5] = torch.nan
        assert mlp(x)[0].isnan().all()
    state = model.state_dict()
    assert torch.equal(state["model.layers.1.mlp.gate_proj.weight"], dense.gate_proj.weight)


@pytest.mark.parametrize("method", ["cats", "teal-rotated", "wina-rotated"])
def test_a_sequence_does_not_depend_on_its_company(method: str, calibrated: Calibrated) -> None:
    model, calibration = calibrated("qwen2")
    scrimp.sparsify(model, calibration, 0.2, method)
    together, alone = scrimp.KVCache(model, 2, 32), [scrimp.KVCache(model, 1, 32) for _ in PROMPTS]
    scrimp.generate(model, PROMPTS, max_new_tokens=12, cache=together)
    for b, cache in enumerate(alone):
        scrimp.generate(model, PROMPTS[b : b + 1], max_new_tokens=12, cache=cache)
        held = len(cache.tokens[0])
        assert together.tokens[b] == cache.tokens[0]
        assert torch.equal(together.memory[:, :, b, :, :held], cache.memory[:, :, 0, :, :held])


def test_an_activation_that_is_not_zero_at_zero_is_refused(calibrated: Calibrated) -> None:
    model, calibration = calibrated("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Sigmoid()
    with pytest.raises(ValueError, match="sparsify: method='cats' knows the activations SiLU and GELU, not Sigmoid"):
        scrimp.sparsify(model, calibration, 0.2, "cats")
