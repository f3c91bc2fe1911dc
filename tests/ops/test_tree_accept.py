"""tree_accept against its reference, decoding one by one, and its contract."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import scrimp
from scrimp._registry import OPS

OP = OPS["tree_accept"]
IMPLEMENTATIONS = scrimp.implementations("tree_accept")
ALL = IMPLEMENTATIONS | {"reference": OP.reference}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = [(1, 1, 1), (2, 5, 3), (3, 64, 7), (1, 9, 300), (2, 17, 33)]


def inputs(B: int, T: int, V: int, dtype: torch.dtype = torch.float32, heat: float = 1.0) -> list[Tensor]:
    """Random trees with rows of no tree among them; most rows hold the token that is likely after their parent."""
    logits = (3 * torch.randn(B, T, V)).to(dtype)
    parents = torch.full((B, T), -1, dtype=torch.int32)
    tokens = torch.randint(max(V, 1), (B, T))
    for b in range(B):
        for t in range(1, T):
            parent = int(torch.randint(max(0, t - 4), t, ()))
            parents[b, t] = parent if torch.rand(()) < 0.9 else -1
            if torch.rand(()) < 0.7:
                tokens[b, t] = logits[b, parent].argmax()
    temperature = torch.full((B,), heat)
    return [logits, tokens, parents, temperature, torch.randint(2**62, (B,)), torch.randint(10**6, (B,))]


def alone(call: Any, row: Tensor, temperature: float, seed: int, position: int) -> int:
    """The token chosen from one row."""
    one = torch.zeros(1, 1, dtype=torch.int64)
    heat, numbers = torch.tensor([temperature]), (torch.tensor([seed]), torch.tensor([position]))
    return int(call(row[None, None], one, one.int() - 1, heat, *numbers)[1])


def test_implementations_exist() -> None:
    assert IMPLEMENTATIONS, scrimp.which("tree_accept")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heat", [0.0, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_reference(name: str, dtype: str, heat: float, shape: tuple[int, int, int]) -> None:
    for _ in range(3):
        args = inputs(*shape, DTYPES[dtype], heat)
        for got, expected in zip(IMPLEMENTATIONS[name](*args), OP.reference(*args), strict=True):
            assert torch.equal(got, expected)
            assert got.dtype == expected.dtype


@pytest.mark.parametrize("name", ALL)
def test_the_walk_by_hand(name: str) -> None:
    """0 - 1 - 3 is taken; row 2 has the token but a later place, row 4 has another parent, row 5 is of no tree."""
    logits = torch.zeros(1, 6, 9)
    for row, token in ((0, 7), (1, 3), (3, 8)):
        logits[0, row, token] = 1.0
    tokens = torch.tensor([[0, 7, 7, 3, 8, 8]])
    parents = torch.tensor([[-1, 0, 0, 1, 0, -1]], dtype=torch.int32)
    zero = torch.zeros(1, dtype=torch.int64)
    path, chosen = ALL[name](logits, tokens, parents, torch.zeros(1), zero, zero)
    assert path.tolist() == [[0, 1, 3, -1, -1, -1]]
    assert chosen.tolist() == [[7, 3, 8, -1, -1, -1]]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("heat", [0.0, 1.0])
def test_a_row_is_chosen_from_as_if_alone(name: str, heat: float) -> None:
    """The token at depth i is the one drawn for position + i from that row, whatever else is in the batch."""
    args = inputs(3, 20, 40, heat=heat)
    path, chosen = ALL[name](*args)
    logits, _, _, _, seed, position = args
    assert int((path >= 0).sum()) > 3
    for b in range(3):
        for i, row in enumerate(r for r in path[b].tolist() if r >= 0):
            token = alone(ALL[name], logits[b, row], heat, int(seed[b]), int(position[b]) + i)
            assert token == int(chosen[b, i])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_wide_vocabularies_and_far_seeds(name: str) -> None:
    for seed in (0, -1, 2**63 - 1, -(2**63)):
        row = 4 * torch.randn(50_000)
        for position in (0, 2**40):
            args = (row, 0.8, seed, position)
            assert alone(IMPLEMENTATIONS[name], *args) == alone(OP.reference, *args)


@pytest.mark.parametrize("name", ALL)
def test_equal_logits_and_infinities(name: str) -> None:
    inf, nan = torch.inf, torch.nan
    cases = [
        ([1.0, 2.0, 2.0], 1, None),
        ([-inf, -inf, 0.0], 2, 2),
        ([0.0, inf, inf], 1, 1),
        ([-inf, -inf], -1, -1),
        ([0.0, nan, 9.0], -1, -1),
        ([nan] * 40, -1, -1),
        ([-0.0, 0.0], 0, None),
    ]
    for row, greedy, drawn in cases:
        assert alone(ALL[name], torch.tensor(row), 0.0, 3, 5) == greedy
        if drawn is not None:
            assert alone(ALL[name], torch.tensor(row), 1.0, 3, 5) == drawn


@pytest.mark.parametrize("name", ALL)
def test_a_walk_ends_where_nothing_can_be_chosen(name: str) -> None:
    args = inputs(2, 4, 6, heat=0.0)
    args[0][0, 0], args[2][:] = torch.nan, torch.tensor([-1, 0, 1, 2], dtype=torch.int32)
    path, chosen = ALL[name](*args)
    assert path[0].tolist() == [0, -1, -1, -1]
    assert chosen[0].tolist() == [-1] * 4
    assert chosen[1, 0] >= 0


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_strided(name: str) -> None:
    args = inputs(2, 6, 50)
    spread = [torch.stack([x, x], -1)[..., 0] for x in args]
    assert not spread[0].is_contiguous()
    for got, expected in zip(IMPLEMENTATIONS[name](*spread), OP.reference(*args), strict=True):
        assert torch.equal(got, expected)
    part = inputs(2, 12, 50)
    some = [x[:, 3:9] if x.dim() > 1 else x for x in part]
    some[2] = args[2]
    for got, expected in zip(IMPLEMENTATIONS[name](*some), OP.reference(*some), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (0, 0, 0)], ids=str)
def test_zero_size(name: str, shape: tuple[int, int, int]) -> None:
    path, chosen = ALL[name](*inputs(*shape))
    assert path.shape == chosen.shape == shape[:2]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_draws_have_the_distribution(name: str) -> None:
    """4,000 seeds on 6 tokens against the softmax: chi-square with 5 degrees of freedom, fixed numbers."""
    row, count = torch.tensor([1.0, 0.5, -1.0, 2.0, 0.0, 1.5]), 4000
    logits, zeros = row.expand(count, 1, 6), torch.zeros(count, 1, dtype=torch.int64)
    args = (logits, zeros, zeros.int() - 1, torch.full((count,), 1.3), torch.arange(count), zeros[:, 0])
    seen = torch.bincount(IMPLEMENTATIONS[name](*args)[1][:, 0], minlength=6)
    expected = count * (row / 1.3).softmax(0)
    assert float(((seen - expected) ** 2 / expected).sum()) < 20.5  # p = 0.001


def test_opcheck() -> None:
    for shape in SHAPES[:2]:
        opcheck(OP.call, inputs(*shape))


def test_compiles_and_exports_as_one_node() -> None:
    args, graphs = tuple(inputs(2, 5, 30)), []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    class Layer(torch.nn.Module):
        def forward(self, *args: Tensor) -> tuple[Tensor, Tensor]:
            return scrimp.ops.tree_accept(*args)

    expected = scrimp.ops.tree_accept(*args)
    exported = torch.export.export(Layer(), args).module()
    for call in (torch.compile(scrimp.ops.tree_accept, backend=record, fullgraph=True), exported):
        assert all(torch.equal(a, b) for a, b in zip(call(*args), expected, strict=True))
    for graph in (*graphs, exported):
        assert [str(node.target) for node in graph.graph.nodes].count("scrimp.tree_accept.default") == 1


def replaced(**values: Tensor) -> list[Tensor]:
    names = ("logits", "tokens", "parents", "temperature", "seed", "position")
    parents = torch.tensor([[-1, 0, 1]] * 2, dtype=torch.int32)
    numbers = torch.zeros(2, dtype=torch.int64)
    every = (torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64), parents, torch.zeros(2), numbers, numbers)
    return list((dict(zip(names, every, strict=True)) | values).values())


BAD = {
    "rank of logits": (replaced(logits=torch.zeros(3, 5)), r"logits must be \[B, T, V\], got shape \[3, 5\]"),
    "integer logits": (replaced(logits=torch.zeros(2, 3, 5).int()), "logits is int32; it must be float32"),
    "no vocabulary": (replaced(logits=torch.zeros(2, 3, 0)), r"\[2, 3, 0\] offer no token"),
    "dtype of tokens": (replaced(tokens=torch.zeros(2, 3).int()), "tokens is int32; it must be int64"),
    "shape of tokens": (replaced(tokens=torch.zeros(2, 4).long()), r"tokens is \(2, 4\)"),
    "dtype of parents": (replaced(parents=torch.zeros(2, 3).long()), "parents is int64; it must be int32"),
    "shape of parents": (replaced(parents=torch.zeros(1, 3).int()), r"parents is \(1, 3\)"),
    "dtype of temperature": (
        replaced(temperature=torch.zeros(2).double()),
        "temperature is float64; it must be float32",
    ),
    "shape of temperature": (replaced(temperature=torch.zeros(2, 1)), r"temperature is \(2, 1\)"),
    "dtype of seed": (replaced(seed=torch.zeros(2)), "seed is float32; it must be int64"),
    "shape of seed": (replaced(seed=torch.zeros(3).long()), r"seed is \(3,\)"),
    "dtype of position": (replaced(position=torch.zeros(2).int()), "position is int32; it must be int64"),
    "shape of position": (replaced(position=torch.zeros(()).long()), r"position is \(\)"),
    "device": (replaced(seed=torch.zeros(2, device="meta").long()), "device of seed is meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    args, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        scrimp.ops.tree_accept(*args)
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        OP.call(*args)


OUTSIDE = {
    "own parent": ({"parents": torch.tensor([[-1, 0, 0], [-1, 0, 2]]).int()}, r"parents\[1, 2\]=2 is not an earlier"),
    "parent of the root": ({"parents": torch.tensor([[0, 0, 0]] * 2).int()}, r"parents\[0, 0\]=0 is not an earlier"),
    "negative parent": ({"parents": torch.tensor([[-1, -2, 0]] * 2).int()}, r"parents\[0, 1\]=-2 is not"),
    "negative temperature": ({"temperature": torch.tensor([0.0, -1.0])}, r"temperature\[1\]=-1"),
    "infinite temperature": ({"temperature": torch.tensor([torch.inf, 1.0])}, r"temperature\[0\]=inf must be finite"),
    "no temperature": ({"temperature": torch.tensor([torch.nan, 1.0])}, r"temperature\[0\]=nan must be finite"),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("case", OUTSIDE)
def test_values_out_of_range(name: str, case: str) -> None:
    change, words = OUTSIDE[case]
    with pytest.raises((ValueError, RuntimeError), match=words):
        ALL[name](*replaced(**change))


def test_gradients_are_refused_by_name() -> None:
    args = replaced()
    args[0].requires_grad_()
    with pytest.raises(RuntimeError, match="scrimp::tree_accept has no backward"):
        scrimp.ops.tree_accept(*args)
