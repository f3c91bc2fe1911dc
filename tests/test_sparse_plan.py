"""SparsePlan against its definition: naive masks built one (query, key) pair at a time."""

import dataclasses
import doctest
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from scrimp.sparse_plan import SparsePlan
from scrimp.sparse_plan import data as sparse_plan_data
from scrimp.sparse_plan import plan as sparse_plan

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    """n_q, n_k, q_offset, q_block, causal: odd sizes, none, negative and large offsets."""
    n_q, n_k = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    offset = draw(st.one_of(st.none(), st.integers(-45, 45)))
    q_block = draw(st.sampled_from([1, 3, 7, 8, 16, 64]))
    return {
        "n_q": n_q,
        "n_k": n_k,
        "q_offset": offset,
        "q_block": q_block,
        "causal": draw(st.booleans()),
    }


def offset_of(size: dict[str, Any]) -> int:
    offset = size["q_offset"]
    return size["n_k"] - size["n_q"] if offset is None else offset


def naive(size: dict[str, Any], wants: Callable[[int, int], bool]) -> Tensor:
    """A tile sees what any of its rows wants; then causality. `wants(p, j)`: position p wants key j."""
    n_q, n_k, block, offset = size["n_q"], size["n_k"], size["q_block"], offset_of(size)
    mask = torch.zeros(n_q, n_k, dtype=torch.bool)
    for first in range(0, n_q, block):
        rows = range(first, min(first + block, n_q))
        for j in range(n_k):
            if any(wants(i + offset, j) for i in rows):
                for i in rows:
                    mask[i, j] = not size["causal"] or j <= i + offset
    return mask


def check(plan: SparsePlan, *masks: Tensor) -> None:
    """The plan is well formed, its heads see `masks`, and every count agrees with them."""
    plan.validate()
    assert plan.bytes() > 0 or plan.tiles == 0 or plan.heads == 0
    expected = torch.stack(masks)[None]
    mask = plan.to_mask()
    assert mask.shape == (plan.batch, plan.heads, plan.n_q, plan.n_k)
    torch.testing.assert_close(mask, expected, rtol=0, atol=0)
    check_counts(plan)


def check_counts(plan: SparsePlan) -> None:
    mask = plan.to_mask()
    query, key = torch.arange(plan.n_q)[:, None], torch.arange(plan.n_k)
    dense = (key <= query + plan.q_offset) if plan.causal else torch.ones(plan.n_q, plan.n_k).bool()
    pairs, whole = mask.sum((2, 3)), int(dense.sum())
    density = pairs.double() / whole if whole else torch.ones_like(pairs).double()
    torch.testing.assert_close(plan.density(per_head=True), density, rtol=0, atol=0)
    assert plan.density() == float(density.mean())
    seen = [mask[:, :, t * plan.q_block : (t + 1) * plan.q_block].any(2).sum(-1) for t in range(plan.tiles)]
    cost = torch.stack(seen, -1) if seen else torch.zeros(*pairs.shape, 0, dtype=torch.int64)
    assert plan.tile_cost().tolist() == cost.tolist()
    rows = [min(plan.q_block, plan.n_q - t * plan.q_block) for t in range(plan.tiles)]
    all_keys = [int(dense[t * plan.q_block : (t + 1) * plan.q_block].any(0).sum()) for t in range(plan.tiles)]
    area = sum(r * k for r, k in zip(rows, all_keys, strict=True))
    executed = (cost * torch.tensor(rows, dtype=torch.int64)).sum(-1).double()
    torch.testing.assert_close(
        plan.executed_density(per_head=True), executed / area if area else torch.ones_like(executed)
    )


def window_wants(causal: bool, window: int) -> Callable[[int, int], bool]:
    return lambda p, j: (p - window < j <= p) if causal else abs(p - j) < window


@few
@given(sizes())
def test_dense(size: dict[str, Any]) -> None:
    check(SparsePlan.dense(**size), naive(size, lambda p, j: True))
    assert SparsePlan.dense(**size).density() == 1.0
    assert SparsePlan.dense(**size).executed_density() == 1.0


@few
@given(sizes(), st.lists(st.tuples(st.integers(0, 45), st.integers(0, 45)), min_size=1, max_size=3))
def test_a_shape(size: dict[str, Any], heads: list[tuple[int, int]]) -> None:
    plan = SparsePlan.a_shape(**size, sink=[s for s, _ in heads], window=[w for _, w in heads])
    masks = []
    for sink, window in heads:
        near = window_wants(size["causal"], window)
        masks.append(naive(size, lambda p, j, sink=sink, near=near: j < sink or near(p, j)))
    check(plan, *masks)


@few
@given(sizes(), st.integers(0, 10), st.integers(0, 10), st.integers(0, 45))
def test_tri_shape(size: dict[str, Any], sink: int, window: int, last: int) -> None:
    near, border = window_wants(size["causal"], window), size["n_q"] - last + offset_of(size)
    plan = SparsePlan.tri_shape(**size, sink=sink, window=torch.tensor(window), last=last)
    check(plan, naive(size, lambda p, j: j < sink or near(p, j) or p >= border))


@settings(few, max_examples=80)
@given(sizes(), st.integers(0, 45))
def test_sliding_window(size: dict[str, Any], window: int) -> None:
    """Exact in every row: a tile shows its rows no key beside their own window."""
    position = torch.arange(size["n_q"])[:, None] + offset_of(size)
    behind = position - torch.arange(size["n_k"])
    mask = (behind >= 0) & (behind < window) if size["causal"] else behind.abs() < window
    check(SparsePlan.sliding_window(**size, window=window), mask)


