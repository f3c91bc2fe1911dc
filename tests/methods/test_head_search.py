"""The offline search: curves of one head against their definition, the choice, and a tiny model end to end."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scrimp.methods import head_search
from scrimp.methods.head_patterns import weight_hash
from scrimp.methods.head_search import COLUMNS, DENSE_WINDOW, WINDOWS, choose, head_curves, search_heads
from scrimp.ops import sparse_attention, vertical_slash_index


def test_curves_are_the_error_and_cost_of_the_plan() -> None:
    """Error and cost of a grid point equal those of the op's own plan on the sampled tiles."""
    n, D, scale = 1100, 8, 1.0
    q, k, v, w_o = torch.randn(n, D), torch.randn(n, D), torch.randn(n, D), torch.randn(12, D)
    tiles = torch.tensor([3, 9, 16])
    error, cost = head_curves(q, k, v, w_o, tiles, scale)
    rows = (tiles[:, None] * 64 + torch.arange(64)).flatten()
    batch = tuple(t[None, None] for t in (q, k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(*batch, is_causal=True, scale=scale)
    for w, c in ((0, 0), (1, 3), (3, 2)):
        budget = torch.tensor([WINDOWS[w]]).int(), torch.tensor([COLUMNS[c]]).int()
        plan = vertical_slash_index(*batch[:2], *budget, scale=scale)
        lost = (sparse_attention(*batch, plan, scale)[0] - dense)[0, 0, rows] @ w_o.T
        torch.testing.assert_close(error[w, c], lost.pow(2).sum(1).mean(), rtol=1e-3, atol=1e-6)
        columns = plan.column_slice[0, 0, tiles, 1].sum()
        ranges = plan.tile_cost()[0, 0, tiles].sum() - columns
        expected = (ranges + head_search.COLUMN_COST * columns) / ((tiles + 1) * 64).sum()
        torch.testing.assert_close(cost[w, c], expected, rtol=1e-5, atol=0)


def test_choose_spends_where_it_helps() -> None:
    error = torch.zeros(1, 2, len(WINDOWS), len(COLUMNS))
    cost = torch.linspace(0.01, 0.9, error[0, 0].numel()).view(1, 1, *error.shape[2:]).expand_as(error)
    error[0, 1] = (1 - cost[0, 1]) ** 2  # head 1 gains from every key, head 0 from none
    window, columns = choose(error, cost, 0.3)
    assert (window[0, 0], columns[0, 0]) == (WINDOWS[0], COLUMNS[0])
    spent = 0.01 + cost[0, 1, WINDOWS.index(int(window[0, 1])), COLUMNS.index(int(columns[0, 1]))]
    assert 0.5 < spent <= 0.6
    assert choose(error, cost, 1.0)[0][0, 1] == DENSE_WINDOW


def test_tiny_model_end_to_end() -> None:
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=900,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation("sdpa")
    texts = [torch.randint(0, 60, (1, 800))]
    found = search_heads(model, texts, {"small": 0.3, "large": 0.8}, tiles=3, progress=False)
    assert model.config._attn_implementation == "sdpa"
    for name, bound in (("small", 0.3), ("large", 0.8)):
        patterns = found[name]
        assert (patterns.layers, patterns.heads) == (2, 4)
        assert patterns.weight_hash == weight_hash(model)
        assert sum(patterns.expected_density(layer, 800) for layer in range(2)) / 2 < bound + 0.05
    assert (found["small"].window <= found["large"].window).float().mean() > 0.5


@pytest.mark.parametrize(
    ("texts", "budgets", "words"),
    [
        ([], {"a": 0.5}, "no texts"),
        ([torch.zeros(1, 100).long()], {"a": 0.5}, "a text has 100 tokens; 12 tiles need at least 768"),
        ([torch.zeros(1, 800).long()], {"a": 1.5}, r"budget 'a' is 1.5; a density lies in \(0, 1\]"),
    ],
)
def test_bad_input(texts: list[torch.Tensor], budgets: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        search_heads(LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,
                     num_hidden_layers=1, num_attention_heads=1)), texts, budgets)  # fmt: skip
