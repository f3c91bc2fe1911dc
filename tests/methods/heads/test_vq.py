"""VQLogitsHead: built from a trained head, its repairs, its place in a model; VQTraining: learnt from scratch."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

import scrimp
from scrimp.methods.heads import VQLogitsHead, VQTraining, vq_build, vq_cross_entropy
from scrimp.methods.heads.exact import hidden_states
from scrimp.ops import vq_logits, vq_sample

V, D, K = 400, 16, 50


@pytest.fixture
def trained() -> dict[str, Tensor]:
    """A head, uneven hidden states with a mean, and frequencies that fall with no order of the ids."""
    states = torch.randn(600, D) * torch.linspace(3, 0.1, D) + torch.randn(D)
    counts = (1000 / (1 + torch.randperm(V).float())).long()
    return {"weight": torch.randn(V, D), "states": states, "counts": counts}


def error(head: VQLogitsHead, trained: dict[str, Tensor], tokens: Any = slice(None)) -> float:
    """Mean square error of the logits."""
    with torch.no_grad():
        wrong = head(trained["states"]) - trained["states"] @ trained["weight"].T
    return float(wrong[:, tokens].square().mean())


def build(trained: dict[str, Tensor], size: int = K, *names: str, **options: Any) -> VQLogitsHead:
    return VQLogitsHead.from_head(trained["weight"], size, **{name: trained[name] for name in names}, **options)


def test_what_it_computes() -> None:
    head = VQLogitsHead(torch.randn(5, D), torch.randint(5, (2, 30), dtype=torch.int32), torch.randn(30))
    h, target = torch.randn(4, D), torch.randint(30, (4,))
    parts = (head.codebook.detach(), head.codes, head.bias.detach())
    with torch.no_grad():
        assert torch.equal(head(h), vq_logits(h, *parts))
    torch.testing.assert_close(head(h), vq_logits(h, *parts), atol=1e-5, rtol=1e-5)
    assert torch.equal(head.loss(h, target), vq_cross_entropy(h, *parts, target=target))
    how = {"temperature": torch.ones(4), "seed": torch.arange(4), "position": torch.arange(4), "top_p": 0.9}
    assert torch.equal(head.sample(h, **how), vq_sample(h, *parts, **how))


def test_gradients_of_forward_are_those_of_loss() -> None:
    head = VQLogitsHead(torch.randn(5, D), torch.randint(5, (30,), dtype=torch.int32), torch.randn(30))
    h, target = torch.randn(4, D), torch.randint(30, (4,))
    wanted = (head.codebook, head.bias)
    for ours, theirs in zip(
        torch.autograd.grad(head.loss(h, target).mean(), wanted),
        torch.autograd.grad(cross_entropy(head(h), target), wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_frequent_tokens_have_codes_of_their_own(trained: dict[str, Tensor]) -> None:
    """Their logits are those of the trained head, to the bit of the same kernel."""
    top = trained["counts"].topk(20).indices
    for options in ({"singles": 20}, {"singles": 20, "levels": 2}):
        head = build(trained, K, "counts", "states", **options)
        first = torch.atleast_2d(head.codes)[0].long()
        assert torch.equal(head.codebook[first[top]], trained["weight"][top])
        assert (torch.bincount(first, minlength=K)[first[top]] == 1).all()
        assert error(head, trained, top) < 1e-9
        assert error(head, trained) > 0.1
    assert torch.equal(head.codes[1, top], torch.full((20,), K // 2, dtype=torch.int32))
    assert not head.codebook[K // 2].any()
    assert not head.bias[top].any()
    half = build(trained, K, "counts")
    assert int((torch.bincount(half.codes)[half.codes.long()] == 1).sum()) >= K // 2


def test_each_repair_repairs(trained: dict[str, Tensor]) -> None:
    plain = error(build(trained), trained)
    fitted = error(build(trained, K, "states", bias=False), trained)
    with_bias = error(build(trained, K, "states"), trained)
    residual = error(build(trained, K, "states", levels=2), trained)
    assert fitted < 0.9 * plain
    assert with_bias < 0.95 * fitted
    assert residual < 0.95 * with_bias
    assert error(build(trained, 2 * K, "states"), trained) < 0.9 * with_bias


def test_all_codes_are_the_head_itself(trained: dict[str, Tensor]) -> None:
    for options in ({}, {"singles": V}):
        assert error(build(trained, V, "counts", "states", **options), trained) < 1e-9


@pytest.mark.parametrize("size", [1, 2, 3, V])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_every_size_works(trained: dict[str, Tensor], size: int, levels: int) -> None:
    """With a dtype of its own, and a vocabulary of one token."""
    if levels > size:
        with pytest.raises(ValueError, match=f"levels={levels} must be from 1 to the {size} rows"):
            build(trained, size, levels=levels)
        return
    low = trained | {"weight": trained["weight"].bfloat16()}
    head = build(low, size, "counts", "states", levels=levels)
    assert head.codebook.shape == (size, D)
    assert head(trained["states"][:3].bfloat16()).isfinite().all()
    alike = {"weight": torch.ones(V, D)}
    assert torch.equal(build(alike, size, levels=levels)(torch.eye(D)[:2]), torch.ones(2, V))
    assert VQLogitsHead.from_head(torch.ones(1, 1), 1)(torch.ones(3, 1)).tolist() == [[1.0]] * 3


def test_the_same_seed_gives_the_same_head(trained: dict[str, Tensor]) -> None:
    first, second, other = (build(trained, K, "counts", "states", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.codebook, second.codebook)
    assert not torch.equal(first.codes, other.codes)


def test_k_means_ends_where_no_row_would_move() -> None:
    """Every row is at the nearest of the weighted means, no code is empty, and it costs less than the start."""
    rows, weights = torch.randn(300, 4), torch.rand(300) + 0.1

    def cost(index: Tensor) -> tuple[float, Tensor]:
        distance, nearest = vq_build.nearest(rows, vq_build.means(rows, index, 20, weights))
        return float((distance * weights).sum()), nearest

    for seed in range(3):
        start, end = (vq_build.k_means(rows, 20, weights, n, torch.Generator().manual_seed(seed)) for n in (0, 100))
        assert torch.equal(cost(end)[1], end)
        assert cost(end)[0] < 0.95 * cost(start)[0]
        assert (torch.bincount(end, minlength=20) > 0).all()


def test_state_dict_and_copies(trained: dict[str, Tensor]) -> None:
    head, other = build(trained, K, "counts", "states"), build(trained, K, "states", seed=9)
    other.load_state_dict(head.state_dict())
    h = torch.randn(3, D)
    assert torch.equal(other(h), head(h))
    assert torch.equal(copy.deepcopy(head)(h), head(h))
    assert repr(head) == "VQLogitsHead(V=400, d=16, K=50, levels=1, bias=True)"


def test_in_a_model(tiny: Callable[[str], PreTrainedModel]) -> None:
    """Under our loop and transformers', beside a dense head of the same logits."""
    model = copy.deepcopy(tiny("llama"))
    weight = model.lm_head.weight.detach()
    model.set_output_embeddings(VQLogitsHead.from_head(weight, 100))
    head, dense = model.lm_head, copy.deepcopy(tiny("llama"))
    dense.lm_head.weight.data = head.codebook.detach()[head.codes.long()]
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    for more in ({}, {"temperature": 1.5, "seed": 7}):
        texts = [scrimp.generate(some, [3, 1, 4, 1, 5], max_new_tokens=12, **more).tokens for some in (model, dense)]
        assert texts[0] == texts[1]
    stock = model.generate(ids, max_new_tokens=12, do_sample=False)[0, 5:].tolist()
    assert stock == scrimp.generate(model, [3, 1, 4, 1, 5], max_new_tokens=12).tokens


