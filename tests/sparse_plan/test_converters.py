"""SparsePlan from and to masks, block masks, BSR, FlexAttention and MInference."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import check_counts, few, offset_of, sizes
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from scrimp.sparse_plan import SparsePlan


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


def dense_blocks(flex: BlockMask) -> Tensor:
    return flex.to_dense().bool()


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
