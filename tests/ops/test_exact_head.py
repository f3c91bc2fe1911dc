"""exact_head against the dense head, its contract and its reference."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import scrimp
from scrimp import HeadScreen
from scrimp._ext import use_isa
from scrimp._registry import OPS
from scrimp.testing import assert_rows_independent, same_bits

OP = OPS["exact_head"]
IMPLEMENTATIONS = scrimp.implementations("exact_head")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# rows of the head, inputs, whether the screen has a basis
SHAPES = [(5, 3, False), (900, 64, False), (2111, 100, True), (1500, 192, True), (700, 1, False), (3000, 130, False)]


def head(V: int, K: int, basis: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, HeadScreen]:
    """A random head, and its screen; with a basis for states of which few directions hold most of the energy."""
    weight = torch.randn(V, K).to(dtype)
    return weight, HeadScreen.build(weight, states(300, K, basis) if basis else None, wide=1 if basis else None)


def states(rows: int, K: int, uneven: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random hidden states."""
    return (torch.randn(rows, K) * (torch.logspace(0, -2, K) if uneven else 1)).to(dtype)


def flat(x: Tensor, weight: Tensor, screen: HeadScreen, k: int) -> tuple[Any, ...]:
    """The arguments of the op."""
    return x, weight, *screen.tensors().values(), screen.slack, screen.wide, k


def dense(name: str, x: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top-k of the dense head, hidden states one by one, with the kernels of the same instruction set."""
    with use_isa(name.removeprefix("cpu-")):
        logits = torch.stack([scrimp.ops.linear(row, weight) for row in x.reshape(-1, x.shape[-1])])
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return values[:, :k].reshape(*x.shape[:-1], k), ids[:, :k].reshape(*x.shape[:-1], k)


def assert_dense(name: str, x: Tensor, weight: Tensor, screen: HeadScreen, k: int) -> Tensor:
    """Asserts that the op gives the dense head's values and ids, to the bit; returns how many rows were computed."""
    values, ids, scored = IMPLEMENTATIONS[name](*flat(x, weight, screen, k))
    expected = dense(name, x, weight, k)
    assert torch.equal(ids, expected[1])
    assert same_bits(values, expected[0])
    assert scored.shape == x.shape[:-1]
    return scored


def test_implementations_exist() -> None:
    assert IMPLEMENTATIONS, scrimp.which("exact_head")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_dense_head(name: str, dtype: str, shape: tuple[int, int, bool]) -> None:
    V, K, basis = shape
    weight, screen = head(V, K, basis, DTYPES[dtype])
    for x in (states(13, K, basis, DTYPES[dtype]), states(2, K, basis, DTYPES[dtype])[0]):
        for k in (1, 3, 64):
            assert_dense(name, x, weight, screen, min(k, V))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_few_rows_are_computed(name: str) -> None:
    weight, screen = head(4000, 128, False)
    assert assert_dense(name, states(20, 128), weight, screen, 1).max() < 40
    weight, screen = head(4000, 256, True)
    assert assert_dense(name, states(20, 256, True), weight, screen, 1).float().mean() < 400


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_more_than_64_hidden_states(name: str) -> None:
    weight, screen = head(600, 70, True)
    assert_dense(name, states(140, 70, True).view(2, 70, 70), weight, screen, 2)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits_come_by_id(name: str, dtype: str) -> None:
    """Rows that occur many times, far apart; in bf16 different rows have equal logits too."""
    weight = torch.randn(40, 64).repeat(30, 1).to(DTYPES[dtype])
    assert_dense(name, states(9, 64, dtype=DTYPES[dtype]), weight, HeadScreen.build(weight), 7)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e15, 1e18])
def test_any_magnitude(name: str, size: float) -> None:
    weight = torch.randn(700, 90) * torch.logspace(-3, 3, 700)[:, None]
    weight[5], weight[6] = 0, 1e-30
    assert_dense(name, states(5, 90) * size, weight, HeadScreen.build(weight, states(200, 90)), 4)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_screen_cannot_bound_is_computed_densely(name: str, dtype: str) -> None:
    """NaN, infinities and an overflow fall back; so does a head of equal rows. The other states do not notice."""
    weight, screen = head(1100, 64, False, DTYPES[dtype])
    x = states(6, 64, dtype=DTYPES[dtype])
    x[1, 7], x[2, 0], x[3], x[4] = torch.nan, torch.inf, 3e38, -torch.inf
    scored = assert_dense(name, x, weight, screen, 5)
    assert scored[1:5].tolist() == [1100] * 4
    assert scored[[0, 5]].max() < 200
    same = torch.ones(1000, 64, dtype=DTYPES[dtype])
    assert assert_dense(name, x[:1], same, HeadScreen.build(same), 3).tolist() == [1000]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_interval_is_needed(name: str) -> None:
    """Without its bound the screen would choose wrong rows: these tests can fail."""
    weight = torch.randn(1, 64) + 1e-3 * torch.randn(2000, 64)
    x, screen = states(30, 64), HeadScreen.build(weight)
    assert_dense(name, x, weight, screen, 1)
    none = torch.zeros_like(screen.error)
    blind = replace(screen, error=none, norm=none, slack=0.0)
    ids = IMPLEMENTATIONS[name](*flat(x, weight, blind, 1))[1]
    assert not torch.equal(ids, dense(name, x, weight, 1)[1])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_independent(name: str, dtype: str) -> None:
    weight, screen = head(800, 70, True, DTYPES[dtype])

    def results(x: Tensor) -> Tensor:
        values, ids, scored = IMPLEMENTATIONS[name](*flat(x, weight, screen, 2))
        return torch.cat([values.float(), ids.float(), scored[..., None].float()], -1)

    assert_rows_independent(results, states(64, 70, True, DTYPES[dtype]))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_strided(name: str) -> None:
    wide, x = torch.randn(1000, 90), torch.randn(4, 3, 64).transpose(0, 1)
    weight = wide[:, 5:69]
    screen = HeadScreen.build(weight)
    assert_dense(name, x, weight, screen, 2)
    assert_dense(name, torch.randn(64, 7).T, weight, screen, 2)
    assert_dense(name, x, wide[::2, 5:69], HeadScreen.build(wide[::2, 5:69]), 2)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("M", "V", "K"), [(0, 9, 5), (3, 1, 5), (3, 9, 0), (2, 700, 0)])