def test_compress_head(tiny: Callable[[str], PreTrainedModel]) -> None:
    model, tokens = copy.deepcopy(tiny("llama")), torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    weight, states = model.lm_head.weight.detach(), hidden_states(model, tokens)
    head = scrimp.compress_head(model, "vq", codes=20, tokens=tokens, levels=2)
    counts = torch.bincount(tokens[0], minlength=len(weight))
    wanted = VQLogitsHead.from_head(weight, 20, counts=counts, states=states, levels=2)
    assert model.get_output_embeddings() is head
    assert repr(head) == repr(wanted)
    assert torch.equal(head(states), wanted(states))
    assert len(scrimp.generate(model, tokens[0].tolist(), max_new_tokens=4).tokens) == 4
    with pytest.raises(ValueError, match="head is a VQLogitsHead"):
        scrimp.compress_head(model, "vq", codes=20)


C, M = torch.zeros(5, 8), torch.zeros(9, dtype=torch.int32)
BAD_HEADS = {
    "no codes": ((C[:0], M), r"codebook has shape \[0, 8\] and codes \[9\]; there must be a code"),
    "no numbers": ((C[:, :0], M), r"codebook has shape \[5, 0\]"),
    "no tokens": ((C, M[:0]), r"codes \[0\]; there must be"),
    "rank": ((C[0], M), r"codebook has shape \[8\]"),
    "code": ((C, M + 5), r"codes\[0\]=5 is not one of the 5 rows"),
    "negative code": ((C, M - 1), r"codes\[0\]=-1 is not"),
    "dtype of codes": ((C, M.long()), "codes is int64; it must be int32"),
    "bias": ((C, M, torch.zeros(8)), r"bias has shape \[8\], expected \[9\]"),
    "NaN": ((C / 0, M), "codebook has values that are not finite"),
    "infinite bias": ((C, M, torch.full((9,), torch.inf)), "bias has values that are not finite"),
}


