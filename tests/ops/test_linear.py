"""linear against its reference, its definition and its contract."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import scrimp
from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle

OP = OPS["linear"]
IMPLEMENTATIONS = scrimp.implementations("linear")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Args = tuple[Tensor, list[Tensor], list[Tensor | None], Tensor | None]
# leading dimensions of x, K, outputs of each weight
SHAPES = [
    ((1,), 1, (1,)),
    ((), 100, (7, 1, 1)),
    ((3,), 19, (5, 0, 2)),
    ((2, 3), 64, (33,)),
    ((17,), 577, (50,)),
    ((5,), 2200, (9, 34)),
    ((64,), 1090, (40, 6)),
    ((13, 5), 70, (36,)),
    ((130,), 33, (3, 64)),
]


def arguments(lead: tuple[int, ...], K: int, outputs: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Args:
    """Weights of `outputs` rows, the first, third, ... with a bias, and a residual."""
    x = torch.randn(*lead, K).to(dtype)
    weights = [torch.randn(N, K).to(dtype) for N in outputs]
    biases = [None if i % 2 else torch.randn(N).to(dtype) for i, N in enumerate(outputs)]
    return x, weights, biases, torch.randn(*lead, sum(outputs)).to(dtype)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_implementations_exist() -> None:
    assert IMPLEMENTATIONS, scrimp.which("linear")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oracle(name: str, dtype: str, shape: tuple[tuple[int, ...], int, tuple[int, ...]]) -> None:
    x, weights, biases, residual = arguments(*shape, DTYPES[dtype])
    for args in ((x, weights, biases, residual), (x, weights, [], None), (x, weights, biases, None)):
        assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bf16_is_rounded_once(name: str) -> None:
    args = arguments((9,), 300, (70,), torch.bfloat16)
    exact = OP.reference(
        *(a.double() for a in args[:1]), *([t.double() for t in a] for a in args[1:3]), args[3].double()
    )
    got = IMPLEMENTATIONS[name](*args)
    assert ((got.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [6, 70])
def test_strided(name: str, dtype: str, rows: int) -> None:
    """Transposed batches, every second column, rows of a wider weight, a bias with gaps."""
    kind = DTYPES[dtype]
    x, residual = torch.randn(8, rows // 2, 2, 40).to(kind), torch.randn(30, rows // 2, 2).to(kind)
    weights = [torch.randn(20, 50).to(kind)[:, 5:45], torch.randn(20, 40).to(kind)[::2]]
    biases = [torch.randn(20, 3).to(kind)[:, 1], None]
    for some in (x[3].transpose(0, 1), x.transpose(0, 3)[::5, :, 0, 0:1].expand(8, rows // 2, 40).transpose(0, 1)):
        beside = residual.permute(2, 1, 0) if some.shape[0] == 2 else None
        args = (some, weights, biases, beside)
        assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "shape",
    [((0,), 5, (3,)), ((2, 0), 5, (3, 4)), ((3,), 0, (4,)), ((70,), 0, (4,)), ((3,), 5, (0,)), ((0,), 0, (0, 0))],
    ids=str,
)
def test_zero_size(name: str, shape: tuple[tuple[int, ...], int, tuple[int, ...]]) -> None:
    args = arguments(*shape)
    assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args)


def test_reference_by_hand() -> None:
    x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    got = OP.reference(x, [weight, weight[:1]], [torch.tensor([0.5, 0.0]), None], torch.tensor([[0.0, 1.0, 2.0]]))
    assert got.tolist() == [[11.5, 18.0, 13.0]]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [300, 1537])
@pytest.mark.usefixtures("threads")
def test_a_row_does_not_depend_on_the_others(name: str, dtype: str, K: int) -> None:
    """Bitwise, for every number of rows; rows behind the one looked at are poison."""
    run = IMPLEMENTATIONS[name]
    x, weights, biases, residual = arguments((64,), K, (233, 41), DTYPES[dtype])
    alone = torch.cat([run(x[m : m + 1], weights, biases, residual[m : m + 1]) for m in range(64)])
    for rows in range(1, 65):
        assert torch.equal(run(x[:rows], weights, biases, residual[:rows]), alone[:rows]), rows
    assert torch.equal(run(x.view(4, 16, K), weights, biases, residual.view(4, 16, -1)).flatten(0, 1), alone)
    x[::2], residual[1::4] = torch.nan, torch.inf
    assert torch.equal(run(x, weights, biases, residual)[3::4], alone[3::4])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [1, 7, 64, 100])
def test_same_bits_for_any_thread_count(name: str, rows: int) -> None:
    args, before, results = arguments((rows,), 700, (300, 75)), torch.get_num_threads(), []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        results.append(IMPLEMENTATIONS[name](*args))
    torch.set_num_threads(before)
    assert torch.equal(results[1], results[2])
    assert rows > 64 or torch.equal(results[0], results[1])


def test_python_threads_do_not_disturb_each_other() -> None:
    args = arguments((5,), 600, (130,))
    expected = scrimp.ops.linear(*args)
    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(got, expected) for got in pool.map(lambda _: scrimp.ops.linear(*args), range(200)))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_weights_side_by_side_equal_one(name: str) -> None:
    x, weights, _, _ = arguments((11,), 130, (5, 34, 1))
    apart = [IMPLEMENTATIONS[name](x, [weight], [], None) for weight in weights]
    assert torch.equal(IMPLEMENTATIONS[name](x, weights, [], None), torch.cat(apart, 1))
    assert torch.equal(IMPLEMENTATIONS[name](x, [torch.cat(weights)], [], None), torch.cat(apart, 1))


def test_one_tensor_or_several() -> None:
    x, (weight,), (bias,), residual = arguments((2, 3), 9, (4,))
    expected = torch.nn.functional.linear(x, weight, bias) + residual
    for got in (
        scrimp.ops.linear(x, weight, bias, residual),
        scrimp.ops.linear(x, (weight,), (bias,), residual=residual),
    ):
        torch.testing.assert_close(got, expected)
    assert scrimp.ops.linear(x, weight).is_contiguous()


def test_opcheck() -> None:
    for shape in (*SHAPES[:4], SHAPES[-1]):
        x, weights, biases, residual = arguments(*shape)
        opcheck(OP.call, (x, weights, biases, residual))
        opcheck(OP.call, (x, weights, [], None))


def test_compiles_and_exports_as_one_node() -> None:
    args = arguments((5,), 8, (3, 2))
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    class Layer(torch.nn.Module):
        def forward(self, *args: object) -> Tensor:
            return scrimp.ops.linear(*args)

    expected = scrimp.ops.linear(*args)
    assert torch.equal(torch.compile(scrimp.ops.linear, backend=record, fullgraph=True)(*args), expected)
    exported = torch.export.export(Layer(), args).module()
    assert torch.equal(exported(*args), expected)
    for graph in (*graphs, exported):
        assert [str(node.target) for node in graph.graph.nodes].count("scrimp.linear.default") == 1


X, W, B, R = torch.zeros(2, 3, 8), torch.zeros(5, 8), torch.zeros(5), torch.zeros(2, 3, 5)
BAD = {
    "scalar x": ((X[0, 0, 0], [W], [], None), r"x must be \[.., K\], got a scalar"),
    "integer x": ((X.int(), [W.int()], [], None), "x is int32; it must be float32"),
    "no weights": ((X, [], [], None), "there are no weights"),
    "rank of weights[1]": ((X, [W, B], [], None), r"weights\[1\] has shape \[5\], expected \[N, 8\] for x \[2, 3, 8\]"),
    "inputs": ((X, [W[:, :7]], [], None), r"weights\[0\] has shape \[5, 7\], expected \[N, 8\]"),
    "transposed weight": ((X, [torch.zeros(8, 5).T], [], None), r"weights\[0\] has strides \(1, 5\)"),
    "dtype of a weight": ((X, [W, W.bfloat16()], [], None), r"dtype of weights\[1\] is torch.bfloat16, but that of x"),
    "device of a weight": ((X, [W.to("meta")], [], None), r"device of weights\[0\] is meta, but that of x is cpu"),
    "number of biases": ((X, [W, W], [B], None), "1 biases for 2 weights"),
    "rank of a bias": ((X, [W], [W], None), r"biases\[0\] has shape \[5, 8\], expected \[5\]"),
    "size of a bias": ((X, [W, W], [None, B[:4]], None), r"biases\[1\] has shape \[4\], expected \[5\]"),
    "dtype of a bias": ((X, [W], [B.half()], None), r"dtype of biases\[0\] is torch.float16"),
    "rank of residual": ((X, [W], [], R[0]), r"residual has shape \[3, 5\], expected \[2, 3, 5\]"),
    "size of residual": ((X, [W, W], [], R), r"residual has shape \[2, 3, 5\], expected \[2, 3, 10\]"),
    "batch of residual": ((X, [W], [], R[:1]), r"residual has shape \[1, 3, 5\], expected \[2, 3, 5\]"),
    "dtype of residual": ((X, [W], [], R.double()), "dtype of residual is torch.float64"),
    "device of residual": ((X, [W], [], R.to("meta")), "device of residual is meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    args, words = BAD[case]
    with pytest.raises(ValueError, match=f"linear: .*{words}"):
        scrimp.ops.linear(*args)
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        OP.call(*args)


def test_gradients_are_refused_by_name() -> None:
    x, weights, biases, residual = arguments((2,), 4, (3,))
    with pytest.raises(RuntimeError, match="scrimp::linear has no backward"):
        scrimp.ops.linear(x, [weights[0].requires_grad_()], biases, residual)
    with torch.no_grad():
        scrimp.ops.linear(x, weights, biases, residual)
