"""vq_logits against its reference, the op `linear` and its contract."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import scrimp
from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle, assert_rows_independent, same_bits

OP = OPS["vq_logits"]
IMPLEMENTATIONS = scrimp.implementations("vq_logits")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Args = tuple[Tensor, Tensor, Tensor, Tensor | None]
# leading dimensions of h, d, K, shape of codes
SHAPES = [
    ((1,), 1, 1, (1,)),
    ((), 7, 3, (50,)),
    ((3,), 19, 40, (1, 33)),
    ((2, 3), 64, 5, (2, 100)),
    ((5,), 33, 300, (3, 4111)),
    ((64,), 20, 9, (65,)),
    ((13, 6), 16, 30, (129,)),
]


def arguments(
    lead: tuple[int, ...], d: int, K: int, codes: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Args:
    """A random head whose tokens have random codes."""
    h, codebook = torch.randn(*lead, d).to(dtype), torch.randn(K, d).to(dtype)
    return h, codebook, torch.randint(max(K, 1), codes, dtype=torch.int32), torch.randn(codes[-1]).to(dtype)


def test_implementations_exist() -> None:
    assert IMPLEMENTATIONS, scrimp.which("vq_logits")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oracle(name: str, dtype: str, shape: tuple[tuple[int, ...], int, int, tuple[int, ...]]) -> None:
    h, codebook, codes, bias = arguments(*shape, DTYPES[dtype])
    for args in ((h, codebook, codes, bias), (h, codebook, codes, None)):
        got = IMPLEMENTATIONS[name](*args)
        assert got.is_contiguous()
        assert_matches_oracle(got, OP.reference, *args)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scores_are_those_of_linear(name: str, dtype: str) -> None:
    """To the bit; the sum over codes and the bias are taken in fp32 and rounded once."""
    h, codebook, codes, bias = arguments((7,), 100, 50, (2, 1000), DTYPES[dtype])
    scores = scrimp.implementations("linear")[name](h, [codebook], [], None)
    first, second = (scores[:, level].float() for level in codes.long())
    assert same_bits(IMPLEMENTATIONS[name](h, codebook, codes[0], None), scores[:, codes[0].long()])
    assert same_bits(IMPLEMENTATIONS[name](h, codebook, codes, bias), (first + second + bias.float()).to(h.dtype))


def test_reference_by_hand() -> None:
    h, codebook = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    codes = torch.tensor([[0, 1, 1, 2], [2, 2, 1, 0]], dtype=torch.int32)
    assert OP.reference(h, codebook, codes, torch.tensor([0.0, 0.0, 0.5, 0.0])).tolist() == [[4.0, 5.0, 4.5, 4.0]]
    assert OP.reference(h, codebook, codes[0], None).tolist() == [[1.0, 2.0, 2.0, 3.0]]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(name: str, dtype: str) -> None:
    h, *head = arguments((64,), 70, 30, (2, 133), DTYPES[dtype])
    assert_rows_independent(lambda rows: IMPLEMENTATIONS[name](rows, *head), h)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided(name: str, dtype: str) -> None:
    """Transposed rows, a codebook inside a wider one, codes and bias with gaps."""
    kind = DTYPES[dtype]
    args = (
        torch.randn(40, 2, 5).to(kind).permute(2, 1, 0),
        torch.randn(60, 50).to(kind)[::2, 5:45],
        torch.randint(30, (2, 77, 3), dtype=torch.int32)[..., 1],
        torch.randn(77, 2).to(kind)[:, 1],
    )
    assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "shape", [((0,), 5, 3, (7,)), ((2,), 0, 3, (7,)), ((2,), 5, 3, (0,)), ((2,), 5, 0, (2, 0))], ids=str
)
def test_zero_size(name: str, shape: tuple[tuple[int, ...], int, int, tuple[int, ...]]) -> None:
    args = arguments(*shape)
    assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_broken_inputs_stay_where_they_are(name: str) -> None:
    """A NaN or infinite score reaches the tokens of its code alone."""
    h, codebook, codes, _ = arguments((2,), 6, 5, (50,))
    h[1], codebook[3] = torch.nan, torch.inf
    codebook[3, 1:] = 0
    h[0, 0] = 1.0
    got = IMPLEMENTATIONS[name](h, codebook, codes, None)
    assert got[1].isnan().all()
    assert torch.equal(got[0].isinf(), codes == 3)


def test_python_threads_do_not_disturb_each_other() -> None:
    args = arguments((2,), 60, 130, (3000,))
    expected = scrimp.ops.vq_logits(*args)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(got, expected) for got in pool.map(lambda _: scrimp.ops.vq_logits(*args), range(100)))


def test_opcheck() -> None:
    for shape in SHAPES[:4]:
        args = arguments(*shape)
        opcheck(OP.call, args)
        opcheck(OP.call, (*args[:3], None))


def test_compiles_and_exports_as_one_node() -> None:
    args, graphs = arguments((5,), 8, 4, (30,)), []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    class Head(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return scrimp.ops.vq_logits(*args)

    expected = scrimp.ops.vq_logits(*args)
    exported = torch.export.export(Head(), args).module()
    for call in (torch.compile(scrimp.ops.vq_logits, backend=record, fullgraph=True), exported):
        assert torch.equal(call(*args), expected)
    for graph in (*graphs, exported):
        assert [str(node.target) for node in graph.graph.nodes].count("scrimp.vq_logits.default") == 1


H, C, M, B = torch.zeros(2, 8), torch.zeros(5, 8), torch.zeros(9, dtype=torch.int32), torch.zeros(9)
BAD = {
    "scalar h": ((H[0, 0], C, M, B), r"h must be \[.., d\], got a scalar"),
    "integer h": ((H.int(), C.int(), M, None), "h is int32; it must be float32"),
    "dtype of codebook": ((H, C.bfloat16(), M, B), "dtype of codebook is torch.bfloat16, but that of h"),
    "dtype of codes": ((H, C, M.long(), B), "codes is int64; it must be int32"),
    "dtype of bias": ((H, C, M, B.double()), "dtype of bias is torch.float64"),
    "device": ((H, C, M.to("meta"), B), "device of codes is meta"),
    "rank of codebook": ((H, C[0], M, B), r"codebook has shape \[8\], expected \[K, 8\]"),
    "width of codebook": ((H, C[:, :7], M, B), r"codebook has shape \[5, 7\], expected \[K, 8\]"),
    "transposed codebook": ((H, torch.zeros(8, 5).T, M, B), r"codebook has strides \(1, 5\)"),
    "scalar codes": ((H, C, M[0], None), r"codes has shape \[\], expected \[V\] or \[G, V\]"),
    "no codes": ((H, C, M[None][:0], B), r"codes has shape \[0, 9\], expected \[V\] or \[G, V\]"),
    "rank of bias": ((H, C, M, B[None]), r"bias has shape \[1, 9\], expected \[9\]"),
    "size of bias": ((H, C, M, B[:8]), r"bias has shape \[8\], expected \[9\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    args, words = BAD[case]
    with pytest.raises(ValueError, match=f"vq_logits: .*{words}"):
        scrimp.ops.vq_logits(*args)
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        OP.call(*args)


@pytest.mark.parametrize("name", IMPLEMENTATIONS | {"reference": OP.reference})
@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1, -(2**31)])
def test_codes_out_of_range(name: str, bad: int) -> None:
    codes = torch.full((2, 100), 4, dtype=torch.int32)
    codes[1, 77] = bad
    call = (IMPLEMENTATIONS | {"reference": OP.reference})[name]
    if name.startswith("cuda"):
        logits = call(H, C, codes, None)
        assert logits[:, 77].isnan().all()
        assert logits.isfinite().sum() == logits.numel() - len(H)
        return
    words = rf"={bad} is not one of the 5 rows of the codebook"
    with pytest.raises((ValueError, RuntimeError), match=rf"codes\[1, 77\]{words}"):
        call(H, C, codes, None)
    with pytest.raises((ValueError, RuntimeError), match=rf"codes\[77\]{words}"):
        call(H, C, codes[1], None)
    with pytest.raises((ValueError, RuntimeError), match=r"codes\[0\]=0 is not one of the 0 rows"):
        call(H, C[:0], M, None)


def test_gradients_are_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match="scrimp::vq_logits has no backward"):
        scrimp.ops.vq_logits(H, C.clone().requires_grad_(), M)
