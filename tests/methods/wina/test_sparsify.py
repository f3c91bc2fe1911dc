"""sparsify: what becomes of a model, and how layers share a budget."""

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import scrimp
from scrimp import Calibration
from scrimp.methods.wina import ALLOCATIONS, METHODS, SPARSITIES, SparseLinear, metered
from scrimp.methods.wina.allocation import greedy, hull, knapsack, squared_errors, uniform

Calibrated = Callable[[str], tuple[Any, Calibration]]
CHOOSING = [method for method in METHODS if method != "cats"]  # those that every linear layer takes part in


def sizes(calibration: Calibration, layer: int) -> list[int]:
    return [group.outputs * len(group.norms) for group in calibration.layers[layer]]


@pytest.mark.parametrize("method", CHOOSING)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.62, 0.99])
def test_greedy_keeps_to_the_budget_and_errs_less(sparsity: float, method: str, calibrated: Calibrated) -> None:
    _, calibration = calibrated("llama")
    shares, even = greedy(calibration, method, sparsity), uniform(calibration, method, sparsity)
    assert even == [[sparsity] * 4] * 2
    for index, layer in enumerate(calibration.layers):
        weights = sizes(calibration, index)
        assert all(0 <= share <= 0.99 for share in shares[index])
        mean = sum(s * w for s, w in zip(shares[index], weights, strict=True)) / sum(weights)
        assert mean == pytest.approx(sparsity, abs=1e-6)

        def error(found: list[float], groups: Any = layer) -> float:
            return sum(group.sensitivity * group.error(method, s) ** 2 for group, s in zip(groups, found, strict=True))

        assert error(shares[index]) <= error(even[index]) * (1 + 1e-6)


@pytest.mark.parametrize("method", CHOOSING)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.62, 0.99])
def test_the_knapsack_is_the_best_of_all_layers(sparsity: float, method: str, calibrated: Calibrated) -> None:
    """No exchange of a little budget between two groups makes the sum of the hulls' errors smaller."""
    _, calibration = calibrated("llama")
    groups = [group for layer in calibration.layers for group in layer]
    weights = [group.outputs * len(group.norms) for group in groups]
    shares = [share for layer in knapsack(calibration, method, sparsity) for share in layer]
    mean = sum(s * w for s, w in zip(shares, weights, strict=True)) / sum(weights)
    assert mean == pytest.approx(sparsity, abs=1e-6)
    prices: dict[bool, list[float]] = {True: [], False: []}  # of the steps that were taken, and of the others
    for group, weight, share in zip(groups, weights, shares, strict=True):
        assert 0 <= share <= 0.99 + 1e-9
        curve = squared_errors(group, method)
        corners = hull(curve)
        assert corners[0] == 0
        assert corners[-1] == len(SPARSITIES) - 1
        for a, b in pairwise(corners):
            price = (curve[b] - curve[a]) / (SPARSITIES[b] - SPARSITIES[a]) / weight
            if share >= SPARSITIES[b] - 1e-9:
                prices[True].append(price)
            elif share <= SPARSITIES[a] + 1e-9:
                prices[False].append(price)
            inside = [
                curve[a] + (curve[b] - curve[a]) * (SPARSITIES[i] - SPARSITIES[a]) / (SPARSITIES[b] - SPARSITIES[a])
                for i in range(a, b + 1)
            ]
            assert all(low <= high + 1e-9 for low, high in zip(inside, curve[a : b + 1], strict=True))
    assert max(prices[True], default=0.0) <= min(prices[False], default=1.0) * (1 + 1e-9)


