"""The benchmark cases of VQ heads and codebooks at tiny sizes, and the quality command."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from scrimp.benchmarks import codebook_quality, codebook_topk, measure, rows, vq_logits, vq_quality, vq_sample
from scrimp.benchmarks.registry import Case
from transformers import LlamaConfig, LlamaForCausalLM

PROBES = measure.probes(torch.float32, size=64, elements=2**12)


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vq_logits, "COLD_BYTES", 2**16)
    monkeypatch.setitem(vq_logits.HEADS, "tiny", (700, 24))


def assert_measured(case: Case) -> None:
    found = rows.case_rows(case, case.make(), PROBES, 0.0)
    assert [row["peer"] for row in found] == ["torch", "torch_dense"]
    for row in found:
        assert row["note"] == ""
        assert row["ratio"] > 0
        assert (row["vocab"], row["d"], row["codes"]) == (700, 24, 7)


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vq_logits_rows(dtype: torch.dtype) -> None:
    assert_measured(vq_logits.case("tiny", 3, dtype))


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("way", vq_sample.WAYS)
def test_vq_sample_rows(way: str) -> None:
    assert_measured(vq_sample.case("tiny", 3, way))


@pytest.mark.usefixtures("_tiny")
def test_checks_see_a_wrong_result() -> None:
    problem = vq_logits.problem(2, 700, 24, torch.float32)
    logits = problem.ours()
    problem.check(logits)
    logits[1, 699] += 1e-3
    with pytest.raises(AssertionError, match="above the bound"):
        problem.check(logits)
    problem = vq_sample.problem(2, 700, 24, 1.0, 0.9)
    tokens = problem.ours()
    problem.check(tokens)
    tokens[1] += 1
    with pytest.raises(AssertionError, match="row 1: token"):
        problem.check(tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codebook_topk_rows(dtype: torch.dtype) -> None:
    make = partial(codebook_topk.problem, 200, 24, 90, 3, dtype)
    case = Case("codebook_topk", "tiny", dtype, {"m": 200}, ("torch",), make)
    (row,) = rows.case_rows(case, case.make(), PROBES, 0.0)
    assert row["note"] == ""
    assert row["ratio"] > 0


def test_codebook_topk_check_sees_a_wrong_result() -> None:
    problem = codebook_topk.problem(20, 24, 90, 3, torch.float32)
    problem.check(problem.ours())
    for part, words in enumerate(("out is", "of its code", "of its code|largest")):
        found = problem.ours()
        found[part][7, 1] += 1 if part == 1 else 1e-3
        with pytest.raises(AssertionError, match=words):
            problem.check(found)


@pytest.fixture
def small_model(tokenizer: Any, tmp_path: Path) -> str:
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.2))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_codebook_quality(small_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More codes disturb less; each is judged before training and after it."""
    out = tmp_path / "rows.json"
    words = [small_model, "--codes", "2", "150", "--k", "1", "--euclidean", "--steps", "15"]
    sizes = ["--texts", "4", "--windows", "2", "--length", "64", "--json", str(out)]
    assert codebook_quality.main([*words, *sizes]) == 0
    found = {(row["where"], row["codes"], row["steps"]): row for row in json.loads(out.read_text())}
    assert list(found) == [
        (where, codes, steps) for where in ("mlp", "heads") for codes in (2, 150) for steps in (0, 15)
    ]
    for where in ("mlp", "heads"):
        assert found[where, 2, 0]["top1_agreement"] < found[where, 150, 0]["top1_agreement"] < 1
    assert "without codes: perplexity" in capsys.readouterr().out


def test_vq_quality(small_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As many codes as tokens are the head itself; fewer are worse and smaller, and training helps."""
    sizes = ["--texts", "4", "--length", "64", "--window", "32", "--windows", "2", "--steps", "30"]
    out = tmp_path / "rows.json"
    files = ["--json", str(out), "--csv", f"{out}.csv"]
    assert vq_quality.main([small_model, "--codes", "16", "256", *sizes, *files]) == 0
    found = {row["case"]: row for row in json.loads(out.read_text())}
    assert list(found) == [f"{repair}-{K}" for K in (16, 256) for repair in vq_quality.REPAIRS]
    assert found["plain-256"]["kl_mean"] < 1e-6
    assert found["plain-256"]["top1_agreement"] == 1
    assert found["metric-16"]["kl_mean"] < found["plain-16"]["kl_mean"]
    assert found["tuned-16"]["perplexity"] < found["bias-16"]["perplexity"]
    assert found["plain-16"]["share"] < 0.2 < 1 < found["bias-256"]["share"]
    assert all(row["head_ms"] > 0 and row["head_ratio"] > 0 for row in found.values())
    assert "residual-16" in capsys.readouterr().out
