"""The sampler: filters of transformers, the right distribution, noise of (seed, position, token) alone."""

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import scrimp
from scrimp.methods.generation import Sampling
from scrimp.methods.generation.sampling import choose, kept
from scrimp.ops._noise import gumbel, mix, uniform

LOGITS = torch.tensor([1.0, -2.0, 0.5, 0.5, 3.0, -0.3, 2.2, -7.0])


def chi_square(counts: Counter[int], probabilities: torch.Tensor, draws: int) -> float:
    """The survival function of the chi-square test, from the regularised gamma function."""
    seen = [(counts[i], float(p) * draws) for i, p in enumerate(probabilities) if p > 0]
    assert sum(counts.values()) == sum(count for count, _ in seen), "a token of probability 0 was drawn"
    statistic = sum((count - expected) ** 2 / expected for count, expected in seen)
    degrees = torch.tensor((len(seen) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, torch.tensor(statistic / 2, dtype=torch.float64)))


FILTERS = {
    "plain": Sampling(1.0),
    "hot": Sampling(2.0),
    "top-k": Sampling(1.0, top_k=3),
    "top-p": Sampling(0.7, top_p=0.9),
    "min-p": Sampling(1.0, min_p=0.1),
    "all": Sampling(1.3, top_k=6, top_p=0.95, min_p=0.05),
}


def filtered(sampling: Sampling, logits: torch.Tensor) -> torch.Tensor:
    """Probabilities after transformers' own warpers, in its order."""
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits[None])
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize("name", FILTERS)
def test_the_distribution_is_right(name: str) -> None:
    """2,000 draws each over positions and over seeds; the numbers are fixed, so this cannot flake."""
    sampling, draws = FILTERS[name], 2000
    expected = filtered(sampling, LOGITS)
    over_positions = Counter(choose(LOGITS, position, sampling) for position in range(draws))
    assert chi_square(over_positions, expected, draws) > 1e-3
    how = vars(sampling)
    over_seeds = Counter(choose(LOGITS, 17, Sampling(**{**how, "seed": seed})) for seed in range(draws))
    assert chi_square(over_seeds, expected, draws) > 1e-3


def test_chi_square_sees_a_wrong_distribution() -> None:
    counts = Counter(choose(LOGITS, position, Sampling(1.0)) for position in range(2000))
    assert chi_square(counts, (LOGITS / 1.1).softmax(-1), 2000) < 1e-3


@pytest.mark.parametrize("name", [name for name in FILTERS if name != "plain"])
def test_filters_are_those_of_transformers(name: str) -> None:
    for seed in range(20):
        logits = 3 * torch.randn(3000, generator=torch.Generator().manual_seed(seed))
        expected = filtered(FILTERS[name], logits).nonzero().view(-1)
        assert torch.equal(kept(logits / FILTERS[name].temperature, FILTERS[name]), expected)


def test_wide_nuclei_and_ties() -> None:
    flat = torch.zeros(5000)
    assert kept(flat, Sampling(1.0, top_p=0.49999)).tolist() == list(range(2500))
    assert kept(flat, Sampling(1.0, top_k=3)).numel() == 5000  # equals of the last one stay, as in transformers
    assert choose(flat, 0, Sampling()) == 0
    assert kept(torch.tensor([0.0, 1.0, 1.0]), Sampling(1.0, top_p=1e-9)).tolist() == [1]


def test_uniform_numbers() -> None:
    tokens = torch.arange(200_000)
    for seed, position in ((0, 0), (0, 1), (1, 0), (2**63 - 1, 10**6), (-5, 3)):
        u = uniform(seed, position, tokens)
        assert 0 < float(u.min()) < float(u.max()) < 1
        counts = torch.histc(u, 100, 0, 1)
        assert float(((counts - 2000) ** 2 / 2000).sum()) < 150  # 99 degrees of freedom: p = 0.0007
    one = uniform(3, 7, tokens)
    for other in (uniform(3, 8, tokens), uniform(4, 7, tokens), one.roll(1), one.roll(2)):
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.01


def test_uniform_numbers_by_hand() -> None:
    """Python's own integers give the same numbers as the tensors' wrapped ones."""
    mask = 2**64 - 1
    for seed, position, token in ((0, 0, 0), (123, 45, 67), (2**64 - 1, 2**31, 151_935)):
        key = mix((mix(seed) + position * 0x9E3779B97F4A7C15) & mask)
        bits = mix((key + (token + 1) * 0x9E3779B97F4A7C15) & mask) >> 12
        assert float(uniform(seed, position, torch.tensor([token]))) == (bits + 0.5) / 2**52
    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the first number of splitmix64 with seed 0


def test_noise_is_gumbel_and_bounded() -> None:
    noise = gumbel(5, 5, torch.arange(100_000))
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.02)
    assert torch.equal(gumbel(5, 5, torch.arange(70, 90)), noise[70:90])  # whoever asks for a part gets the same


def test_tokens_far_behind_are_left_out_without_a_change() -> None:
    logits = 30 * torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(20_000)
    for position in range(50):
        whole = int((logits.double() + gumbel(9, position, ids)).argmax())
        assert choose(logits, position, Sampling(1.0, seed=9)) == whole


def test_infinite_logits() -> None:
    masked = torch.tensor([-torch.inf, 0.0, -torch.inf])
    assert {choose(masked, position, Sampling(1.0)) for position in range(20)} == {1}
    assert choose(torch.tensor([0.0, torch.inf]), 0, Sampling(1.0)) == 1
    for sampling in (Sampling(), Sampling(1.0, top_k=1, top_p=0.5, min_p=0.1)):
        with pytest.raises(ValueError, match="no token is left"):
            choose(torch.full((3,), -torch.inf), 0, sampling)


def test_generation_draws_the_models_distribution(tiny: Callable[[str], PreTrainedModel]) -> None:
    """512 seeds, 64 at a time, against the softmax of Hugging Face's logits."""
    model = tiny("llama")
    with torch.no_grad():
        expected = (model(torch.tensor([[3, 1, 4]])).logits[0, -1] / 3).softmax(-1)
    found: Counter[int] = Counter()
    for first in range(0, 512, 64):
        seeds = list(range(first, first + 64))
        batch = scrimp.generate(model, [[3, 1, 4]] * 64, max_new_tokens=1, temperature=3.0, seed=seeds)
        found.update(completion.tokens[0] for completion in batch)
    rare = expected < 0.01
    pooled = torch.cat([expected[~rare], expected[rare].sum()[None]])
    ids = (~rare).nonzero().view(-1).tolist()
    counts = Counter({i: found[token] for i, token in enumerate(ids)})
    counts[len(ids)] = 512 - sum(counts.values())
    assert chi_square(counts, pooled, 512) > 1e-3
