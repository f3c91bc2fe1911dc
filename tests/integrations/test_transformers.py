"""The attention implementation "scrimp_sparse" on tiny models of several families."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.masking_utils import chunked_causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from scrimp import HeadPatterns, SparsePlan
from scrimp.integrations import transformers as integration
from scrimp.methods.attention_cost import AttentionCost

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 40}),
}
DENSE = HeadPatterns(torch.full((2, 6), 10_000).int(), torch.zeros(2, 6).int())
NARROW = HeadPatterns(torch.zeros(2, 6).int(), torch.full((2, 6), 3).int(), sinks=2, segment=64, samples=8)
ALWAYS = AttentionCost(dense=1.0, ranges=1e-9, columns=1e-9)
NEVER = AttentionCost(dense=1e-9, ranges=1.0, columns=1.0)


def tiny(family: str = "llama") -> PreTrainedModel:
    config, model, extra = FAMILIES[family]
    torch.manual_seed(1)
    return model(config(**SIZES, **extra)).eval()


def tokens(B: int, n: int) -> Tensor:
    return torch.randint(1, 97, (B, n))


@pytest.fixture
def cost(monkeypatch: pytest.MonkeyPatch) -> list[AttentionCost]:
    """The cost model answers with the first entry of this list."""
    current = [ALWAYS]
    monkeypatch.setattr(AttentionCost, "measured", staticmethod(lambda *args: current[0]))
    integration.register()
    return current


def logits(model: PreTrainedModel, implementation: str, **inputs: Any) -> Tensor:
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(**inputs).logits


def plans_seen(model: PreTrainedModel, **inputs: Any) -> list[int]:
    seen: list[int] = []
    with integration.watch_plans(model, lambda layer, plan: seen.append(layer)):
        logits(model, integration.NAME, **inputs)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("B", [1, 2])
def test_dense_budgets_equal_sdpa(family: str, B: int, cost: list[AttentionCost]) -> None:
    model, ids = tiny(family), tokens(B, 150)
    integration.configure(model, DENSE)
    expected = logits(model, "sdpa", input_ids=ids)
    torch.testing.assert_close(logits(model, integration.NAME, input_ids=ids), expected, atol=2e-5, rtol=2e-5)
    assert plans_seen(model, input_ids=ids) == [0, 1]


def test_narrow_budgets_change_the_result_and_are_seen(cost: list[AttentionCost]) -> None:
    model, ids = tiny(), tokens(1, 300)
    integration.configure(model, NARROW)
    densities: list[float] = []
    with integration.watch_plans(model, lambda layer, plan: densities.append(plan.density())):
        sparse = logits(model, integration.NAME, input_ids=ids)
    assert len(densities) == 2
    assert max(densities) < 0.5
    difference = (sparse - logits(model, "sdpa", input_ids=ids)).abs().amax(-1)[0]
    assert difference[:64].max() < 2e-5  # the first tile sees everything
    assert difference[64:].max() > 1e-4


def test_left_padding_is_respected(cost: list[AttentionCost]) -> None:
    """Each sequence of a padded batch gives what it gives alone."""
    model, ids = tiny(), tokens(2, 200)
    integration.configure(model, NARROW)
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    ids[1, :37] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = logits(model, integration.NAME, input_ids=ids, attention_mask=mask, position_ids=positions)
    alone = logits(model, integration.NAME, input_ids=ids[1:, 37:])
    torch.testing.assert_close(batch[1:, 37:], alone, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(batch[:1], logits(model, integration.NAME, input_ids=ids[:1]), atol=2e-5, rtol=2e-5)
    assert plans_seen(model, input_ids=ids, attention_mask=mask, position_ids=positions) == [0, 0, 1, 1]


def windowed_layers() -> PreTrainedModel:
    """A Qwen 2 whose first layer sees everything and whose second has a window."""
    torch.manual_seed(1)
    return Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=50, max_window_layers=1)
    ).eval()


def test_sliding_windows_are_exact(cost: list[AttentionCost]) -> None:
    """Budgets do not touch a layer with a window: it sees all of it, and nothing else."""
    model, ids = tiny("mistral"), tokens(2, 300)
    integration.configure(model, NARROW)
    plans: list[SparsePlan] = []
    with integration.watch_plans(model, lambda layer, plan: plans.append(plan)):
        got = logits(model, integration.NAME, input_ids=ids)
    torch.testing.assert_close(got, logits(model, "sdpa", input_ids=ids), atol=2e-5, rtol=2e-5)
    assert [plan.same_pairs(SparsePlan.sliding_window(300, 40)) for plan in plans] == [True, True]


def test_windows_of_some_layers_and_left_padding(cost: list[AttentionCost]) -> None:
    model, ids = windowed_layers(), tokens(2, 200)
    integration.configure(model, DENSE)
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    got, expected = logits(model, integration.NAME, **inputs), logits(model, "sdpa", **inputs)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=2e-5)
    assert plans_seen(model, **inputs) == [0, 0, 1]  # padded sequences one by one, windows in one call
    cost[0] = NEVER
    integration.configure(model, DENSE)
    assert plans_seen(model, **inputs) == []
    got = logits(model, integration.NAME, **inputs)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("model", [lambda: tiny("mistral"), windowed_layers])
def test_windows_in_chunks_and_decoding(model: Callable[[], PreTrainedModel], cost: list[AttentionCost]) -> None:
    model, ids = model(), tokens(1, 400)
    integration.configure(model, DENSE)
    expected = logits(model, "sdpa", input_ids=ids)
    model.set_attn_implementation(integration.NAME)
    seen: list[tuple[int, int]] = []
    with torch.no_grad(), integration.watch_plans(model, lambda layer, plan: seen.append((plan.n_q, plan.n_k))):
        first = model(input_ids=ids[:, :200], use_cache=True)
        second = model(input_ids=ids[:, 200:390], past_key_values=first.past_key_values)
        steps = [model(input_ids=ids[:, i : i + 1], past_key_values=first.past_key_values) for i in range(390, 400)]
    assert len(seen) == 4
    assert {n_q for n_q, _ in seen} == {200, 190}
    got = torch.cat([part.logits for part in (first, second, *steps)], 1)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


def test_windows_with_more_than_a_window_fall_through_to_sdpa(cost: list[AttentionCost]) -> None:
    """Packed sequences (position ids that start over) and chunked masks are not taken for windows."""
    model, ids = tiny("mistral"), tokens(1, 200)
    integration.configure(model, DENSE)
    positions = torch.cat([torch.arange(90), torch.arange(110)])[None]
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    assert plans_seen(model, **inputs) == []
    got, expected = logits(model, integration.NAME, **inputs), logits(model, "sdpa", **inputs)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    sizes = {"batch_size": 1, "q_length": 200, "kv_length": 200, "local_size": 50}
    for function in (chunked_causal_mask_function(50, torch.zeros(1).int()), sliding_window_causal_mask_function(49)):
        mask = integration.sparse_attention_mask(**sizes, mask_function=function)
        assert mask is not None
        assert torch.equal(mask, sdpa_mask(**sizes, mask_function=function))


@pytest.mark.parametrize("padded", ["right", "middle", "short"])
def test_other_masks_fall_through_to_sdpa(padded: str, cost: list[AttentionCost]) -> None:
    model, ids = tiny(), tokens(2, 100 if padded == "short" else 160)
    integration.configure(model, DENSE)
    mask = torch.ones_like(ids)
    mask[1, {"right": slice(120, None), "middle": slice(30, 40), "short": slice(0, 9)}[padded]] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    assert plans_seen(model, **inputs) == []
    got, expected = logits(model, integration.NAME, **inputs), logits(model, "sdpa", **inputs)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=2e-5)


def test_chunked_prefill(cost: list[AttentionCost]) -> None:
    model, ids = tiny(), tokens(1, 400)
    integration.configure(model, DENSE)
    model.set_attn_implementation(integration.NAME)
    seen: list[tuple[int, int]] = []
    with torch.no_grad(), integration.watch_plans(model, lambda layer, plan: seen.append((plan.n_q, plan.n_k))):
        first = model(input_ids=ids[:, :250], use_cache=True)
        second = model(input_ids=ids[:, 250:], past_key_values=first.past_key_values)
    assert seen == [(250, 250)] * 2 + [(150, 400)] * 2
    whole = logits(model, "sdpa", input_ids=ids)
    torch.testing.assert_close(second.logits, whole[:, 250:], atol=2e-5, rtol=2e-5)


def test_generate_prefills_sparsely_and_decodes_densely(cost: list[AttentionCost]) -> None:
    model, ids = tiny(), tokens(1, 140)
    integration.configure(model, DENSE)
    arguments = {"max_new_tokens": 6, "do_sample": False}
    model.set_attn_implementation("sdpa")
    expected = model.generate(ids, **arguments)
    model.set_attn_implementation(integration.NAME)
    seen: list[int] = []
    with integration.watch_plans(model, lambda layer, plan: seen.append(layer)):
        assert torch.equal(model.generate(ids, **arguments), expected)
    assert seen == [0, 1]
    assert torch.equal(model.generate(ids, cache_implementation="static", **arguments), expected)


def test_without_budgets_it_is_sdpa(cost: list[AttentionCost]) -> None:
    model, ids = tiny(), tokens(1, 150)
    expected = logits(model, "sdpa", input_ids=ids)
    assert torch.equal(logits(model, integration.NAME, input_ids=ids), expected)
    integration.configure(model, NARROW)
    integration.configure(model, None)
    assert torch.equal(logits(model, integration.NAME, input_ids=ids), expected)


def test_a_layer_that_would_lose_runs_sdpa_and_says_so(
    cost: list[AttentionCost], caplog: pytest.LogCaptureFixture
) -> None:
    cost[0] = NEVER
    model, ids = tiny(), tokens(1, 150)
    integration.configure(model, NARROW)
    with caplog.at_level(logging.INFO, "scrimp"):
        assert torch.equal(logits(model, integration.NAME, input_ids=ids), logits(model, "sdpa", input_ids=ids))
    assert "layer 1, 150 queries, 150 keys: sdpa (predicted" in caplog.text
    assert integration.choices(model)[0].startswith("layer 0, 150 queries, 150 keys: sdpa")


def test_training_falls_through_to_sdpa(cost: list[AttentionCost]) -> None:
    model, ids = tiny(), tokens(1, 150)
    integration.configure(model, NARROW)
    model.set_attn_implementation(integration.NAME)
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_patterns_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="patterns are for 3 layers of 6 heads, but the model has 2 layers of 6 heads"):
        integration.configure(tiny(), HeadPatterns(torch.zeros(3, 6).int(), torch.zeros(3, 6).int()))


def test_bf16(cost: list[AttentionCost]) -> None:
    model, ids = tiny().bfloat16(), tokens(1, 150)
    integration.configure(model, DENSE)
    expected = logits(model.float(), "sdpa", input_ids=ids)
    plain = logits(model.bfloat16(), "sdpa", input_ids=ids)
    got = logits(model, integration.NAME, input_ids=ids)
    assert (got - expected).abs().max() <= 2 * (plain - expected).abs().max()


def test_cost_is_measured_and_ordered() -> None:
    rates = AttentionCost.measured(64, torch.float32, "cpu", torch.get_num_threads())
    assert min(rates.dense, rates.ranges, rates.columns) > 0
    near = HeadPatterns(torch.zeros(1, 4).int(), torch.zeros(1, 4).int())
    sparse, dense = rates.predict(near, 0, 8192, 8192)
    assert sparse < dense
