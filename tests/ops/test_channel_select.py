"""channel_select against its reference, its definition and its contract."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import scrimp
from scrimp._registry import OPS
from scrimp.ops.channel_select import RULES
from scrimp.testing import oracle_tolerance, same_bits

OP = OPS["channel_select"]
IMPLEMENTATIONS = scrimp.implementations("channel_select")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = [(1,), (7,), (1, 64), (2, 3, 33), (5, 257), (1, 4099), (64, 130), (70, 19)]
LEVELS = {"threshold": 0.6, "relative": 0.9, "top_k": 0.5, "top_p": 0.9}
Args = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, int, bool]


def arguments(shape: tuple[int, ...], rule: str, dtype: torch.dtype = torch.float32, common: bool = False) -> Args:
    """Half of the channels or so, with scale and center, every third row whole."""
    K = shape[-1]
    level = torch.tensor([float(round(LEVELS[rule] * K)) if rule == "top_k" else LEVELS[rule]])
    whole = (torch.arange(torch.Size(shape[:-1]).numel()) % 3 == 2).view(shape[:-1])
    x = torch.randn(shape).to(dtype)
    return x, level, 0.5 + torch.rand(K), 0.2 * torch.randn(K), whole, RULES.index(rule), common


def assert_selects_like(got: tuple[Tensor, ...], args: Args) -> None:
    """The same channels as the reference, and numbers as near as its own rounding."""
    plain = OP.reference(*args)
    exact = OP.reference(*(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args))
    assert torch.equal(plain[1], exact[1]), "the case is too close to call"
    for name, mine, rough, truth in zip(("kept", "index", "count", "energy"), got, plain, exact, strict=True):
        assert (mine.shape, mine.dtype) == (rough.shape, rough.dtype), name
        if mine.is_floating_point() and mine.numel():
            assert torch.equal(mine == 0, rough == 0), name
            assert (mine.double() - truth).abs().max() <= oracle_tolerance(truth, rough), name
        else:
            assert torch.equal(mine, rough), name


def test_implementations_exist() -> None:
    assert IMPLEMENTATIONS, scrimp.which("channel_select")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("common", [False, True], ids=["union", "common"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oracle(name: str, rule: str, common: bool, shape: tuple[int, ...]) -> None:
    for dtype in DTYPES.values():
        args = arguments(shape, rule, dtype, common)
        assert_selects_like(IMPLEMENTATIONS[name](*args), args)
        plain = (*args[:2], None, None, None, *args[5:])
        assert_selects_like(IMPLEMENTATIONS[name](*plain), plain)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", RULES)
def test_strided(name: str, rule: str) -> None:
    x, level, _, _, _, *rest = arguments((6, 5, 40), rule)
    wide = torch.randn(40, 3)
    for some in (x.transpose(0, 1), torch.randn(40, 7).T, x[::2, 1:, :], torch.randn(6, 80)[:, ::2]):
        args = (some, level, wide[:, 1].abs(), wide[:, 2], None, *rest)
        assert_selects_like(IMPLEMENTATIONS[name](*args), args)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), (0, 0)], ids=str)
def test_zero_size(name: str, shape: tuple[int, ...]) -> None:
    for rule in RULES:
        for common in (False, True):
            kept, index, count, energy = IMPLEMENTATIONS[name](*arguments(shape, rule, common=common))
            assert (kept.shape, energy.shape, count.item()) == (shape, (*shape[:-1], 2), 0)
            assert index.tolist() == [-1] * shape[-1]
            assert not energy.any()


@pytest.mark.parametrize("run", [OP.reference, *IMPLEMENTATIONS.values()], ids=["reference", *IMPLEMENTATIONS])
def test_by_hand(run: Any) -> None:
    """Scores 3, 1, 2, 2, 0; of the two 2 the first is the larger."""
    x = torch.tensor([[3.0, -1.0, 3.0, -1.0, 1.0]])
    scale, center = torch.tensor([1.0, 1.0, 1.0, 1.0, 5.0]), torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])
    wanted = {("threshold", 1.0): [0, 2, 3], ("relative", 1.25): [0], ("top_k", 2.0): [0, 2], ("top_k", 0.0): []}
    wanted |= {("top_p", 0.5): [0], ("top_p", 0.51): [0, 2], ("top_p", 0.0): [], ("top_p", 1.0): [0, 1, 2, 3]}
    wanted |= {("top_k", 5.0): [0, 1, 2, 3, 4], ("threshold", 0.0): [0, 1, 2, 3], ("threshold", 9.0): []}
    for (rule, level), channels in wanted.items():
        kept, index, count, energy = run(x, torch.tensor([level]), scale, center, None, RULES.index(rule), False)
        assert index[: count.item()].tolist() == channels, (rule, level)
        assert energy[0].tolist() == [18.0 - sum([9.0, 1.0, 4.0, 4.0, 0.0][i] for i in channels), 18.0]
        assert kept[0].tolist() == [[3.0, -1.0, 2.0, -2.0, 0.0][i] if i in channels else 0.0 for i in range(5)]


@pytest.mark.parametrize("run", [OP.reference, *IMPLEMENTATIONS.values()], ids=["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("rule", RULES)
def test_nan_is_kept_and_zeros_are_defined(run: Any, rule: str) -> None:
    x = torch.zeros(2, 40)
    x[0, 7] = torch.nan
    for level in (0.0, 0.5, 3.0):
        kept, index, count, energy = run(x, torch.tensor([level]), None, None, None, RULES.index(rule), False)
        assert kept[0, 7].isnan()
        assert 7 in index[: count.item()].tolist()
        assert energy[0, 1].isnan()
        assert not kept[1].any()
        assert not energy[1].any()


@pytest.mark.parametrize("run", [OP.reference, *IMPLEMENTATIONS.values()], ids=["reference", *IMPLEMENTATIONS])
def test_nan_counts_among_the_best_k(run: Any) -> None:
    """As many as are asked for: nothing else is kept; an infinite score goes like any other."""
    x = torch.tensor([[1.0, torch.nan, torch.inf, 3.0]])
    for k, expected in ((1.0, [1]), (2.0, [1, 2]), (3.0, [1, 2, 3])):
        _, index, count, energy = run(x, torch.tensor([k]), None, None, None, RULES.index("top_k"), False)
        assert index[: int(count)].tolist() == expected
        assert energy[0, 0] == (torch.inf if k == 1 else 10 if k == 2 else 1)


@pytest.mark.parametrize("run", [OP.reference, *IMPLEMENTATIONS.values()], ids=["reference", *IMPLEMENTATIONS])
def test_an_infinite_score_that_is_kept_is_not_dropped_energy(run: Any) -> None:
    x = torch.tensor([[1.0, -torch.inf, 2.0]])
    energy = run(x, torch.tensor([5.0]), None, None, None, RULES.index("threshold"), False)[3]
    assert energy.tolist() == [[5.0, torch.inf]]


@pytest.mark.parametrize("run", [OP.reference, *IMPLEMENTATIONS.values()], ids=["reference", *IMPLEMENTATIONS])
def test_infinity_is_kept_beside_a_mean_that_it_makes_infinite(run: Any) -> None:
    x = torch.tensor([[1.0, -torch.inf, 2.0]])
    kept, index, count, _ = run(x, torch.tensor([0.5]), None, None, None, RULES.index("relative"), False)
    assert (kept.tolist(), index.tolist(), count.item()) == ([[0.0, -torch.inf, 0.0]], [1, -1, -1], 1)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", RULES)
def test_a_row_does_not_depend_on_the_others(name: str, rule: str) -> None:
    """Bits of kept and energy for any number of rows and threads, beside poison; the list is the union."""
    run, before = IMPLEMENTATIONS[name], torch.get_num_threads()
    x, level, scale, center, whole, which, _ = arguments((64, 577), rule)
    rows = [run(x[m : m + 1], level, scale, center, whole[m : m + 1], which, False) for m in range(64)]
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for count in (1, 2, 5, 33, 64):
                kept, index, listed, energy = run(x[:count], level, scale, center, whole[:count], which, False)
                for m in range(count):
                    assert same_bits(kept[m], rows[m][0][0])
                    assert same_bits(energy[m], rows[m][3][0])
                union = set().union(*(row[1][: row[2].item()].tolist() for row in rows[:count]))
                assert index[: listed.item()].tolist() == sorted(union)
    finally:
        torch.set_num_threads(before)
    x[1:] = torch.nan
    assert same_bits(run(x, level, scale, center, whole, which, False)[0][0], rows[0][0][0])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_many_equal_scores(name: str) -> None:
    x = torch.tensor([2.0, 1.0]).repeat(50).view(1, 100)
    for rule, level, most in (("top_k", 60, 60), ("top_p", 0.9, 75)):
        args = (x, torch.tensor([float(level)]), None, None, None, RULES.index(rule), False)
        got = IMPLEMENTATIONS[name](*args)
        assert_selects_like(got, args)
        assert got[2].item() == most


def test_public_function() -> None:
    x, level, scale, center, whole, _, _ = arguments((4, 30), "top_k")
    for given in (level, level.item()):
        got = scrimp.ops.channel_select(x, given, rule="top_k", scale=scale, center=center, whole=whole, common=True)
        expected = OP.call(x, level, scale, center, whole, RULES.index("top_k"), True)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with pytest.raises(ValueError, match="channel_select: rule='best' must be one of threshold, relative, top_k"):
        scrimp.ops.channel_select(x, level, rule="best")
    for bad in (-0.5, float("nan")):
        with pytest.raises(ValueError, match=f"channel_select: level={bad} must be at least 0"):
            scrimp.ops.channel_select(x, bad)


def test_opcheck() -> None:
    for rule in RULES:
        for common in (False, True):
            opcheck(OP.call, arguments((2, 3, 9), rule, common=common))
    x, level, *_ = arguments((2, 9), "threshold", torch.bfloat16)
    opcheck(OP.call, (x, level, None, None, None, 0, False))


def test_compiles_and_exports_as_one_node() -> None:
    args = arguments((5, 8), "relative")
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, level: Tensor, scale: Tensor, center: Tensor, whole: Tensor) -> Any:
            return scrimp.ops.channel_select(x, level, rule="relative", scale=scale, center=center, whole=whole)

    expected = OP.call(*args)
    exported = torch.export.export(Layer(), args[:5]).module()
    compiled = torch.compile(Layer(), backend=record, fullgraph=True)
    for got in (compiled(*args[:5]), exported(*args[:5])):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    for graph in (*graphs, exported):
        assert [str(node.target) for node in graph.graph.nodes].count("scrimp.channel_select.default") == 1


X, L, V = torch.zeros(2, 3, 8), torch.zeros(1), torch.zeros(8)
W = torch.zeros(2, 3, dtype=torch.bool)
BAD = {
    "scalar x": ((X[0, 0, 0], L, None, None, None), r"x must be \[.., K\], got a scalar"),
    "integer x": ((X.int(), L, None, None, None), "x is int32; it must be float32"),
    "levels": ((X, V, None, None, None), r"level must be one number, \[1\], got shape \[8\]"),
    "half level": ((X, L.half(), None, None, None), "level is float16; it must be float32"),
    "size of scale": ((X, L, V[:7], None, None), r"scale must be \[K=8\], one number a channel, got \[7\]"),
    "dtype of scale": ((X.half(), L, V.half(), None, None), "scale is float16; it must be float32"),
    "rank of center": ((X, L, None, X, None), r"center must be \[K=8\], one number a channel, got \[2, 3, 8\]"),
    "integer whole": ((X, L, None, None, W.int()), "whole is int32; it must be bool"),
    "rows of whole": ((X, L, None, None, W[0]), r"shape of whole is \(3,\), but that of rows_of_x is \(2, 3\)"),
    "device": ((X, L, None, V.to("meta"), None), "device of center is meta, but that of x is cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    (x, level, scale, center, whole), words = BAD[case]
    with pytest.raises(ValueError, match=f"channel_select: .*{words}"):
        scrimp.ops.channel_select(x, level, scale=scale, center=center, whole=whole)
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        OP.call(x, level, scale, center, whole, 0, False)


def test_unknown_rule() -> None:
    with pytest.raises(RuntimeError, match="rule=4"):
        OP.call(X, L, None, None, None, 4, False)
    with pytest.raises(ValueError, match="channel_select: rule=4 must be an index of"):
        OP.reference(X, L, None, None, None, 4, False)


def test_gradients_are_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match="scrimp::channel_select has no backward"):
        scrimp.ops.channel_select(torch.zeros(3, requires_grad=True), 1.0)
