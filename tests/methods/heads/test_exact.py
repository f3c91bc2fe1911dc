"""ExactHead: the tokens of the dense head in every way of decoding, and what falls back."""

import copy
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import scrimp
from scrimp.integrations.transformers import custom_generate
from scrimp.methods.generation import UnsupportedModelError
from scrimp.methods.heads import compress_head
from scrimp.methods.heads.exact import MOST_ROWS
from scrimp.methods.tree_decoding import CostCurve, LookupDraft, NgramDraft, RecyclingDraft, SelfDraft
from scrimp.testing import same_bits

V = 3000
PROMPTS = [[1, 2, 3], [700, 5, 2999, 8, 5, 2999], [42], [9, 9, 9, 9]]
NEW = {"max_new_tokens": 10}


def make(tied: bool = True, dtype: torch.dtype = torch.float32, **more: Any) -> PreTrainedModel:
    """A tiny model whose vocabulary is large."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6}
    config = LlamaConfig(
        vocab_size=V,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        eos_token_id=None,
        pad_token_id=0,
        **sizes,
        **more,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """With the dense head; tests must not change it."""
    return make()


@pytest.fixture(scope="module")
def screened(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights with an exact head."""
    found = copy.deepcopy(model)
    compress_head(found, "exact")
    return found


@pytest.fixture(autouse=True)
def fresh(screened: PreTrainedModel) -> None:
    screened.lm_head.counts.clear()
    screened.lm_head._said.clear()


def tokens(model: PreTrainedModel, prompts: Any = PROMPTS, **settings: Any) -> list[list[int]]:
    return [completion.tokens for completion in scrimp.generate(model, prompts, **{**NEW, **settings})]


FEW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "top-1": {"temperature": 1.0, "top_k": 1},
    "top-5": {"temperature": 1.0, "top_k": 5, "seed": [1, 2, 3, 4]},
    "hot top-40": {"temperature": 30.0, "top_k": 40, "seed": 3},
    "top-k, top-p, min-p": {"temperature": 3.0, "top_k": 50, "top_p": 0.8, "min_p": 0.01, "seed": 4},
    "least, greedy": {"min_new_tokens": 6, "stop_ids": list(range(0, 30))},
    "least, sampled": {"min_new_tokens": 6, "stop_ids": [1, 2, 3], "temperature": 2.0, "top_k": 20},
}
ALL: dict[str, tuple[dict[str, Any], str]] = {
    "whole distribution": ({"temperature": 0.8}, "needs all logits"),
    "top-p alone": ({"temperature": 0.8, "top_p": 0.9}, "needs all logits"),
    "processors": ({"processors": [lambda ids, logits: -logits]}, "needs all logits"),
    "large k": ({"temperature": 0.8, "top_k": 60}, "needs more than 64 logits"),
    "freezing": ({"temperature": 1e-30, "top_k": 5}, "needs all logits"),
}


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "four"])
@pytest.mark.parametrize("name", FEW)
def test_tokens_of_the_dense_head(name: str, prompts: Any, model: PreTrainedModel, screened: PreTrainedModel) -> None:
    assert tokens(screened, prompts, **FEW[name]) == tokens(model, prompts, **FEW[name])
    counts = screened.lm_head.counts
    assert counts["screened"] >= len(prompts)
    assert not counts["dense"]
    assert not counts["fell back"]


