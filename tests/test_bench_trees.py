"""The commands about tree decoding on a tiny model: exactness, sources, trained maps that are kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scrimp.benchmarks import draft_maps, e2e, tree_exact, tree_sources

from scrimp.methods.generation import decoder_model
from scrimp.methods.tree_decoding import DraftMaps
from scrimp.methods.tree_decoding.maps import model_hash
from scrimp.testing import random_llama


@pytest.fixture
def model() -> Any:
    return random_llama(256, initializer_range=0.3, max_position_embeddings=1024)


def test_exactness(model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    asked = ["--prompts", "3", "--drawn", "1", "--tokens", "6", "--guesses", "9"]
    assert tree_exact.main([*asked, "--sources", "mix"]) == 0
    said = capsys.readouterr().out
    assert said.count("0 differences in ") == 4
    assert "mix              batch 4: 0 differences in 36 tokens and 18 rows of logits" in said
    monkeypatch.setattr(tree_exact.scrimp, "load", lambda _: (model, tokenizer))
    assert tree_exact.main([*asked, "--sources", "hidden, half", "--model", "tiny"]) == 0
    assert capsys.readouterr().out.count("0 differences in ") == 4


def test_a_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tree_exact.scrimp.generate

    def wrong(*args: Any, **settings: Any) -> Any:
        found = real(*args, **settings)
        if settings.get("draft") is not None:
            found[0].tokens[3] += 1
        return found

    monkeypatch.setattr(tree_exact.scrimp, "generate", wrong)
    asked = ["--prompts", "1", "--drawn", "0", "--tokens", "6", "--sources", "lookup"]
    assert tree_exact.main(asked) == 1


def test_sources(model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    pairs: list[tuple[Any, int]] = [("hidden", 1), ("medusa", 2)]
    for kind, layer in pairs:
        maps = DraftMaps(kind, layer, torch.randn(2, 48, 48), torch.randn(2, 48), model_hash(decoder_model(model)))
        maps.save(tmp_path / kind)
    monkeypatch.setattr(draft_maps, "path", lambda kind: tmp_path / kind)
    monkeypatch.setattr(tree_sources.scrimp, "load", lambda _: (model, tokenizer))
    monkeypatch.setattr(tree_sources, "named_model", lambda name: name)
    monkeypatch.setitem(tree_sources.SOURCES, "early-exit", lambda: [tree_sources.EarlyExit(1)])
    out = tmp_path / "rows.json"
    assert tree_sources.main(["--prompts", "2", "--tokens", "5", "--json", str(out)]) == 0
    said = capsys.readouterr().out
    assert "kv_compact: " in said
    rows = json.loads(out.read_text())
    of_texts = [row for row in rows if "pairs" in row]
    assert [row["case"] for row in of_texts] == [f"{k}-{s}" for k in tree_sources.KINDS for s in tree_sources.SOURCES]
    assert [row["m"] for row in rows if row["case"].startswith("cost-")] == [1, 4, 8, 16, 32, 64]
    for row in of_texts:
        assert (row["pairs"], row["new_tokens"]) == (2, 5)
        assert 1 <= row["tokens_per_step"] <= 4
        assert row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"]
    assert all("medusa 0." in row["right"] for row in of_texts if row["case"].endswith("medusa"))


def test_maps_are_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def train(words: list[str]) -> int:
        asked.append(words)
        Path(words[words.index("--out") + 1]).touch()
        return len(asked) > 2

    monkeypatch.setattr(draft_maps, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(draft_maps, "demo_model_path", lambda: tmp_path)
    monkeypatch.setattr(draft_maps.cli, "main", train)
    found = {kind: draft_maps.path(kind) for kind in (*draft_maps.KINDS, *draft_maps.KINDS)}
    assert len(asked) == 2
    assert all(file.parent == tmp_path / "drafts" for file in found.values())
    monkeypatch.setattr(draft_maps, "SETTINGS", ["--steps", "1"])
    with pytest.raises(RuntimeError, match="the training failed"):
        draft_maps.path("medusa")
    with pytest.raises(ValueError, match="kind='eagle' is not hidden or medusa"):
        draft_maps.path("eagle")


def test_no_prompt_is_measured() -> None:
    trained = draft_maps.prompts()
    assert len(set(trained)) == len(trained) > 80
    measured = {*e2e.QUESTIONS.values(), *(each for some in tree_sources.ASKED.values() for each in some)}
    assert not measured & set(trained)
    assert not any("\n" in each for each in trained)
    short = [each for each in trained if not each.startswith("Read this text.")]
    assert not any(word in each for each in short for word in ("Rome", "lighthouse", " fox", "stack"))
