"""Constructors of SparsePlan against masks built one (query, key) pair at a time."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import check, check_counts, few, naive, offset_of, sizes, slashes, window_wants
from torch import Tensor

from scrimp.sparse_plan import SparsePlan


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
