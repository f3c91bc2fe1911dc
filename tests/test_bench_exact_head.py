"""The rows of exact_head and of generation with it at tiny sizes, and the command that counts mismatches."""

from typing import Any

import pytest
import torch
from scrimp.benchmarks import e2e, exact_head, exact_head_count, measure, rows
from scrimp.benchmarks.registry import Case
from transformers import LlamaConfig, LlamaForCausalLM

from scrimp import HeadScreen

IDS = torch.randint(2000, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 6}
    made = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=2000, initializer_range=0.3)).eval()
    monkeypatch.setattr(e2e, "loaded", lambda dtype: (made, None))
    monkeypatch.setattr(e2e, "prompts", lambda name, tokenizer, length, batch: IDS[:batch, :length])
    monkeypatch.setattr(e2e.text, "windows", lambda *_: IDS)
    return made


def found(case: Case, problem: Any) -> list[dict[str, Any]]:
    return list(rows.case_rows(case, problem, measure.probes(torch.float32, size=64, elements=2**12), 0.0))


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_head, "COLD_BYTES", 2**12)
    monkeypatch.setitem(exact_head.RANDOM, "small", (2000, 64))
    for k in (1, 5):
        problem = exact_head.problem("small", 2, k)
        case = Case(
            "exact_head", "small", torch.float32, exact_head.fields("small", 2, k), ("self-dense", "torch"), None
        )
        for row in found(case, problem):
            assert not row["note"].startswith(rows.FAILURES)  # a peer may be too slow at such a size to count
            assert (row["mismatches"], row["fallback_rate"]) == (0, 0)
            assert row["scored"] < 200
        values, ids, scored = problem.ours()
        problem.check((values, ids, scored))
        for wrong in ((values + 1e-6, ids), (values, (ids + 1) % 2000)):
            with pytest.raises(AssertionError, match="of 2 hidden states have other logits or ids"):
                problem.check((*wrong, scored))


@pytest.mark.parametrize("kind", e2e.HEADS)
def test_generation(kind: str, model: Any) -> None:
    e2e.quantized.cache_clear()
    case = e2e.head_case(kind, prompt=12, new=6)
    problem = case.make()
    for row in found(case, problem):
        assert row["note"] == ""
        assert (row["profile"], row["fallback_rate"]) == ("plain", 0)
        assert row["tokens_per_s"] > 0
        assert 0 < row["head_share"] < 1
        assert row["allowed"] == pytest.approx(1 / (1 - row["head_share"]), rel=1e-3)
        assert row["of_allowed"] == pytest.approx(row["ratio"] / row["allowed"], rel=1e-3)
    assert type(model.lm_head) is torch.nn.Linear
    got = problem.ours()
    problem.check(got)
    with pytest.raises(AssertionError, match="only 5 of 6 tokens are those of the dense head"):
        problem.check(torch.cat([got[:, :5], got[:, 5:] ^ 1], 1))
    e2e.quantized.cache_clear()


def test_count(model: Any) -> None:
    screen = HeadScreen.build(model.lm_head.weight.detach())
    one, many = exact_head_count.count(model, IDS, screen, [1, 64])
    assert (one["k"], one["states"], one["mismatches"], one["fallback_rate"]) == (1, 48, 0, 0)
    assert one["scored"] < many["scored"]
    assert many["mismatches"] == 0
    row = exact_head_count.texts(model, IDS, screen, 5)
    assert row == {"prompts": 2, "tokens": 10, "mismatches": 0, "fallback_rate": 0}
    assert type(model.lm_head) is torch.nn.Linear
