"""SparseLinear alone: what a token, a prompt and the decoding loop get from it."""

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from scrimp.methods.generation.linear import SideBySide
from scrimp.methods.wina import Selection, SparseLinear
from scrimp.methods.wina.linear import EngineSparse
from scrimp.testing import same_bits

K, SIZES = 40, (24, 8, 8)


def selection(level: float = 0.7, centred: bool = False) -> Selection:
    scale, center = 0.5 + torch.rand(K), torch.randn(K)
    return Selection(torch.tensor([level]), scale, center if centred else None)


def layers(chosen: Selection, biases: tuple[bool, ...] = (True, False, True)) -> list[SparseLinear]:
    """Parts of one matrix."""
    parts = torch.randn(K, sum(SIZES)).split(SIZES, 1)
    return [
        SparseLinear(part, torch.randn(size) if bias else None, chosen)
        for part, size, bias in zip(parts, SIZES, biases, strict=True)
    ]


@pytest.mark.parametrize("centred", [False, True])
def test_a_token_skips_channels_and_a_prompt_none(centred: bool) -> None:
    (layer, *_), x = layers(chosen := selection(centred=centred)), torch.randn(2, 5, K)
    dense = functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), dense)
    center = 0 if chosen.center is None else chosen.center
    kept = ((x - center) * chosen.scale).abs() > chosen.level
    expected = functional.linear(x.where(kept, center + torch.zeros(K)), layer.weight, layer.bias)
    for t in range(5):
        torch.testing.assert_close(layer(x[:, t : t + 1]), expected[:, t : t + 1])
    torch.testing.assert_close(layer(x[0, 0]), expected[0, 0])
    assert not torch.allclose(expected, dense)


def test_not_a_number_comes_out_and_zeros_are_defined() -> None:
    for centred in (False, True):
        (layer, *_) = layers(selection(level=math.inf, centred=centred))
        x = torch.zeros(1, 1, K)
        none = layer(x)
        torch.testing.assert_close(none.flatten(), layer.offset)
        x[0, 0, 3] = torch.nan
        assert layer(x).isnan().all()


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("biases", [(True, False, True), (False, False, False)], ids=["biases", "none"])
def test_the_loop_gets_the_same_bits(biases: tuple[bool, ...], centred: bool) -> None:
    parts = layers(selection(centred=centred), biases)
    engine = SparseLinear.engine_linear(parts)
    assert isinstance(engine, EngineSparse)
    assert len(engine.weights) == 1
    assert engine.weights[0].data_ptr() == parts[0].weight.data_ptr()
    apart = SparseLinear.engine_linear(copy.deepcopy(parts))
    assert isinstance(apart, EngineSparse)
    assert [w.shape[1] for w in apart.weights] == list(SIZES)
    x, residual = torch.randn(3, 1, K), torch.randn(3, 1, sum(SIZES))
    expected = torch.cat([part(x) for part in parts], -1)
    for made in (engine, apart):
        assert made.sizes == SIZES
        assert same_bits(made(x), expected)
        torch.testing.assert_close(made(x, residual), expected + residual)
        whole = torch.cat([functional.linear(x, part.weight, part.bias) for part in parts], -1)
        torch.testing.assert_close(made.dense(x), whole)
        torch.testing.assert_close(made.dense(x, residual), whole + residual)


def test_rows_do_not_depend_on_the_others_up_to_64() -> None:
    engine = SparseLinear.engine_linear(layers(selection(centred=True)))
    x = torch.randn(1, 64, K)
    for linear in (engine, engine.dense):  # type: ignore[attr-defined]
        together = linear(x)
        assert all(same_bits(linear(x[:, t : t + 1]), together[:, t : t + 1]) for t in range(64))
        many = torch.cat([x, x], 1)
        torch.testing.assert_close(linear(many), torch.cat([together, together], 1))
        torch.testing.assert_close(linear(many, linear(many)), 2 * linear(many))


def test_layers_that_choose_apart_run_apart() -> None:
    parts = [*layers(selection())[:2], layers(selection(level=2.0))[2]]
    engine, x = SparseLinear.engine_linear(parts), torch.randn(1, 2, K)
    assert isinstance(engine, SideBySide)
    assert same_bits(engine(x[:, :1]), torch.cat([part(x[:, :1]) for part in parts], -1))
    whole = torch.cat([functional.linear(x, part.weight, part.bias) for part in parts], -1)
    torch.testing.assert_close(engine.dense(x), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_keep_the_scores_exact(dtype: torch.dtype) -> None:
    (layer, *_) = layers(selection(centred=True))
    made = copy.deepcopy(layer).to(dtype)
    assert made.weight.stride(0) == 1
    assert made.selection.level.dtype == torch.float32
    x = torch.randn(1, 1, K)
    rounding = 4 * torch.finfo(dtype).eps * float(layer.weight.norm())
    assert (made(x.to(dtype)).float() - layer(x.to(dtype).float())).abs().max() < rounding


def test_state_dict_is_that_of_a_dense_layer() -> None:
    (layer, *_) = layers(selection(centred=True))
    dense = torch.nn.Linear(K, SIZES[0])
    dense.load_state_dict(layer.state_dict())
    assert torch.equal(dense.weight, layer.weight)
    assert dense.weight.shape == (SIZES[0], K)
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_compiles_as_one_graph() -> None:
    (layer, *_), x = layers(selection()), torch.randn(1, 1, K)
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    assert torch.equal(torch.compile(layer, backend=record, fullgraph=True)(x), layer(x))
    assert len(graphs) == 1
