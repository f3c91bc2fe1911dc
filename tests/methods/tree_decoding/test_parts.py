"""The parts of tree decoding: trees, merging, cost, acceptance, the automaton, and sources that do not fit."""

from typing import Any

import pytest
import torch

import scrimp
from scrimp import _ext
from scrimp.methods.generation import KVCache, decoder_model
from scrimp.methods.tree_decoding import (
    Candidates,
    CostCurve,
    EarlyExit,
    LookupDraft,
    ModelDraft,
    NgramDraft,
    RecyclingDraft,
    SelfDraft,
    Tree,
)
from scrimp.methods.tree_decoding.acceptance import Acceptance
from scrimp.methods.tree_decoding.knowledge import AGAIN, TRIAL, Worth
from scrimp.methods.tree_decoding.merge import Merged, worthwhile
from scrimp.methods.tree_decoding.session import _cut
from scrimp.methods.tree_decoding.tree import together
from scrimp.testing import random_llama


def llama(vocabulary: int = 16, layers: int = 2, heads: int = 2) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 64}
    return random_llama(vocabulary, layers, **sizes, num_attention_heads=heads, num_key_value_heads=heads)


def candidates(*guesses: tuple[int, int, float]) -> Candidates:
    found = Candidates()
    for guess in guesses:
        found.add(*guess)
    return found


def test_trees() -> None:
    tree = Tree([9, 1, 2, 1], [-1, 0, 1, 0])
    assert (tree.depths, tree.words) == ([0, 1, 2, 1], [0b1, 0b11, 0b111, 0b1001])
    assert (tree.child(0, 1), tree.child(1, 2), tree.child(0, 2), tree.child(3, 1)) == (1, 2, None, None)
    for tokens, parents in (([], []), ([1, 2], [-1]), ([1], [0]), ([1, 2], [-1, 1]), ([1, 2], [-1, -1])):
        with pytest.raises(ValueError, match="Tree: "):
            Tree(tokens, parents)


def test_trees_side_by_side() -> None:
    chain = Tree(list(range(64)), list(range(-1, 63)))
    batch = together([Tree([5, 6], [-1, 0]), chain], torch.device("cpu"))
    assert batch.tokens.shape == (2, 64)
    assert batch.words[0].tolist()[:4] == [1, 3, 4, 8]
    assert batch.words[1, 63] == -1
    assert batch.parents[0].tolist()[:3] == [-1, 0, -1]


def test_guesses_are_merged_by_prefix() -> None:
    """Two sources that agree on a token share its row; the best chain comes first."""
    one = candidates((1, -1, 0.5), (2, 0, 0.5), (3, 1, 0.9))
    two = candidates((4, -1, 0.25), (1, -1, 0.75), (7, 1, 0.25))
    merged = Merged(9, [("one", one), ("two", two)], Acceptance(), chain=False)
    assert merged.gains == pytest.approx([0, 0.75, 0.75 + 0.375, 0.75 + 0.375 + 0.3375, 1.7125, 1.9])
    tree = merged.tree(5)
    assert (list(tree.tokens), list(tree.parents)) == ([9, 1, 2, 3, 7, 4], [-1, 0, 1, 2, 1, 0])
    assert list(merged.tree(2).tokens) == [9, 1, 2]
    assert len(merged.tree(0)) == 1
    chain = Merged(9, [("one", one), ("two", two)], Acceptance(), chain=True)
    assert list(chain.tree(5).tokens) == [9, 1, 2, 3]


def test_acceptance_is_measured() -> None:
    acceptance = Acceptance()
    merged = Merged(9, [("one", candidates((1, -1, 0.5), (2, 0, 0.5), (3, -1, 0.5), (4, 2, 0.5)))], acceptance, False)
    for _ in range(100):
        merged.count([1, 5], acceptance)  # 1 was right, 3 wrong; then 2 was wrong, and 4 cannot be judged
    assert acceptance.of_source("one") == (300, 100)
    assert acceptance.rate("one", 0.5) == pytest.approx((100 + 2) / 304)
    assert acceptance.rate("two", 0.5) == 0.5
    for _ in range(2000):
        acceptance.count("one", 0.5, True)
    assert acceptance.rate("one", 0.5) > 0.95


def test_as_many_guesses_as_pay() -> None:
    gains = [0.0, 0.5, 0.7, 0.8, 0.85]
    assert worthwhile([gains], 1, 9, lambda rows: 1.0) == (4, 1.85)
    assert worthwhile([gains], 1, 2, lambda rows: 1.0) == (2, 1.7)
    assert worthwhile([gains], 1, 9, lambda rows: 1 + 0.2 * (rows - 1)) == (1, 1.25)
    assert worthwhile([gains], 1, 9, lambda rows: float(rows)) == (0, 1.0)
    assert worthwhile([gains, [0.0]], 4, 9, lambda rows: 1.0 if rows <= 8 else 9.0) == (1, 2.5)
    assert worthwhile([[0.0]], 1, 9, lambda rows: 1.0) == (0, 1.0)


