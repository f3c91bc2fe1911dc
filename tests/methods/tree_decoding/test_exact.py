"""Tree decoding gives the tokens and the logits of plain decoding, to the bit: every source, batch and choice."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scrimp.benchmarks.tree_exact import Free
from torch import Tensor
from transformers import PreTrainedModel

import scrimp
from scrimp.methods.generation import KVCache, decoder_model, stream
from scrimp.methods.tree_decoding import (
    Accepted,
    Candidates,
    DraftMaps,
    EarlyExit,
    HiddenTransfer,
    LookupDraft,
    MedusaHeads,
    ModelDraft,
    NgramDraft,
    RecyclingDraft,
    SelfDraft,
    TreeDecoding,
)
from scrimp.methods.tree_decoding.maps import model_hash
from scrimp.testing import random_llama, same_bits

Tiny = Callable[[str], PreTrainedModel]
DRAWN = {"temperature": 0.9, "seed": 11}


class RandomDraft:
    """Bushy trees of nonsense and of the truth, so that paths of every shape are accepted."""

    name = "random"
    costly = False

    def __init__(self, truth: dict[tuple[int, ...], int]) -> None:
        self.truth = truth
        self.random = torch.Generator().manual_seed(0)

    def start(self, *_: Any) -> "RandomDraft":
        return self

    def propose(self, texts: Any, depths: Any) -> list[Candidates]:
        return [Candidates() if text is None else self.tree(list(text)) for text in texts]

    def tree(self, text: list[int]) -> Candidates:
        found, texts = Candidates(), [text]
        for i in range(20):
            parent = int(torch.randint(max(-1, i - 5), i, (), generator=self.random)) if i else -1
            before = texts[parent + 1]
            lucky = torch.rand((), generator=self.random) < 0.6
            wrong = int(torch.randint(64, (), generator=self.random))
            token = self.truth.get(tuple(before), wrong) if lucky else wrong
            chance = float(torch.rand((), generator=self.random))
            found.add(token, parent, chance)
            texts.append([*before, token])
        return found

    def update(self, accepted: Accepted) -> None:
        assert len(accepted.rows) == len(accepted.logits) == len(accepted.state)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Freshly made weights: the logits of all tokens nearly tie."""
    torch.manual_seed(1)
    return random_llama(layers=3)


