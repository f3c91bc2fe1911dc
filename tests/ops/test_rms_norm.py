"""rms_norm against its reference, Hugging Face's module and its contract."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import scrimp
from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle, assert_rows_independent

OP = OPS["rms_norm"]
IMPLEMENTATIONS = scrimp.implementations("rms_norm")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = [(1,), (3, 19), (2, 5, 576), (1, 4, 3, 111), (64, 1000)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, float]:
    return torch.randn(shape).to(dtype), torch.randn(shape[-1:]).to(dtype), 1e-5


def test_implementations_exist() -> None:
    assert IMPLEMENTATIONS, scrimp.which("rms_norm")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oracle(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    args = inputs(shape, DTYPES[dtype])
    assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e18])
def test_scale(name: str, scale: float) -> None:
    x, weight, eps = inputs((3, 40))
    args = scale * x, weight, eps
    assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided(name: str, dtype: str) -> None:
    """Heads of a slice of one linear's output; batches in another order; every second column; an expanded row."""
    weight, x = torch.randn(40).to(DTYPES[dtype]), torch.randn(2, 7, 5 * 40).to(DTYPES[dtype])
    heads = x[..., 40:160].unflatten(-1, (3, 40))
    wide = torch.randn(2, 3, 4, 5, 80).to(DTYPES[dtype])
    for some in (heads, heads.transpose(1, 2), wide[..., ::2].permute(3, 1, 0, 2, 4), x[:1, :1, :40].expand(2, 3, 40)):
        args = some, torch.stack((weight, weight), 1)[:, 1], 1e-6
        got = IMPLEMENTATIONS[name](*args)
        assert got.is_contiguous()
        assert_matches_oracle(got, OP.reference, *args)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 0, 4)], ids=str)
def test_zero_size(name: str, shape: tuple[int, ...]) -> None:
    assert IMPLEMENTATIONS[name](*inputs(shape)).shape == shape


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_hugging_face(name: str, dtype: str) -> None:
    """bf16 is rounded where Llama rounds: the same bits but where the fp32 factor's last bit decides."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight, eps = inputs((50, 576), DTYPES[dtype])
    module = LlamaRMSNorm(576, eps=eps).to(x.dtype)
    module.weight.data = weight
    with torch.no_grad():
        expected = module(x)
    assert torch.equal(OP.reference(x, weight, eps), expected)
    same = (IMPLEMENTATIONS[name](x, weight, eps) == expected).float().mean()
    assert same > (0.999 if dtype == "bf16" else 0.3)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [601])
def test_a_row_does_not_depend_on_the_others(name: str, dtype: str, columns: int) -> None:
    x, weight, eps = inputs((64, columns), DTYPES[dtype])
    assert_rows_independent(lambda rows: IMPLEMENTATIONS[name](rows, weight, eps), x)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_same_bits_for_any_strides_and_threads(name: str) -> None:
    x, weight, eps = inputs((400, 3, 120))
    expected, threads = IMPLEMENTATIONS[name](x, weight, eps), torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(IMPLEMENTATIONS[name](x.transpose(0, 1), weight, eps), expected.transpose(0, 1))
    finally:
        torch.set_num_threads(threads)


def test_opcheck() -> None:
    for shape in SHAPES[1:4]:
        opcheck(OP.call, inputs(shape))


def test_compiles_and_exports_as_one_node() -> None:
    args, graphs = inputs((5, 8)), []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return scrimp.ops.rms_norm(x, weight, 1e-5)

    expected = scrimp.ops.rms_norm(*args)
    assert torch.equal(torch.compile(scrimp.ops.rms_norm, backend=record, fullgraph=True)(*args), expected)
    exported = torch.export.export(Layer(), args[:2]).module()
    assert torch.equal(exported(*args[:2]), expected)
    for graph in (*graphs, exported):
        assert [str(node.target) for node in graph.graph.nodes].count("scrimp.rms_norm.default") == 1


X, W = torch.zeros(2, 3, 8), torch.zeros(8)
BAD = {
    "scalar": ((X[0, 0, 0], W, 1e-5), r"weight has shape \[8\], but rows of x are of \[\]"),
    "columns": ((X, W[:7], 1e-5), r"weight has shape \[7\], but rows of x are of \[8\]"),
    "rank of weight": ((X, X, 1e-5), r"weight has shape \[2, 3, 8\]"),
    "integer x": ((X.int(), W.int(), 1e-5), "x is int32; it must be float32"),
    "dtype of weight": ((X.bfloat16(), W, 1e-5), "dtype of weight is torch.float32, but that of x is torch.bfloat16"),
    "device": ((X, W.to("meta"), 1e-5), "device of weight is meta, but that of x is cpu"),
    "negative eps": ((X, W, -1.0), "eps=-1.0 must be finite and not negative"),
    "eps": ((X, W, torch.nan), "eps=nan must be finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    args, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        scrimp.ops.rms_norm(*args)
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        OP.call(*args)


def test_gradients_are_refused_by_name() -> None:
    x, weight, eps = inputs((2, 4))
    with pytest.raises(RuntimeError, match="scrimp::rms_norm has no backward"):
        scrimp.ops.rms_norm(x, weight.requires_grad_(), eps)