@pytest.mark.parametrize("name", ALL)
def test_what_needs_all_logits_gets_them_and_says_so_once(
    name: str, model: PreTrainedModel, screened: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    settings, words = ALL[name]
    with caplog.at_level(logging.WARNING, "scrimp"):
        assert tokens(screened, **settings) == tokens(model, **settings)
    assert [words in record.message for record in caplog.records] == [True]
    assert screened.lm_head.counts == {"dense": 4 * NEW["max_new_tokens"]}


def test_bf16() -> None:
    """Ties are common: some of the sampled rows are computed again."""
    plain = make(dtype=torch.bfloat16)
    exact = copy.deepcopy(plain)
    head = compress_head(exact, "exact")
    for name in FEW:
        assert tokens(exact, **FEW[name]) == tokens(plain, **FEW[name])
    assert head.counts["tied"] < head.counts["screened"]


def test_a_basis_changes_nothing(model: PreTrainedModel) -> None:
    exact = copy.deepcopy(model)
    text = torch.randint(V, (2, 40), generator=torch.Generator().manual_seed(0))
    head = compress_head(exact, "exact", tokens=text, wide=1)
    assert head.screen.basis is not None
    assert tokens(exact) == tokens(model)
    assert head.counts["screened"] == 4 * NEW["max_new_tokens"]


@pytest.mark.parametrize("name", [*FEW, *ALL])
@pytest.mark.parametrize("batch", [1, 3])
def test_trees(name: str, batch: int, model: PreTrainedModel, screened: PreTrainedModel) -> None:
    """Guesses of every source, those that learn from logits among them; rows beyond MOST_ROWS run densely."""
    settings = FEW.get(name) or (ALL[name][0] if name in ALL else {})
    settings = {**settings, "seed": settings.get("seed", 0) if isinstance(settings.get("seed", 0), int) else 7}
    expected = tokens(model, PROMPTS[:batch], **settings)
    for guesses in (3, 32):
        sources = (LookupDraft(), NgramDraft(), RecyclingDraft(), SelfDraft(screened, depth=2))
        draft = scrimp.tree_decoding(*sources, guesses=guesses, cost=CostCurve({1: 1.0}))
        for _ in range(2):
            assert tokens(screened, PROMPTS[:batch], draft=draft, **settings) == expected
    if name in FEW:
        assert screened.lm_head.counts["screened"] > 0


HUGGING_FACE: dict[str, tuple[dict[str, Any], bool]] = {
    "greedy": ({"do_sample": False}, True),
    "top-50": ({"do_sample": True, "temperature": 2.0}, True),  # top_k=50 is the default of transformers
    "top-k, top-p": ({"do_sample": True, "top_k": 8, "top_p": 0.7, "temperature": 3.0}, True),
    "all": ({"do_sample": True, "top_k": 0}, False),
    "penalty": ({"do_sample": False, "repetition_penalty": 1.3}, False),
    "penalty, top-k": ({"do_sample": True, "top_k": 9, "repetition_penalty": 1.3}, False),
    "logits": ({"do_sample": False, "return_dict_in_generate": True, "output_logits": True}, False),
}


@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_under_transformers(name: str, trees: bool, model: PreTrainedModel, screened: PreTrainedModel) -> None:
    asked, few = HUGGING_FACE[name]
    ids = torch.randint(1, V, (3, 20), generator=torch.Generator().manual_seed(2))

    def run(model: PreTrainedModel) -> Any:
        draft = scrimp.tree_decoding(RecyclingDraft(), guesses=4, cost=CostCurve({1: 1.0})) if trees else None
        return model.generate(ids, **NEW, **asked, seed=5, custom_generate=partial(custom_generate, draft=draft))

    expected, got = run(model), run(screened)
    if isinstance(got, Tensor):
        assert torch.equal(got, expected)
    else:
        assert all(map(same_bits, got.logits, expected.logits))
    assert bool(screened.lm_head.counts["screened"]) == few
    assert bool(screened.lm_head.counts["dense"]) != few


def test_stock_generate_is_that_of_the_dense_head(model: PreTrainedModel, screened: PreTrainedModel) -> None:
    ids = torch.tensor([[4, 5, 6]])
    asked = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(screened.generate(ids, **asked), model.generate(ids, **asked))
    assert same_bits(screened(ids).logits, model(ids).logits)


def test_largest_holds_what_it_promises(screened: PreTrainedModel) -> None:
    """Every entry is the dense head's or -inf; all that reach the k-th are there; equal rows count as one."""
    head = screened.lm_head
    x = torch.randn(2, 3, 48)
    dense = scrimp.ops.linear(x, head.weight.detach())
    for k in (1, 2, 30, 56):
        with torch.no_grad():
            got = head.largest(x, k)
        there = got > -torch.inf
        assert same_bits(got[there], dense[there])
        assert there[dense >= dense.topk(k).values[..., -1:]].all()
        assert there.sum(-1).max() <= k + 8
    assert head.counts["tied"] == 0


def test_ties_that_reach_far_are_computed_densely(model: PreTrainedModel) -> None:
    """Each row of the head occurs 30 times, so that the 5 largest logits have many equals."""
    plain = make(tied=False)
    with torch.no_grad():
        plain.lm_head.weight.copy_(plain.lm_head.weight[:100].repeat(30, 1))
    exact = copy.deepcopy(plain)
    head = compress_head(exact, "exact")
    for settings in (FEW["greedy"], FEW["top-5"], FEW["hot top-40"]):
        assert tokens(exact, **settings) == tokens(plain, **settings)
    assert head.counts["tied"] == 2 * 4 * NEW["max_new_tokens"]


def test_many_sequences_run_densely(model: PreTrainedModel, screened: PreTrainedModel) -> None:
    prompts = [[i + 1] for i in range(MOST_ROWS + 1)]
    assert tokens(screened, prompts, max_new_tokens=2) == tokens(model, prompts, max_new_tokens=2)
    assert screened.lm_head.counts == {"dense": 2 * (MOST_ROWS + 1)}
    assert not screened.lm_head._said


@pytest.mark.parametrize("settings", [FEW["greedy"], FEW["top-5"]])
def test_nan_states_fail_as_with_the_dense_head(settings: dict[str, Any]) -> None:
    plain = make(tied=False)
    with torch.no_grad():
        plain.model.embed_tokens.weight[7, 3] = torch.nan
    exact = copy.deepcopy(plain)
    head = compress_head(exact, "exact")
    for model in (plain, exact):
        with pytest.raises(ValueError, match="the logit of token 0 is NaN"):
            scrimp.generate(model, [7], temperature=settings.get("temperature", 0.0), top_k=settings.get("top_k", 0))
    assert head.counts["fell back"] == 1


def test_weights_stay_what_they_were(tmp_path: Path, model: PreTrainedModel) -> None:
    exact = copy.deepcopy(model)
    before = {name: tensor.data_ptr() for name, tensor in exact.state_dict().items()}
    parameters = list(map(id, exact.parameters()))
    head = compress_head(exact, "exact")
    assert head is exact.lm_head
    assert head.weight is exact.model.embed_tokens.weight
    assert {name: tensor.data_ptr() for name, tensor in exact.state_dict().items()} == before
    assert list(map(id, exact.parameters())) == parameters
    exact.tie_weights()
    assert exact.lm_head.weight is exact.model.embed_tokens.weight
    assert head.is_current
    exact.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again.lm_head) is nn.Linear
    assert tokens(again) == tokens(model) == tokens(exact)
    plain = compress_head(exact, "dense")
    assert type(exact.lm_head) is nn.Linear
    assert plain.weight is exact.model.embed_tokens.weight