def test_cost_curve() -> None:
    curve = CostCurve({1: 2.0, 8: 1.0, 16: 2.0, 32: 6.0})
    assert [curve(rows) for rows in (1, 4, 8, 12, 16, 24, 32, 64)] == [1.0, 1.0, 1.0, 1.5, 2.0, 4.0, 6.0, 14.0]
    curve.note(16, 100.0)
    assert curve(16) == pytest.approx(2.2)
    for _ in range(100):
        curve.note(12, 1.2)
    assert curve(12) == pytest.approx(1.2, rel=1e-2)
    assert CostCurve({4: 3.0})(50) == 3.0
    for points in ({}, {0: 1.0}, {1: 0.0}):
        with pytest.raises(ValueError, match="CostCurve: "):
            CostCurve(points)
    measured = CostCurve.measure(decoder_model(llama()))
    assert list(measured.points) == [1, 4, 8, 16, 32, 64]
    assert min(measured.points.values()) > 0


@pytest.mark.parametrize("ratio", [0.9, 1.1])
def test_a_costly_source_must_be_worth_its_time(ratio: float) -> None:
    """One that slows texts is left out after a few steps, and tried anew much later."""
    worth, ways = Worth(), list[bool]()
    for _ in range(AGAIN + 3 * TRIAL):
        ways.append(worth.on)
        if worth.on:
            worth.judge(ratio)
        else:
            worth.rest()
    if ratio > 1:
        assert all(ways)
    else:
        assert ways == [True] * TRIAL + [False] * AGAIN + [True] * TRIAL + [False] * TRIAL


def test_the_worth_of_a_source_is_that_of_many_steps() -> None:
    worth = Worth()
    for ratio in [1.3, 0.9] * 20:
        worth.judge(ratio)
    assert worth.on
    for seconds in (1.0, 1.0, 2.0):
        worth.took(seconds)
    assert worth.seconds == pytest.approx(1.1)


def test_guesses_too_deep_are_left_out() -> None:
    found = _cut(candidates((1, -1, 0.5), (2, 0, 0.5), (3, 1, 0.5), (4, -1, 0.5), (5, 3, 0.5)), 2)
    assert (found.tokens, found.parents) == ([1, 2, 4, 5], [-1, 0, -1, 2])
    assert len(_cut(found, 0)) == 0


def longest_match(text: list[int]) -> int:
    """The most last tokens that came before."""
    return next(
        (n for n in range(len(text) - 1, 0, -1) if any(text[i : i + n] == text[-n:] for i in range(len(text) - n))), 0
    )


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 20])
def test_suffix_automaton(vocabulary: int) -> None:
    """Against a search of the text: the longest match is found, and every match ends before the end."""
    random = torch.Generator().manual_seed(vocabulary)
    text = torch.randint(vocabulary, (120,), generator=random).tolist()
    automaton = _ext.host.SuffixAutomaton()
    for n in range(1, len(text) + 1):
        automaton.extend(text[n - 1 : n])
        found = automaton.matches(4, 1)
        assert (found[0][0] if found else 0) == longest_match(text[:n])
        assert len({end for _, end in found}) == len(found)
        for length, end in found:
            assert length <= end < n
            assert text[end - length : end] == text[n - length : n]
    assert len(automaton) == 120
    assert all(length >= 3 for length, _ in automaton.matches(9, 3))
    with pytest.raises(ValueError, match="token -1 is not from 0 to"):
        automaton.extend([3, -1])
    assert len(automaton) == 120


def test_lookup_copies_what_followed() -> None:
    text = [1, 2, 3, 4, 5, 6, 9, 9, 2, 3]
    model = decoder_model(llama())
    (found,) = LookupDraft(chains=1).start(model, KVCache(model, 1, 40)).propose([text], [3])
    assert (found.tokens, found.parents) == ([4, 5, 6], [-1, 0, 1])


def test_ngrams_and_recycling() -> None:
    table = NgramDraft(guesses=3, depth=2)
    table.learn([1, 2, 3, 1, 2, 3, 1, 2, 4])
    assert [token for token, _ in table.follow((1, 2))] == [3, 4]
    assert table.follow((7, 7)) == []
    assert [token for token, _ in table.follow((7, 3))] == [1]
    model = decoder_model(llama())
    (found,) = table.start(model, KVCache(model, 1, 40)).propose([[8, 3]], [9])
    assert (found.tokens, found.parents) == ([1, 2], [-1, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LookupDraft(chains=0), "chains=0"),
        (lambda: NgramDraft(guesses=0), "guesses=0"),
        (lambda: RecyclingDraft(width=0), "width=0"),
        (lambda: ModelDraft(llama(), depth=0), "depth=0"),
        (lambda: SelfDraft(llama(), depth=0), "depth=0"),
        (lambda: EarlyExit([1, 0]), r"layers \[1, 0\] are not ascending"),
        (lambda: EarlyExit(0), "layers 0 are not"),
        (lambda: scrimp.tree_decoding(guesses=64), "guesses=64 must be from 0 to 63"),
        (lambda: scrimp.tree_decoding(NgramDraft(), NgramDraft()), "must have different names"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: ModelDraft(llama(17)), "the draft model has 17 tokens, but the model 16"),
        (lambda: SelfDraft(llama(heads=4)), r"\(16, 4, 4, torch.float32\) are not \(16, 2, 8"),
        (lambda: SelfDraft(llama(layers=3)), "for 3 of a model with 2"),
        (lambda: EarlyExit(3), "layer 2 of a model with 2 layers"),
    ],
)
def test_sources_that_do_not_fit_the_model(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scrimp.generate(llama(), [1, 2], draft=scrimp.tree_decoding(source()), max_new_tokens=4)
