"""vq_sample against its reference, the sampler of scrimp.generate on scattered logits, and its contract."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import scrimp
from scrimp._registry import OPS
from scrimp.methods.generation import Sampling
from scrimp.methods.generation.sampling import choose
from scrimp.testing import assert_rows_independent

OP = OPS["vq_sample"]
IMPLEMENTATIONS = scrimp.implementations("vq_sample")
ALL = IMPLEMENTATIONS | {"reference": OP.reference}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# top_k, top_p, min_p
FILTERS = {
    "none": (0, 1.0, 0.0),
    "top-k": (40, 1.0, 0.0),
    "top-p": (0, 0.8, 0.0),
    "min-p": (0, 1.0, 0.05),
    "all": (300, 0.95, 0.01),
    "more than all": (10**6, 1.0, 0.0),
}
HEADS = {"codes": (1, False), "bias": (1, True), "residual": (2, False), "residual and bias": (3, True)}


def head(V: int, K: int, kind: str = "codes", d: int = 24, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Codebook, codes and bias; the last code is the best of most rows and has no token."""
    levels, with_bias = HEADS[kind]
    codebook = torch.randn(K, d)
    codebook[-1] = 9.0
    codes = torch.randint(max(K - 1, 1), (levels, V), dtype=torch.int32)
    bias = torch.randn(V).to(dtype) if with_bias else None
    return codebook.to(dtype), codes[0] if levels == 1 else codes, bias


def numbers(rows: int, heat: float) -> tuple[Tensor, Tensor, Tensor]:
    """Temperatures, seeds and positions."""
    return torch.full((rows,), heat), torch.randint(-(2**62), 2**62, (rows,)), torch.randint(10**6, (rows,))


def test_implementations_exist() -> None:
    assert IMPLEMENTATIONS, scrimp.which("vq_sample")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("filters", FILTERS)