def test_sliding_window_needs_no_row_start_where_all_rows_of_a_tile_agree() -> None:
    assert SparsePlan.sliding_window(100, 100).row_start is None
    assert SparsePlan.sliding_window(100, 7, q_block=1).row_start is None
    assert SparsePlan.sliding_window(100, 7).row_start.shape == (1, 100)  # type: ignore[union-attr]
    assert SparsePlan.sliding_window(100, 7).tile_cost().tolist() == [[[64, 42]]]


@st.composite
def slashes(draw: st.DrawFn) -> tuple[dict[str, Any], list[Any], list[Any], list[Any]]:
    """Sizes, and per head columns, diagonals, bands (some heads may have none)."""
    size = draw(sizes())
    low = 0 if size["causal"] else offset_of(size) - size["n_k"] + 1
    high = size["n_q"] + offset_of(size) - 1
    some = draw(st.integers(1, 3))
    column = st.integers(0, max(size["n_k"] - 1, 0))
    distance = st.integers(low, max(low, high))
    columns = [draw(st.lists(column, max_size=8 if size["n_k"] else 0)) for _ in range(some)]
    most = 5 if high >= low else 0
    diagonals = [draw(st.lists(distance, max_size=most)) for _ in range(some)]
    bands = [draw(st.lists(st.tuples(distance, st.integers(1, 60)), max_size=most)) for _ in range(some)]
    return size, columns, diagonals, bands


@settings(few, max_examples=80)
@given(slashes())
def test_vertical_slash(case: tuple[dict[str, Any], list[Any], list[Any], list[Any]]) -> None:
    size, columns, diagonals, bands = case
    masks = []
    for column, diagonal, band in zip(columns, diagonals, bands, strict=True):
        far = set(diagonal) | {d for start, width in band for d in range(start, start + width)}
        masks.append(naive(size, lambda p, j, column=column, far=far: j in column or p - j in far))
    plan = SparsePlan.vertical_slash(**size, columns=columns, diagonals=diagonals, bands=bands)
    check(plan, *masks)
    start, stop = plan.ranges.unbind(-1)
    for b, h, t in torch.ones(plan.range_slice.shape[:3]).nonzero().tolist():
        first, count = plan.range_slice[b, h, t].tolist()
        here = slice(first + 1, first + count), slice(first, first + count - 1)
        assert count == 0 or bool((start[b, h, here[0]] > stop[b, h, here[1]]).all()), "not merged"


def test_vertical_slash_takes_tensors_and_shares_columns() -> None:
    lists = SparsePlan.vertical_slash(40, [[3, 1, 3], [7, 8, 7]], [0], [(4, 2)], q_block=8)
    assert lists.columns.tolist() == [[[1, 3], [7, 8]]]
    assert lists.column_slice[0, 0].tolist() == [[0, 2]] * 5
    tensors = SparsePlan.vertical_slash(
        40,
        torch.tensor([[3, 1, 3], [7, 8, 7]]),
        torch.tensor([0]),
        torch.tensor([[4, 2]]),
        q_block=8,
    )
    assert lists.same_pairs(tensors)
    batched = SparsePlan.vertical_slash(40, torch.tensor([[[3, 1]], [[7, 8]]]), [0, 4, 5], q_block=8)
    assert batched.ranges.shape[:2] == (2, 1)
    assert torch.equal(batched.to_mask().transpose(0, 1), lists.to_mask())
    assert SparsePlan.vertical_slash(40, [[], [1]], bands=[[], []]).heads == 2


