"""The end-to-end rows and the comparison with Hugging Face's greedy text, on a tiny model."""

import copy
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from scrimp.benchmarks import (
    agreement,
    e2e,
    int4_quality,
    measure,
    registry,
    rows,
    same_choices,
    wina_loops,
    wina_lossless,
    wina_plot,
    wina_quality,
)
from scrimp.benchmarks.registry import Case
from transformers import LlamaConfig, LlamaForCausalLM

import scrimp
from scrimp.methods.int4.quantize import METHODS
from scrimp.methods.tree_decoding import LookupDraft, RecyclingDraft
from scrimp.methods.wina import Selection

IDS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=97, num_key_value_heads=2, initializer_range=0.3)).eval()


def test_rows(model: Any) -> None:
    for batch, peers in ((2, ("hf",)), (1, ("hf", "hf_lookup", "llama"))):
        problem = e2e.of_model(model, IDS[:batch], 8)
        case = Case("e2e", "tiny", torch.float32, {"m": batch}, peers, lambda p=problem: p)
        found = rows.case_rows(case, problem, measure.probes(torch.float32, size=64, elements=2**12), 0.0)
        for row in found:
            if row["note"].startswith("MISSING"):
                assert row["peer"] == "llama"
                assert "pip install llama-cpp-python" in row["note"]
                continue
            assert row["note"] == ""
            assert row["profile"] == "plain"
            assert row["identical_tokens"] == 8 * batch
            assert row["perplexity_ratio"] == pytest.approx(1, rel=1e-4)
            assert row["tokens_per_s"] == pytest.approx(1e3 * 8 * batch / row["ours_ms"], rel=1e-2)
            assert row["peer_tokens_per_s"] == pytest.approx(1e3 * 8 * batch / row["peer_ms"], rel=1e-2)


def test_rows_of_trees(model: Any) -> None:
    problem = e2e.of_model(model, IDS, 8, trees=lambda: [LookupDraft(), RecyclingDraft()])
    case = Case("e2e", "tiny", torch.float32, {"m": 2}, ("self-plain", "hf"), lambda: problem)
    for row in rows.case_rows(case, problem, measure.probes(torch.float32, size=64, elements=2**12), 0.0):
        assert (row["note"], row["profile"]) == ("", "tree")
        assert row["tokens_per_step"] >= 1
        assert row["ratio"] > 0


def test_a_wrong_token_is_seen(model: Any) -> None:
    problem = e2e.of_model(model, IDS, 8)
    got = problem.ours()
    problem.check(got)
    got[1, 3] = (got[1, 3] + 1) % 97
    with pytest.raises(AssertionError, match="behind the best one by Hugging Face"):
        problem.check(got)


def test_cases_have_names_and_peers() -> None:
    cases = e2e.cases()
    assert "e2e" in registry.names()
    assert len({case.full_name for case in cases}) == len(cases)
    for peer in {peer for case in cases for peer in case.peers if not registry.is_self(peer)}:
        assert callable(registry.peer_file(peer).e2e)