def test_is_the_reference(name: str, kind: str, filters: str) -> None:
    """Small integers, so that every sum is exact and equal logits are many."""
    for V, K, heat in ((1, 1, 1.0), (37, 5, 0.0), (1000, 30, 2.0), (1000, 30, 20.0)):
        codebook, codes, bias = head(V, K, kind)
        h, codebook = torch.randint(-2, 3, (6, 24)).float(), codebook.round().clamp(-3, 3)
        args = (h, codebook, codes, None if bias is None else bias.round(), *numbers(6, heat), *FILTERS[filters])
        assert torch.equal(IMPLEMENTATIONS[name](*args), OP.reference(*args))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_draw_of_generate_from_scattered_logits(name: str, kind: str, dtype: str) -> None:
    h, parts = torch.randn(40, 24).to(DTYPES[dtype]), head(3001, 100, kind, dtype=DTYPES[dtype])
    logits = scrimp.implementations("vq_logits")[name](h, *parts)
    for heat, filters in ((0.0, "none"), (0.7, "none"), (3.0, "none"), *((3.0, some) for some in FILTERS)):
        temperature, seed, position = numbers(40, heat)
        got = IMPLEMENTATIONS[name](h, *parts, temperature, seed, position, *FILTERS[filters])
        for row, token, own, at in zip(logits, got.tolist(), seed.tolist(), position.tolist(), strict=True):
            assert token == choose(row, at, Sampling(heat, *FILTERS[filters], seed=own)), filters


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("threads", [1, 2])
def test_many_tokens_and_threads(name: str, threads: int) -> None:
    """Several blocks of tokens, the last one odd; rows whose best code has no token among rows whose best code has."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for kind in ("codes", "residual and bias"):
            codebook, codes, bias = head(20_011, 60, kind)
            h = torch.randint(-2, 3, (6, 24)).float()
            h[2:4] = -torch.arange(24.0)  # the code without tokens scores least, in other rows often best
            bias = None if bias is None else bias.round()
            for heat in (0.0, 4.0):
                for filters in ("none", "all"):
                    args = (h, codebook.round().clamp(-3, 3), codes, bias, *numbers(6, heat), *FILTERS[filters])
                    assert torch.equal(IMPLEMENTATIONS[name](*args), OP.reference(*args))
    finally:
        torch.set_num_threads(before)


def chi_square(seen: Tensor, expected: Tensor) -> float:
    """The survival function of the chi-square test; tokens expected less than five times are pooled."""
    assert not seen[expected == 0].any()
    rare = expected < 5
    seen, expected = (torch.cat([x[~rare], x[rare].sum()[None]]).double() for x in (seen, expected))
    some = expected > 0
    statistic = ((seen - expected)[some] ** 2 / expected[some]).sum()
    return float(torch.special.gammaincc((some.sum() - 1) / 2, statistic / 2))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("filters", [(0, 1.0, 0.0), (8, 1.0, 0.0), (0, 0.7, 0.0)], ids=["none", "top-k", "top-p"])
def test_draws_have_the_distribution(name: str, kind: str, filters: tuple[int, float, float]) -> None:
    """8,000 seeds on 50 tokens of 9 codes, and as many positions, against the softmax of what is kept."""
    count, heat = 8000, 5.0
    parts, h = head(50, 9, kind), torch.randn(1, 24)
    scores = (OPS["vq_logits"].reference(h, *parts)[0] / heat).double()
    order = scores.sort(descending=True, stable=True)
    if filters[0]:
        scores = scores.masked_fill(scores < order.values[filters[0] - 1], -torch.inf)
    mass = order.values.softmax(0)
    scores[order.indices[mass.cumsum(0) - mass >= filters[1]]] = -torch.inf
    expected, many, fixed = count * scores.softmax(0), torch.arange(count), torch.full((count,), 17)
    for seed, position in ((many, fixed), (fixed, many)):
        got = IMPLEMENTATIONS[name](h.expand(count, 24), *parts, torch.full((count,), heat), seed, position, *filters)
        assert chi_square(torch.bincount(got, minlength=50), expected) > 1e-3
    assert chi_square(torch.bincount(got, minlength=50), count * (1.3 * scores).softmax(0)) < 1e-3


@pytest.mark.parametrize("name", ALL)
def test_equal_logits_give_the_lowest_id(name: str) -> None:
    h, codebook = torch.ones(1, 1), torch.tensor([[1.0], [2.0], [2.0], [5.0]])
    codes = torch.tensor([0, 2, 1, 0, 2] + 100 * [1], dtype=torch.int32)
    zero = torch.zeros(1, dtype=torch.int64)
    assert ALL[name](h, codebook, codes, None, torch.zeros(1), zero, zero, 0, 1.0, 0.0).tolist() == [1]
    # top_p keeps one of the many equal logits, the first
    for seed in range(20):
        args = (h, codebook, codes, None, torch.ones(1), zero + seed, zero, 0, 1e-6, 0.0)
        assert ALL[name](*args).tolist() == [1]


@pytest.mark.parametrize("name", ALL)
def test_flat_logits_keep_the_lower_half(name: str) -> None:
    """All tokens of one code: top_p counts them, top_k keeps the equals of the last."""
    h, codebook, codes = torch.ones(300, 1), torch.zeros(1, 1), torch.zeros(400, dtype=torch.int32)
    for bias in (None, torch.zeros(400)):
        temperature, seed, position = numbers(300, 1.0)
        half = ALL[name](h, codebook, codes, bias, temperature, seed, position, 0, 0.49999, 0.0)
        assert 190 <= int(half.max()) < 200
        every = ALL[name](h, codebook, codes, bias, temperature, seed, position, 3, 1.0, 0.0)
        assert int(every.max()) > 380


@pytest.mark.parametrize("name", ALL)
def test_broken_and_infinite_logits(name: str) -> None:
    inf, nan = torch.inf, torch.nan
    cases = [
        ([0.0, nan], -1, -1),
        ([-inf, -inf], -1, -1),
        ([0.0, inf], 1, 1),
        ([-inf, 1.0], 1, 1),
        ([nan, nan], -1, -1),
    ]
    codes = torch.tensor([0] * 3 + [1] * 60, dtype=torch.int32)
    for scores, greedy, drawn in cases:
        h, codebook, zero = torch.ones(1, 1), torch.tensor(scores)[:, None], torch.zeros(1, dtype=torch.int64)
        for heat, expected in ((0.0, greedy), (1.0, drawn)):
            for filters in ((0, 1.0, 0.0), (2, 0.9, 0.1)):
                got = ALL[name](h, codebook, codes, None, torch.tensor([heat]), zero, zero, *filters)
                code = -1 if int(got) < 0 else int(codes[int(got)])
                assert code == expected
                assert heat or int(got) in (-1, 0, 3)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_code_without_tokens_is_never_chosen(name: str) -> None:
    """Even if its score is NaN."""
    codebook, codes, _ = head(100, 5)
    codebook[-1] = torch.nan
    for filters in FILTERS.values():
        got = IMPLEMENTATIONS[name](torch.randn(9, 24), codebook, codes, None, *numbers(9, 1.0), *filters)
        assert (got >= 0).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_row_does_not_depend_on_the_others(name: str) -> None:
    parts = head(500, 40, "bias")
    _, seed, position = numbers(64, 1.0)
    heat = torch.rand(64)

    def call(h: Tensor, picked: Tensor) -> Tensor:
        index = picked[:, 0].nan_to_num(0, 0, 0).clamp(0, 63).long()
        return IMPLEMENTATIONS[name](h, *parts, heat[index], seed[index], position[index], 0, 0.9, 0.0)

    assert_rows_independent(call, torch.randn(64, 24), torch.arange(64.0)[:, None])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_strided_and_batched(name: str) -> None:
    codebook, codes, bias = head(300, 20, "bias")
    h, args = torch.randn(24, 3, 4).permute(1, 2, 0), [x.view(4, 3).T for x in numbers(12, 1.0)]
    got = IMPLEMENTATIONS[name](h, codebook, codes, bias, *args, 0, 1.0, 0.0)
    flat = [x.reshape(-1) for x in args]
    expected = IMPLEMENTATIONS[name](h.reshape(12, 24), codebook, codes, bias, *flat, 0, 1.0, 0.0)
    assert torch.equal(got.flatten(), expected)
    gaps = torch.stack([codes, codes], -1)[:, 0], torch.stack([bias, bias], -1)[:, 0]
    assert torch.equal(IMPLEMENTATIONS[name](h, codebook, *gaps, *args, 0, 1.0, 0.0), got)


@pytest.mark.parametrize("name", ALL)
def test_zero_size(name: str) -> None:
    parts = head(30, 4)
    for rows, V in (((0,), 30), ((2, 0), 30), ((0,), 0)):
        none = torch.zeros(rows, dtype=torch.int64)
        got = ALL[name](torch.zeros(*rows, 24), parts[0], parts[1][:V], None, none.float(), none, none, 0, 1.0, 0.0)
        assert got.shape == rows
        assert got.dtype == torch.int64
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises((ValueError, RuntimeError), match=r"codes of shape \[0\] offer no token"):
        ALL[name](torch.zeros(1, 24), parts[0], parts[1][:0], None, one.float(), one, one, 0, 1.0, 0.0)


def arguments(**changes: Any) -> list[Any]:
    """Arguments of the op, some of them replaced."""
    two = torch.zeros(2, dtype=torch.int64)
    every = {"h": torch.zeros(2, 8), "codebook": torch.zeros(5, 8), "codes": torch.zeros(9, dtype=torch.int32)}
    every |= {"bias": torch.zeros(9), "temperature": torch.ones(2), "seed": two, "position": two}
    return list((every | {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | changes).values())


def test_opcheck() -> None:
    opcheck(OP.call, arguments())
    opcheck(OP.call, arguments(bias=None, top_k=3, top_p=0.5, min_p=0.1))


def public(*args: Any) -> Tensor:
    names = ("temperature", "seed", "position", "top_k", "top_p", "min_p")
    return scrimp.ops.vq_sample(*args[:4], **dict(zip(names, args[4:], strict=True)))


def test_compiles_and_exports_as_one_node() -> None:
    args, graphs = tuple(arguments()), []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    class Head(torch.nn.Module):
        def forward(self, *args: Any) -> Tensor:
            return public(*args)

    expected = public(*args)
    exported = torch.export.export(Head(), args).module()
    for call in (torch.compile(public, backend=record, fullgraph=True), exported):
        assert torch.equal(call(*args), expected)
    for graph in (*graphs, exported):
        assert [str(node.target) for node in graph.graph.nodes].count("scrimp.vq_sample.default") == 1


TWO = torch.zeros(2)
BAD = {
    "integer h": ({"h": torch.zeros(2, 8).int()}, "h is int32; it must be float32"),
    "dtype of codebook": ({"codebook": torch.zeros(5, 8).bfloat16()}, "dtype of codebook is torch.bfloat16"),
    "rank of codebook": ({"codebook": torch.zeros(8)}, r"codebook has shape \[8\]"),
    "dtype of codes": ({"codes": torch.zeros(9).long()}, "codes is int64; it must be int32"),
    "no token": ({"codes": torch.zeros(0).int(), "bias": None}, r"codes of shape \[0\] offer no token"),
    "dtype of temperature": ({"temperature": TWO.double()}, "temperature is float64; it must be float32"),
    "dtype of seed": ({"seed": TWO}, "seed is float32; it must be int64"),
    "dtype of position": ({"position": TWO.int()}, "position is int32; it must be int64"),
    "shape of temperature": (
        {"temperature": torch.zeros(3)},
        r"temperature is \(3,\), but that of rows_of_h is \(2,\)",
    ),
    "shape of seed": ({"seed": torch.zeros(2, 1).long()}, r"seed is \(2, 1\)"),
    "shape of position": ({"position": torch.zeros(()).long()}, r"position is \(\)"),
    "device": ({"seed": torch.zeros(2, device="meta").long()}, "device of seed is meta"),
    "negative top_k": ({"top_k": -1}, "top_k=-1 must not be negative"),
    "no top_p": ({"top_p": 0.0}, r"top_p=0.0 must be above 0"),
    "NaN top_p": ({"top_p": math.nan}, r"top_p=nan must be above 0"),
    "large min_p": ({"min_p": 1.5}, r"min_p=1.5 must be from 0 to 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    changes, words = BAD[case]
    with pytest.raises(ValueError, match=f"vq_sample: .*{words}"):
        public(*arguments(**changes))
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        OP.call(*arguments(**changes))


LATE = torch.zeros(20_000, dtype=torch.int32)
LATE[12_345] = 5
OUTSIDE = {
    "code of a later block": ({"codes": LATE, "bias": None}, r"codes\[12345\]=5 is not one of the 5 rows"),
    "code of a later block, filtered": (
        {"codes": LATE, "bias": None, "top_k": 3},
        r"codes\[12345\]=5 is not one of the 5 rows",
    ),
    "code": ({"codes": torch.tensor([0, 5] + 7 * [0]).int()}, r"codes\[1\]=5 is not one of the 5 rows"),
    "negative code": ({"codes": torch.tensor(8 * [0] + [-1]).int()}, r"codes\[8\]=-1 is not one of the 5 rows"),
    "no codes": ({"codebook": torch.zeros(0, 8)}, r"codes\[0\]=0 is not one of the 0 rows"),
    "negative temperature": ({"temperature": torch.tensor([0.0, -1.0])}, "temperature of row 1 is -1"),
    "infinite temperature": ({"temperature": torch.tensor([torch.inf, 0.0])}, "temperature of row 0 is inf"),
    "no temperature": ({"temperature": torch.tensor([torch.nan, 0.0])}, "temperature of row 0 is nan"),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("case", OUTSIDE)
def test_values_out_of_range(name: str, case: str) -> None:
    changes, words = OUTSIDE[case]
    if name.startswith("cuda"):
        assert -1 in ALL[name](*arguments(**changes)).tolist()
        return
    with pytest.raises((ValueError, RuntimeError), match=words):
        ALL[name](*arguments(**changes))


def test_gradients_are_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match="scrimp::vq_sample has no backward"):
        public(*arguments(h=torch.zeros(2, 8).requires_grad_()))
