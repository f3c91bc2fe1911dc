"""`model.generate(custom_generate=...)`: what transformers prepares works as in its own loop."""

from functools import partial
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import scrimp
from scrimp import HeadPatterns
from scrimp.integrations import transformers as integration
from scrimp.integrations.transformers import custom_generate
from scrimp.methods.generation import forward
from scrimp.methods.tree_decoding import CostCurve, LookupDraft, RecyclingDraft, SelfDraft


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(1)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6}
    config = LlamaConfig(
        **sizes, vocab_size=97, num_key_value_heads=2, pad_token_id=0, eos_token_id=5, initializer_range=0.3
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    """Three sequences, the second one padded on the left."""
    ids = torch.randint(6, 97, (3, 40), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :7], ids[1, :7] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3},
    "least": {"min_new_tokens": 12, "eos_token_id": [5, 6, 7, 8, 9, 10, 11, 12]},
    "forbidden": {"suppress_tokens": list(range(40, 90))},
    "allowed": {"prefix_allowed_tokens_fn": lambda b, ids: list(range(10 + 20 * b, 30 + 20 * b))},
    "max-time": {"max_time": 100.0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_greedy_is_that_of_transformers(name: str, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    asked = {"max_new_tokens": 24, "do_sample": False, **OPTIONS[name]}
    expected = model.generate(**inputs, **asked)
    got = model.generate(**inputs, **asked, custom_generate=custom_generate)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("rows", [slice(0, 1), slice(0, 3)])
@pytest.mark.parametrize("name", OPTIONS)
def test_trees_change_nothing(
    name: str, rows: slice, sampled: bool, model: PreTrainedModel, inputs: dict[str, torch.Tensor]
) -> None:
    """Processors and criteria see what they see in plain decoding; logits have the same bits."""
    asked = {"max_new_tokens": 24, "do_sample": sampled, **OPTIONS[name], "seed": 5}
    asked |= {"return_dict_in_generate": True, "output_logits": True}
    some = {key: tensor[rows] for key, tensor in inputs.items()}
    draft = scrimp.tree_decoding(LookupDraft(), RecyclingDraft(), SelfDraft(model), cost=CostCurve({1: 1.0}))
    expected = model.generate(**some, **asked, custom_generate=custom_generate)
    for _ in range(2):
        got = model.generate(**some, **asked, custom_generate=partial(custom_generate, draft=draft))
        assert torch.equal(got.sequences, expected.sequences)
        ended = torch.zeros(len(got.sequences), dtype=torch.bool)
        for step, (mine, theirs) in enumerate(zip(got.logits, expected.logits, strict=True)):
            assert torch.equal(mine[~ended], theirs[~ended])
            ended |= torch.isin(got.sequences[:, 40 + step], torch.tensor(asked.get("eos_token_id", 5)))
    assert draft.report()["self"][0] > 0


def test_results_in_a_dictionary(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    asked = {"max_new_tokens": 8, "do_sample": False, "repetition_penalty": 1.3}
    asked |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = model.generate(**inputs, **asked)
    got = model.generate(**inputs, **asked, custom_generate=custom_generate)
    assert torch.equal(got.sequences, expected.sequences)
    rows = [0, 2]  # stock logits of a finished sequence go on
    for name in ("scores", "logits"):
        for mine, theirs in zip(getattr(got, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(mine[rows], theirs[rows], atol=1e-4, rtol=1e-4)


def test_sampling_is_seeded(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    asked = {"max_new_tokens": 10, "do_sample": True, "top_k": 20, "custom_generate": custom_generate}
    got = model.generate(**inputs, **asked, seed=3)
    assert torch.equal(model.generate(**inputs, **asked, seed=3), got)
    one = {name: tensor[1:2] for name, tensor in inputs.items()}
    alone = model.generate(**one, **asked, seed=3)
    assert torch.equal(alone, got[1:2, : alone.shape[1]])
    assert torch.equal(model.generate(**inputs, **asked, seed=[1, 3, 9])[1], got[1])
    torch.manual_seed(7)
    first = model.generate(**inputs, **asked)
    assert not torch.equal(model.generate(**inputs, **asked), first)
    torch.manual_seed(7)
    assert torch.equal(model.generate(**inputs, **asked), first)


def test_streams(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    class Collector:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.tolist()

        def end(self) -> None:
            self.ended = True

    seen = Collector()
    one = {"input_ids": inputs["input_ids"][:1], "max_new_tokens": 6, "do_sample": False}
    got = model.generate(**one, custom_generate=partial(custom_generate, streamer=seen))
    assert seen.tokens == got[0, 40:].tolist()
    assert seen.ended


def test_prompts_are_read_sparsely_where_configured(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    integration.register()
    patterns = HeadPatterns(torch.zeros(2, 6).int(), torch.full((2, 6), 3).int())
    seen: list[Any] = []
    advance = forward.advance

    def watched(*args: Any, **more: Any) -> torch.Tensor:
        seen.append(args[5])
        return advance(*args, **more)

    monkeypatch.setattr(forward, "advance", watched)
    ids = torch.randint(6, 97, (1, 520))
    integration.configure(model, patterns)
    try:
        for name, expected in (("sdpa", None), (integration.NAME, patterns)):
            model.set_attn_implementation(name)
            model.generate(ids, max_new_tokens=2, custom_generate=custom_generate)
            assert seen.pop() is expected
    finally:
        integration.configure(model, None)
        model.set_attn_implementation("sdpa")


def test_what_the_loop_does_not_do_is_refused(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        filled = model(inputs["input_ids"][:1], use_cache=True).past_key_values
    ids = {"input_ids": inputs["input_ids"][:1]}
    longer = torch.cat([ids["input_ids"], torch.tensor([[9]])], 1)
    for asked, message in (
        ({**ids, "num_beams": 2}, "num_beams=2; scrimp decodes greedily or by sampling"),
        ({**ids, "output_attentions": True, "return_dict_in_generate": True}, "output_attentions is not available"),
        ({"input_ids": longer, "past_key_values": filled}, "past_key_values holds tokens"),
        ({"input_ids": torch.ones(65, 3).long()}, r"65 sequences of \[3, 3"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**asked, max_new_tokens=2, custom_generate=custom_generate)  # type: ignore[arg-type]
