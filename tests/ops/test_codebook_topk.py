"""codebook_topk against its reference and its contract."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import scrimp
from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle, assert_rows_independent, oracle_tolerance, same_bits

OP = OPS["codebook_topk"]
IMPLEMENTATIONS = scrimp.implementations("codebook_topk")
ALL = IMPLEMENTATIONS | {"reference": OP.reference}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# leading dimensions of x, groups (0: a codebook without that dimension), C, D, k
Shape = tuple[tuple[int, ...], int, int, int, int]
SHAPES: list[Shape] = [
    ((1,), 0, 1, 1, 1),
    ((), 0, 5, 7, 5),
    ((3,), 1, 100, 19, 8),
    ((2, 3), 2, 33, 16, 3),
    ((40,), 3, 70, 5, 64),
    ((67,), 0, 300, 33, 8),
    ((1100,), 0, 65, 3, 2),
    ((20,), 0, 900, 700, 4),
]
Args = tuple[Tensor, Tensor, Tensor | None, int, bool, bool]


def arguments(shape: Shape, dtype: torch.dtype = torch.float32, *, euclidean: bool = False, mean: bool = True) -> Args:
    """Random rows, codes and bias."""
    lead, G, C, D, k = shape
    codebook = torch.randn(G, C, D) if G else torch.randn(C, D)
    x = torch.randn(*lead, max(G, 1) * D)
    return x.to(dtype), codebook.to(dtype), torch.randn(codebook.shape[:-1]), k, euclidean, mean


def one(**changes: Any) -> list[Any]:
    """Arguments of a small call, some of them replaced."""
    every = {"x": torch.zeros(2, 8), "codebook": torch.zeros(5, 8), "bias": torch.zeros(5), "k": 3}
    return list((every | {"euclidean": False, "mean": True} | changes).values())


def all_scores(x: Tensor, codebook: Tensor, bias: Tensor | None, euclidean: bool) -> Tensor:
    """`[.., G, C]` in float64."""
    books = codebook.double().view(-1, *codebook.shape[-2:])
    scores = torch.einsum("...gd,gcd->...gc", x.double().unflatten(-1, (len(books), -1)), books)
    if euclidean:
        scores = scores - books.square().sum(-1) / 2
    return scores if bias is None else scores + bias.view(len(books), -1)


def assert_finds(call: Any, args: Args) -> None:
    """The scores are the oracle's; the codes have these scores, are not the same, and `out` is what they give."""
    out, index, scores = call(*args)
    x, codebook, bias, k, euclidean, mean = args
    assert_matches_oracle(scores, lambda *some: OP.reference(*some)[2], *args)
    exact = all_scores(x, codebook, bias, euclidean)
    flat = index.long().reshape(*exact.shape[:-1], k)
    own = exact.gather(-1, flat)
    slack = oracle_tolerance(own, OP.reference(*args)[2].reshape(own.shape))
    assert (own - scores.reshape(own.shape).double()).abs().max() <= slack
    assert (flat.sort(-1).values.diff(dim=-1) > 0).all()
    books = codebook.view(-1, *codebook.shape[-2:])
    codes = books[torch.arange(len(books))[:, None], flat]
    add = torch.mean if mean else torch.sum
    expected = add(codes.double(), -2).flatten(-2)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert (out.double() - expected).abs().max() <= oracle_tolerance(expected, add(codes, -2).flatten(-2))


def test_implementations_exist() -> None:
    assert IMPLEMENTATIONS, scrimp.which("codebook_topk")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oracle(name: str, dtype: str, shape: Shape) -> None:
    for euclidean, mean in ((False, True), (True, False)):
        args = arguments(shape, DTYPES[dtype], euclidean=euclidean, mean=mean)
        assert_finds(IMPLEMENTATIONS[name], args)
        assert_finds(IMPLEMENTATIONS[name], (*args[:2], None, *args[3:]))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("euclidean", [False, True])
def test_equal_scores_give_the_lowest_codes(name: str, dtype: str, euclidean: bool) -> None:
    """Small integers, so that every sum is exact and equal scores are many."""
    for shape in SHAPES:
        x, codebook, bias, k, *_ = arguments(shape, DTYPES[dtype])
        x, codebook, bias = (some.round().clamp(-2, 2) for some in (x, codebook, bias))
        for mean in (False, True):
            args = (x, codebook, bias, k, euclidean, mean)
            for got, expected in zip(IMPLEMENTATIONS[name](*args), OP.reference(*args), strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ALL)
def test_by_hand(name: str) -> None:
    x = torch.tensor([[1.0, 2.0, 0.0, 0.0]])
    books = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]], [[4.0, 4.0], [1.0, 0.0], [0.0, 2.0]]])
    out, index, scores = ALL[name](x, books, torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 1.0]]), 2, False, True)
    assert (out.tolist(), index.tolist()) == ([[1.5, 0.5, 2.0, 3.0]], [[[1, 2], [2, 0]]])
    assert scores.tolist() == [[[4.0, 3.0], [1.0, 0.0]]]
    out, index, scores = ALL[name](x, books, None, 2, True, False)
    assert (out.tolist(), index.tolist()) == ([[1.0, 1.0, 1.0, 2.0]], [[[1, 0], [1, 2]]])
    assert scores.tolist() == [[[1.5, 0.5], [-0.5, -2.0]]]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("mean", [False, True])
