"""sparse_linear against its reference, its definition and its contract."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import scrimp
from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle, assert_rows_independent, same_bits

OP = OPS["sparse_linear"]
IMPLEMENTATIONS = scrimp.implementations("sparse_linear")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# leading dimensions of x, K, N, channels listed
SHAPES = [
    ((1,), 1, 1, 1),
    ((), 100, 7, 40),
    ((3,), 19, 65, 19),
    ((2, 3), 64, 33, 0),
    ((17,), 577, 50, 300),
    ((5,), 1100, 321, 550),
    ((64,), 190, 140, 100),
    ((130,), 33, 67, 20),
]
EMPTY = [((0,), 5, 3, 2), ((3,), 0, 4, 0), ((70,), 0, 4, 0), ((3,), 5, 0, 5), ((0,), 0, 0, 0)]
Args = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def arguments(lead: tuple[int, ...], K: int, N: int, listed: int, dtype: torch.dtype = torch.float32) -> Args:
    """A random list, bias and residual; what the list leaves out is poison."""
    x, weight = torch.randn(*lead, K).to(dtype), torch.randn(K, N).to(dtype)
    index = torch.full((K,), -1, dtype=torch.int32)
    index[:listed] = torch.randperm(K)[:listed].sort().values
    weight[torch.ones(K, dtype=torch.bool).index_fill_(0, index[:listed].long(), False)] = torch.nan
    count = torch.tensor([listed], dtype=torch.int32)
    return x, weight, index, count, torch.randn(N).to(dtype), torch.randn(*lead, N).to(dtype)


def test_implementations_exist() -> None:
    assert IMPLEMENTATIONS, scrimp.which("sparse_linear")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oracle(name: str, dtype: str, shape: tuple[tuple[int, ...], int, int, int]) -> None:
    args = arguments(*shape, DTYPES[dtype])
    for some in (args, (*args[:4], None, None), (*args[:4], args[4], None)):
        assert_matches_oracle(IMPLEMENTATIONS[name](*some), OP.reference, *some)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided(name: str, dtype: str) -> None:
    """Transposed rows, every second input, some outputs of a wider weight, a bias with gaps, a short list."""
    kind = DTYPES[dtype]
    weight, bias = torch.randn(40, 90).to(kind)[:, 5:75], torch.randn(70, 3).to(kind)[:, 1]
    index, count = torch.arange(0, 40, 3, dtype=torch.int32), torch.tensor([12], dtype=torch.int32)
    for x in (torch.randn(40, 6).to(kind).T, torch.randn(3, 80).to(kind)[:, ::2], torch.randn(1, 40).to(kind)):
        args = (x, weight, index, count, bias, torch.randn(70, x.shape[0]).to(kind).T)
        assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", EMPTY)
def test_zero_size(name: str, shape: tuple[tuple[int, ...], int, int, int]) -> None:
    args = arguments(*shape)
    assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args)


@pytest.mark.parametrize("run", [OP.reference, *IMPLEMENTATIONS.values()], ids=["reference", *IMPLEMENTATIONS])
def test_by_hand(run: object) -> None:
    x, weight = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    index, count = torch.tensor([0, 2, -1], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    got = run(x, weight, index, count, torch.tensor([0.5, 0.0]), torch.tensor([[0.0, 1000.0]]))
    assert got.tolist() == [[10.5, 1100.0]]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(name: str, dtype: str) -> None:
    """Bitwise, each row with a selection of its own: alone it has a shorter list than in company."""
    weight, bias = torch.randn(333, 233).to(DTYPES[dtype]), torch.randn(233).to(DTYPES[dtype])
    select = scrimp.implementations("channel_select")[name]
    level = torch.tensor([0.7])

    def call(x: Tensor, residual: Tensor) -> Tensor:
        kept, index, count, _ = select(x, level, None, None, None, 0, False)
        return IMPLEMENTATIONS[name](kept, weight, index, count, bias, residual)

    assert_rows_independent(call, torch.randn(64, 333).to(DTYPES[dtype]), torch.randn(64, 233).to(DTYPES[dtype]))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_listed_zeros_change_no_bit(name: str) -> None:
    """Also where sums underflow: neither the sign of a zero nor a subnormal number depends on the list."""
    x, weight, index, count, *_ = arguments((5,), 200, 70, 90)
    weight = torch.randn(200, 70)
    kept = torch.zeros_like(x)
    kept[:, index[:90].long()] = x[:, index[:90].long()]
    kept[2:] *= 1e-40
    everything = torch.arange(200, dtype=torch.int32), torch.tensor([200], dtype=torch.int32)
    short = IMPLEMENTATIONS[name](kept, weight * 1e-3, index, count, None, None)
    assert same_bits(short, IMPLEMENTATIONS[name](kept, weight * 1e-3, *everything, None, None))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_same_bits_for_any_thread_count(name: str) -> None:
    args, before = arguments((5,), 600, 330, 400), torch.get_num_threads()
    expected = IMPLEMENTATIONS[name](*args)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(IMPLEMENTATIONS[name](*args), expected)
    finally:
        torch.set_num_threads(before)


def test_python_threads_do_not_disturb_each_other() -> None:
    args = arguments((5,), 600, 330, 400)
    expected = OP.call(*args)
    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(got, expected) for got in pool.map(lambda _: OP.call(*args), range(50)))


def test_opcheck() -> None:
    for shape in SHAPES[:4]:
        args = arguments(*shape)
        opcheck(OP.call, args)
        opcheck(OP.call, (*args[:4], None, None))


def test_compiles_and_exports_as_one_node() -> None:
    args = arguments((5,), 8, 3, 4)
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    class Layer(torch.nn.Module):
        def forward(self, *args: object) -> Tensor:
            return scrimp.ops.sparse_linear(*args)

    expected = scrimp.ops.sparse_linear(*args)
    assert torch.equal(torch.compile(scrimp.ops.sparse_linear, backend=record, fullgraph=True)(*args), expected)
    exported = torch.export.export(Layer(), args).module()
    assert torch.equal(exported(*args), expected)
    for graph in (*graphs, exported):
        assert [str(node.target) for node in graph.graph.nodes].count("scrimp.sparse_linear.default") == 1


X, W, B, R = torch.zeros(2, 3, 8), torch.zeros(8, 5), torch.zeros(5), torch.zeros(2, 3, 5)
I, C = torch.arange(8, dtype=torch.int32), torch.tensor([8], dtype=torch.int32)  # noqa: E741
BAD = {
    "scalar x": ((X[0, 0, 0], W, I, C, None, None), r"x must be \[.., K\], got a scalar"),
    "integer x": ((X.int(), W.int(), I, C, None, None), "x is int32; it must be float32"),
    "rank of weight": ((X, B, I, C, None, None), r"weight has shape \[5\], expected \[8, N\] for x \[2, 3, 8\]"),
    "inputs": ((X, W[:7], I, C, None, None), r"weight has shape \[7, 5\], expected \[8, N\]"),
    "transposed weight": ((X, torch.zeros(5, 8).T, I, C, None, None), r"weight has strides \(1, 8\)"),
    "dtype of weight": ((X, W.half(), I, C, None, None), "dtype of weight is torch.float16, but that of x"),
    "device of weight": ((X, W.to("meta"), I, C, None, None), "device of weight is meta, but that of x is cpu"),
    "long list": ((X, W, I.repeat(2), C, None, None), r"index has shape \[16\], expected \[at most 8\]"),
    "dtype of index": ((X, W, I.long(), C, None, None), "index is int64; it must be int32"),
    "counts": ((X, W, I, C.repeat(2), None, None), r"count must be one number, \[1\], got shape \[2\]"),
    "dtype of count": ((X, W, I, C.long(), None, None), "count is int64; it must be int32"),
    "size of bias": ((X, W, I, C, B[:4], None), r"bias has shape \[4\], expected \[5\]"),
    "dtype of bias": ((X, W, I, C, B.half(), None), "dtype of bias is torch.float16"),
    "shape of residual": ((X, W, I, C, None, R[:1]), r"residual has shape \[1, 3, 5\], expected \[2, 3, 5\]"),
    "dtype of residual": ((X, W, I, C, None, R.double()), "dtype of residual is torch.float64"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    args, words = BAD[case]
    with pytest.raises(ValueError, match=f"sparse_linear: .*{words}"):
        scrimp.ops.sparse_linear(*args)
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        OP.call(*args)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bad_lists(name: str) -> None:
    run = IMPLEMENTATIONS[name]
    for listed, count, words in (
        ([0, 2, 2], 3, r"does not ascend within \[0, 8\)"),
        ([0, 8, 1], 2, r"does not ascend within \[0, 8\)"),
        ([-1, 1, 2], 2, r"does not ascend within \[0, 8\)"),
        ([0, 1, 2], 4, "count=4 is not within a list of 3"),
        ([0, 1, 2], -1, "count=-1 is not within a list of 3"),
    ):
        index, number = torch.tensor(listed, dtype=torch.int32), torch.tensor([count], dtype=torch.int32)
        with pytest.raises(RuntimeError, match=f"sparse_linear: .*{words}"):
            run(X, W, index, number, None, None)


def test_gradients_are_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match="scrimp::sparse_linear has no backward"):
        scrimp.ops.sparse_linear(X, W.clone().requires_grad_(), I, C)
