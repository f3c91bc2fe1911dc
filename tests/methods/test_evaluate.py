"""Perplexity, divergence and agreement against plain torch on Hugging Face's logits."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import scrimp
from scrimp.methods.evaluate import Reader, needles, quality

Tiny = Callable[[str], PreTrainedModel]
WINDOWS = torch.randint(1, 256, (2, 600), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(WINDOWS).logits[:, :-1].double()


def other(model: PreTrainedModel) -> PreTrainedModel:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.lm_head.weight.mul_(1.3)
        changed.model.layers[1].mlp.down_proj.weight.mul_(1.05)
    return changed


def test_quality_is_that_of_plain_torch(tiny: Tiny) -> None:
    model, reference = tiny("llama"), other(tiny("llama"))
    steps: list[int] = []
    mine, theirs = quality(Reader(model), WINDOWS, Reader(reference), lambda: steps.append(1))
    assert len(steps) == 2
    p, q = logits(reference), logits(model)
    targets = WINDOWS[:, 1:]
    nll = cross_entropy(q.flatten(0, 1), targets.flatten(), reduction="none").view(2, 599)
    kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(mine.nll.double(), nll, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mine.kl.double(), kl, atol=1e-4, rtol=1e-4)  # type: ignore[union-attr]
    figures = mine.figures()
    assert figures["perplexity"] == pytest.approx(float(nll.mean().exp()), rel=1e-4)
    means = nll.mean(1)
    assert figures["perplexity_error"] == pytest.approx(figures["perplexity"] * float(means.std()) / 2**0.5, rel=1e-3)
    assert figures["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert figures["kl_max"] == pytest.approx(float(kl.max()), rel=1e-3)
    agreement = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert figures["top1_agreement"] == pytest.approx(agreement, abs=2e-3)
    assert theirs is not None
    assert theirs.perplexity == pytest.approx(float(cross_entropy(p.flatten(0, 1), targets.flatten()).exp()), rel=1e-4)


def test_a_model_does_not_differ_from_itself(tiny: Tiny) -> None:
    reader = Reader(tiny("qwen3"))
    figures = quality(reader, WINDOWS[:1], reader)[0].figures()
    assert (figures["kl_max"], figures["top1_agreement"]) == (0.0, 1.0)
    assert "perplexity_error" not in figures


def test_sparse_reading_is_another_configuration(tiny: Tiny) -> None:
    model = tiny("llama")
    narrow = scrimp.HeadPatterns(torch.full((2, 6), 64).int(), torch.full((2, 6), 16).int())
    windows = torch.randint(1, 256, (1, 1100), generator=torch.Generator().manual_seed(1))
    figures = quality(Reader(model, narrow), windows, Reader(model))[0].figures()
    assert figures["kl_mean"] > 1e-6


def test_models_that_the_engine_does_not_know_are_read_by_their_own_code() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=600, n_embd=16, n_layer=1, n_head=2)).eval()
    reader = Reader(model)
    assert not reader.by_engine
    nll = cross_entropy(logits(model).flatten(0, 1), WINDOWS[:, 1:].flatten())
    assert quality(reader, WINDOWS)[0].perplexity == pytest.approx(float(nll.exp()), rel=1e-4)
    with pytest.raises(ValueError, match="cannot run this GPT2LMHeadModel"):
        Reader(model, scrimp.HeadPatterns(torch.zeros(1, 2).int(), torch.zeros(1, 2).int()))
    small = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=600, n_embd=16, n_layer=1, n_head=2)).eval()
    with pytest.raises(ValueError, match="vocabularies of 256 and 300 tokens cannot be compared"):
        quality(reader, WINDOWS, Reader(small))


def test_windows_must_predict_something(tiny: Tiny) -> None:
    for wrong in (torch.zeros(3, 1).long(), torch.zeros(0, 5).long(), torch.zeros(5).long()):
        with pytest.raises(ValueError, match="windows has shape"):
            quality(Reader(tiny("llama")), wrong)


def test_needles(tiny: Tiny, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The questions are well formed; a model that answers with the last number of its prompt finds them all."""
    from scrimp.methods import evaluate

    asked: list[str] = []

    def answer(model: Any, tokens: list[int], tokenizer: Any, **settings: Any) -> Any:
        text = tokenizer.decode(tokens)
        asked.append(text)
        key = text.split("The pass key is ")[1][:5]
        return scrimp.methods.generation.Completion([], key if len(asked) != 2 else "no idea", "length", len(tokens))

    monkeypatch.setattr(evaluate, "generate", answer)
    found = needles(tiny("llama"), tokenizer, "word " * 100, 300)
    assert [needle.found for needle in found] == [True, False, True, True, True]
    assert len({needle.key for needle in found}) == 5
    places = [text.index("The pass key") for text in asked]
    assert places == sorted(places)
    assert places[-1] > 290
    with pytest.raises(ValueError, match="the text has 500 tokens, fewer than the 501"):
        needles(tiny("llama"), tokenizer, "word " * 100, 501)
    monkeypatch.undo()
    assert len(needles(tiny("llama"), tokenizer, "word " * 100, 60, depths=(0.5,))) == 1
