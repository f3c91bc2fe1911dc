"""What plans do: row starts, joins, selections, padding, counts, examples."""

import dataclasses
import doctest
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plan_cases import check_counts, few, sizes, slashes

from scrimp.sparse_plan import SparsePlan
from scrimp.sparse_plan import data as sparse_plan_data
from scrimp.sparse_plan import plan as sparse_plan


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
