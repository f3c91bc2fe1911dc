"""`scrimp.load`, `scrimp generate` and `scrimp eval` on a tiny model in a folder and in a GGUF file."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from scrimp.benchmarks.peers.llama import write_gguf

import scrimp
from scrimp import cli
from scrimp.methods.draft_training import Tuner
from scrimp.methods.generation import decoder_model
from scrimp.methods.tree_decoding import DraftMaps, HiddenTransfer, MedusaHeads
from scrimp.methods.tree_decoding.maps import model_hash

SIZES = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 640}


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder."""
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(**SIZES, **HEADS, initializer_range=0.3, eos_token_id=None, bos_token_id=None)
    transformers.LlamaForCausalLM(config).save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


def test_load_a_folder(folder: Path) -> None:
    model, tokenizer = scrimp.load(folder)
    assert model.dtype == torch.float32
    assert not model.training
    assert scrimp.load(str(folder), torch.bfloat16)[0].dtype == torch.bfloat16
    got = scrimp.generate(model, "Hello", tokenizer, max_new_tokens=5)
    ids = tokenizer("Hello", return_tensors="pt").input_ids
    assert got.tokens == model.generate(ids, max_new_tokens=5, do_sample=False)[0, 5:].tolist()


def test_load_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise RuntimeError("no network\nand more words")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"PK\x03\x04")
    for source, error, message in (
        (tmp_path, ValueError, "is not the folder of a transformers model: it has no config.json"),
        (tmp_path / "none.gguf", ValueError, "there is no file .*none.gguf"),
        (wrong, OSError, "is not a GGUF file: it begins with b'PK"),
        ("./no/such/folder", ValueError, "there is no folder ./no/such/folder"),
        ("typo", ValueError, "there is no folder typo .and a name on the Hugging Face Hub is written OWNER/MODEL"),
        ("nobody/nothing-here", OSError, "nobody/nothing-here: no such folder here, and not from the Hub: no network$"),
    ):
        with pytest.raises(error, match=message):
            scrimp.load(source)


def test_load_a_gguf_file(folder: Path, tmp_path: Path) -> None:
    """Weights in GGUF's layout come back as they were."""
    model, tokenizer = scrimp.load(folder)
    letters = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    write_gguf(model, tmp_path / "tiny.gguf", [letter for letter, _ in letters])
    loaded, own = scrimp.load(tmp_path / "tiny.gguf")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor)
    got = scrimp.generate(loaded, "Hello", own, max_new_tokens=4, ignore_eos=True)
    assert got == scrimp.generate(model, "Hello", tokenizer, max_new_tokens=4)