@pytest.mark.parametrize("case", BAD_HEADS)
def test_bad_heads(case: str) -> None:
    args, words = BAD_HEADS[case]
    with pytest.raises(ValueError, match=f"VQLogitsHead: .*{words}"):
        VQLogitsHead(*args)


BAD_BUILDS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"weight": torch.zeros(9)}, r"weight is float32 \[9\]"),
    "integers": ({"weight": torch.zeros(9, 4).int()}, r"weight is int32 \[9, 4\]"),
    "no tokens": ({"weight": torch.zeros(0, 4)}, r"weight is float32 \[0, 4\]"),
    "no codes": ({"K": 0}, "K=0 must be from 1 to the 9 tokens"),
    "many codes": ({"K": 10}, "K=10 must be from 1 to the 9 tokens"),
    "counts": ({"counts": torch.zeros(8)}, r"counts has shape \[8\], expected \[9\]"),
    "negative counts": ({"counts": torch.full((9,), -1)}, "counts has values that are not finite and not negative"),
    "states": ({"states": torch.zeros(3, 5)}, r"states has shape \[3, 5\], expected \[at least 1, 4\]"),
    "no states": ({"states": torch.zeros(0, 4)}, r"states has shape \[0, 4\]"),
    "NaN states": ({"states": torch.full((2, 4), torch.nan)}, "states has values that are not finite"),
    "NaN": ({"weight": torch.full((9, 4), torch.nan)}, "weight has values that are not finite"),
    "levels": ({"levels": 0}, "levels=0 must be from 1 to the 5 rows"),
    "singles": ({"singles": 5}, r"singles=5 must be from 0 to 4, as the levels have \[5\] rows"),
    "negative singles": ({"singles": -1}, "singles=-1 must be from 0 to 4"),
    "singles and levels": ({"singles": 1, "levels": 5}, "singles=1 must be from 0 to 0"),
}


