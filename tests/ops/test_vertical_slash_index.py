"""vertical_slash_index against its definition, its reference and its contract."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import scrimp
from scrimp import SparsePlan
from scrimp._registry import OPS
from scrimp.ops.vertical_slash_index import _check as check
from scrimp.ops.vertical_slash_index import column_scores
from scrimp.testing import oracle_tolerance

OP = OPS["vertical_slash_index"]
IMPLEMENTATIONS = scrimp.implementations("vertical_slash_index")
FIELDS = ("q", "k", "window", "columns", "max_columns", "sinks", "segment", "samples", "q_block", "q_offset", "scale")
Args = tuple[Any, ...]
Result = tuple[Tensor, Tensor, Tensor, Tensor]


def arguments(
    n_q: int,
    n_k: int | None = None,
    *,
    B: int = 1,
    H: int = 3,
    G: int = 1,
    D: int = 40,
    dtype: torch.dtype = torch.float32,
    window: int | list[int] = 20,
    columns: int | list[int] = 15,
    max_columns: int | None = None,
    sinks: int = 4,
    segment: int = 64,
    samples: int = 16,
    q_block: int = 16,
    q_offset: int | None = None,
) -> Args:
    """Flat arguments of the op with random q and k; one window and one number of columns serve all heads."""
    n_k = n_q if n_k is None else n_k
    q, k = torch.randn(B, H, n_q, D).to(dtype), torch.randn(B, G, n_k, D).to(dtype)
    budgets = [torch.tensor([x] * H if isinstance(x, int) else x, dtype=torch.int32) for x in (window, columns)]
    most = int(budgets[1].max()) if max_columns is None else max_columns
    offset = n_k - n_q if q_offset is None else q_offset
    return (q, k, *budgets, most, sinks, segment, samples, q_block, offset, D**-0.5)


def named(args: Args) -> dict[str, Any]:
    return dict(zip(FIELDS, args, strict=True))


def to_plan(result: Result, args: Args) -> SparsePlan:
    at = named(args)
    sizes = {"q_block": at["q_block"], "n_q": at["q"].shape[2], "n_k": at["k"].shape[2], "q_offset": at["q_offset"]}
    return SparsePlan(*result, **sizes, causal=True).validate()


def reference(args: Args, dtype: torch.dtype = torch.float64) -> Result:
    result: Result = OP.reference(args[0].to(dtype), args[1].to(dtype), *args[2:])
    return result


def segment_scores(args: Args, start: int, dtype: torch.dtype) -> Tensor:
    """`[B, H, n_k]`: the mass of each key for the segment that starts at query `start`, by the reference."""
    at = named(args)
    stop, stride = min(start + at["segment"], at["q"].shape[2]), at["segment"] // at["samples"]
    rows = torch.arange(start + stride - 1, stop + stride - 1, stride).clamp(max=stop - 1)
    low = rows // at["q_block"] * at["q_block"] + at["q_offset"] - at["window"].long()[:, None]
    low = low.clamp(0, at["k"].shape[2])
    low = low.masked_fill(low <= at["sinks"], 0)
    return column_scores(at["q"].to(dtype), at["k"].to(dtype), rows, low, at["sinks"], at["q_offset"], at["scale"])


def assert_plan(got: Result, args: Args) -> None:
    """Ranges as the float64 reference has them; columns of (nearly) the same mass, whatever rounding chose.

    A score that errs by at most E can be taken for one that is 2 E better: so much may each exchanged column cost.
    """
    at, expected = named(args), reference(args)
    for value, truth in zip(got, expected, strict=True):
        assert value.shape == truth.shape
        assert value.dtype == torch.int32
    to_plan(got, args)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[3][..., 0], expected[3][..., 0])
    n_q, q_block, width = at["q"].shape[2], at["q_block"], at["max_columns"]
    for s, start in enumerate(range(0, n_q, at["segment"])):
        first, last = start // q_block, -(-min(start + at["segment"], n_q) // q_block) - 1
        exact, plain = (segment_scores(args, start, dtype) for dtype in (torch.float64, at["q"].dtype))
        bound = 2 * oracle_tolerance(exact, plain)
        for b in range(got[2].shape[0]):
            for h in range(got[2].shape[1]):
                mine, theirs = (x[2][b, h, s * width :][: int(x[3][b, h, last, 1])].long() for x in (got, expected))
                assert len(mine) == len(theirs) <= min(width, int(at["columns"][h]))
                assert (mine.diff() > 0).all()
                assert (got[2][b, h, s * width :][len(mine) : width] == 0).all()
                windows = got[0][b, h, 2 * first + 1 : 2 * last + 2 : 2, 0]
                assert torch.equal(got[3][b, h, first : last + 1, 1].long(), (mine < windows[:, None]).sum(1))
                if len(mine):
                    assert int(mine[0]) >= at["sinks"]
                    exchanged = int((~torch.isin(mine, theirs)).sum())
                    short = (exact[b, h, theirs].sum() - exact[b, h, mine].sum()).item()
                    assert short <= bound * exchanged, f"head {h}, segment {s}: {short} over {bound} x {exchanged}"


def separated(n: int, dtype: torch.dtype = torch.float32, **changes: Any) -> Args:
    """Arguments with n <= 256 keys whose scores differ by 3 % and more, in any order: rounding cannot exchange them."""
    args = arguments(n, dtype=dtype, D=8, **changes)
    q, k = torch.zeros_like(args[0]), torch.zeros_like(args[1])
    q[..., 0] = 1
    for head in k.flatten(0, 1):
        head[:, 0] = torch.randperm(n) / 32
    return (q, k, *args[2:-1], 1.0)


def test_implementations_exist() -> None:
    assert IMPLEMENTATIONS, scrimp.which("vertical_slash_index")


def test_reference_is_the_definition() -> None:
    """One head, one loop: softmax rows, sums outside sinks and window, sorted."""
    args = arguments(100, H=1, columns=6)
    at, plan = named(args), to_plan(reference(args), args)
    q, k, mask = args[0][0, 0].double(), args[1][0, 0].double(), plan.to_mask()[0, 0]
    for start in (0, 64):
        score, stop = torch.zeros(100, dtype=torch.float64), min(start + 64, 100)
        for i in range(start + 3, stop, 4):
            mass = (q[i] @ k[: i + 1].T * at["scale"]).softmax(0)
            low = i // 16 * 16 - 20
            if low > 4:
                score[4:low] += mass[4:low]
        best = [j for j in score.argsort(descending=True, stable=True).tolist() if score[j] > 0][:6]
        for i in range(start, stop):
            low = i // 16 * 16 - 20
            seen = {j for j in range(100) if j <= i and (low <= 4 or j < 4 or j >= low or j in best)}
            assert seen == set(mask[i].nonzero()[:, 0].tolist())


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("n", [1, 63, 65, 200, 1000])
def test_sizes(name: str, n: int) -> None:
    args = arguments(n)
    assert_plan(IMPLEMENTATIONS[name](*args), args)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("D", [1, 19, 64, 111, 128, 256])
def test_head_sizes(name: str, dtype: torch.dtype, D: int) -> None:
    args = arguments(150, D=D, B=2, H=4, G=2, dtype=dtype)
    assert_plan(IMPLEMENTATIONS[name](*args), args)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("H", "G"), [(1, 1), (9, 3), (8, 1), (5, 5)])
def test_head_groups_and_batch(name: str, H: int, G: int) -> None:
    args = arguments(140, B=2, H=H, G=G)
    assert_plan(IMPLEMENTATIONS[name](*args), args)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("n_q", "n_k"), [(10, 250), (130, 131), (1, 300), (150, 40)])
@pytest.mark.parametrize("q_offset", [None, -30, 0, 55, 1000])
def test_chunks_of_a_longer_sequence(name: str, n_q: int, n_k: int, q_offset: int | None) -> None:
    args = arguments(n_q, n_k, q_offset=q_offset)
    assert_plan(IMPLEMENTATIONS[name](*args), args)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_more_keys_than_scratch_keeps(name: str) -> None:
    args = arguments(70, 17000, H=2, D=8, columns=[40, 3])
    assert_plan(IMPLEMENTATIONS[name](*args), args)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("segment", "samples", "q_block"),
    [(16, 1, 16), (64, 2, 64), (48, 24, 16), (96, 32, 48), (128, 64, 64), (192, 96, 32), (256, 256, 64), (20, 5, 10)],
)
def test_segments_and_samples(name: str, segment: int, samples: int, q_block: int) -> None:
    """Rows that fill a part of the lanes, all of them, or more than there are; the last segment is never whole."""
    args = arguments(301, segment=segment, samples=samples, q_block=q_block)
    assert_plan(IMPLEMENTATIONS[name](*args), args)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("sinks", [0, 1, 70, 5000])
def test_heads_have_budgets_of_their_own(name: str, sinks: int) -> None:
    """No window, a huge one; no columns, more than max_columns, more than there are keys."""
    windows, columns = [0, 0, 2**31 - 1, 30, 300, 77], [0, 2**31 - 1, 9, 25, 9, 1]
    for most in (0, 20, 500):
        args = arguments(310, H=6, G=2, window=windows, columns=columns, max_columns=most, sinks=sinks)
        assert_plan(IMPLEMENTATIONS[name](*args), args)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("samples", [4, 16])
def test_equals_the_reference_where_scores_are_well_separated(name: str, dtype: torch.dtype, samples: int) -> None:
    args = separated(250, dtype, B=2, H=6, G=2, samples=samples, columns=[0, 1, 5, 20, 60, 250], window=33)
    for value, truth in zip(IMPLEMENTATIONS[name](*args), reference(args), strict=True):
        assert torch.equal(value, truth)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_equal_scores_prefer_the_lower_key(name: str) -> None:
    args = arguments(250, columns=[7, 40, 250])
    args = (args[0], torch.ones_like(args[1]), *args[2:])
    got = IMPLEMENTATIONS[name](*args)
    assert got[2][0, 0, -7:].max() == 0  # max_columns is 250, the first head has 7
    assert got[2][0, 0, 3 * 250 : 3 * 250 + 7].tolist() == list(range(4, 11))
    for value, truth in zip(got, reference(args), strict=True):
        assert torch.equal(value, truth)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_key_that_is_not_finite_silences_the_rows_that_see_it(name: str, value: float) -> None:
    args = separated(250, H=3)
    args[1][0, 0, 130, 0] = value
    got = IMPLEMENTATIONS[name](*args)
    for mine, truth in zip(got, reference(args), strict=True):
        assert torch.equal(mine, truth)
    to_plan(got, args)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_large_scores_do_not_overflow(name: str) -> None:
    args = separated(250, H=3, columns=1)
    args = (args[0], args[1] * 1000, *args[2:])
    for mine, truth in zip(IMPLEMENTATIONS[name](*args), reference(args), strict=True):
        assert torch.equal(mine, truth)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_strided_inputs(name: str, dtype: torch.dtype) -> None:
    args = separated(140, dtype, B=2, H=4, G=2)
    expected = IMPLEMENTATIONS[name](*args)
    token_major = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in args[:2]]
    last_not_unit = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in args[:2]]
    wide = [torch.stack([t, t], 3)[:, :, :, 1] for t in args[:2]]
    budgets = [torch.stack([t, t], 1)[:, 0] for t in args[2:4]]
    for q, k in (token_major, last_not_unit, wide):
        for value, truth in zip(IMPLEMENTATIONS[name](q, k, *budgets, *args[4:]), expected, strict=True):
            assert torch.equal(value, truth)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("B", "H", "n_q", "n_k", "D"),
    [(0, 2, 5, 5, 8), (1, 0, 5, 5, 8), (1, 2, 0, 5, 8), (1, 2, 90, 0, 8), (1, 2, 90, 90, 0)],
)
def test_zero_size(name: str, B: int, H: int, n_q: int, n_k: int, D: int) -> None:
    args = arguments(n_q, n_k, B=B, H=H, G=H, D=max(D, 1), columns=[3] * H, max_columns=3, q_offset=0)
    args = (args[0][..., :D], args[1][..., :D], *args[2:])
    got = IMPLEMENTATIONS[name](*args)
    if B * H * n_q == 0:
        args = tuple(x.to("meta") if isinstance(x, Tensor) else x for x in args)
        assert [x.shape for x in got] == [x.shape for x in OP.call(*args)]
    else:
        for value, truth in zip(got, reference(args), strict=True):
            assert torch.equal(value, truth)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_same_bits_for_any_thread_count(name: str) -> None:
    args, threads = arguments(700, B=2, H=4, G=2), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = IMPLEMENTATIONS[name](*args)
        torch.set_num_threads(3)
        three = IMPLEMENTATIONS[name](*args)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_a_tile_sees_no_more_keys_than_were_asked_for() -> None:
    window, columns = torch.tensor([0, 50, 100, 900]).int(), torch.tensor([30, 0, 70, 5]).int()
    q, k = torch.randn(1, 4, 600, 16), torch.randn(1, 2, 600, 16)
    plan = scrimp.ops.vertical_slash_index(q, k, window, columns, sinks=8, segment=128, q_block=32).validate()
    assert (plan.tile_cost() <= 8 + window[:, None] + 32 + columns[:, None]).all()
    assert (plan.density(per_head=True)[0] < torch.tensor([0.3, 0.3, 0.7, 1.1])).all()
    assert plan.density(per_head=True)[0, 3] == 1


def test_the_public_function_fills_in_the_rest() -> None:
    q, k = torch.randn(1, 2, 100, 16), torch.randn(1, 1, 300, 16)
    window, columns = torch.tensor([10, 20]).int(), torch.tensor([5, 9]).int()
    plan = scrimp.ops.vertical_slash_index(q, k, window, columns)
    assert (plan.q_block, plan.n_q, plan.n_k, plan.q_offset, plan.causal) == (64, 100, 300, 200, True)
    flat = OP.call(q, k, window, columns, 9, 16, 512, 16, 64, 200, 0.25)
    for value, truth in zip((plan.ranges, plan.range_slice, plan.columns, plan.column_slice), flat, strict=True):
        assert torch.equal(value, truth)


def test_attention_over_the_plan_keeps_the_columns_that_matter() -> None:
    """Three keys that every query looks for are found: sparse attention is close to dense, without them it is not."""
    n = 400
    q, k, v = torch.randn(1, 1, n, 32), torch.randn(1, 1, n, 32), torch.randn(1, 1, n, 32)
    k[..., 0], q[..., 0] = 0, 10
    k[0, 0, [60, 90, 130], 0] = 5
    window = torch.tensor([32]).int()
    dense = scrimp.ops.sparse_attention(q, k, v, SparsePlan.dense(n))[0][:, :, 200:]
    errors = []
    for columns in (0, 3):
        plan = scrimp.ops.vertical_slash_index(q, k, window, torch.tensor([columns]).int(), segment=64, samples=8)
        errors.append((scrimp.ops.sparse_attention(q, k, v, plan)[0][:, :, 200:] - dense).norm() / dense.norm())
    assert errors[0] > 0.5
    assert errors[1] < 0.1


def test_opcheck() -> None:
    opcheck(OP.call, arguments(90, B=2, H=4, G=2))
    opcheck(OP.call, arguments(30, 145, dtype=torch.bfloat16))


def test_compiles_as_one_node() -> None:
    graphs = []

    def record(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    q, k, window, columns, *_ = arguments(90)

    def estimate(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        plan = scrimp.ops.vertical_slash_index(q, k, window, columns, segment=64, max_columns=15)
        return plan.columns, plan.ranges

    compiled = torch.compile(estimate, backend=record, fullgraph=True)
    for got, expected in zip(compiled(q, k), estimate(q, k), strict=True):
        assert torch.equal(got, expected)
    assert [str(n.target) for n in graphs[0].graph.nodes].count("scrimp.vertical_slash_index.default") == 1


def test_gradients_are_refused_by_name() -> None:
    args = arguments(20)
    with pytest.raises(RuntimeError, match="scrimp::vertical_slash_index has no backward"):
        OP.call(args[0].requires_grad_(), *args[1:])


GOOD = arguments(100, H=4, G=2)
Q, K, WINDOW, COLUMNS = GOOD[:4]


def change(**changes: Any) -> Args:
    return tuple(changes.get(name, value) for name, value in zip(FIELDS, GOOD, strict=True))


# What Python says, what C++ says; one may not look (Python at contents, C++ at devices it is not for).
BAD = {
    "rank of q": (change(q=Q[0]), r"q must be \[batch, heads, tokens, D\], got shape \[4, 100, 40\]", r"q must be \[B"),
    "integer q": (change(q=Q.int()), "q is int32; it must be float32", "q must be float32 or bfloat16"),
    "float64 on the CPU": (change(q=Q.double(), k=K.double()), None, "q must be float32 or bfloat16 on the CPU"),
    "mixed dtype": (change(k=K.bfloat16()), "dtype of k is torch.bfloat16", "k and q differ in dtype"),
    "device": (change(k=K.to("meta")), "device of k is meta, but that of q is cpu", None),
    "batch": (change(k=K[:0]), r"k has shape \[0, 2, 100, 40\]", r"k \[0, 2, 100, 40\] do not fit"),
    "head size": (change(q=Q[..., :9]), r"but q \[1, 4, 100, 9\]", r"q \[1, 4, 100, 9\] and k"),
    "heads": (change(q=Q[:, :3]), "3 query heads are not a multiple of 2", "3 query heads are not a multiple of 2"),
    "no key heads": (change(k=K[:, :0]), "4 query heads are not a multiple of 0", "not a multiple of 0"),
    "head size above 256": (arguments(9, D=300), "head size D=300 is above 256", "head size D=300 is above 256"),
    "int64 window": (change(window=WINDOW.long()), "window is int64; it must be int32", "window must be int32"),
    "short window": (change(window=WINDOW[:3]), r"window must be \[H=4\], .* \[3\]", r"window must be .* \[3\]"),
    "rank of columns": (change(columns=COLUMNS[None]), r"columns must be \[H=4\]", r"columns must be .* \[1, 4\]"),
    "negative window": (change(window=torch.tensor([1, 2, -5, 3]).int()), None, r"window\[2\]=-5 must not be negative"),
    "negative columns": (change(columns=torch.tensor([0, -1, 2, 3]).int()), None, r"columns\[1\]=-1 must not be neg"),
    "max_columns": (change(max_columns=-2), "max_columns=-2 must be at least 0", "max_columns=-2 must be at least 0"),
    "huge max_columns": (change(max_columns=2**31 - 1), None, "max_columns=2147483647 for each of 2 segments"),
    "sinks": (change(sinks=-1), "sinks=-1 must be at least 0", "sinks=-1 must be at least 0"),
    "no samples": (change(samples=0), "samples=0 must be at least 1", "segment=64 must be a multiple of samples=0"),
    "samples": (change(samples=15), "segment=64 must be a multiple of samples=15", "segment=64 must be a multiple of"),
    "no tile": (change(q_block=0), "segment=64 must be a positive multiple of q_block=0", "multiple of q_block=0"),
    "segment": (change(segment=100), "segment=100 must be a positive multiple of q_block=16", "segment=100 must be"),
    "no segment": (change(segment=0), "segment=0 must be a positive multiple", "segment=0 must be a positive multiple"),
    "far offset": (change(q_offset=2**40), None, "q_offset=1099511627776 does not fit int32"),
    "nan scale": (change(scale=float("nan")), "scale=nan must be finite", "scale=-?nan must be finite"),
    "infinite scale": (change(scale=float("inf")), "scale=inf must be finite", "scale=inf must be finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    """The fake and the public function check in Python, the kernel again before it touches memory."""
    args, python, cpp = BAD[case]
    if python is not None:
        with pytest.raises(ValueError, match=f"^vertical_slash_index: .*{python}"):
            check(*args)
    with pytest.raises(
        (RuntimeError, NotImplementedError, ValueError), match=cpp and f"^vertical_slash_index: .*{cpp}"
    ):
        OP.call(*args)
