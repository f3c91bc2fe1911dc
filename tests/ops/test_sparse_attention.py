"""sparse_attention against its reference, masked dense attention and its contract."""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

import scrimp
from scrimp import SparsePlan
from scrimp._registry import OPS
from scrimp.ops.sparse_attention import _check as check
from scrimp.testing import assert_matches_oracle

OP = OPS["sparse_attention"]
IMPLEMENTATIONS = scrimp.implementations("sparse_attention")
NAMES = ("out", "lse")


def inputs(
    n_q: int,
    n_k: int | None = None,
    B: int = 1,
    H: int = 3,
    G: int = 1,
    D: int = 40,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    n_k = n_q if n_k is None else n_k
    return tuple(torch.randn(B, heads, n, D).to(dtype) for heads, n in ((H, n_q), (G, n_k), (G, n_k)))  # type: ignore


def flat(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, scale: float | None = None) -> tuple[object, ...]:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tensors = (plan.ranges, plan.range_slice, plan.columns, plan.column_slice, plan.row_start)
    return (q, k, v, *tensors, plan.q_block, plan.q_offset, plan.causal, scale)


def plans(n: int) -> dict[str, SparsePlan]:
    """One plan of every constructor, for n queries over n keys."""
    blocks = torch.rand(1, 3, -(-n // 64), -(-n // 32)) < 0.4
    return {
        "dense": SparsePlan.dense(n),
        "bidirectional": SparsePlan.dense(n, causal=False),
        "a_shape": SparsePlan.a_shape(n, sink=5, window=70),
        "tri_shape": SparsePlan.tri_shape(n, sink=5, window=33, last=40),
        "sliding_window": SparsePlan.sliding_window(n, window=50),
        "vertical_slash": SparsePlan.vertical_slash(
            n, columns=[sorted({0, n // 3, n // 2}), [n - 1], []], diagonals=[[0, min(7, n - 1), n // 2], [0], [n // 3]]
        ),
        "blocks": SparsePlan.from_block_mask(blocks, q_block=64, k_block=32, n_q=n, n_k=n),
        "documents": SparsePlan.from_documents([n // 3, n - n // 3]),
        "padded": SparsePlan.dense(n).with_padding([n // 2]),
        "nothing": SparsePlan.from_block_mask(torch.zeros_like(blocks), q_block=64, k_block=32, n_q=n, n_k=n),
    }


def masked_dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, in float64."""
    repeats = q.shape[1] // k.shape[1]
    q, k, v = (t.double() for t in (q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)))
    scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(nan=0.0) @ v, scores.logsumexp(-1)


def test_implementations_exist() -> None:
    assert IMPLEMENTATIONS, scrimp.which("sparse_attention")


@pytest.mark.parametrize("kind", plans(64))
@pytest.mark.parametrize("n", [64, 19, 201])
def test_reference_is_masked_dense_attention(kind: str, n: int) -> None:
    q, k, v = inputs(n)
    plan = plans(n)[kind]
    out, lse = OP.reference(*flat(q, k, v, plan))
    exact_out, exact_lse = masked_dense(q, k, v, plan.to_mask())
    torch.testing.assert_close(out.double(), exact_out, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse.double(), exact_lse, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", plans(64))
@pytest.mark.parametrize("n", [1, 63, 65, 200])
def test_every_plan(name: str, kind: str, n: int) -> None:
    args = flat(*inputs(n, B=16 if n == 1 else 1), plans(n)[kind])  # a bound needs more than a few numbers
    assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args, names=NAMES)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("D", [1, 19, 64, 111, 128, 256])
def test_head_sizes(name: str, dtype: torch.dtype, D: int) -> None:
    q, k, v = inputs(77, D=D, B=2, H=4, G=2, dtype=dtype)
    args = flat(q, k, v, SparsePlan.a_shape(77, sink=3, window=40))
    assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args, names=NAMES)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("H", "G"), [(1, 1), (9, 3), (8, 1), (5, 5)])
def test_head_groups_and_batch(name: str, H: int, G: int) -> None:
    args = flat(*inputs(70, B=2, H=H, G=G), SparsePlan.sliding_window(70, window=20))
    assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args, names=NAMES)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("n_q", "n_k"), [(10, 150), (130, 131), (1, 300), (150, 40)])
@pytest.mark.parametrize("q_block", [16, 64, 100, 128])
def test_chunks_of_a_longer_sequence(name: str, n_q: int, n_k: int, q_block: int) -> None:
    plan = SparsePlan.dense(n_q, n_k, q_block=q_block)
    args = flat(*inputs(n_q, n_k), plan)
    assert plan.q_offset == n_k - n_q
    assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args, names=NAMES)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("q_offset", [-30, 0, 55, 1000])
def test_offsets(name: str, q_offset: int) -> None:
    args = flat(*inputs(80, 90), SparsePlan.dense(80, 90, q_offset=q_offset))
    out, lse = IMPLEMENTATIONS[name](*args)
    assert_matches_oracle((out, lse), OP.reference, *args, names=NAMES)
    empty = max(0, -q_offset)
    assert (lse[:, :, :empty] == -torch.inf).all()
    assert (out[:, :, :empty] == 0).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_strided_inputs(name: str) -> None:
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs(50, H=4, G=2, D=24))
    v = torch.randn(1, 2, 24, 50).transpose(2, 3)  # last stride is not 1
    args = flat(q, k[:, :, ::1], v, SparsePlan.dense(50))
    assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args, names=NAMES)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_column_inside_a_range_counts_once(name: str) -> None:
    n = 40
    plan = SparsePlan.from_tensors(
        ranges=torch.tensor([[[[0, 10], [20, 30]]]]).int(),
        range_slice=torch.tensor([[[[0, 2]]]]).int(),
        columns=torch.tensor([[[0, 9, 10, 15, 19, 20, 29, 30, 39]]]).int(),
        column_slice=torch.tensor([[[[0, 9]]]]).int(),
        q_block=64, n_q=n, n_k=n, q_offset=0, causal=True,
    )  # fmt: skip
    args = flat(*inputs(n), plan)
    assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args, names=NAMES)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("B", "H", "n_q", "n_k"), [(0, 2, 5, 5), (1, 0, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0)])
def test_zero_size(name: str, B: int, H: int, n_q: int, n_k: int) -> None:
    out, lse = IMPLEMENTATIONS[name](*flat(*inputs(n_q, n_k, B=B, H=H, G=H), SparsePlan.dense(n_q, n_k)))
    assert out.shape == (B, H, n_q, 40)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_large_scores_do_not_overflow(name: str) -> None:
    q, k, v = inputs(90)
    args = flat(q * 300, k, v, SparsePlan.dense(90))
    assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args, names=NAMES)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_same_bits_for_any_thread_count(name: str) -> None:
    args, threads = flat(*inputs(400, B=2), plans(400)["vertical_slash"]), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = IMPLEMENTATIONS[name](*args)
        torch.set_num_threads(2)
        two = IMPLEMENTATIONS[name](*args)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@given(data=st.data())
def test_any_mask(data: st.DataObject) -> None:
    """Random tiles of random keys: the kernel's result is masked dense attention."""
    n_q, n_k = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 150))
    q_block = data.draw(st.sampled_from([16, 48, 64, 128]))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    tiles = torch.rand(1, 2, -(-n_q // q_block), n_k) < data.draw(st.sampled_from([0.02, 0.3, 0.9]))
    causal = data.draw(st.booleans())
    mask = tiles.repeat_interleave(q_block, 2)[:, :, :n_q]
    if causal:
        mask = mask & torch.ones(n_q, n_k, dtype=torch.bool).tril(n_k - n_q)
    plan = SparsePlan.from_mask(mask, q_block=q_block, causal=causal)
    q, k, v = inputs(n_q, n_k, H=2, D=data.draw(st.sampled_from([8, 33])))
    out, lse = scrimp.ops.sparse_attention(q, k, v, plan)
    exact_out, exact_lse = masked_dense(q, k, v, mask)
    torch.testing.assert_close(out.double(), exact_out, atol=5e-6, rtol=5e-6)
    torch.testing.assert_close(lse.double(), exact_lse, atol=5e-6, rtol=5e-6)


def windows(n_q: int, n_k: int, window: int) -> Tensor:
    """The definition: bool `[n_q, n_k]`, key j at most window - 1 before query i's own."""
    behind = torch.arange(n_q)[:, None] + n_k - n_q - torch.arange(n_k)
    return (behind >= 0) & (behind < window)


def matches(name: str, plan: SparsePlan, mask: Tensor, *tensors: Tensor) -> None:
    """The implementation against its reference, and the reference against dense attention under `mask`."""
    args = flat(*tensors, plan)
    assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args, names=NAMES)
    exact = OP.reference(*flat(*(t.double() for t in tensors), plan))
    for part, whole in zip(exact, masked_dense(*tensors, mask), strict=True):
        torch.testing.assert_close(part, whole, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [1, 40, 100])
@pytest.mark.parametrize(("n_q", "n_k", "q_block"), [(200, 200, 64), (130, 300, 128), (90, 500, 16), (70, 300, 100)])
def test_windows(name: str, window: int, n_q: int, n_k: int, q_block: int) -> None:
    plan = SparsePlan.sliding_window(n_q, window, n_k=n_k, q_block=q_block)
    matches(name, plan, windows(n_q, n_k, window), *inputs(n_q, n_k, B=2, H=4, G=2))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("causal", [True, False])
def test_documents(name: str, dtype: torch.dtype, causal: bool) -> None:
    ids = torch.arange(6).repeat_interleave(torch.tensor([1, 200, 63, 2, 130, 64]))
    mask = ids[:, None] == ids
    plan = SparsePlan.from_documents(ids=ids, causal=causal, q_block=128)
    matches(name, plan, mask.tril() if causal else mask, *inputs(460, H=2, D=24, dtype=dtype))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("q_offset", [-40, 0, 200])
def test_row_start_of_each_sequence(name: str, causal: bool, q_offset: int) -> None:
    """Any first keys, in no order, over ranges and columns; rows that see nothing give 0 and -inf."""
    sizes = {"n_k": 330, "causal": causal, "q_offset": q_offset}
    plan = SparsePlan.vertical_slash(170, [[3, 5, 100, 300, 329], [0]], bands=[[(0, 150)], [(0, 9)]], **sizes)
    start = torch.randint(0, 331, (3, 170), dtype=torch.int32)
    start[1] = start[1].sort().values
    plan = dataclasses.replace(plan.expand(batch=3), row_start=start).validate()
    matches(name, plan, plan.to_mask(), *inputs(170, 330, B=3, H=2))
    shared = dataclasses.replace(plan.select(batch=[1]), row_start=start[1:2])
    matches(name, shared, plan.to_mask()[1:2], *inputs(170, 330, B=3, H=2))
    wide = dataclasses.replace(shared, row_start=start)
    args = flat(*inputs(170, 330, B=3, H=2), wide)
    assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args, names=NAMES)


@given(data=st.data())
def test_any_row_start(data: st.DataObject) -> None:
    n_q, n_k = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 400))
    plan = SparsePlan.a_shape(n_q, 5, 200, n_k=n_k, q_block=data.draw(st.sampled_from([16, 48, 64, 128])))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    spread, least = data.draw(st.sampled_from([1, 30, n_k + 1])), torch.randint(0, n_k + 1, (1, 1))
    start = (least + torch.randint(0, spread, (1, n_q))).clamp(max=n_k).int()
    plan = dataclasses.replace(plan, row_start=start).validate()
    q, k, v = inputs(n_q, n_k, H=2, D=8)
    got = scrimp.ops.sparse_attention(q, k, v, plan)
    for part, whole in zip(got, masked_dense(q, k, v, plan.to_mask()), strict=True):
        torch.testing.assert_close(part.double(), whole, atol=5e-6, rtol=5e-6)


def test_output_memory_is_batch_token_head() -> None:
    out, lse = scrimp.ops.sparse_attention(*inputs(20), SparsePlan.dense(20))
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()


def test_split_prefix_and_tail_merge_to_the_whole() -> None:
    q, k, v = inputs(30, 100)
    prefix = scrimp.ops.sparse_attention(q, k[:, :, :60], v[:, :, :60], SparsePlan.dense(30, 60, causal=False))
    tail = scrimp.ops.sparse_attention(q, k[:, :, 60:], v[:, :, 60:], SparsePlan.dense(30, 40))
    whole = scrimp.ops.sparse_attention(q, k, v, SparsePlan.dense(30, 100))
    for part, total in zip(scrimp.ops.merge_attention(*prefix, *tail), whole, strict=True):
        torch.testing.assert_close(part, total, atol=2e-6, rtol=2e-6)


def test_opcheck() -> None:
    opcheck(OP.call, flat(*inputs(40), plans(40)["vertical_slash"]))
    opcheck(OP.call, flat(*inputs(30, 45, dtype=torch.bfloat16), SparsePlan.dense(30, 45)))
    opcheck(OP.call, flat(*inputs(40), SparsePlan.sliding_window(40, 9)))


def test_compiles_and_exports_as_one_node() -> None:
    plan = SparsePlan.a_shape(20, sink=2, window=8)

    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return scrimp.ops.sparse_attention(q, k, v, plan)[0]

    args = inputs(20)
    expected = Attention()(*args)
    compiled = torch.compile(Attention(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*args), expected)
    program = torch.export.export(Attention(), args)
    assert [str(n.target) for n in program.graph.nodes].count("scrimp.sparse_attention.default") == 1
    assert torch.equal(program.module()(*args), expected)


def test_inductor() -> None:
    plan = SparsePlan.a_shape(20, sink=2, window=8)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return 2 * scrimp.ops.sparse_attention(q, k, v, plan)[0] + 1

    args = inputs(20)
    torch.testing.assert_close(torch.compile(attend, fullgraph=True)(*args), attend(*args))


def test_eight_threads_at_once() -> None:
    args = flat(*inputs(200), plans(200)["vertical_slash"])
    expected = OP.call(*args)
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: OP.call(*args), range(64)):
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_after_fork() -> None:
    """A forked child works with one thread; with more, torch's own thread pool hangs there, ours or not."""
    args, threads = flat(*inputs(200), plans(200)["vertical_slash"]), torch.get_num_threads()
    expected = OP.call(*args)
    torch.set_num_threads(1)
    child = os.fork()
    if child == 0:
        same = all(torch.equal(a, b) for a, b in zip(OP.call(*args), expected, strict=True))
        os._exit(0 if same else 1)
    torch.set_num_threads(threads)
    assert os.waitpid(child, 0)[1] == 0


Q, K, V = inputs(100, H=4, G=2)
PLAN = SparsePlan.vertical_slash(100, columns=[[3, 50]], diagonals=[[0, 30]])
GOOD = flat(Q, K, V, PLAN)
FIELDS = (
    *("q", "k", "v", "ranges", "range_slice", "columns", "column_slice", "row_start"),
    *("q_block", "q_offset", "causal", "scale"),
)


def change(**changes: object) -> tuple[object, ...]:
    return tuple(changes.get(name, value) for name, value in zip(FIELDS, GOOD, strict=True))


def with_ranges(pairs: list[list[int]], count: int | None = None, first: int = 0) -> tuple[object, ...]:
    """Tile 0 sees `pairs`, tile 1 nothing."""
    ranges = torch.tensor([[pairs]], dtype=torch.int32)
    return change(
        ranges=ranges, range_slice=torch.tensor([[[[first, len(pairs) if count is None else count], [0, 0]]]]).int()
    )


def with_columns(columns: list[int], count: int | None = None, first: int = 0) -> tuple[object, ...]:
    return change(
        columns=torch.tensor([[columns]], dtype=torch.int32),
        column_slice=torch.tensor([[[[first, len(columns) if count is None else count], [0, 0]]]]).int(),
    )


BAD_SHAPES = {
    "rank of q": (change(q=Q[0]), r"q must be \[batch, heads, tokens, D\], got shape \[4, 100, 40\]"),
    "integer q": (change(q=Q.int()), "q is int32; it must be float32"),
    "mixed dtype": (change(v=V.bfloat16()), "dtype of v is torch.bfloat16, but that of q is torch.float32"),
    "device": (change(k=K.to("meta")), "device of k is meta, but that of q is cpu"),
    "k and v differ": (change(v=V[:, :, :90]), r"shape of v is \(1, 2, 90, 40\)"),
    "head size": (change(q=Q[..., :32]), r"k has shape \[1, 2, 100, 40\], but q \[1, 4, 100, 32\]"),
    "heads": (change(q=Q[:, :3]), "3 query heads are not a multiple of 2 key/value heads"),
    "head size above 256": (flat(*inputs(100, D=300), PLAN), "head size D=300 is above 256"),
    "nan scale": (change(scale=float("nan")), "scale=nan must be finite"),
    "infinite scale": (change(scale=float("inf")), "scale=inf must be finite"),
    "q_block": (change(q_block=0), "q_block=0 must be at least 1"),
    "plan of another tile size": (change(q_block=32), r"range_slice has shape \[1, 1, 2, 2\], expected .*, 4, 2\]"),
    "plan of other heads": (change(columns=torch.zeros(1, 3, 5).int()), r"columns has shape \[1, 3, 5\]"),
    "int64 indices": (change(ranges=GOOD[3].long()), "ranges is int64; it must be int32"),  # type: ignore[attr-defined]
    "ranges without pairs": (change(ranges=torch.zeros(1, 1, 4, 3).int()), r"ranges has shape \[1, 1, 4, 3\]"),
    "int64 row_start": (change(row_start=torch.zeros(1, 100).long()), "row_start is int64; it must be int32"),
    "row_start of heads": (
        change(row_start=torch.zeros(1, 4, 100).int()),
        r"row_start has shape \[1, 4, 100\], expected",
    ),
    "row_start of another batch": (change(row_start=torch.zeros(2, 100).int()), r"expected \[1 or 1, 100\]"),
    "row_start of other rows": (change(row_start=torch.zeros(1, 99).int()), r"row_start has shape \[1, 99\]"),
    "row_start elsewhere": (change(row_start=torch.zeros(1, 100).int().to("meta")), "device of row_start is meta"),
}
BAD_INDICES = {
    "range past the keys": (with_ranges([[0, 101]]), r"range \[0, 101\)"),
    "negative range": (with_ranges([[-3, 5]]), r"range \[-3, 5\)"),
    "reversed range": (with_ranges([[9, 5]]), r"range \[9, 5\)"),
    "unsorted ranges": (with_ranges([[50, 60], [0, 10]]), r"range \[0, 10\)"),
    "overlapping ranges": (with_ranges([[0, 30], [20, 40]]), r"range \[20, 40\)"),
    "range slice outside": (with_ranges([[0, 5]], count=3), r"3"),
    "negative range slice": (with_ranges([[0, 5]], count=1, first=-1), r"-1"),
    "negative count": (with_ranges([[0, 5]], count=-2), r"-2"),
    "column past the keys": (with_columns([3, 100]), r"column 100"),
    "negative column": (with_columns([-7, 3]), r"column -7"),
    "unsorted columns": (with_columns([5, 3]), r"column 3"),
    "repeated column": (with_columns([5, 5]), r"column 5"),
    "column slice outside": (with_columns([5], count=9), r"9"),
    "negative row_start": (
        change(row_start=torch.arange(-1, 99).int()[None]),
        r"row_start -1 is outside \[0, n_k=100\]",
    ),
    "row_start past the keys": (change(row_start=torch.arange(2, 102).int()[None]), r"row_start 101 is outside"),
    "huge slice": (with_columns([5], count=2**31 - 1, first=2**31 - 1), r"2147483647"),
}


@pytest.mark.parametrize("case", BAD_SHAPES)
def test_bad_shapes(case: str) -> None:
    """The fake and the public function check in Python, the kernel again before it touches memory."""
    args, words = BAD_SHAPES[case]
    with pytest.raises(ValueError, match=words):
        check(*args)
    with pytest.raises((RuntimeError, NotImplementedError, ValueError)):
        OP.call(*args)


@pytest.mark.parametrize("case", BAD_INDICES)
def test_bad_indices(case: str) -> None:
    args, words = BAD_INDICES[case]
    with pytest.raises(RuntimeError, match=f"^sparse_attention: .*{words}"):
        OP.call(*args)


def test_plan_for_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="plan is for 100 queries and 100 keys, but q has 90 and k 100"):
        scrimp.ops.sparse_attention(Q[:, :, :90], K, V, PLAN)