@pytest.mark.parametrize("case", BAD_BUILDS)
def test_bad_builds(case: str) -> None:
    changes, words = BAD_BUILDS[case]
    with pytest.raises(ValueError, match=rf"VQLogitsHead.from_head: .*{words}"):
        VQLogitsHead.from_head(**({"weight": torch.zeros(9, 4), "K": 5} | changes))


@pytest.mark.parametrize("bias", [True, False])
def test_straight_through_gradients(bias: bool) -> None:
    """Those of autograd through rows + (codebook[codes] - rows).detach(), a dense head; the fifth code is empty."""
    codes = torch.randint(4, (30,), dtype=torch.int32)
    training = VQTraining(torch.randn(30, D, dtype=torch.float64), 5, codes, bias=bias)
    if bias:
        torch.nn.init.normal_(training.bias)
    h, target = torch.randn(7, D, dtype=torch.float64, requires_grad=True), torch.randint(30, (7,))
    head = training.head()
    seen = training.rows + (head.codebook[codes.long()] - training.rows).detach()
    logits = h @ seen.T + (training.bias if bias else 0.0)
    wanted = [h, training.rows, *([training.bias] if bias else [])]
    found = training.loss(h, target)
    torch.testing.assert_close(found, cross_entropy(logits, target, reduction="none"))
    ours, theirs = (torch.autograd.grad(x.mean(), wanted) for x in (found, cross_entropy(logits, target)))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(head.loss(h, target), found)


@pytest.mark.parametrize("refreshed", [True, False])
def test_training_from_scratch_learns_a_map(refreshed: bool) -> None:
    """Tokens 6 k to 6 k + 5 follow state k alone: with a refreshed map the codes become those groups."""
    groups = 8
    states, follower = 4 * torch.eye(groups), torch.arange(groups).repeat_interleave(6)
    training = VQTraining(0.1 * torch.randn(6 * groups, groups), groups, bias=False)
    optimiser = torch.optim.Adam(training.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for step in range(300):
        target = torch.randint(6 * groups, (64,), generator=generator)
        optimiser.zero_grad()
        training.loss(states[follower[target]], target).mean().backward()
        optimiser.step()
        if refreshed and step % 5 == 0:
            training.refresh()
    target = torch.arange(6 * groups)
    with torch.no_grad():
        excess = float(training.head().loss(states[follower], target).mean()) - math.log(6)
    assert excess < 0.05 if refreshed else excess > 1
    pairs = set(zip(follower.tolist(), training.codes.tolist(), strict=True))
    assert (len(pairs) == groups) == refreshed


def test_refresh_fills_codes_without_a_token() -> None:
    training = VQTraining(torch.randn(40, D), 10, torch.zeros(40, dtype=torch.int32))
    assert training.refresh(torch.arange(40)) > 0
    for _ in range(5):
        training.refresh()
    assert (torch.bincount(training.codes, minlength=10) > 0).all()
    assert training.refresh() < 40


def test_bad_training() -> None:
    rows = torch.zeros(9, 4)
    for args, words in (
        ((rows, 10), r"K=10 must be from 1 to the tokens of rows \[9, 4\]"),
        ((rows, 0), "K=0 must be"),
        ((rows[:0], 1), r"rows \[0, 4\]"),
        ((rows, 3, torch.zeros(8).int()), r"codes has shape \[8\], expected \[9\]"),
        ((rows, 3, torch.zeros(2, 9).int()), r"codes has shape \[2, 9\]"),
        ((rows, 3, torch.full((9,), 3).int()), r"codes\[0\]=3 is not one of the 3 rows"),
    ):
        with pytest.raises(ValueError, match=words):
            VQTraining(*args)
    with pytest.raises(ValueError, match="VQTraining: target 9 is not one of the 9 tokens"):
        VQTraining(rows, 3).loss(torch.zeros(1, 4), torch.tensor([9]))