def prompts(count: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(5)
    return [torch.randint(64, (n,), generator=random).tolist() for n in (1, 30, 7, 66)[:count]]


def recorded(model: PreTrainedModel, ids: Any, draft: Any, **how: Any) -> tuple[Any, dict[tuple[int, ...], Tensor]]:
    """Completions, and the logits after each text on the way."""
    seen: dict[tuple[int, ...], Tensor] = {}

    def record(text: Tensor, logits: Tensor) -> Tensor:
        seen[tuple(text[0].tolist())] = logits[0].clone()
        return logits

    return scrimp.generate(model, ids, draft=draft, processors=[record], **how), seen


def maps(model: PreTrainedModel, kind: Any, layer: int, size: float = 1.0) -> DraftMaps:
    """Random maps for three tokens ahead."""
    random, d = torch.Generator().manual_seed(3), model.config.hidden_size
    weight, bias = (size * torch.randn(3, *more, d, generator=random) for more in ([d], []))
    return DraftMaps(kind, layer, weight, bias, model_hash(decoder_model(model)))


def trained(model: PreTrainedModel) -> list[Any]:
    return [MedusaHeads(maps(model, "medusa", 3)), HiddenTransfer(maps(model, "hidden", 2))]


SOURCES: dict[str, Callable[[PreTrainedModel], list[Any]]] = {
    "lookup": lambda model: [LookupDraft()],
    "ngram": lambda model: [NgramDraft()],
    "recycling": lambda model: [RecyclingDraft()],
    "early exit": lambda model: [EarlyExit(1)],
    "skipped layer": lambda model: [EarlyExit([0, 2], depth=5)],
    "model": lambda model: [ModelDraft(model)],
    "self": lambda model: [SelfDraft(model, depth=6)],
    "medusa": lambda model: [MedusaHeads(maps(model, "medusa", 3)), RecyclingDraft()],
    "hidden": lambda model: [HiddenTransfer(maps(model, "hidden", 1)), RecyclingDraft()],
    "hidden low": lambda model: [HiddenTransfer(maps(model, "hidden", 0, size=1e20))],
    "mix": lambda model: [
        LookupDraft(),
        NgramDraft(),
        RecyclingDraft(),
        EarlyExit(2),
        ModelDraft(model),
        *trained(model),
    ],
}
HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": DRAWN,
    "filtered": {**DRAWN, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "least": {"min_new_tokens": 9, "stop_ids": range(0, 64, 2)},
}


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", SOURCES)
def test_tokens_and_logits(name: str, how: str, batch: int, model: PreTrainedModel) -> None:
    """The second round knows the texts, so that its trees are accepted far down."""
    ids, asked = prompts(batch), {"max_new_tokens": 24, **HOW[how]}
    expected, logits = recorded(model, ids, None, **asked)
    draft = scrimp.tree_decoding(*SOURCES[name](model), cost=Free())
    for _ in range(2):
        assert scrimp.generate(model, ids, draft=draft, **asked) == expected
        got, seen = recorded(model, ids, draft, **asked)
        assert got == expected
        assert all(same_bits(seen[text], row) for text, row in logits.items())
    assert any(tried for tried, _ in draft.report().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [{}, DRAWN])
@pytest.mark.parametrize("batch", [1, 4])
def test_trees_of_any_shape(dtype: torch.dtype, how: dict[str, Any], batch: int, model: PreTrainedModel) -> None:
    """Half of what is guessed is the truth, anywhere in the tree: rows move, and the cache is the plain one's."""
    model = copy.deepcopy(model).to(dtype)
    ids = prompts(batch)
    caches = [KVCache(model, batch, 130) for _ in range(2)]
    expected, logits = recorded(model, ids, None, max_new_tokens=40, cache=caches[0], **how)
    whole = [text + found.tokens for text, found in zip(ids, expected, strict=True)]
    truth = {
        tuple(text[:n]): text[n] for text, start in zip(whole, ids, strict=True) for n in range(len(start), len(text))
    }
    draft = scrimp.tree_decoding(RandomDraft(truth), cost=Free())
    got, seen = recorded(model, ids, draft, max_new_tokens=40, cache=caches[1], **how)
    assert got == expected
    assert all(same_bits(seen[text], row) for text, row in logits.items())
    assert caches[0].tokens == caches[1].tokens
    for b, held in enumerate(caches[0].tokens):
        assert same_bits(*(cache.memory[:, :, b, :, : len(held)] for cache in caches))
    tried, right = draft.report()["random"]
    assert tried > 50
    assert right > 0.2


@pytest.mark.parametrize(
    "family", ["llama-biases-tied", "llama-rope-yarn", "mistral-window", "qwen2-some-windows", "qwen3"]
)
def test_families(family: str, tiny: Tiny) -> None:
    """Windowed layers read chains."""
    model, ids = tiny(family), [[5, 6, 7] * 20, [9] * 70]
    draft = scrimp.tree_decoding(LookupDraft(), RecyclingDraft(), SelfDraft(model), cost=Free())
    for how in ({}, DRAWN):
        expected, logits = recorded(model, ids, None, max_new_tokens=30, **how)
        got, seen = recorded(model, ids, draft, max_new_tokens=30, **how)
        assert got == expected
        assert all(same_bits(seen[text], row) for text, row in logits.items())


@pytest.fixture
def mixed(model: PreTrainedModel) -> TreeDecoding:
    riding = HiddenTransfer(maps(model, "hidden", 2))
    return scrimp.tree_decoding(LookupDraft(), RecyclingDraft(), SelfDraft(model), riding, cost=Free())


def test_ends_inside_an_accepted_path(model: PreTrainedModel, mixed: TreeDecoding, tokenizer: Any) -> None:
    ids = prompts(3)
    free = scrimp.generate(model, ids, tokenizer, max_new_tokens=30)
    for at in (0, 1, 4, 9, 20):
        for asked in ({"stop_ids": [free[1].tokens[at]]}, {"stop": free[1].text[at : at + 2]}, {"max_new_tokens": at}):
            asked = {"max_new_tokens": 30, **asked}
            caches = [KVCache(model, 3, 120) for _ in range(2)]
            expected = scrimp.generate(model, ids, tokenizer, cache=caches[0], **asked)
            assert scrimp.generate(model, ids, tokenizer, draft=mixed, cache=caches[1], **asked) == expected
            assert caches[0].tokens == caches[1].tokens
            for b, held in enumerate(caches[0].tokens):
                assert same_bits(*(cache.memory[:, :, b, :, : len(held)] for cache in caches))


def test_streams_each_sequence_in_order(model: PreTrainedModel, mixed: TreeDecoding) -> None:
    plain = list(stream(model, prompts(3), max_new_tokens=12))
    trees = list(stream(model, prompts(3), max_new_tokens=12, draft=mixed))
    for b in range(3):
        assert [p for p in trees if p.sequence == b] == [p for p in plain if p.sequence == b]


def test_a_cancelled_generation_leaves_the_cache_of_plain_decoding(model: PreTrainedModel, mixed: TreeDecoding) -> None:
    ids = prompts(2)[1:]
    expected = scrimp.generate(model, ids, max_new_tokens=40)
    scrimp.generate(model, ids, max_new_tokens=40, draft=mixed)
    for taken in (1, 2, 5, 11, 24):
        caches = [KVCache(model, 1, 100) for _ in range(2)]
        for cache, draft in zip(caches, (None, mixed), strict=True):
            pieces = stream(model, ids, max_new_tokens=40, cache=cache, draft=draft)
            assert [next(pieces).token for _ in range(taken)] == expected[0].tokens[:taken]
            pieces.close()  # type: ignore[attr-defined]
        held = len(caches[0].tokens[0])
        assert caches[0].tokens == caches[1].tokens
        assert same_bits(*(cache.memory[..., :held, :] for cache in caches))
        assert scrimp.generate(model, ids, max_new_tokens=40, cache=caches[1], draft=mixed) == expected


def test_full_cache_and_context(model: PreTrainedModel, mixed: TreeDecoding) -> None:
    for capacity, n in ((31, 30), (35, 30), (512, 505)):
        ids = (prompts(2)[1] * 20)[:n]
        got = [
            scrimp.generate(model, ids, max_new_tokens=60, cache=KVCache(model, 1, capacity), draft=draft)
            for draft in (None, mixed)
        ]
        assert got[0] == got[1]
        assert got[0].reason == "context"
        assert len(got[0].tokens) == capacity - n


@pytest.mark.parametrize("guesses", [0, 1, 63])
@pytest.mark.parametrize("batch", [1, 3, 12, 33, 64])
def test_no_guesses_and_many_sequences(guesses: int, batch: int, model: PreTrainedModel) -> None:
    """33 and more sequences leave no rows for trees, 9 and more none for pseudo rows."""
    draft = scrimp.tree_decoding(LookupDraft(), RecyclingDraft(), *trained(model), guesses=guesses, cost=Free())
    ids, seeds = [[3, 1, 3]] * batch, list(range(batch))
    plain, trees = (
        scrimp.generate(model, ids, max_new_tokens=10, temperature=1.0, seed=seeds, draft=d) for d in (None, draft)
    )
    assert trees == plain


def test_nan_logits_are_an_error(model: PreTrainedModel) -> None:
    broken = copy.deepcopy(model)
    token = scrimp.generate(model, [1, 2], max_new_tokens=6).tokens[3]
    with torch.no_grad():
        broken.model.embed_tokens.weight[token] = torch.nan
    for draft in (None, scrimp.tree_decoding(SelfDraft(model), cost=Free())):
        with pytest.raises(ValueError, match="is NaN: the model's weights or inputs are broken"):
            scrimp.generate(broken, [1, 2], max_new_tokens=9, draft=draft)


@pytest.mark.parametrize("make", [ModelDraft, SelfDraft])
def test_drafts_that_are_nan_change_nothing(make: Any, model: PreTrainedModel) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    draft = scrimp.tree_decoding(make(broken), RecyclingDraft(), cost=Free())
    ids = prompts(3)
    assert scrimp.generate(model, ids, max_new_tokens=12, draft=draft) == scrimp.generate(model, ids, max_new_tokens=12)


def test_the_distribution_is_the_models() -> None:
    """Third tokens of 1,024 seeds on 8 tokens against the exact mixture over all first two tokens."""
    torch.manual_seed(2)
    model = random_llama(8, 1, initializer_range=0.3)
    pairs = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    with torch.no_grad():
        chances = model(torch.cat([torch.tensor([[5, 2]]).expand(64, 2), pairs], 1)).logits.softmax(-1)
    rows = torch.arange(64)
    expected = (chances[rows, 1, pairs[:, 0]] * chances[rows, 2, pairs[:, 1]]) @ chances[:, 3]
    draft = scrimp.tree_decoding(RecyclingDraft(width=3), NgramDraft(), guesses=7, cost=Free())
    found: Counter[int] = Counter()
    for first in range(0, 1024, 8):
        batch = scrimp.generate(
            model, [[5, 2]] * 8, max_new_tokens=3, temperature=1.0, seed=list(range(first, first + 8)), draft=draft
        )
        found.update(completion.tokens[2] for completion in batch)
    statistic = sum((found[i] - 1024 * float(p)) ** 2 / (1024 * float(p)) for i, p in enumerate(expected))
    assert statistic < 24.3  # 7 degrees of freedom: p = 0.001
    assert draft.report()["recycling"][0] > 100
