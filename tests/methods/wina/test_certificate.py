"""Certified bounds hold for the worst inputs; tokens above a limit are read densely."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import scrimp
from scrimp import Calibration
from scrimp.methods.wina import METHODS, Selection, SparseLinear, metered
from scrimp.methods.wina.certificate import bounds, certificate
from scrimp.methods.wina.rotation import axes

Calibrated = Callable[[str], tuple[Any, Calibration]]
PROMPT = torch.randint(1, 256, (11,), generator=torch.Generator().manual_seed(3)).tolist()
SHAPES = [(8, 24), (24, 8), (16, 16), (1, 5), (5, 1)]


def correlated(n: int, k: int) -> Tensor:
    """Columns of very different lengths that point nearly the same way: the estimate is far too low for them."""
    return (torch.randn(n, 1) + 0.1 * torch.randn(n, k)) * torch.logspace(-3, 2, k)


def worst(weight: Tensor, scale: Tensor) -> Tensor:
    """The changes of unit energy that change the outputs most."""
    columns = weight.double() / scale.double()
    return torch.linalg.svd(columns).Vh[0] / scale.double()


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_no_change_exceeds_it_and_one_reaches_it(scaled: bool, n: int, k: int) -> None:
    weight = correlated(n, k)
    scale = weight.norm(dim=0) if scaled else torch.ones(k)
    kappa = certificate(weight, scale if scaled else None)
    d = worst(weight, scale)
    ratio = float((weight.double() @ d).square().sum() / (d * scale.double()).square().sum())
    assert ratio <= kappa <= ratio * (1 + 1e-9)
    for d in torch.randn(200, k).double():
        assert (weight.double() @ d).square().sum() <= kappa * (d * scale).square().sum()


def test_a_power_iteration_is_below_it() -> None:
    weight = torch.randn(300, 200) @ torch.diag(torch.linspace(1, 1.01, 200))
    v = torch.randn(200).double()
    for _ in range(50):
        v = weight.double().T @ (weight.double() @ v)
        v /= v.norm()
    assert float((weight.double() @ v).square().sum()) < certificate(weight)


def test_special_weights() -> None:
    assert certificate(torch.zeros(3, 4)) == 0
    assert certificate(torch.zeros(3, 0)) == 0
    assert certificate(torch.tensor([[1.0, 0.0]]), torch.tensor([1.0, 0.0])) == pytest.approx(1)
    assert certificate(torch.tensor([[1.0, 2.0]]), torch.tensor([1.0, 0.0])) == float("inf")
    assert certificate(torch.tensor([[1.0, torch.nan]])) == float("inf")


def test_orthogonal_columns_have_constant_one() -> None:
    weight = correlated(40, 24)
    turned = weight.double() @ axes(weight).double().T
    assert certificate(weight, weight.norm(dim=0)) > 10
    assert certificate(turned, turned.norm(dim=0)) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("way", ["plain", "scaled", "centred", "rotated"])
def test_layers_keep_their_bounds_for_the_worst_inputs(way: str) -> None:
    """Inputs whose dropped part is the worst direction, at sizes from tiny to huge, beside random ones."""
    weight = torch.randn(24, 16) if way == "rotated" else correlated(24, 16)
    basis = axes(weight) if way == "rotated" else torch.eye(16)
    own = weight @ basis.T
    scale = torch.ones(16) if way == "plain" else own.norm(dim=0)
    center = torch.randn(16) if way == "centred" else None
    selection = Selection(
        torch.tensor([0.9]), None if way == "plain" else scale, center, axes=basis if way == "rotated" else None
    )
    layer = SparseLinear(own.T.contiguous(), None, selection)
    kappa = layer.certificate()
    d = worst(own, scale).float()
    least = int((d * scale).abs().argmin())
    rows = torch.randn(64, 16)
    for i, size in enumerate((1e-25, 1e-12, 1e-3, 1.0, 1e3, 1e8)):
        rows[i] = size * d
        rows[i, least] = 40 * size * float((d * scale).abs().max()) / float(scale[least])  # the one that is kept
    shift = torch.zeros(16) if center is None else center
    x = (rows @ basis if way == "rotated" else rows + shift)[:, None]
    kept, _, _, energy = selection(x)
    exact = (x.double() @ basis.double().T - shift.double())[:, 0]
    missed = torch.where(kept[:, 0] != 0, 0.0, exact)
    error = (missed @ own.double().T).norm(dim=-1)
    bound = bounds(kappa, energy[:, 0, 0], 16)
    slack = 1e-5 if way in ("centred", "rotated") else 0.0  # of the rounding of x - center and of the rotation
    assert (error <= bound + slack * exact.norm(dim=-1) * own.double().norm()).all()
    assert float((error / bound)[2:6].max()) > 0.5  # and it is not far away


def test_telemetry_bounds_what_decoding_really_did(calibrated: Calibrated) -> None:
    model, calibration = calibrated("llama")
    scrimp.sparsify(model, calibration, 0.4, "wina")
    layer = model.model.layers[1].mlp.up_proj
    seen: list[tuple[Tensor, Tensor]] = []
    x = torch.randn(20, 1, layer.in_features)
    with metered(model, certified=True) as usage:
        for row in x:
            seen.append((layer(row[None])[0, 0], torch.nn.functional.linear(row[0], layer.weight)))
    (found,) = [each for each in usage.layers() if each.name == "model.layers.1.mlp.up_proj"]
    sparse, dense = (torch.stack(each).double() for each in zip(*seen, strict=True))
    relative = float((sparse - dense).norm() / dense.norm())
    assert 0.01 < relative <= found.bound < 20 * relative
    assert float((sparse - dense).norm(dim=-1).max()) <= found.worst
    assert found.error == pytest.approx(relative, rel=0.5)
    others = [each for each in usage.layers() if each.name != found.name]
    assert all(each.bound != each.bound for each in others)  # NaN: not a token
    with metered(model) as usage:
        scrimp.generate(model, PROMPT, max_new_tokens=3)
    assert all(each.bound != each.bound for each in usage.layers())
    with metered(model, certified=True) as usage:
        scrimp.generate(model, PROMPT, max_new_tokens=6)
    assert all(0 < each.worst < float("inf") for each in usage.layers())
    assert "at most" in str(usage)


def test_rows_above_the_limit_take_all_channels() -> None:
    weight, scale = torch.randn(32, 24), torch.rand(32) + 0.5
    limited = SparseLinear(weight, None, Selection(torch.tensor([0.8]), scale, limit=0.3))
    free = SparseLinear(weight, None, Selection(torch.tensor([0.8]), scale))
    hard, easy = torch.ones(32) / scale, torch.zeros(32)
    hard[:16] *= 0.6  # below the level, and much in all
    easy[3], easy[4:] = 100.0, 0.1
    x = torch.stack([hard, easy, torch.zeros(32), torch.full((32,), torch.nan)])[:, None]
    whole = torch.nn.functional.linear(x, limited.weight)
    out, plain = limited(x), free(x)
    torch.testing.assert_close(out[0], whole[0])
    assert not torch.allclose(plain[0], whole[0], rtol=1e-2)
    assert torch.equal(out[1], plain[1])
    assert not torch.equal(out[1], whole[1])
    assert (out[2] == 0).all()
    assert out[3].isnan().all()


@pytest.mark.parametrize("method", [method for method in METHODS if method != "cats"])
def test_a_limit_in_decoding(method: str, calibrated: Calibrated) -> None:
    """A low limit is dense decoding, a high one none; both in the loop and, without a patch, in stock generate."""
    model, calibration = calibrated("llama")
    scrimp.sparsify(model, calibration, 0.0, method)
    dense = scrimp.generate(model, PROMPT, max_new_tokens=8)
    shares, limits = [], [1.0, 1e-6]
    for limit in limits:
        model, calibration = calibrated("llama")
        scrimp.sparsify(model, calibration, 0.4, method, "uniform", max_error=limit)
        with metered(model) as usage:
            found = scrimp.generate(model, PROMPT, max_new_tokens=8)
        layers = usage.layers()
        shares.append(sum(layer.whole for layer in layers) / len(layers))
        assert all(layer.error <= limit for layer in layers)
        if limit == 1.0:
            limits.append(sum(layer.error for layer in layers) / len(layers))
        if limit == 1e-6:
            assert found == dense
        stock = model.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert stock[0, len(PROMPT) :].tolist() == found.tokens
    assert 0 == shares[0] < shares[2] < shares[1] == 1
