"""The rows of int4_linear at tiny sizes, beside every peer that is installed."""

import pytest
import torch
from scrimp.benchmarks import int4_linear, measure, rows
from scrimp.benchmarks.registry import Case


def test_int4_linear_rows_and_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4_linear, "COLD_BYTES", 2**12)
    for kind, group_size, mode, dtype in (
        ("none8", 128, "exact", torch.float32),
        ("uint8", 64, "int8", torch.bfloat16),
        ("none8", 32, "int8", torch.float32),
    ):
        problem = int4_linear.problem(3, 16, 256, group_size, kind, mode, dtype)
        peers = int4_linear.peers(1, group_size, kind, mode, dtype)
        case = Case("int4_linear", "tiny", dtype, {"m": 3, "group_size": group_size}, peers, lambda p=problem: p)
        for row in rows.case_rows(case, problem, measure.probes(dtype, size=64, elements=2**12), 0.0):
            assert {"ratio", "limit_fraction", "group_size", "mode"} <= set(row)
            assert not row["note"].startswith(rows.FAILURES)
            assert row["ratio"] or "make setup-peers" in row["note"]
        out = problem.ours()
        out[2, 15] += 0.5
        with pytest.raises(AssertionError, match="above the bound"):
            problem.check(out)