def test_copies_keep_their_screen(screened: PreTrainedModel) -> None:
    copied = copy.deepcopy(screened)
    assert copied.lm_head.is_current
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    with torch.no_grad():
        copied.lm_head.weight.mul_(2)
    assert not copied.lm_head.is_current
    assert screened.lm_head.is_current
    assert not copy.deepcopy(copied).lm_head.is_current


@pytest.mark.parametrize("change", ["in place", "another parameter", "another dtype"])
def test_a_changed_weight_is_not_screened(change: str, caplog: pytest.LogCaptureFixture) -> None:
    exact = make(tied=False)
    head = compress_head(exact, "exact")
    if change == "in place":
        with torch.no_grad():
            head.weight.neg_()
    elif change == "another parameter":
        head.weight = nn.Parameter(head.weight.detach().flip(0))
    else:
        exact.bfloat16()
    plain = copy.deepcopy(exact)
    compress_head(plain, "dense")
    with caplog.at_level(logging.WARNING, "scrimp"):
        assert tokens(exact) == tokens(plain)
    assert ["the weight has changed" in record.message for record in caplog.records] == [True]
    assert not head.counts["screened"]
    assert compress_head(exact, "exact").is_current
    assert tokens(exact) == tokens(plain)
    assert exact.lm_head.counts["screened"] > 0


def test_bad_calls(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="compress_head: there is no method 'small'; methods are dense, exact"):
        compress_head(model, "small")
    for bad, words in (
        (torch.zeros(3, dtype=torch.int64), r"got int64 \[3\]"),
        (torch.zeros(1, 3), r"got float32 \[1, 3\]"),
        (torch.full((1, 3), V), "has 3000; ids are below 3000"),
        (torch.full((1, 3), -1), "has -1"),
    ):
        with pytest.raises(ValueError, match=f"compress_head: tokens .*{words}"):
            compress_head(model, "exact", tokens=bad)
    with pytest.raises(ValueError, match="wide=7 must be from 0 to 1"):
        compress_head(model, "exact", wide=7)
    other = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(UnsupportedModelError, match="its model type is 'gpt2'"):
        compress_head(other, "exact")
    quantized = make(tied=False)
    scrimp.quantize(quantized, "rtn", 16, skip=())
    with pytest.raises(ValueError, match="the model's head is a Int4Linear"):
        compress_head(quantized, "exact")
    biased = make(tied=False)
    biased.lm_head = nn.Linear(48, V)
    with pytest.raises(ValueError, match="has a bias"):
        compress_head(biased, "exact")
    assert type(model.lm_head) is nn.Linear
