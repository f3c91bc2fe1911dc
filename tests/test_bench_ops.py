"""The benchmark's real cases at tiny sizes: every op has some, and their checks see wrong results."""

from typing import Any

import pytest
import torch
from scrimp.benchmarks import (
    gelu_mul,
    kv_compact,
    linear,
    measure,
    merge_attention,
    registry,
    rms_norm,
    rotary_append,
    rows,
    silu_mul,
    sparse_attention,
    tree_accept,
    tree_attention,
    vertical_slash_index,
)
from scrimp.benchmarks.registry import Case

import scrimp
from scrimp import implementations
from scrimp._registry import OPS

NUMBERS = ["ours_ms", "peer_ms", "ratio", "ratio_p20", "ratio_p80", "limit_fraction"]
ATTENTION_FIELDS = ["plan", "n", "head_dim", "density", "efficiency"]


def test_every_op_with_a_kernel_has_cases_of_its_own_name() -> None:
    assert set(registry.ops()) == {op for op in OPS if implementations(op)}
    for op in registry.ops():
        cases = registry.case_file(op).cases()
        assert len({case.full_name for case in cases}) == len(cases)
        assert all(case.op == op and "m" in case.shape and case.peers for case in cases)
        for peer in {peer for case in cases for peer in case.peers if not registry.is_self(peer)}:
            file = registry.peer_file(peer)
            assert callable(file.available)
            assert callable(getattr(file, op))
            assert file.DISTRIBUTION


PLANS = {
    "dense": sparse_attention.dense,
    "blocks": lambda n, heads: sparse_attention.blocks(0.5, n, heads),
    "columns": lambda n, heads: sparse_attention.SparsePlan.vertical_slash(n, [[3, 77]] * heads, bands=[(0, 64)]),
}


@pytest.mark.parametrize("kind", PLANS)
def test_sparse_attention_rows(kind: str) -> None:
    shape = {"m": 512, "batch": 1, "heads": 4, "kv_heads": 2, "n": 512, "head_dim": 16}
    problem = sparse_attention.problem(kind, PLANS[kind](512, 4), shape, torch.float32)
    peers = ("sdpa", "self-dense")
    case = Case("sparse_attention", kind, torch.float32, shape, peers, lambda: problem)
    for row in rows.case_rows(case, problem, measure.probes(torch.float32, size=64, elements=2**12), 0.0):
        assert set(ATTENTION_FIELDS) <= set(row)
        assert all(isinstance(row[name], float) and row[name] > 0 for name in NUMBERS)
        assert not row["note"].startswith(rows.FAILURES)
        assert 0 < row["density"] <= 1


def test_blocks_have_the_density_of_their_name() -> None:
    for density in (0.1, 0.25, 0.5):
        assert sparse_attention.blocks(density, 8192, 4).density() == pytest.approx(density, rel=0.05)


def test_sparse_attention_check_sees_a_wrong_row() -> None:
    shape = {"m": 300, "batch": 1, "heads": 2, "kv_heads": 1, "n": 300, "head_dim": 16}
    problem = sparse_attention.problem("dense", sparse_attention.dense(300, 2), shape, torch.float32)
    out, lse = problem.ours()
    problem.check((out, lse))
    out[0, 1, 299, 3] += 1e-4
    with pytest.raises(AssertionError, match="out of sampled tiles"):
        problem.check((out, lse))


def test_linear_check_sees_a_wrong_row() -> None:
    problem = linear.problem(3, 512, (300, 2), True, torch.float32)
    assert torch.equal(problem.own["self-1-row"](), problem.ours()[:1])
    out = problem.ours()
    problem.check(out)
    out[2, 301] += 1e-3
    with pytest.raises(AssertionError, match="above the bound"):
        problem.check(out)


@pytest.mark.parametrize("op", [rms_norm, silu_mul, gelu_mul])
def test_row_ops_check_sees_a_wrong_element(op: Any) -> None:
    problem = op.problem(3, 40, torch.bfloat16)
    out = problem.ours()
    problem.check(out)
    out[2, 39] += 0.1
    with pytest.raises(AssertionError, match="above the bound"):
        problem.check(out)


def test_rotary_append_check_sees_a_wrong_slot() -> None:
    problem = rotary_append.problem((3, 4, 2, 16), torch.float32)
    out = problem.ours()
    problem.check(out)
    problem.inputs[7][0, 1, 2051, 5] += 1e-4
    with pytest.raises(AssertionError, match="k_cache"):
        problem.check(out)


@pytest.mark.parametrize("T", [1, 20])
def test_tree_attention_rows(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_attention, "COLD_BYTES", 2**20)
    monkeypatch.setitem(tree_attention.MODELS, "small", (4, 2, 16))
    case = tree_attention.case("small", 300, T)
    problem = case.make()
    for row in rows.case_rows(case, problem, measure.probes(torch.float32, size=64, elements=2**12), 0.0):
        assert {"plan", "n", "head_dim"} <= set(row)
        assert not row["note"].startswith(rows.FAILURES)
    out, lse = problem.ours()
    problem.check((out, lse))
    out[0, 3, T - 1, 3] += 1e-4
    with pytest.raises(AssertionError, match="out: error"):
        problem.check((out, lse))


def test_tree_accept_check_sees_another_token() -> None:
    for heat in (0.0, 1.0):
        problem = tree_accept.problem(8, 50, heat, torch.float32)
        path, chosen = problem.ours()
        problem.check((path, chosen))
        assert int((path >= 0).sum()) >= tree_accept.STEPS
        chosen[0, 1] += 1
        with pytest.raises(AssertionError, match="chosen is"):
            problem.check((path, chosen))


def test_kv_compact_check_sees_another_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kv_compact.MODELS, "small", (1, 1, 2))
    problem = kv_compact.problem("small", "four", torch.float32)
    problem.check(problem.ours())
    monkeypatch.setattr(scrimp.ops, "kv_compact", lambda *_: None)
    with pytest.raises(AssertionError, match="other rows were moved"):
        problem.check(None)


def test_merge_attention_check_sees_a_wrong_row() -> None:
    problem = merge_attention.problem((1, 2, 64, 8), torch.float32)
    out, lse = problem.ours()
    problem.check((out, lse))
    lse[0, 0, 63] += 1e-4
    with pytest.raises(AssertionError, match="lse"):
        problem.check((out, lse))


def test_vertical_slash_index_check_sees_a_wrong_plan() -> None:
    shape = {"m": 1536, "batch": 1, "heads": 4, "kv_heads": 2, "n": 1536, "head_dim": 16}
    problem = vertical_slash_index.problem(shape, torch.float32)
    plan = problem.ours()
    problem.check(plan)
    first, count = plan.column_slice[0, 3, -1].tolist()
    unseen = sorted(set(range(16, 1000)) - set(plan.columns[0, 3, first : first + count].tolist()))
    plan.columns[0, 3, first : first + 10] = torch.tensor(unseen[:10], dtype=torch.int32)
    with pytest.raises(AssertionError, match="head 3, segment 2: the columns' mass is"):
        problem.check(plan)
    plan.ranges[0, 0, -1, 0] += 1
    with pytest.raises(AssertionError, match="ranges of head 0, segment 2, tile 7"):
        problem.check(plan)