def test_generate(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    model, tokenizer = scrimp.load(folder)
    asked = ["generate", str(folder), "--max-new-tokens", "12", "--threads", "1"]
    assert cli.main([*asked, "--prompt", "Hello", "--raw"]) == 0
    said = capsys.readouterr()
    expected = scrimp.generate(model, "Hello", tokenizer, max_new_tokens=12).text
    assert said.out == expected + "\n"
    assert said.err.startswith("prompt 5 tokens in ")
    assert said.err.strip().endswith("ended by length")
    (tmp_path / "prompt.txt").write_text("Hello")
    assert cli.main([*asked, "--file", str(tmp_path / "prompt.txt"), "--raw"]) == 0
    assert capsys.readouterr().out == expected + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello"))
    assert cli.main([*asked, "--file", "-", "--raw", "--stop", expected[3:6]]) == 0
    assert capsys.readouterr().out == expected[: expected.index(expected[3:6])] + "\n"
    assert cli.main([*asked, "--prompt", "Hello", "--temperature", "2", "--seed", "5"]) == 0
    said = capsys.readouterr()
    chat = "[user]Hello[/][assistant]"
    assert said.out == scrimp.generate(model, chat, tokenizer, max_new_tokens=12, temperature=2.0, seed=5).text + "\n"
    assert cli.main([*asked, "--prompt", "Hello", "--split"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("one step takes") for line in lines)
    assert any(line.split()[0] == "linear" and line.split()[-2] == "9" for line in lines)
    assert cli.main([*asked, "--prompt", "Hello", "--raw", "--head", "exact", "--split"]) == 0
    said = capsys.readouterr()
    assert said.out == expected + "\n"
    assert any(line.split()[0] == "exact_head" and line.split()[-2] == "1" for line in said.err.splitlines())


def test_generate_with_drafts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same text by every source; maps of another model are refused, with both hashes."""
    asked = ["generate", str(folder), "--max-new-tokens", "12", "--threads", "1", "--prompt", "Hello", "--raw"]
    assert cli.main(asked) == 0
    expected = capsys.readouterr().out
    model = scrimp.load(folder)[0]
    maps = DraftMaps("hidden", 1, torch.randn(2, 32, 32), torch.randn(2, 32), model_hash(decoder_model(model)), "tiny")
    maps.save(tmp_path / "maps")
    assert cli.main([*asked, "--draft", "lookup", "ngram", "recycling", str(tmp_path / "maps")]) == 0
    said = capsys.readouterr()
    assert said.out == expected
    assert "tokens a step; guesses that were right: lookup " in said.err
    assert cli.main([*asked, "--draft", "early-exit:1", f"model:{folder}"]) == 0
    assert capsys.readouterr().out == expected
    replace(maps, weight_hash="a" * 32).save(tmp_path / "other")
    for word, message in (
        ("other", f"these are for weights {'a' * 32} (tiny), but this model's are {maps.weight_hash}; train others"),
        ("none", "there is no such file; sources are lookup, ngram, recycling, early-exit:N, model:MODEL, FILE"),
        ("early-exit:9", "EarlyExit: layer 8 of a model with 2 layers"),
    ):
        assert cli.main([*asked, "--draft", word if ":" in word else str(tmp_path / word)]) == 2
        said = capsys.readouterr()
        assert message in said.err
        assert said.err.strip().count("\n") == 0
        assert said.out == ""


def test_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words, message in (
        ((folder,), "give the prompt by --prompt TEXT or by --file FILE"),
        ((tmp_path, "--prompt", "x"), "it has no config.json"),
        ((folder, "--prompt", "x" * 700), "but the model's context is of 640"),
        ((folder, "--prompt", "x", "--top-p", "7"), "top_p=7.0 must be above 0 and at most 1"),
        ((folder, "--prompt", "x", "--threads", "0"), "--threads 0 must be at least 1"),
        ((folder, "--prompt", "x", "--sparse", "fast"), "no head patterns come with scrimp for this model's weights"),
        ((folder, "--prompt", "x", "--patterns", "p"), "--patterns needs --sparse BUDGET"),
        ((folder, "--file", str(tmp_path / "none")), "No such file"),
    ):
        assert cli.main(["generate", *map(str, words)]) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith("scrimp generate: ")
        assert message in said
        assert "\n" not in said


def test_eval(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    asked = ["eval", str(folder), "--window", "64", "--windows", "2", "--json", str(out)]
    assert cli.main(asked) == 0
    said = capsys.readouterr().out
    assert "windows that do not overlap" in said
    assert "text: pydoc_data.topics (held-out documents), 2 windows of 64 tokens" in said
    plain = json.loads(out.read_text())
    assert plain["perplexity"] > 1
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    assert cli.main([*asked, "--text", str(text), "--against-dtype", "bfloat16", "--needle", "100"]) == 0
    said = capsys.readouterr().out
    assert "text: text.txt" in said
    assert said.count("pass key") == 5
    found = json.loads(out.read_text())
    assert 0 < found["kl_mean"] < 1
    assert found["top1_agreement"] > 0.5
    assert found["perplexity_ratio"] == pytest.approx(found["perplexity"] / found["reference_perplexity"])
    assert cli.main([*asked, "--against", str(folder)]) == 0
    assert json.loads(out.read_text())["kl_max"] == 0.0
    assert cli.main(["eval", str(folder), "--window", "1"]) == 2
    assert cli.main(["eval", str(folder), "--text", str(text), "--window", "5000"]) == 2
    assert "the text has 900 tokens, not one window of 5000" in capsys.readouterr().err
    assert cli.main(["eval", str(folder), "--json", "no/such/folder.json"]) == 2


def test_train_draft(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "maps.safetensors"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    asked = ["train-draft", str(folder), "--text", str(text), "--length", "64", "--out", str(out), "--threads", "1"]
    assert cli.main([*asked, "--sweep", "0", "1", "2", "--steps", "3", "--json", str(tmp_path / "figures.json")]) == 0
    said = capsys.readouterr().out
    assert "layer 1, upper layers" in said
    assert "layer 2, head at once" in said
    assert "layer 2, upper layers" not in said
    assert f"written: {out} (hidden, layer 1 of 2, weights " in said
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [each["offset"] for each in figures["3 steps"]] == [2, 3, 4]
    assert {each["guesses"] for accuracy in figures.values() for each in accuracy} == {30}
    model, tokenizer = scrimp.load(folder)
    for kind, source in (("hidden", HiddenTransfer), ("medusa", MedusaHeads)):
        assert cli.main([*asked, "--kind", kind, "--steps", "1", "--ahead", "2", "--generated", "--texts", "2"]) == 0
        draft = scrimp.tree_decoding(source(out))
        plain = scrimp.generate(model, "The quick", tokenizer, max_new_tokens=9)
        assert scrimp.generate(model, "The quick", tokenizer, max_new_tokens=9, draft=draft) == plain


def test_train_draft_on_answers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "maps"
    prompts.write_text("".join(f"What is {i} and {i}?\n\n" for i in range(5)))
    asked = ["train-draft", str(folder), "--out", str(out), "--threads", "1", "--prompts", str(prompts)]
    assert cli.main([*asked, "--length", "20", "--steps", "2", "--vocabulary", "99"]) == 0
    assert "guesses are among 99 of 256 tokens, " in capsys.readouterr().out
    assert len(DraftMaps.load(out).tokens) == 99
    assert cli.main([*asked, "--length", "20", "--steps", "0", "--vocabulary", "0", "--kind", "medusa"]) == 0
    assert DraftMaps.load(out).tokens is None
    assert cli.main([*asked, "--generated"]) == 2
    assert "--prompts goes without --text, --heldout and --generated" in capsys.readouterr().err
    prompts.write_text("One.\n")
    assert cli.main([*asked, "--length", "20"]) == 2
    assert "1 of 1 answers are long enough, which leaves none to judge by" in capsys.readouterr().err


def test_train_draft_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    text, maps = tmp_path / "text.txt", [tmp_path / name for name in ("whole", "interrupted")]
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    asked = ["train-draft", str(folder), "--text", str(text), "--length", "64", "--steps", "4", "--threads", "1"]
    assert cli.main([*asked, "--out", str(maps[0])]) == 0
    step = Tuner._advance

    def interrupt(tuner: Tuner, *rest: Any) -> None:
        if tuner.step == 2:
            raise KeyboardInterrupt
        step(tuner, *rest)

    monkeypatch.setattr(Tuner, "_advance", interrupt)
    assert cli.main([*asked, "--out", str(maps[1])]) == 130
    assert not maps[1].exists()
    monkeypatch.undo()
    assert cli.main([*asked, "--out", str(maps[1]), "--rate", "0.1"]) == 2
    said = capsys.readouterr()
    assert "a training with other settings, texts or weights; remove it to begin anew" in said.err
    assert cli.main([*asked, "--out", str(maps[1])]) == 0
    assert "interrupted.training: 2 steps" in capsys.readouterr().out
    assert maps[0].read_bytes() == maps[1].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["interrupted", "text.txt", "whole"]


def test_mistakes_of_train_draft(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", str(tmp_path / "out")
    text.write_text("x" * 100)
    for words, message in (
        (("--out", "no/such/folder/maps"), "the folder of no/such/folder/maps does not exist"),
        (("--out", out, "--ahead", "0"), "--ahead, --texts and --judged must be at least 1"),
        (("--out", out, "--steps", "-1"), "steps must not be negative"),
        (("--out", out, "--layer", "2"), "--layer 2 is not from 0 to 1"),
        (("--out", out, "--layer", "1", "--kind", "medusa"), "--layer 1: Medusa heads read the last state"),
        (("--out", out, "--sweep", "3"), "--sweep [3] must be layers from 0 to 2"),
        (("--out", out, "--heldout", str(text)), "--heldout goes with --text"),
        (("--out", out, "--text", str(text)), "the texts have 100 tokens, not one window of --length 512"),
        (("--out", out, "--text", str(text), "--length", "60"), "which leaves none to judge by"),
        (("--out", out, "--text", str(text), "--length", "3"), "the texts are too short to look 3 tokens ahead"),
        (("--out", out, "--text", str(tmp_path / "none")), "No such file"),
    ):
        assert cli.main(["train-draft", str(folder), *words]) == 2
        said = capsys.readouterr().err.strip()
        assert said.splitlines()[-1].startswith("scrimp train-draft: ")
        assert message in said
        assert "Traceback" not in said