def test_codes_without_a_score_are_never_chosen(name: str, mean: bool) -> None:
    """Two codes are left of 40, then none."""
    x, codebook, bias, *_ = arguments(((5,), 0, 40, 6, 1))
    bias[:] = -torch.inf
    bias[[7, 33]] = 0.0
    out, index, scores = ALL[name](x, codebook, bias, 4, False, mean)
    assert torch.equal(index[:, :2].sort(-1).values, torch.tensor([[7, 33]] * 5, dtype=torch.int32))
    assert (index[:, 2:] == -1).all()
    assert (scores[:, 2:] == -torch.inf).all()
    both = codebook[7] + codebook[33]
    torch.testing.assert_close(out, (both / 2 if mean else both).expand(5, 6))
    out, index, scores = ALL[name](x, codebook, torch.full((40,), -torch.inf), 4, False, mean)
    assert not out.any()
    assert (index == -1).all()
    assert (scores == -torch.inf).all()


@pytest.mark.parametrize("name", ALL)
def test_a_bias_of_infinity_forces_a_code(name: str) -> None:
    x, codebook, bias, *_ = arguments(((50,), 2, 90, 6, 1))
    bias[0, 80], bias[1, [5, 3]] = torch.inf, torch.inf
    _, index, scores = ALL[name](x, codebook, bias, 3, False, True)
    assert (index[:, 0, 0] == 80).all()
    assert torch.equal(index[:, 1, :2], torch.tensor([[3, 5]] * 50, dtype=torch.int32))
    assert scores[:, :, 1].isinf().tolist() == [[False, True]] * 50


@pytest.mark.parametrize("name", ALL)
def test_broken_rows(name: str) -> None:
    """A NaN score breaks its row and group; infinite scores rank as any others, also in the last panel."""
    x, codebook, *_ = arguments(((30,), 2, 37, 4, 1))
    x[:, 5], x[3, 1], x[4, 6], x[7, 5] = 1.0, torch.nan, torch.inf, 0.0
    codebook[1, ::2, 2], codebook[1, 1::2, 2], codebook[1, 36, 1] = 1.0, -1.0, torch.inf
    args = (x, codebook, None, 20, False, True)
    out, index, scores = ALL[name](*args)
    broken = scores.isnan().any(-1)
    assert broken.nonzero().tolist() == [[3, 0], [7, 1]]
    assert (index[broken] == -1).all()
    assert scores[broken].isnan().all()
    assert out.view(30, 2, 4)[broken].isnan().all()
    assert index[4, 1].tolist() == [*range(0, 37, 2), -1]
    for got, expected in zip((out, index, scores), OP.reference(*args), strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(name: str, dtype: str) -> None:
    _, *parts = arguments(((1,), 2, 130, 20, 5), DTYPES[dtype], euclidean=True)

    def call(x: Tensor) -> Tensor:
        out, index, scores = IMPLEMENTATIONS[name](x, *parts)
        return torch.cat([out.float(), index.flatten(1).float(), scores.flatten(1)], 1)

    assert_rows_independent(call, torch.randn(64, 40).to(DTYPES[dtype]))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_neither_blocks_nor_threads_change_a_bit(name: str) -> None:
    """Rows of several items, and a single row whose codes are split among threads."""
    x, codebook, _, k, *rest = arguments(((1500,), 0, 700, 40, 8))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found += [IMPLEMENTATIONS[name](x, codebook, None, k, *rest)]
            found += [
                tuple(
                    map(
                        torch.cat,
                        zip(
                            *(IMPLEMENTATIONS[name](part, codebook, None, k, *rest) for part in x.split(300)),
                            strict=True,
                        ),
                    )
                )
            ]
        wide = arguments(((1,), 0, 5000, 600, 8))
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found += [(IMPLEMENTATIONS[name](*wide))]
    finally:
        torch.set_num_threads(before)
    for some in (found[:6], found[6:]):
        for other in some[1:]:
            for mine, theirs in zip(some[0], other, strict=True):
                assert same_bits(mine, theirs)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided(name: str, dtype: str) -> None:
    """Transposed rows, a codebook inside a wider one, a bias with gaps."""
    kind = DTYPES[dtype]
    x = torch.randn(40, 2, 5).to(kind).permute(2, 1, 0)
    books = torch.randn(4, 60, 50).to(kind)[::2, ::2, 5:25]
    bias = torch.randn(2, 30, 3)[..., 1]
    assert_finds(IMPLEMENTATIONS[name], (x, books, bias, 4, False, True))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("lead", "G", "D"), [((0,), 0, 5), ((2, 0), 3, 5), ((3,), 0, 0), ((3,), 2, 0)], ids=str)
