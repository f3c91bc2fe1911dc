"""The counts of sparse_attention beside those of MInference's kernels."""

import pytest
from scrimp.benchmarks import minference_count, predict, sparse_attention_cost

from scrimp import SparsePlan


def converted(end: int, verticals: list[int], slashes: list[int]) -> tuple[int, list[int]]:
    """One thread of MInference's conversion, word for word: blocks and columns of the tile that ends at `end`."""
    blocks, columns = 0, []
    v = s = 0
    while slashes[s] >= end:
        s += 1
    stop = max(end - slashes[s], 64)
    start = stop - 64
    s += 1
    while True:
        vertical = verticals[v] if v < len(verticals) else end + 64
        if vertical < stop:
            if vertical < start:
                columns.append(vertical)
            v += 1
        elif s < len(slashes):
            at = max(end - slashes[s], 64)
            s += 1
            if at > stop + 64:
                blocks += -(-(stop - start) // 64)
                start, stop = at - 64, at
            elif at > stop:
                stop += 64
        else:
            return blocks + -(-(stop - start) // 64), columns


def test_conversion_is_minferences() -> None:
    n = 16384
    columns, bands = minference_count.slashes(n, 1)
    slashes = sorted((d for a, width in bands.tolist() for d in range(a, a + width)), reverse=True)
    assert len(slashes) == 6096
    assert len(set(columns.tolist())) == 1000
    tiles = [converted(end, columns.tolist(), slashes) for end in range(64, n + 1, 64)]
    expected = (
        sum(blocks for blocks, _ in tiles),
        sum(len(found) for _, found in tiles),
        sum(-(-len(found) // 64) for _, found in tiles),
    )
    assert minference_count.converted(n, columns, bands) == expected


def test_less_work_than_minferences_kernels() -> None:
    """At 128K tokens; where all blocks are whole there is no product to save, only the repetition of K and V."""
    found = sparse_attention_cost.AGAINST["minference"]()
    assert len(found) == 3
    for name, (ours, theirs) in found.items():
        assert ours.flops_useful == theirs.flops_useful <= ours.flops_issued
        assert ours.bytes < theirs.bytes
        assert ours.unique_bytes < theirs.unique_bytes
        assert ours.flops_issued < theirs.flops_issued or (
            name.startswith("top_blocks") and ours.flops_issued == theirs.flops_issued
        )


def test_tile_efficiency_is_told_at_every_density() -> None:
    rows = [row for row in predict.predicted("sparse_attention", "h100") if row["plan"] == "blocks"]
    assert len({row["density"] for row in rows}) == 4
    assert all(0.85 < row["tile_efficiency"] <= 1 for row in rows)


@pytest.mark.parametrize("causal", [True, False])
def test_useful_work_of_dense_attention(causal: bool) -> None:
    """By hand: pairs of all heads, two products of D multiply-adds each."""
    n, H, D = 200, 6, 64
    case = sparse_attention_cost.plan_case("dense", lambda: SparsePlan.dense(n, causal=causal), n, (H, 2), D)
    pairs = n * (n + 1) // 2 if causal else n * n
    count = case.count()
    assert count.flops_useful == 4 * D * H * pairs
    q, k, lse = H * n * D * 2, 2 * n * D * 2, H * n * 4
    assert 0 <= count.unique_bytes - (2 * q + 2 * k + lse) <= 200