@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_int4_rows(mode: str, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(e2e, "loaded", lambda dtype: (model, tokenizer))
    monkeypatch.setattr(e2e, "prompts", lambda name, tokenizer, length, batch: IDS[:batch, :length])
    e2e.quantized.cache_clear()
    for stock in (False, True):
        case = e2e.int4_case(stock, mode, prompt=12, new=6)
        found = rows.case_rows(case, case.make(), measure.probes(torch.float32, size=64, elements=2**12), 0.0)
        assert [row["peer"] for row in found] == (["hf"] if stock else ["hf", "self-fp32"])
        for row in found:
            assert row["note"] == ""
            assert (row["mode"], row["group_size"]) == (mode, 64)
            assert row["profile"] == ("stock" if stock else "plain")
    e2e.quantized.cache_clear()


@pytest.mark.parametrize("mode", ["", "exact"])
def test_sparse_rows(mode: str, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(e2e, "loaded", lambda dtype: (model, tokenizer))
    monkeypatch.setattr(e2e, "prompts", lambda name, tokenizer, length, batch: IDS[:batch, :length])
    monkeypatch.setattr(e2e.text, "windows", lambda *_: texts)
    for made in (e2e.quantized, e2e.sparsified):
        made.cache_clear()
    case = e2e.sparse_case(mode, prompt=12, new=6)
    problem = case.make()
    found = rows.case_rows(case, problem, measure.probes(torch.float32, size=64, elements=2**12), 0.0)
    assert [(row["peer"], row["note"], row["sparsity"], row["mode"]) for row in found] == [
        (peer, "", 0.5, mode) for peer in (("hf", "self-dense", "self-fp32") if mode else ("hf", "self-dense"))
    ]
    assert found[0]["identical_tokens"] == 6
    assert found[0]["perplexity_ratio"] != pytest.approx(1, rel=1e-3)
    got = problem.ours()
    got[0, 3] = (got[0, 3] + 1) % 97
    with pytest.raises(AssertionError, match="tokens are not those of our ops one by one"):
        problem.check(got)
    for made in (e2e.quantized, e2e.sparsified):
        made.cache_clear()


@pytest.mark.parametrize("mode", ["", "exact"])
def test_hugging_face_gets_our_choices(mode: str, model: Any) -> None:
    sparse = copy.deepcopy(model)
    if mode:
        scrimp.quantize(sparse, "rtn", 16, mode=mode)
    texts = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(1))
    scrimp.sparsify(sparse, scrimp.calibrate(sparse, texts, progress=False), 0.5)
    got, near = e2e.of_model(sparse, IDS[:1], 6).ours(), e2e.NEAR_TIE[torch.float32]
    with same_choices.recorded_choices(sparse) as choices:
        e2e.recorded(sparse, IDS[:1].tolist(), None, max_new_tokens=6, ignore_eos=True)
    with torch.no_grad():
        own = e2e.stepwise(sparse, IDS[:1], got)
        for layer in same_choices.layers(sparse).values():
            layer.selection.level.mul_(0.97)
        assert (e2e.stepwise(sparse, IDS[:1], got) - own).abs().max() > near
        with same_choices.replayed_choices(sparse, choices):
            torch.testing.assert_close(e2e.stepwise(sparse, IDS[:1], got), own, rtol=0, atol=near)
    assert all(type(layer.selection) is Selection for layer in same_choices.layers(sparse).values())


def test_loops_are_compared(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(1))
    sparse = copy.deepcopy(model)
    scrimp.sparsify(sparse, scrimp.calibrate(sparse, texts, progress=False), 0.5)
    found = wina_loops.apart(sparse, IDS[:1], 6)
    assert found.same < e2e.NEAR_TIE[torch.float32]
    assert found.channels or found.own < e2e.NEAR_TIE[torch.float32]
    assert found.calls == 5 * 2 * 7
    monkeypatch.setattr(e2e, "loaded", lambda dtype: (model, tokenizer))
    monkeypatch.setattr(e2e, "prompts", lambda name, tokenizer, length, batch: IDS[:batch])
    monkeypatch.setattr(e2e, "sparsified", lambda mode: sparse)
    assert wina_loops.main(["--tokens", "4"]) == 0
    assert capsys.readouterr().out.count(" in 42 choices taken by one loop alone") == 2


def test_sparse_logits_of_other_bits_are_seen(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    got, exact = e2e.of_model(model, IDS[:1], 6).ours(), e2e.recorded
    count = iter(range(2))

    def nudged(*args: Any, **asked: Any) -> Any:
        found, logits = exact(*args, **asked)
        first = next(iter(logits))
        logits[first] = logits[first] if next(count) else logits[first].nextafter(torch.tensor(torch.inf))
        return found, logits

    monkeypatch.setattr(e2e, "recorded", nudged)
    with pytest.raises(AssertionError, match="1 of 6 rows of logits differ in bits from our ops one by one"):
        e2e.sparse_check(model, IDS[:1], got)


def test_wina_quality(model: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "vocab_size": 256, "initializer_range": 0.1}))
    wide.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    sizes = ["--texts", "2", "--length", "32", "--window", "32", "--windows", "2", "--sparsities", "0", "0.6"]
    out = tmp_path / "rows.json"
    picture = tmp_path / "out.svg"
    asked = [str(tmp_path / "model"), *sizes, "--plot", str(picture), "--certified"]
    assert wina_quality.main([*asked, "--json", str(out), "--csv", f"{out}.csv"]) == 0
    found = json.loads(out.read_text())
    names = [variant.replace(":", "-") for variant in wina_quality.VARIANTS]
    cases = [f"{name}-{s}" for name in names for s in ("0", "0.6")]
    assert [row["case"] for row in found] == [case for case in cases if case != "cats-uniform-0.6"]
    for row in found:
        assert row["perplexity_ratio"] == pytest.approx(row["perplexity"] / row["reference_perplexity"], rel=1e-3)
        assert row["dropped"] == pytest.approx(row["sparsity"], abs=0.05)
        exact = row["sparsity"] == 0
        assert (row["kl_mean"] < 1e-5) == exact
        assert (row["ratio_error"] < 1e-4) == exact
        if row["method"] != "cats" and not exact:
            assert 0.05 < row["layer_error"] < row["layer_bound"]
        rotations = 0.3 if "rotated" in row["method"] else 0.0  # 2 d^2 of 2 d (d + d_kv) + 3 d f
        assert row["saved"] == pytest.approx(row["sparsity"] - rotations, abs=0.02)
    printed = capsys.readouterr().out
    assert "cats' skips at most 39.6% of this model's weights" in printed
    drawn = ElementTree.parse(picture).getroot()
    assert len(drawn.findall("{http://www.w3.org/2000/svg}circle")) == len(found)
    assert wina_plot.main([str(out), str(tmp_path / "again.svg")]) == 0
    assert (tmp_path / "again.svg").read_text() == picture.read_text()