@pytest.mark.parametrize("method", CHOOSING)
def test_tokens_drop_what_was_asked_for(method: str, calibrated: Calibrated, text: Tensor) -> None:
    """Over the calibration text, read token by token."""
    model, calibration = calibrated("llama")
    report = scrimp.sparsify(model, calibration, 0.4, method, "uniform")
    assert [layer.sparsity for layer in report.layers] == [0.4] * 8
    assert "40.0%" in str(report)
    with metered(model) as usage, torch.no_grad():
        layer = model.model.layers[0].self_attn.q_proj
        norm = model.model.layers[0].input_layernorm
        for token in text[:, 1:].flatten():
            layer(norm(model.model.embed_tokens(token.view(1, 1))))
    (found,) = [each for each in usage.layers() if each.name == "model.layers.0.self_attn.q_proj"]
    assert found.sparsity == pytest.approx(0.4, abs=0.01)
    assert found.read == pytest.approx(1 - found.sparsity, abs=1e-6)
    assert found.bytes_saved == pytest.approx(0.4 * 177 * 48 * 48 * 4, rel=0.02)
    assert found.error == pytest.approx(calibration.layers[0][0].error(method, 0.4), rel=0.5)
    assert "model.layers.0.self_attn.q_proj" in str(usage)
    assert layer.meter is None


def test_nothing_is_copied_or_renamed(calibrated: Calibrated) -> None:
    model, calibration = calibrated("qwen2")
    dense = copy.deepcopy(model)
    scrimp.sparsify(model, calibration, 0.5, "wina-centred")
    assert {name: tuple(t.shape) for name, t in dense.state_dict().items()} == {
        name: tuple(t.shape) for name, t in model.state_dict().items()
    }
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in dense.state_dict().items())
    kinds = [type(m) for m in model.modules() if isinstance(m, torch.nn.Linear | SparseLinear)]
    assert (kinds.count(SparseLinear), kinds.count(torch.nn.Linear)) == (14, 1)
    attention = model.model.layers[0].self_attn
    storages = {layer.weight.untyped_storage().data_ptr() for layer in (attention.q_proj, attention.v_proj)}
    assert len(storages) == 1
    assert attention.q_proj.weight.untyped_storage().nbytes() == 4 * 48 * (48 + 16 + 16)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_saved_model_is_the_dense_one(calibrated: Calibrated, tmp_path: Path) -> None:
    model, calibration = calibrated("llama")
    dense = copy.deepcopy(model)
    scrimp.sparsify(model, calibration, 0.9)
    model.save_pretrained(tmp_path)
    found = type(dense).from_pretrained(tmp_path)
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in dense.state_dict().items())
    calibration.check(found)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_no_sparsity_changes_nothing_but_rounding(allocation: str, calibrated: Calibrated) -> None:
    model, calibration = calibrated("llama")
    dense = copy.deepcopy(model)
    scrimp.sparsify(model, calibration, 0.0, "wina", allocation)
    prompt = list(range(1, 20))
    assert scrimp.generate(model, prompt, max_new_tokens=8) == scrimp.generate(dense, prompt, max_new_tokens=8)


def test_bad_wishes(calibrated: Calibrated) -> None:
    model, calibration = calibrated("llama")
    for wish, words in (
        ({"sparsity": 1.0}, "sparsity=1.0 must be from 0 to 0.99"),
        ({"sparsity": -0.1}, "sparsity=-0.1 must be from 0 to 0.99"),
        ({"sparsity": float("nan")}, "sparsity=nan must be from 0"),
        ({"method": "dogs"}, "method='dogs' must be one of teal, wina, wina-centred"),
        ({"allocation": "fair"}, "allocation='fair' must be one of uniform, greedy, knapsack"),
        ({"max_error": 0.0}, "max_error=0.0 must be above 0"),
        ({"max_error": float("nan")}, "max_error=nan must be above 0"),
        ({"method": "cats", "max_error": 0.5, "sparsity": 0.2}, "method='cats' estimates no errors"),
        ({"method": "cats"}, r"method='cats' skips at most 39.\d% of this model's weights, not sparsity=0.5"),
    ):
        with pytest.raises(ValueError, match=f"sparsify: {words}"):
            scrimp.sparsify(model, calibration, **wish)  # type: ignore[arg-type]
    scrimp.sparsify(model, calibration)
    with pytest.raises(ValueError, match=r"sparsify: model.layers.0.self_attn.q_proj is a SparseLinear, not"):
        scrimp.sparsify(model, calibration)
