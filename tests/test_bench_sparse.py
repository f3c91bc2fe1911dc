"""The benchmark cases of activation sparsity at tiny sizes."""

import pytest
import torch
from scrimp.benchmarks import (
    channel_select,
    int4_linear,
    int4_sparse_linear,
    int4_sparse_step,
    measure,
    rows,
    sparse_linear,
)
from scrimp.benchmarks.registry import Case

from scrimp.ops.channel_select import RULES

PROBES = measure.probes(torch.float32, size=64, elements=2**12)


def measured(case: Case) -> list[rows.Row]:
    return rows.case_rows(case, case.make(), PROBES, 0.0)


@pytest.mark.parametrize("choice", sparse_linear.CHOICES)
def test_sparse_linear_rows(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_linear, "COLD_BYTES", 2**16)
    monkeypatch.setitem(sparse_linear.SHAPES, "tiny", (300, 40))
    count, sparsity = sparse_linear.CHOICES[choice]
    for row in measured(sparse_linear.case(f"tiny-{choice}", torch.float32)):
        assert not row["note"].startswith(rows.FAILURES)
        assert row["ratio"] > 0
        assert row["sparsity"] == sparsity
        if count == 1:
            assert row["listed"] == pytest.approx(1 - sparsity, abs=0.01)
        else:  # rows choose independently here
            assert row["listed"] == pytest.approx(1 - sparsity**count, abs=0.08)


def test_sparse_linear_check_sees_a_wrong_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_linear, "COLD_BYTES", 2**16)
    problem = sparse_linear.problem(3, 300, 40, 0.5, torch.float32)
    out = problem.ours()
    problem.check(out)
    out[2, 39] += 1e-3
    with pytest.raises(AssertionError, match="above the bound"):
        problem.check(out)


def test_int4_sparse_linear_rows_and_check(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (int4_linear, int4_sparse_linear):
        monkeypatch.setattr(module, "COLD_BYTES", 2**12)
    monkeypatch.setitem(int4_sparse_linear.SHAPES, "tiny", (40, 256, 32, "uint8"))
    monkeypatch.setattr(int4_sparse_linear, "WITH_FLOATS", ("tiny",))
    for choice, mode in (("1-half", "int8"), ("4-half", "exact")):
        case = int4_sparse_linear.case("tiny", choice, mode, torch.float32)
        for row in measured(case):
            assert not row["note"].startswith(rows.FAILURES)
            assert row["ratio"] > 0
            assert (row["mode"], row["group_size"]) == (mode, 32)
        problem = case.make()
        out = problem.ours()
        problem.check(out)
        out[0, 39] += 0.5
        with pytest.raises(AssertionError, match="above the bound"):
            problem.check(out)


@pytest.mark.parametrize("rule", RULES)
def test_channel_select_rows(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(channel_select.CHANNELS, "tiny", 50)
    case = channel_select.case("tiny", 2, rule, torch.float32)
    (row,) = measured(case)
    assert not row["note"].startswith(rows.FAILURES)
    problem = case.make()
    kept, index, count, _ = found = problem.ours()
    problem.check(found)
    theirs = rows.registry.peer_file("torch").channel_select(*problem.inputs).call()
    assert torch.equal(theirs[0], kept)
    assert theirs[1][:, 0].tolist() == index[: int(count)].tolist()
    index[0] += 1
    with pytest.raises(AssertionError, match="index is not the reference's in 1 places"):
        problem.check(found)


@pytest.mark.parametrize("mode", ["int8", "exact"])
def test_int4_sparse_step(mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(measure, "PROBE_SIZES", {"cpu": (8, 2**12)})
    sizes = ["--layers", "2", "--width", "64", "--group-size", "32", "--mode", mode, "--threads", "1"]
    assert int4_sparse_step.main([*sizes, "--sparsity", "0.6"]) == 0
    title, _, *lines = capsys.readouterr().out.splitlines()
    assert float(title.split(f"{mode}, ")[1].split("%")[0]) == pytest.approx(60, abs=10)
    assert [line.split()[0] for line in lines] == ["dense", "sparse"]
    limits = [float(line.split()[5]) for line in lines]
    assert len(limits) == 2
    assert all(float(line.split()[6].rstrip("%")) > 0 for line in lines)
