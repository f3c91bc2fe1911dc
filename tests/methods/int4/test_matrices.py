"""Each way to choose the codes of a matrix, against its definition and against the simpler ways."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from scrimp import Int4Weight
from scrimp.methods.int4 import Grid, gptq, half_quadratic, largest_group_size, round_to_nearest
from scrimp.methods.int4.gptq import column_order, inverse_factor


def loss(weight: Tensor, rough: Int4Weight, gram: Tensor | None = None) -> float:
    """Relative error of the outputs, or of the weights without a Gram matrix."""
    gram = torch.eye(weight.shape[1]) if gram is None else gram
    lost = rough.dequantize() - weight
    return math.sqrt(float(((lost @ gram) * lost).sum() / ((weight @ gram) * weight).sum()))


def problem(N: int = 48, K: int = 256, tokens: int = 600) -> tuple[Tensor, Tensor]:
    """A heavy-tailed weight and the Gram matrix of correlated inputs with a few loud ones."""
    weight = torch.randn(N, K) * (1 + torch.rand(N, K) ** 8 * 6)
    x = torch.randn(tokens, K // 4) @ torch.randn(K // 4, K) / (K // 4) ** 0.5 + 0.3 * torch.randn(tokens, K)
    x[:, :: K // 8] *= 12
    return weight, x.T @ x


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_weights_on_a_grid_come_back(symmetric: bool) -> None:
    codes = torch.randint(0, 16, (6, 4, 32)).float()
    codes[..., 0], codes[..., 1] = 0, 15
    zero = torch.full((6, 4, 1), 8.0) if symmetric else torch.randint(0, 16, (6, 4, 1)).float()
    scale = 2.0 ** torch.randint(-6, 3, (6, 4, 1)).float()
    weight = ((codes - zero) * scale).view(6, 128)
    for steps in (1, 40):
        rough = round_to_nearest(weight, 32, Grid(symmetric, steps=steps))
        assert torch.equal(rough.dequantize(), weight)
        assert rough.zero_kind == ("none8" if symmetric else "uint8")


def test_min_max_by_hand() -> None:
    """Range -3 to 12: 15 steps of 1 and zero 3; symmetric: the largest magnitude, 12, becomes -8 steps of -1.5."""
    weight = torch.tensor([[-3.0, 12.0, 0.4, 5.6] + 12 * [0.0]])
    plain = round_to_nearest(weight, 16, Grid(steps=1))
    assert (plain.scales.item(), plain.zeros.item()) == (1, 3)
    assert plain.codes()[0, :4].tolist() == [0, 15, 3, 9]
    symmetric = round_to_nearest(weight, 16, Grid(True, steps=1))
    assert symmetric.scales.item() == -1.5
    assert symmetric.codes()[0, :4].tolist() == [10, 0, 8, 4]
    clipped = round_to_nearest(weight, 16, Grid(steps=1), limit=torch.tensor([[6.0]]))
    assert clipped.scales.item() == pytest.approx(9 / 15, rel=1e-3)
    assert clipped.codes()[0, :2].tolist() == [0, 15]


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_the_search_finds_the_best_range(symmetric: bool) -> None:
    weight, _ = problem()
    errors = [loss(weight, round_to_nearest(weight, 64, Grid(symmetric, steps=steps))) for steps in (1, 4, 40)]
    assert errors[0] > errors[1] > errors[2]
    grid = Grid(symmetric, steps=20, norm=2.4, smallest=0.2)
    scale, zero = grid.fit(weight.view(48, 4, 64))
    for n, g in ((0, 0), (17, 3)):
        row = weight.view(48, 4, 64)[n, g]
        found = []
        for step in range(20):
            part = 1 - step * 0.8 / 20
            low, high = part * min(float(row.min()), 0), part * max(float(row.max()), 0)
            s = -(low if -low >= high else high) / 8 if symmetric else (high - low) / 15
            s = float(torch.tensor(s).half())
            z = 8 if symmetric else min(15, max(0, round(-low / s)))
            rough = ((row / s + z).round().clamp(0, 15) - z) * s
            found.append((float((rough - row).abs().pow(2.4).sum()), s, z))
        assert (scale[n, g].item(), zero[n, g].item()) == pytest.approx(min(found)[1:], rel=1e-6)


def test_flat_and_tiny_groups() -> None:
    weight = torch.zeros(5, 64)
    weight[1], weight[2], weight[3], weight[4, 0] = 0.5, -0.25, 1e-9, 1e-30
    for rough in (
        round_to_nearest(weight, 32),
        round_to_nearest(weight, 32, Grid(True)),
        half_quadratic(weight, 32),
        gptq(weight, torch.eye(64), 32),
    ):
        torch.testing.assert_close(rough.dequantize()[:3], weight[:3], rtol=1e-3, atol=1e-6)
        assert float(rough.dequantize()[3:].abs().max()) < 1e-4


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_sizes_and_types(group_size: int, dtype: torch.dtype) -> None:
    weight, gram = problem(N=7, K=384)
    for rough in (
        round_to_nearest(weight.bfloat16(), group_size, Grid(dtype=dtype, steps=3)),
        half_quadratic(weight, group_size, dtype=dtype, steps=3),
        gptq(weight, gram, group_size, Grid(dtype=dtype, steps=3)),
    ):
        assert rough.scales.dtype == dtype
        assert rough.group_size == (384 if group_size == -1 else group_size)
        assert loss(weight, rough, gram) < 0.35


def test_gptq_is_its_definition() -> None:
    """One column at a time on the whole inverse, no blocks: the same codes."""
    weight, gram = problem(N=9, K=384, tokens=900)
    grid = Grid(steps=1, dtype=torch.float32)
    for size, order in ((32, "columns"), (128, "activations"), (64, "groups"), (384, "columns")):
        way = column_order(gram.diagonal(), size, order)  # type: ignore[arg-type]
        factor = inverse_factor(gram[way][:, way], 0.01).double()
        work, expected = weight[:, way].double(), torch.zeros(9, 384)
        for k in range(384):
            if k % size == 0:
                s, z = grid.fit(work[:, k : k + size].float())
            q = torch.round(work[:, k].float() / s + z).clamp(0, 15)
            expected[:, k] = (q - z) * s
            lost = (work[:, k] - expected[:, k].double()) / factor[k, k]
            work[:, k:] -= lost[:, None] * factor[k, k:]
        got = gptq(weight, gram, size, grid, order=order).dequantize()[:, way]  # type: ignore[arg-type]
        differ = (got - expected).abs() > 1e-5
        assert float(differ.float().mean()) < 0.01, (size, order)  # near-ties of fp32 against fp64


def test_gptq_beats_rounding_on_its_inputs() -> None:
    weight, gram = problem()
    for size in (16, 64, -1):
        nearest = loss(weight, round_to_nearest(weight, size), gram)
        for order in ("columns", "groups", "activations"):
            assert loss(weight, gptq(weight, gram, size, order=order), gram) < 0.8 * nearest  # type: ignore[arg-type]


def test_gptq_orders() -> None:
    importance = torch.tensor([1.0, 5, 2, 3, 9, 4, 0, 7])
    assert column_order(importance, 4, "columns").tolist() == list(range(8))
    assert column_order(importance, 4, "activations").tolist() == [4, 7, 1, 5, 3, 2, 0, 6]
    assert column_order(importance, 4, "groups").tolist() == [4, 7, 5, 6, 1, 3, 2, 0]
    weight, gram = problem()
    assert gptq(weight, gram, order="groups").permutation is None
    assert gptq(weight, gram, order="activations").permutation is not None


def test_gptq_ignores_inputs_that_never_occur() -> None:
    weight, gram = problem(K=64)
    gram[:, 5], gram[5] = 0, 0
    rough = gptq(weight, gram, 32)
    assert rough.dequantize().isfinite().all()
    assert loss(weight, rough, gram) < 0.1


def test_gptq_damps_what_cannot_be_inverted() -> None:
    x = torch.randn(3, 128)
    weight = torch.randn(4, 128)
    assert loss(weight, gptq(weight, x.T @ x, 64), x.T @ x) < 0.05
    with pytest.raises(ValueError, match="X\\^T X of 4 inputs cannot be inverted"):
        inverse_factor(-torch.eye(4), 0.01)


def test_half_quadratic_forgives_outliers() -> None:
    """Its norm below 1 is smaller than that of min-max with the same scale."""
    weight, _ = problem()
    optimised, plain = half_quadratic(weight, 64), half_quadratic(weight, 64, steps=0)
    assert torch.equal(optimised.scales, plain.scales)
    errors = [(rough.dequantize() - weight).abs().view(48, 4, 64).mean(2) for rough in (optimised, plain)]
    assert (errors[0] <= errors[1]).all()
    assert float(errors[0].mean()) < 0.99 * float(errors[1].mean())


WEIGHT, EYE = torch.randn(4, 96), torch.eye(96)
BAD: dict[str, tuple[Any, str]] = {
    "group size": (lambda: round_to_nearest(WEIGHT, 20), "round_to_nearest: group_size=20 must be 16, 32, 64, 128 or"),
    "ragged": (lambda: gptq(WEIGHT, EYE, 64), "gptq: group_size=64 must be .* and divide K=96"),
    "odd": (lambda: half_quadratic(WEIGHT[:, :95], -1), "group_size=-1 must be .* K=95, which must be even"),
    "rank": (lambda: round_to_nearest(WEIGHT[0]), r"the weight must be floating \[N, K\], got torch.float32 \[96\]"),
    "integer": (lambda: round_to_nearest(WEIGHT.int()), "the weight must be floating"),
    "nan": (lambda: half_quadratic(WEIGHT / 0, 32), r"half_quadratic: weight\[0, 0\] is -?inf; it must be finite"),
    "large": (
        lambda: round_to_nearest(WEIGHT * 1e7, 32),
        "Grid: weights up to .* need a scale that torch.float16 cannot hold",
    ),
    "gram": (lambda: gptq(WEIGHT, EYE[:5], 32), r"gptq: gram has shape \[5, 96\], expected \[96, 96\]"),
    "order": (lambda: gptq(WEIGHT, EYE, 32, order="x"), "gptq: order='x' must be columns, groups or activations"),
    "damping": (lambda: gptq(WEIGHT, EYE, 32, damping=0), "gptq: damping=0 must be above 0"),
    "norm": (lambda: half_quadratic(WEIGHT, 32, norm=2), "norm=2, beta=10.0, kappa=1.01, steps=20 are out of range"),
    "grid": (lambda: Grid(steps=0), "Grid: steps=0, smallest=0.5, norm=2.0 must be"),
    "dtype": (lambda: Grid(dtype=torch.float64), "Grid: dtype=torch.float64 must be float16"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call()


def test_largest_group_size() -> None:
    assert [largest_group_size(K, 64) for K in (4096, 96, 48, 40)] == [64, 32, 16, -1]
