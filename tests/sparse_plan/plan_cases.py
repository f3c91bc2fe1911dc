"""What tests of SparsePlan share: sizes, masks built one (query, key) pair at a time, and the check against them."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from scrimp.sparse_plan import SparsePlan

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


def window_wants(causal: bool, window: int) -> Callable[[int, int], bool]:
    return lambda p, j: (p - window < j <= p) if causal else abs(p - j) < window


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
