"""merge_attention against its reference, its definition and its contract."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import scrimp
from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle

OP = OPS["merge_attention"]
IMPLEMENTATIONS = scrimp.implementations("merge_attention")
SHAPES = [(1, 1, 1, 1), (2, 3, 19, 63), (1, 2, 257, 64), (1, 1, 5, 111), (2, 1, 3, 256)]


def state(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse_a, lse_b = 3 * torch.randn(shape[:3]), 3 * torch.randn(shape[:3])
    lse_a[..., ::3] = -torch.inf
    lse_b[..., ::2] = -torch.inf
    return torch.randn(shape).to(dtype), lse_a, torch.randn(shape).to(dtype), lse_b


def test_implementations_exist() -> None:
    assert IMPLEMENTATIONS, scrimp.which("merge_attention")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oracle(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    args = state(shape, dtype)
    assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args, names=("out", "lse"))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_strided(name: str) -> None:
    out_a, lse_a, out_b, lse_b = state((2, 6, 8, 40))
    args = (
        out_a.transpose(1, 2),
        lse_a.transpose(1, 2),
        out_b.transpose(1, 2),
        lse_b.transpose(1, 2),
    )
    assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args, names=("out", "lse"))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)], ids=str)
def test_zero_size(name: str, shape: tuple[int, ...]) -> None:
    out, lse = IMPLEMENTATIONS[name](*state(shape))
    assert out.shape == shape
    assert lse.shape == shape[:3]


def test_reference_by_hand() -> None:
    """Weights 3/4 and 1/4, total e^lse = 4; a row empty on both sides gives 0 and -inf."""
    lse_a, lse_b = torch.tensor([[[3.0, 0.0]]]).log(), torch.tensor([[[1.0, 0.0]]]).log()
    out, lse = OP.reference(torch.full((1, 1, 2, 1), 8.0), lse_a, torch.full((1, 1, 2, 1), 4.0), lse_b)
    torch.testing.assert_close(out, torch.tensor([[[[7.0], [0.0]]]]))
    torch.testing.assert_close(lse, torch.tensor([[[4.0, 0.0]]]).log())


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_merging_splits_equals_attention_over_the_union(name: str) -> None:
    scores, values = torch.randn(1, 2, 7, 30).double(), torch.randn(1, 2, 30, 16).double()

    def attend(keys: slice) -> tuple[Tensor, Tensor]:
        out = scores[..., keys].softmax(-1) @ values[..., keys, :]
        return out.float(), scores[..., keys].logsumexp(-1).float()

    out, lse = IMPLEMENTATIONS[name](*attend(slice(0, 11)), *attend(slice(11, 30)))
    whole_out, whole_lse = attend(slice(0, 30))
    torch.testing.assert_close(out, whole_out, atol=4e-7, rtol=4e-7)
    torch.testing.assert_close(lse, whole_lse, atol=4e-7, rtol=4e-7)


def test_opcheck() -> None:
    for shape in SHAPES[:2]:
        opcheck(OP.call, state(shape))


def test_compiles_as_one_node() -> None:
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    args = state((1, 2, 5, 8))
    compiled = torch.compile(scrimp.ops.merge_attention, backend=record, fullgraph=True)
    for got, expected in zip(compiled(*args), scrimp.ops.merge_attention(*args), strict=True):
        assert torch.equal(got, expected)
    assert [str(n.target) for n in graphs[0].graph.nodes].count("scrimp.merge_attention.default") == 1


OUT, LSE = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 5)
BAD = {
    "rank of out_a": (
        (OUT[0], LSE, OUT, LSE),
        r"out_a must be \[B, H, N, D\], got shape \[3, 5, 8\]",
    ),
    "integer out": ((OUT.int(), LSE, OUT.int(), LSE), "out_a is int32; it must be float32"),
    "integer lse": ((OUT, LSE.int(), OUT, LSE), "lse_a is int32; it must be float32"),
    "half lse": ((OUT, LSE, OUT, LSE.half()), "lse_b is float16; it must be float32"),
    "mixed dtype": (
        (OUT, LSE, OUT.bfloat16(), LSE),
        r"dtype of out_b is torch.bfloat16, but that of out_a is torch.f",
    ),
    "batch": (
        (OUT, LSE, OUT[:1], LSE),
        r"shape of out_b is \(1, 3, 5, 8\), but that of out_a is \(2, 3, 5, 8\)",
    ),
    "head size": ((OUT, LSE, OUT[..., :4], LSE), r"shape of out_b is \(2, 3, 5, 4\)"),
    "rows of lse_a": ((OUT, LSE[..., :4], OUT, LSE), r"shape of lse_a is \(2, 3, 4\)"),
    "rank of lse_b": ((OUT, LSE, OUT, LSE[0]), r"shape of lse_b is \(3, 5\)"),
    "device": (
        (OUT, LSE, OUT.to("meta"), LSE),
        "device of out_b is meta, but that of out_a is cpu",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    args, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        scrimp.ops.merge_attention(*args)
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        OP.call(*args)


def test_gradients_are_refused_by_name() -> None:
    out, lse, *rest = state((1, 1, 2, 4))
    with pytest.raises(RuntimeError, match="scrimp::merge_attention has no backward"):
        scrimp.ops.merge_attention(out.requires_grad_(), lse, *rest)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_same_bits_for_any_thread_count(name: str) -> None:
    args, threads = state((1, 2, 600, 33)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = IMPLEMENTATIONS[name](*args)
        torch.set_num_threads(2)
        two = IMPLEMENTATIONS[name](*args)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