def test_zero_size(name: str, lead: tuple[int, ...], G: int, D: int) -> None:
    """Codes of no numbers all score their bias."""
    x, codebook, bias, *_ = arguments((lead, G, 9, D, 1))
    out, index, scores = ALL[name](x, codebook, bias, 2, True, True)
    assert out.shape == x.shape
    assert index.shape == scores.shape == (*lead, *([G] if G else []), 2)
    if index.numel():
        best = bias.topk(2)
        assert torch.equal(index, best.indices.int().expand(index.shape))
        assert torch.equal(scores, best.values.expand(scores.shape))


def test_the_scores_are_never_stored() -> None:
    """The peak of memory besides the results is below a twentieth of the matrix of scores."""
    x, codebook = torch.randn(4096, 16), torch.randn(10_000, 16)

    def kib(name: str) -> int:
        found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert found
        return int(found[1])

    Path("/proc/self/clear_refs").write_text("5")
    before = kib("VmRSS")
    results = scrimp.ops.codebook_topk(x, codebook, 8)
    own = sum(result.nbytes for result in results) / 1024
    assert kib("VmHWM") - before - own < 4 * 4096 * 10_000 / 1024 / 20


def test_python_threads_do_not_disturb_each_other() -> None:
    args = arguments(((30,), 2, 130, 60, 4))
    expected = OP.call(*args)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: OP.call(*args), range(50)):
            assert all(map(torch.equal, got, expected))


def test_opcheck() -> None:
    for shape in SHAPES[1:4]:
        args = arguments(shape)
        opcheck(OP.call, args)
        opcheck(OP.call, (*args[:2], None, *args[3:]))


def test_compiles_and_exports_as_one_node() -> None:
    x, codebook, bias, *_ = arguments(((6,), 0, 20, 8, 3))
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    class Codes(torch.nn.Module):
        def forward(self, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return scrimp.ops.codebook_topk(args[0], args[1], 3, args[2])

    expected = Codes()(x, codebook, bias)
    exported = torch.export.export(Codes(), (x, codebook, bias)).module()
    for call in (torch.compile(Codes(), backend=record, fullgraph=True), exported):
        assert all(map(torch.equal, call(x, codebook, bias), expected))
    for graph in (*graphs, exported):
        assert [str(node.target) for node in graph.graph.nodes].count("scrimp.codebook_topk.default") == 1


X, C = torch.zeros(2, 8), torch.zeros(5, 8)
BAD = {
    "scalar x": ({"x": X[0, 0]}, r"x must be \[.., D\], got a scalar"),
    "integer x": ({"x": X.int(), "codebook": C.int()}, "x is int32; it must be float32"),
    "dtype of codebook": ({"codebook": C.bfloat16()}, "dtype of codebook is torch.bfloat16, but that of x"),
    "device": ({"codebook": C.to("meta")}, "device of codebook is meta"),
    "rank of codebook": ({"codebook": C[0]}, r"codebook has shape \[8\], expected \[C, D\] or \[G, C, D\]"),
    "no group": ({"codebook": C[None][:0]}, r"codebook has shape \[0, 5, 8\]"),
    "width of codebook": ({"codebook": C[:, :7]}, r"x has shape \[2, 8\], but codebook \[5, 7\] takes rows of 7"),
    "groups": ({"codebook": C[:, :3].expand(2, 5, 3)}, r"codebook \[2, 5, 3\] takes rows of 6"),
    "transposed codebook": ({"codebook": torch.zeros(8, 5).T}, r"codebook has strides \(1, 5\)"),
    "no k": ({"k": 0}, "k=0 must be from 1 to the 5 codes"),
    "k above the codes": ({"k": 6}, "k=6 must be from 1 to the 5 codes"),
    "k above the most": ({"codebook": torch.zeros(99, 8), "bias": None, "k": 65}, "k=65 must be .* at most 64"),
    "no codes": ({"codebook": C[:0], "bias": None}, "k=3 must be from 1 to the 0 codes"),
    "dtype of bias": ({"bias": torch.zeros(5).bfloat16()}, "bias is bfloat16; it must be float32"),
    "device of bias": ({"bias": torch.zeros(5, device="meta")}, "device of bias is meta"),
    "shape of bias": ({"bias": torch.zeros(1, 5)}, r"bias has shape \[1, 5\], expected \[5\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    changes, words = BAD[case]
    x, codebook, bias, k, euclidean, mean = args = one(**changes)
    with pytest.raises(ValueError, match=f"codebook_topk: .*{words}"):
        scrimp.ops.codebook_topk(x, codebook, k, bias, euclidean=euclidean, mean=mean)
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        OP.call(*args)


def test_gradients_are_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match="scrimp::codebook_topk has no backward"):
        scrimp.ops.codebook_topk(X, C.clone().requires_grad_(), 2)