def test_small_and_zero_sizes(name: str, M: int, V: int, K: int) -> None:
    weight, screen = head(V, K, False)
    values, ids, scored = IMPLEMENTATIONS[name](*flat(states(M, K), weight, screen, 1))
    assert (values.shape, ids.shape, scored.shape) == ((M, 1), (M, 1), (M,))
    assert M == 0 or K or not ids.any()


def test_reference_by_hand() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    values, ids, scored = OP.reference(*flat(torch.tensor([[3.0, 1.0]]), weight, HeadScreen.build(weight), 3))
    assert (values.tolist(), ids.tolist(), scored.tolist()) == ([[3.0, 3.0, 2.0]], [[0, 2, 1]], [3])


def test_opcheck() -> None:
    for shape in SHAPES[:3]:
        weight, screen = head(*shape)
        opcheck(OP.call, flat(states(3, shape[1]), weight, screen, 2))


def test_compiles_and_exports_as_one_node() -> None:
    weight, screen = head(600, 64, False)
    x = states(5, 64)
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return scrimp.ops.exact_head(x, weight, screen, 3)

    expected = scrimp.ops.exact_head(x, weight, screen, 3)
    compiled = torch.compile(Layer(), backend=record, fullgraph=True)(x)
    exported = torch.export.export(Layer(), (x,)).module()
    for got in (compiled, exported(x)):
        assert all(map(torch.equal, got, expected))
    for graph in (*graphs, exported):
        assert [str(node.target) for node in graph.graph.nodes].count("scrimp.exact_head.default") == 1


W = torch.randn(20, 70)
S = HeadScreen.build(W, torch.randn(80, 70), wide=2)
X = torch.zeros(2, 70)
BAD = {
    "scalar x": ((X[0, 0], W, S, 1), r"x must be \[.., K\], got a scalar"),
    "integer x": ((X.int(), W, S, 1), "x is int32; it must be float32"),
    "inputs": ((X[:, 1:], W, S, 1), r"weight has shape \[20, 70\], expected \[V, 69\]"),
    "rank of weight": ((X, W[0], S, 1), r"weight has shape \[70\], but the screen is of 20 rows"),
    "rows of the head": ((X, W[1:], S, 1), r"weight has shape \[19, 70\], but the screen is of 20 rows"),
    "transposed weight": ((X, torch.zeros(70, 20).T, S, 1), r"weight has strides \(1, 20\)"),
    "dtype of weight": ((X, W.bfloat16(), S, 1), "dtype of weight is torch.bfloat16"),
    "device of weight": ((X, W.to("meta"), S, 1), "device of weight is meta, but that of x is cpu"),
    "k of 0": ((X, W, S, 0), "k=0 must be from 1 to 64 and at most the 20 rows"),
    "k above V": ((X, W, S, 21), "k=21 must be from 1 to 64 and at most the 20 rows"),
    "wide": ((X, W, replace(S, wide=3), 1), "wide=3 must be from 0 to 2, the groups of 70 inputs"),
    "slack": ((X, W, replace(S, slack=float("nan")), 1), "slack=nan must be finite"),
    "codes": ((X, W, replace(S, codes=S.codes[:, 1:]), 1), r"codes has shape \[2, 2047\], expected \[2, 2048\]"),
    "dtype of codes": ((X, W, replace(S, codes=S.codes.char()), 1), "codes is int8; it must be uint8"),
    "scales": ((X, W, replace(S, scales=S.scales[1:]), 1), r"scales has shape \[31\], expected \[32\]"),
    "basis": ((X, W, replace(S, basis=S.basis[1:]), 1), r"basis has shape \[127, 70\], expected \[128, 70\]"),
    "error": ((X, W, replace(S, error=S.error[:1]), 1), r"error has shape \[1\], expected \[2\]"),
    "gaps in norm": ((X, W, replace(S, norm=torch.zeros(4)[::2]), 1), r"norm has strides \(2,\)"),
    "device of scales": ((X, W, replace(S, scales=S.scales.to("meta")), 1), "device of scales is meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    args, words = BAD[case]
    with pytest.raises(ValueError, match=f"exact_head: .*{words}"):
        scrimp.ops.exact_head(*args)
    if case != "rows of the head":  # the flat op sees the same number of tiles
        with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
            OP.call(*flat(*args))


def test_gradients_are_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match="scrimp::exact_head has no backward"):
        scrimp.ops.exact_head(X.clone().requires_grad_(), W, S)
