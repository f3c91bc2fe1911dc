"""silu_mul against its reference, torch's two operators and its contract."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import scrimp
from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle, assert_rows_independent

OP = OPS["silu_mul"]
IMPLEMENTATIONS = scrimp.implementations("silu_mul")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = [(1,), (3, 19), (2, 5, 111), (64, 1000)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)


def test_implementations_exist() -> None:
    assert IMPLEMENTATIONS, scrimp.which("silu_mul")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oracle(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    args = inputs(shape, DTYPES[dtype])
    assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_everywhere(name: str) -> None:
    """Every order of magnitude, and down to where exp underflows: relative error 4e-6 of the float64 value."""
    signed = torch.logspace(-30, 30, 4001) * torch.tensor([[1.0], [-1.0]])
    gate = torch.cat([signed.flatten(), torch.linspace(-87, 20, 4001)])
    up = torch.ones(len(gate))
    exact = OP.reference(gate.double(), up.double())
    error = (IMPLEMENTATIONS[name](gate, up).double() - exact).abs()
    assert (error <= 4e-6 * exact.abs() + 1e-36).all(), gate[(error - 4e-6 * exact.abs()).argmax()]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_infinities(name: str) -> None:
    gate = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    args = gate, torch.ones(4)
    assert IMPLEMENTATIONS[name](*args)[[0, 2, 3]].tolist()[::2] == [torch.inf, 0.0]
    assert IMPLEMENTATIONS[name](*args)[1:3].isnan().tolist() == [OP.reference(*args)[1].isnan().item(), True]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided(name: str, dtype: str) -> None:
    """Halves of one linear's output; batches in another order; every second column."""
    both = torch.randn(2, 7, 86).to(DTYPES[dtype])
    gate, up = both.chunk(2, -1)
    wide = torch.randn(2, 3, 4, 5, 86).to(DTYPES[dtype]).permute(3, 1, 0, 2, 4)
    for args in (
        (gate, up),
        (gate.transpose(0, 1), up.transpose(0, 1)),
        (wide[..., ::2], wide[..., :43]),
        (gate, up[:1].expand(2, -1, -1)),
    ):
        got = IMPLEMENTATIONS[name](*args)
        assert got.is_contiguous()
        assert_matches_oracle(got, OP.reference, *args)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 0, 4)], ids=str)
def test_zero_size(name: str, shape: tuple[int, ...]) -> None:
    assert IMPLEMENTATIONS[name](*inputs(shape)).shape == shape


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bf16_is_rounded_where_two_operators_round(name: str) -> None:
    gate, up = inputs((50, 1536), torch.bfloat16)
    expected = torch.nn.functional.silu(gate.double()).bfloat16() * up
    assert (IMPLEMENTATIONS[name](gate, up) == expected).float().mean() > 0.999


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [601])
def test_a_row_does_not_depend_on_the_others(name: str, dtype: str, columns: int) -> None:
    gate, up = inputs((64, columns), DTYPES[dtype])
    assert_rows_independent(IMPLEMENTATIONS[name], gate, up)


def test_opcheck() -> None:
    for shape in SHAPES[1:3]:
        opcheck(OP.call, inputs(shape))


def test_compiles_and_exports_as_one_node() -> None:
    args, graphs = inputs((5, 8)), []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    class Layer(torch.nn.Module):
        def forward(self, gate: Tensor, up: Tensor) -> Tensor:
            return scrimp.ops.silu_mul(gate, up)

    expected = scrimp.ops.silu_mul(*args)
    assert torch.equal(torch.compile(scrimp.ops.silu_mul, backend=record, fullgraph=True)(*args), expected)
    exported = torch.export.export(Layer(), args).module()
    assert torch.equal(exported(*args), expected)
    for graph in (*graphs, exported):
        assert [str(node.target) for node in graph.graph.nodes].count("scrimp.silu_mul.default") == 1


X = torch.zeros(2, 3, 8)
BAD = {
    "scalar": ((X[0, 0, 0], X[0, 0, 0]), "gate must be .*, got a scalar"),
    "shape": ((X, X[:, :2]), r"shape of up is \(2, 2, 8\), but that of gate is \(2, 3, 8\)"),
    "rank": ((X, X[0]), r"shape of up is \(3, 8\)"),
    "integers": ((X.int(), X.int()), "gate is int32; it must be float32"),
    "dtype": ((X, X.bfloat16()), "dtype of up is torch.bfloat16, but that of gate is torch.float32"),
    "device": ((X, X.to("meta")), "device of up is meta, but that of gate is cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    args, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        scrimp.ops.silu_mul(*args)
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        OP.call(*args)


def test_gradients_are_refused_by_name() -> None:
    gate, up = inputs((2, 4))
    with pytest.raises(RuntimeError, match="scrimp::silu_mul has no backward"):
        scrimp.ops.silu_mul(gate, up.requires_grad_())