@st.composite
def block_masks(draw: st.DrawFn) -> tuple[dict[str, Any], int, Tensor]:
    size, k_block = draw(sizes()), draw(st.sampled_from([1, 4, 16]))
    shape = (2, 2, -(-size["n_q"] // size["q_block"]), -(-size["n_k"] // k_block))
    total = shape[0] * shape[1] * shape[2] * shape[3]
    bits = draw(st.integers(0, 2 ** min(total, 60) - 1))
    flat = torch.tensor([bits >> (i % 60) & 1 for i in range(total)], dtype=torch.bool)
    return size, k_block, flat.view(shape)


@few
@given(block_masks())
def test_block_mask_and_bsr(case: tuple[dict[str, Any], int, Tensor]) -> None:
    size, k_block, blocks = case
    plan = SparsePlan.from_block_mask(blocks, k_block=k_block, **size).validate()
    check_counts(plan)
    rows, keys = torch.arange(size["n_q"]) // size["q_block"], torch.arange(size["n_k"]) // k_block
    expected = blocks[:, :, rows][..., keys]
    if size["causal"]:
        expected &= torch.arange(size["n_k"]) <= torch.arange(size["n_q"])[:, None] + offset_of(size)
    assert torch.equal(plan.to_mask(), expected)
    crow, col = plan.to_bsr(k_block)
    assert crow.dtype == col.dtype == torch.int32
    assert SparsePlan.from_bsr(crow, col, k_block=k_block, **size).same_pairs(plan)


def test_bsr_of_torch() -> None:
    blocks = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    bsr = blocks.repeat_interleave(4, 0).repeat_interleave(4, 1).to_sparse_bsr((4, 4))
    plan = SparsePlan.from_bsr(bsr.crow_indices(), bsr.col_indices(), 4, 4, n_k=12)
    assert plan.same_pairs(SparsePlan.from_block_mask(blocks.bool()[None, None], 4, 4))
    assert plan.to_bsr(4)[0].flatten().tolist() == bsr.crow_indices().tolist()


def naive_documents(lengths: list[int], causal: bool) -> Tensor:
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    mask = ids[:, None] == ids
    return mask.tril() if causal else mask


@settings(few, max_examples=80)
@given(st.lists(st.integers(0, 20), max_size=8), st.sampled_from([1, 2, 7, 8, 64]), st.booleans())
def test_documents(lengths: list[int], q_block: int, causal: bool) -> None:
    plan = SparsePlan.from_documents(lengths, q_block=q_block, causal=causal)
    check(plan, naive_documents(lengths, causal))
    assert plan.q_block == q_block or not causal


def test_documents_by_id_and_their_tiles() -> None:
    ids = torch.tensor([[5, 5, 5, 5, 2, 2, 9, 9, 9], [1, 1, 3, 3, 3, 3, 3, 3, 3]])
    for q_block in (2, 4, 64):
        plan = SparsePlan.from_documents(ids=ids, q_block=q_block).validate()
        assert plan.batch == 2
        assert torch.equal(plan.to_mask()[:, 0], (ids[:, :, None] == ids[:, None]).tril())
        check_counts(plan)
    assert SparsePlan.from_documents(ids=ids, q_block=2).row_start is None
    assert SparsePlan.from_documents([128, 100, 92], causal=False).q_block == 4
    assert SparsePlan.from_documents([128, 64, 92], causal=False).q_block == 64
    with pytest.raises(ValueError, match=r"ids\[1\]: document 4 comes back"):
        SparsePlan.from_documents(ids=torch.tensor([[1, 1, 1], [4, 5, 4]]), q_block=1)
    with pytest.raises(TypeError, match="either lengths or ids"):
        SparsePlan.from_documents()
    with pytest.raises(ValueError, match=r"lengths\[1\]=-3"):
        SparsePlan.from_documents([64, -3])


@st.composite
def masks(draw: st.DrawFn) -> tuple[dict[str, Any], int, Tensor]:
    """Any mask whose rows differ by causality only inside a tile."""
    size = draw(sizes())
    tiles = -(-size["n_q"] // size["q_block"])
    seed, density = draw(st.integers(0, 2**31)), draw(st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0]))
    keys = torch.rand(2, 2, tiles, size["n_k"], generator=torch.Generator().manual_seed(seed)) < density
    mask = keys[:, :, torch.arange(size["n_q"]) // size["q_block"]]
    if size["causal"]:
        mask &= torch.arange(size["n_k"]) <= torch.arange(size["n_q"])[:, None] + offset_of(size)
    return size, draw(st.integers(1, 8)), mask


@settings(few, max_examples=80)
@given(masks())
def test_mask_round_trip(case: tuple[dict[str, Any], int, Tensor]) -> None:
    size, min_run, mask = case
    kept = {name: size[name] for name in ("q_offset", "q_block", "causal")}
    plan = SparsePlan.from_mask(mask, min_run=min_run, **kept).validate()
    assert torch.equal(plan.to_mask(), mask)
    check_counts(plan)
    assert plan.same_pairs(SparsePlan.from_mask(mask, q_offset=plan.q_offset, q_block=1, causal=False))


@few
@given(sizes(), st.data())
def test_row_start(size: dict[str, Any], data: st.DataObject) -> None:
    """Any first key per row, over ranges and columns, in batches, joined, selected, padded; and back from its mask."""
    n_q, n_k = size["n_q"], size["n_k"]
    columns = data.draw(st.lists(st.integers(0, max(n_k - 1, 0)), max_size=8 if n_k else 0))
    some = SparsePlan.vertical_slash(**size, columns=columns)
    plan = SparsePlan.cat([some, SparsePlan.dense(**size)])
    rows = st.lists(st.integers(0, n_k), min_size=n_q, max_size=n_q)
    starts = torch.stack([torch.tensor(data.draw(rows)).int() for _ in range(data.draw(st.integers(1, 2)))])
    expected = plan.to_mask() & (torch.arange(n_k) >= starts[:, None, :, None])
    plan = dataclasses.replace(plan.expand(batch=len(starts)), row_start=starts).validate()
    assert torch.equal(plan.to_mask(), expected)
    check_counts(plan)
    assert plan.same_pairs(plan.to("cpu"))
    assert torch.equal(plan.select(batch=[len(starts) - 1], heads=[1]).to_mask(), expected[-1:, 1:])
    both = SparsePlan.cat([plan, plan.with_padding([n_k // 2])], "batch").validate()
    assert torch.equal(both.to_mask(), torch.cat([expected, expected & (torch.arange(n_k) >= n_k // 2)]))
    assert torch.equal(SparsePlan.cat([plan.select(heads=[1]), plan.select(heads=[0])]).to_mask(), expected.flip(1))
    kept = {name: size[name] for name in ("q_offset", "q_block", "causal")}
    dense = plan.select(heads=[1])
    assert SparsePlan.from_mask(dense.to_mask(), **kept).validate().same_pairs(dense)


def test_row_start_belongs_to_all_heads() -> None:
    window, dense = SparsePlan.sliding_window(100, 7), SparsePlan.dense(100)
    with pytest.raises(ValueError, match=r"cat along heads: row_start\[0, 7\] is 0 in plan 1 and 1 in plan 0"):
        SparsePlan.cat([window, dense])
    assert SparsePlan.cat([window, dense], "batch").row_start.shape == (2, 100)  # type: ignore[union-attr]
    assert SparsePlan.cat([window, window.expand(batch=2)]).validate().to_mask().shape == (2, 2, 100, 100)
    assert window.expand(batch=0).validate().batch == 0
    assert window.bytes() == dense.bytes() + 4 * 100
    assert repr(window).endswith("columns=0, row_start=[1, 100])")
    assert not window.same_pairs(dense)
    assert window.same_pairs(SparsePlan.sliding_window(100, 7, q_block=1))


def test_formats_without_row_start_refuse_it() -> None:
    window = SparsePlan.sliding_window(128, 65)
    for call, name in ((window.to_bsr, "to_bsr"), (window.to_minference, "to_minference")):
        with pytest.raises(ValueError, match=rf"{name}: row_start hides 2016 pairs of \[0, 0\] tile 1"):
            call()
    idle = dataclasses.replace(SparsePlan.dense(128), row_start=torch.zeros(1, 128, dtype=torch.int32))
    assert [x.tolist() for x in idle.to_bsr()] == [x.tolist() for x in SparsePlan.dense(128).to_bsr()]
    assert torch.equal(idle.to_minference()[1], SparsePlan.dense(128).to_minference()[1])
    late = dataclasses.replace(
        SparsePlan.from_mask(torch.ones(1, 1, 64, 128).bool(), causal=False),
        ranges=torch.tensor([[[[64, 128]]]]).int(),
        row_start=torch.full((1, 64), 64).int(),
    )
    with pytest.raises(ValueError, match=r"sees only 64 keys of block 0"):
        late.to_bsr(128)


@settings(few, max_examples=12)
@given(st.integers(1, 150), st.integers(0, 150), st.booleans(), st.lists(st.integers(1, 60), min_size=1, max_size=4))
def test_flex_has_row_start(n: int, window: int, causal: bool, lengths: list[int]) -> None:
    both = [SparsePlan.from_documents(lengths, q_block=16)] * 2
    plans = [SparsePlan.sliding_window(n, window, causal=causal, q_block=16), SparsePlan.cat(both, "batch")]
    for plan in (*plans, plans[1].with_padding([0, lengths[0] // 2])):
        seen = plan.to_mask()
        flex = plan.to_flex_block_mask(16, eager=True)
        q, k, v = torch.randn(3, plan.batch, 1, plan.n_q, 8).unbind()
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        torch.testing.assert_close(
            flex_attention(q, k, v, block_mask=flex), expected.nan_to_num(nan=0.0), atol=1e-5, rtol=1e-5
        )
        full = BlockMask.from_kv_blocks(
            flex.full_kv_num_blocks, flex.full_kv_indices, BLOCK_SIZE=16, seq_lengths=(plan.n_q, plan.n_k)
        )
        whole = dense_blocks(full).repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, : plan.n_q, : plan.n_k]
        assert not bool((whole & ~seen).any())


def test_mask_that_is_no_plan() -> None:
    mask = torch.ones(1, 2, 8, 8, dtype=torch.bool).tril()
    mask[0, 1, 6, 2] = False
    with pytest.raises(ValueError, match=r"mask\[0, 1\]: query 6 does not see key 2, .* tile 1 .* than 4"):
        SparsePlan.from_mask(mask, q_block=4)
    assert torch.equal(SparsePlan.from_mask(mask, q_block=1).to_mask(), mask)
    mask[0, 0, 3, 5] = True
    with pytest.raises(ValueError, match=r"mask\[0, 0\]: query 3 sees key 5, beyond its causal limit 3"):
        SparsePlan.from_mask(mask, q_block=1)
    assert torch.equal(SparsePlan.from_mask(mask, q_block=1, causal=False).to_mask(), mask)


def dense_blocks(flex: BlockMask) -> Tensor:
    return flex.to_dense().bool()


def test_flex_round_trip() -> None:
    blocks = torch.rand(2, 3, 4, 4) < 0.6
    blocks[..., 0] = True
    for n, offset, causal in ((64, 0, True), (64, 5, True), (64, 0, False), (61, 0, True)):
        plan = SparsePlan.from_block_mask(blocks, 16, 16, n_q=n, n_k=n, q_offset=offset, causal=causal)
        flex = plan.to_flex_block_mask(16, eager=True)
        seen = plan.to_mask()
        spare = (0, 64 - n, 0, 64 - n)
        tiles = torch.nn.functional.pad(seen, spare).view(2, 3, 4, 16, 4, 16).any(5).any(3)
        assert torch.equal(dense_blocks(flex), tiles)
        back = SparsePlan.from_flex_block_mask(flex, causal=causal, q_offset=offset)
        assert back.same_pairs(plan)
        q, k, v = torch.randn(3, 2, 3, n, 8).unbind()
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        torch.testing.assert_close(flex_attention(q, k, v, block_mask=flex), expected)


def test_flex_from_create_block_mask() -> None:
    ids = torch.tensor([0] * 24 + [1] * 40)

    def documents(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (ids[q] == ids[k]) & (q >= k)

    flex = create_block_mask(documents, None, None, 64, 64, device="cpu", BLOCK_SIZE=8)
    assert SparsePlan.from_flex_block_mask(flex).same_pairs(SparsePlan.from_documents([24, 40], q_block=8))
    uneven = create_block_mask(documents, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    with pytest.raises(ValueError, match=r"query 16 does not see|query 24 does not see key"):
        SparsePlan.from_flex_block_mask(uneven)
    both = create_block_mask(lambda b, h, q, k: q >= 0, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    with pytest.raises(ValueError, match=r"tile 0 holds block 0 in full, which crosses the diagonal"):
        SparsePlan.from_flex_block_mask(both)
    assert SparsePlan.from_flex_block_mask(both, causal=False).density() == 1.0
    one = torch.ones(1, 1, 4, dtype=torch.int32)
    outside = BlockMask.from_kv_blocks(
        one, one[..., None] * 9, BLOCK_SIZE=16, compute_q_blocks=False, seq_lengths=(64, 64)
    )
    with pytest.raises(ValueError, match=r"kv_indices\[0, 0\]: 9 is outside \[0, 4\)"):
        SparsePlan.from_flex_block_mask(outside)
    short = BlockMask.from_kv_blocks(one, one[..., None], BLOCK_SIZE=16, compute_q_blocks=False, seq_lengths=(90, 64))
    with pytest.raises(ValueError, match=r"kv_num_blocks has shape \[1, 1, 4\], expected \[B, H, 6\]"):
        SparsePlan.from_flex_block_mask(short)


def test_not_aligned_to_blocks() -> None:
    plan = SparsePlan.vertical_slash(256, [3], [0])
    with pytest.raises(ValueError, match=r"to_flex_block_mask: \[0, 0\] tile 1 sees only 1 keys of block 0"):
        plan.to_flex_block_mask(64)
    with pytest.raises(ValueError, match=r"to_bsr: \[0, 0\] tile 1 .* not aligned to k_block=64"):
        plan.to_bsr()


@settings(few, max_examples=25)
@given(st.integers(1, 400), st.data())
def test_minference_round_trip(n: int, data: st.DataObject) -> None:
    """With the diagonal forced, as MInference does, every vertical-slash plan has the four tensors."""
    distances, columns = (data.draw(st.lists(st.integers(0, n - 1), max_size=5)) for _ in range(2))
    plan = SparsePlan.vertical_slash(n, [columns, []], [0, *distances])
    four = plan.to_minference()
    assert [x.dtype for x in four] == [torch.int32] * 4
    assert four[0].shape == four[2].shape == (1, 2, plan.tiles)
    assert SparsePlan.from_minference(*four, n=n).validate().same_pairs(plan)
    covered = torch.zeros(2, plan.tiles, n + 64, dtype=torch.int64)
    for h, t in torch.ones(2, plan.tiles).nonzero().tolist():
        for start in four[1][0, h, t, : four[0][0, h, t]].tolist():
            covered[h, t, start : start + 64] += 1
        columns = four[3][0, h, t, : four[2][0, h, t]].tolist()
        assert columns == sorted(set(columns))
        covered[h, t, columns] += 1
    assert int(covered.max()) == 1, "a key is named twice"


def test_minference_limits() -> None:
    with pytest.raises(ValueError, match=r"got causal=True, n_q=128, n_k=128, q_offset=0, q_block=32"):
        SparsePlan.dense(128, q_block=32).to_minference()
    with pytest.raises(ValueError, match=r"\[0, 0\] tile 1: key 65 lies on the diagonal"):
        SparsePlan.vertical_slash(128, [65]).to_minference()
    four = list(SparsePlan.dense(128).to_minference())
    with pytest.raises(ValueError, match=r"expected \[B, H, 3\] and \[B, H, 3, K\] for n=130"):
        SparsePlan.from_minference(*four, n=130)
    with pytest.raises(ValueError, match=r"block_offset\[0, 0\]: 640 is outside \[0, 128\)"):
        SparsePlan.from_minference(four[0], four[1] * 10, *four[2:], n=128)
    with pytest.raises(ValueError, match=r"block_count 5 is outside \[0, 2\]"):
        SparsePlan.from_minference(four[0] * 0 + 5, *four[1:], n=128)
    twice = torch.zeros(1, 1, 2, 3, dtype=torch.int32)
    plan = SparsePlan.from_minference(twice[..., 0] + 3, twice, twice[..., 0] + 2, twice + 70, n=128)
    assert plan.tile_cost().tolist() == [[[64, 65]]]


def test_joins_and_selections() -> None:
    parts = [
        SparsePlan.dense(40, q_block=8),
        SparsePlan.vertical_slash(40, [[1, 30], [2]], [0, 9], q_block=8),
    ]
    joined = SparsePlan.cat(parts).validate()
    expected = torch.cat([part.to_mask() for part in parts], 1)
    assert torch.equal(joined.to_mask(), expected)
    assert torch.equal(joined.select(heads=[2, 0]).to_mask(), expected[:, [2, 0]])
    assert torch.equal(joined.select(heads=slice(1, None), batch=[5]).to_mask(), expected[:, 1:])
    both = SparsePlan.cat([joined, joined.with_padding([20])], "batch").validate()
    assert (both.batch, both.heads) == (2, 3)
    assert torch.equal(both.select(batch=[0]).to_mask(), expected)
    assert torch.equal(both.select(batch=[1]).to_mask(), joined.with_padding([20]).to_mask())
    wide = SparsePlan.cat([parts[0].expand(batch=2), parts[1]])
    assert (wide.batch, wide.heads) == (2, 3)
    assert wide.same_pairs(joined)
    assert not wide.same_pairs(joined.select(heads=[0, 0, 0]))
    assert not joined.same_pairs(SparsePlan.dense(41, q_block=8))
    assert SparsePlan.dense(40, q_block=8).same_pairs(SparsePlan.dense(40, q_block=64))
    assert SparsePlan.dense(1, 9).same_pairs(SparsePlan.dense(1, 9, causal=False))
    assert parts[0].to("cpu").same_pairs(parts[0])
    for call, text in (
        (lambda: SparsePlan.cat([]), "at least one"),
        (lambda: SparsePlan.cat(parts, "tiles"), "dim='tiles'"),
        (lambda: SparsePlan.cat([parts[0], SparsePlan.dense(41)]), "plan 1 is .*n_q=41"),
        (
            lambda: SparsePlan.cat([joined, SparsePlan.cat(parts[:1] * 2)], "batch"),
            r"sizes differ: \[2, 3\]",
        ),
        (lambda: joined.expand(heads=4), "cannot expand heads from 3 to 4"),
        (lambda: joined.select(heads=[3]), r"heads=3 is outside \[0, 2\]"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


@few
@given(slashes(), st.lists(st.integers(0, 40), min_size=1, max_size=3))
def test_padding(case: tuple[dict[str, Any], list[Any], list[Any], list[Any]], starts: list[int]) -> None:
    size, columns, diagonals, bands = case
    plan = SparsePlan.vertical_slash(**size, columns=columns, diagonals=diagonals, bands=bands)
    starts = [min(start, size["n_k"]) for start in starts]
    padded = plan.with_padding(starts).validate()
    real = torch.arange(size["n_k"]) >= torch.tensor(starts)[:, None, None, None]
    assert torch.equal(padded.to_mask(), plan.to_mask() & real)
    check_counts(padded)


def test_bad_padding() -> None:
    with pytest.raises(ValueError, match=r"starts\[1\]=9 is outside \[0, 8\]"):
        SparsePlan.dense(8).with_padding([0, 9])
    with pytest.raises(ValueError, match=r"3 starts .* plan of 2 sequences|expand batch from 2 to 3"):
        SparsePlan.dense(8).expand(batch=2).with_padding([0, 1, 2])


def tensors(**changes: Any) -> dict[str, Any]:
    """A good plan for 20 queries and keys in tiles of 8 (two heads), with changes."""
    ranges = [[[0, 4], [8, 12], [12, 20]], [[0, 2], [4, 6], [0, 0]]]
    good = {
        "ranges": torch.tensor([ranges], dtype=torch.int32),
        "range_slice": torch.tensor([[[[0, 1], [0, 2], [0, 3]], [[0, 1], [1, 1], [0, 2]]]], dtype=torch.int32),
        "columns": torch.tensor([[[5, 7, 19], [3, 7, 9]]], dtype=torch.int32),
        "column_slice": torch.tensor([[[[0, 0], [0, 2], [0, 3]], [[0, 1], [1, 2], [3, 0]]]], dtype=torch.int32),
        "n_q": 20,
        "q_block": 8,
    }
    return good | changes


def changed(name: str, at: tuple[int, ...], *values: int) -> dict[str, Any]:
    tensor = tensors()[name].clone()
    tensor[at] = torch.tensor(values if len(values) > 1 else values[0], dtype=torch.int32)
    return {name: tensor}


def test_from_tensors() -> None:
    plan = SparsePlan.from_tensors(**tensors())
    assert plan.to_mask()[0, 1, 19].nonzero().flatten().tolist() == [0, 1, 4, 5]
    assert plan.to_mask()[0, 0, 15].nonzero().flatten().tolist() == [0, 1, 2, 3, 5, 7, 8, 9, 10, 11]
    check_counts(plan)
    unused = changed("ranges", (0, 1, 2), 99, -99)
    assert SparsePlan.from_tensors(**tensors(**unused)).same_pairs(plan)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        changed("ranges", (0, 0, 1), 12, 8),
        ValueError,
        r"ranges\[0, 0\] tile 1: range \[12, 8\) is empty or reversed",
    ),
    (
        changed("ranges", (0, 1, 1), 6, 6),
        ValueError,
        r"ranges\[0, 1\] tile 1: range \[6, 6\) is empty",
    ),
    (
        changed("ranges", (0, 0, 2), 12, 21),
        ValueError,
        r"tile 2: range \[12, 21\) is not inside \[0, n_k=20\)",
    ),
    (
        changed("ranges", (0, 1, 0), -1, 2),
        ValueError,
        r"ranges\[0, 1\] tile 0: range \[-1, 2\) is not inside",
    ),
    (
        changed("ranges", (0, 0, 1), 3, 12),
        ValueError,
        r"tile 1: range \[0, 4\) is followed by \[3, 12\): .*disjoint",
    ),
    (
        changed("ranges", (0, 0, 0), 15, 16),
        ValueError,
        r"range \[15, 16\) is followed by \[8, 12\): .*sorted",
    ),
    (
        changed("columns", (0, 0, 1), 20),
        ValueError,
        r"columns\[0, 0\] tile 1: column 20 is not inside",
    ),
    (
        changed("columns", (0, 1, 0), -4),
        ValueError,
        r"columns\[0, 1\] tile 0: column -4 is not inside",
    ),
    (
        changed("columns", (0, 1, 2), 7),
        ValueError,
        r"tile 1: column 7 is followed by 7: .*strictly increasing",
    ),
    (
        changed("range_slice", (0, 1, 2), 2, 2),
        ValueError,
        r"range_slice\[0, 1\] tile 2: \(first=2, count=2\) .* 3 ent",
    ),
    (
        changed("range_slice", (0, 0, 0), 0, -1),
        ValueError,
        r"range_slice\[0, 0\] tile 0: \(first=0, count=-1\)",
    ),
    (
        changed("column_slice", (0, 0, 1), -1, 1),
        ValueError,
        r"column_slice\[0, 0\] tile 1: \(first=-1, count=1\)",
    ),
    (
        changed("column_slice", (0, 0, 1), 2**31 - 1, 2),
        ValueError,
        r"tile 1: \(first=2147483647, count=2\)",
    ),
    (
        {"n_q": 30},
        ValueError,
        r"range_slice has shape \[1, 2, 3, 2\], expected \[B, H, 4, 2\] for n_q=30",
    ),
    ({"n_k": 19}, ValueError, r"range \[12, 20\) is not inside \[0, n_k=19\)"),
    (
        {"columns": tensors()["columns"][:, :1]},
        ValueError,
        r"columns has shape \[1, 1, 3\], .* B=1, H=2",
    ),
    (
        {"columns": tensors()["columns"][0]},
        ValueError,
        r"columns has shape \[2, 3\], expected \[B, H, C\]",
    ),
    (
        {"ranges": tensors()["columns"]},
        ValueError,
        r"ranges has shape \[1, 2, 3\], expected \[B, H, R, 2\]",
    ),
    ({"ranges": tensors()["ranges"].long()}, TypeError, r"ranges must be int32, got torch.int64"),
    ({"columns": [1, 2]}, TypeError, r"columns must be an int32 tensor, got list"),
    (
        {"columns": tensors()["columns"].to("meta")},
        ValueError,
        r"columns is on meta, ranges on cpu",
    ),
    ({"row_start": torch.zeros(1, 20)}, TypeError, r"row_start must be None or an int32 tensor, got torch.float32"),
    ({"row_start": [0] * 20}, TypeError, r"row_start must be None or an int32 tensor, got list"),
    (
        {"row_start": torch.zeros(20, dtype=torch.int32)},
        ValueError,
        r"row_start has shape \[20\], expected \[1, n_q=20\]",
    ),
    (
        {"row_start": torch.zeros(2, 20, dtype=torch.int32)},
        ValueError,
        r"row_start has shape \[2, 20\], expected \[1, n_q=20\]",
    ),
    ({"row_start": torch.zeros(1, 19, dtype=torch.int32)}, ValueError, r"row_start has shape \[1, 19\]"),
    (
        {"row_start": torch.zeros(1, 20, dtype=torch.int32, device="meta")},
        ValueError,
        r"row_start is on meta, ranges on cpu",
    ),
    (
        {"row_start": torch.arange(20, dtype=torch.int32)[None] - 1},
        ValueError,
        r"row_start\[0, 0\]=-1 is not inside \[0, n_k=20\]",
    ),
    (
        {"row_start": torch.arange(20, dtype=torch.int32)[None] + 2},
        ValueError,
        r"row_start\[0, 19\]=21 is not inside \[0, n_k=20\]",
    ),
    ({"q_block": 0}, ValueError, r"q_block=0 is outside \[1, 2147483647\]"),
    ({"n_q": 20.0}, TypeError, r"n_q=20.0 must be an int, got float"),
    ({"n_q": -1}, ValueError, r"n_q=-1 is outside"),
    ({"q_offset": 2**40}, ValueError, r"q_offset=1099511627776 is outside"),
    ({"causal": 1}, TypeError, r"causal=1 must be a bool"),
]


@pytest.mark.parametrize(("changes", "error", "text"), BAD, ids=[text for _, _, text in BAD])
def test_bad_tensors(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match="^SparsePlan: .*" + text):
        SparsePlan.from_tensors(**tensors(**changes))


def test_validate_checks_a_plan_made_by_hand() -> None:
    plan = SparsePlan.dense(20, q_block=8)
    with pytest.raises(TypeError, match="q_block=True must be an int"):
        dataclasses.replace(plan, q_block=True).validate()
    with pytest.raises(TypeError, match="causal=None"):
        dataclasses.replace(plan, causal=None).validate()  # type: ignore[arg-type]
    assert plan.validate() is plan


BAD_CALLS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: SparsePlan.dense(-3), ValueError, r"n_q=-3 is outside"),
    (lambda: SparsePlan.dense(3, 2**31), ValueError, r"n_k=2147483648 is outside"),
    (lambda: SparsePlan.a_shape(8, "4", 2), TypeError, r"sink\[0\]='4'|sink='4' must be an int"),
    (lambda: SparsePlan.a_shape(8, [1, -2], 2), ValueError, r"sink\[1\]=-2 is outside"),
    (
        lambda: SparsePlan.a_shape(8, [1, 2, 3], [1, 2]),
        ValueError,
        r"heads differ: sink for 3, window for 2",
    ),
    (lambda: SparsePlan.sliding_window(8, [1]), TypeError, r"window=\[1\] must be an int, got list"),  # type: ignore[arg-type]
    (lambda: SparsePlan.sliding_window(8, -1), ValueError, r"window=-1 is outside"),
    (lambda: SparsePlan.from_documents([8], q_block=0, causal=False), ValueError, r"q_block=0 is outside"),
    (
        lambda: SparsePlan.vertical_slash(8, [8]),
        ValueError,
        r"columns\[0, 0\]: 8 is outside \[0, 8\)",
    ),
    (
        lambda: SparsePlan.vertical_slash(8, [[1], [-1]]),
        ValueError,
        r"columns\[0, 1\]: -1 is outside",
    ),
    (
        lambda: SparsePlan.vertical_slash(8, [0], [8]),
        ValueError,
        r"diagonals\[0, 0\]: 8 is outside \[0, 8\)",
    ),
    (
        lambda: SparsePlan.vertical_slash(8, bands=[(-1, 2)]),
        ValueError,
        r"bands \(start\)\[0, 0\]: -1 is outside",
    ),
    (
        lambda: SparsePlan.vertical_slash(8, bands=[(1, 0)]),
        ValueError,
        r"bands \(width\)\[0, 0\]: 0 is outside",
    ),
    (
        lambda: SparsePlan.vertical_slash(8, [1.5]),
        TypeError,
        r"columns must hold ints, got torch.float32",
    ),
    (
        lambda: SparsePlan.vertical_slash(8, [1, [2]]),
        TypeError,
        r"columns=\[1, \[2\]\] is not a list of ints",
    ),
    (
        lambda: SparsePlan.vertical_slash(8, 3),
        ValueError,
        r"columns has shape \[\], expected \[K\], \[H, K\]",
    ),
    (
        lambda: SparsePlan.vertical_slash(8, bands=torch.ones(3, 4)),
        TypeError,
        r"bands must hold ints",
    ),
    (
        lambda: SparsePlan.vertical_slash(8, bands=torch.ones(3, 4).long()),
        ValueError,
        r"bands has shape \[3, 4\]",
    ),
    (
        lambda: SparsePlan.vertical_slash(8, [[1], [2]], [[0]] * 3),
        ValueError,
        r"columns for 2, diagonals for 3",
    ),
    (
        lambda: SparsePlan.from_block_mask(torch.ones(1, 1, 2, 2)),
        TypeError,
        r"must be bool .*got torch.float32",
    ),
    (
        lambda: SparsePlan.from_block_mask(torch.ones(2, 2).bool()),
        ValueError,
        r"has shape \[2, 2\]",
    ),
    (
        lambda: SparsePlan.from_block_mask(torch.ones(1, 1, 2, 2).bool(), n_q=300),
        ValueError,
        r"n_q=300 .* \[5, 2\]",
    ),
    (lambda: SparsePlan.from_mask([[True]]), TypeError, r"mask must be bool .*got list"),  # type: ignore[arg-type]
    (
        lambda: SparsePlan.from_bsr(torch.tensor([0, 3]), torch.tensor([0, 1]), n_k=128),
        ValueError,
        r"at most 2 .*\[0, 3\]",
    ),
    (
        lambda: SparsePlan.from_bsr(torch.tensor([0, 1]), torch.tensor([2]), n_k=128),
        ValueError,
        r"column 2 is outside \[0, 2\)",
    ),
    (
        lambda: SparsePlan.from_bsr(torch.ones(2), torch.tensor([2]), n_k=128),
        TypeError,
        r"crow_indices must be an int tensor",
    ),
    (
        lambda: SparsePlan.from_bsr(torch.tensor(1), torch.tensor([2]), n_k=128),
        ValueError,
        r"crow_indices has shape \[\]",
    ),
    (lambda: SparsePlan.from_documents(ids=torch.ones(4)), TypeError, r"ids must be an int tensor, got torch.float32"),
    (lambda: SparsePlan.from_minference(*[torch.ones(1, 1, 1)] * 4, n=64), TypeError, r"block_count must be an int"),
    (lambda: SparsePlan.dense(64).to_bsr(0), ValueError, r"k_block=0 is outside"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD_CALLS, ids=[text for _, _, text in BAD_CALLS])
def test_bad_calls(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match="^SparsePlan: .*" + text):
        call()


def test_zero_sizes() -> None:
    for n_q, n_k in ((0, 0), (0, 70), (70, 0)):
        plans = [
            SparsePlan.dense(n_q, n_k),
            SparsePlan.tri_shape(n_q, 4, 4, 4, n_k=n_k),
            SparsePlan.vertical_slash(n_q, n_k=n_k),
            SparsePlan.from_mask(torch.zeros(1, 1, n_q, n_k, dtype=torch.bool)),
            SparsePlan.from_block_mask(torch.zeros(1, 1, -(-n_q // 64), -(-n_k // 64)).bool(), n_q=n_q, n_k=n_k),
        ]
        for plan in plans:
            check_counts(plan.validate().with_padding([0, 0]))
            assert plan.same_pairs(plans[0])
            assert plan.density() == 1.0
            assert plan.to_bsr()[0].shape == (1, 1, plan.tiles + 1)
            assert SparsePlan.from_flex_block_mask(plan.to_flex_block_mask()).same_pairs(plan)
    assert [x.shape[2] for x in SparsePlan.dense(0).to_minference()] == [0] * 4
    assert SparsePlan.from_minference(*SparsePlan.dense(0).to_minference(), n=0).tiles == 0
    none = SparsePlan.cat([SparsePlan.dense(70)]).select(heads=slice(None)).expand(heads=0)
    assert none.validate().to_mask().shape == (1, 0, 70, 70)


def test_large_plan_counts_without_a_mask() -> None:
    """n = 2^20 has 5e11 pairs: exact counts need no n x n tensor and pass 32 bits."""
    n, window = 2**20, 4096
    plan = SparsePlan.a_shape(n, 64, window, q_block=1024)
    tiles, block = plan.tiles, 1024
    assert plan.tile_cost()[0, 0, -1] == 64 + window + block - 1
    first = sum(min(64, max(0, t * block + 1 - window)) for t in range(tiles)) * block
    near = sum(block * (min(t * block, window - 1)) + block * (block + 1) // 2 for t in range(tiles))
    assert plan.density() == (first + near) / (n * (n + 1) // 2)


@pytest.mark.parametrize("module", [sparse_plan, sparse_plan_data])
def test_examples(module: ModuleType) -> None:
    results = doctest.testmod(module, extraglobs={"SparsePlan": SparsePlan})
    assert results.attempted > 5
    assert results.failed == 0


def test_repr() -> None:
    plan = SparsePlan.vertical_slash(100, [1, 2], [0], n_k=90, q_offset=3)
    text = "SparsePlan(B=1, H=1, n_q=100, n_k=90, q_offset=3, causal, q_block=64, ranges=2, columns=2)"
    assert repr(plan) == text