def test_wina_quality_of_4_bits(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    wide = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "vocab_size": 256, "initializer_range": 0.1}))
    scrimp.quantize(wide, "rtn", 16)
    wide.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "rows.json"
    sizes = ["--texts", "2", "--length", "32", "--window", "32", "--windows", "2", "--sparsities", "0", "0.5"]
    for mode in ("exact", "int8"):
        asked = ["--mode", mode, "--variants", "cats:uniform", "wina:knapsack", *sizes, "--json", str(out)]
        assert wina_quality.main([str(tmp_path / "model"), *asked]) == 0
        none, half = json.loads(out.read_text())
        assert half["case"] == "wina-knapsack-0.5"
        assert (none["dropped"], half["dropped"]) == pytest.approx((0, 0.5), abs=0.05)
        assert none["kl_mean"] < 1e-5 < half["kl_mean"]


def test_wina_lossless(model: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "vocab_size": 256}))
    wide.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    sizes = ["--texts", "1", "--prompts", "3", "--length", "8", "--tokens", "12", "--batch", "2"]
    assert wina_lossless.main([str(tmp_path / "model"), *sizes, "--ways", "every step"]) == 0
    printed = capsys.readouterr().out
    assert "greedy, drafts read every step: 3 of 3 texts identical" in printed
    assert "drawn, drafts read every step: 3 of 3 texts identical" in printed


def test_int4_quality(model: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "vocab_size": 256, "initializer_range": 0.1}))
    wide.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    sizes = ["--group-size", "16", "--texts", "2", "--length", "32", "--window", "32", "--windows", "2"]
    out = tmp_path / "rows.json"
    asked = [
        str(tmp_path / "model"),
        *sizes,
        "--modes",
        "exact",
        "int8",
        "--json",
        str(out),
        "--csv",
        str(out) + ".csv",
    ]
    assert int4_quality.main(asked) == 0
    found = json.loads(out.read_text())
    assert [row["case"] for row in found] == [f"{m}-{a}" for m in METHODS for a in ("exact", "int8")]
    for row in found:
        assert row["perplexity_ratio"] == pytest.approx(row["perplexity"] / row["reference_perplexity"], rel=1e-3)
        assert 0 < row["kl_mean"] < 1
        assert row["top1_agreement"] > 0.5
        assert 4 < row["bits"] < 6.1
    assert "gptq-int8" in capsys.readouterr().out


def test_agreement_with_hugging_face(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = copy.deepcopy(model).double()
    prompts = [IDS[0, :n].tolist() for n in (1, 5, 12)]
    assert agreement.compare(model, exact, prompts, 24) == []
    real = agreement.scrimp.generate

    def wrong(*args: Any, **settings: Any) -> Any:
        found = real(*args, **settings)
        found.tokens[7] = (found.tokens[7] + 1) % 97
        return found

    monkeypatch.setattr(agreement.scrimp, "generate", wrong)
    (mismatch,) = agreement.compare(model, exact, prompts[:1], 24)
    assert (mismatch.at, mismatch.near_tie) == (7, False)
    assert mismatch.our_error < 1e-4
    tie = agreement.Mismatch(0, 0, 1, 2, margin=1e-6, our_error=8e-7, their_error=9e-7)
    assert tie.near_tie
