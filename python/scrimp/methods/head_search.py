"""Finds a model's HeadPatterns: for each head the window and columns that lose least for what they cost.

One dense pass per calibration text. In every layer and head, for a grid of (window, columns), the output of a few query
tiles is recomputed from the kept keys alone:

    error = mean over sampled rows of |(kept - dense output) W_o|^2 / |residual stream after attention|^2
    cost  = (keys in ranges + COLUMN_COST x columns) / keys of the dense tile

`choose` then minimises the summed error at a given mean cost. After MInference 1.0 (2407.02490), section 3.2, which
searches per head under a FLOP target; here with the output projection and the residual as the scale of the error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .head_patterns import HeadPatterns, weight_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOWS = (64, 128, 256, 512, 1024, 2048)
COLUMNS = (0, 32, 64, 128, 256, 512, 1024, 2048)
COLUMN_COST = 1.2
SINKS, SEGMENT, SAMPLES, Q_BLOCK = 16, 512, 16, 64
DENSE_WINDOW = 1 << 30
BUDGETS: Mapping[str, float] = {"balanced": 0.16, "fast": 0.11, "careful": 0.25}


def search_heads(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    budgets: Mapping[str, float] = BUDGETS,
    tiles: int = 12,
    progress: bool = True,
) -> dict[str, HeadPatterns]:
    """Patterns of every head for each budget.

    Args:
        model: a Llama-like Hugging Face model.
        texts: token windows, int64 `[1, n]` each, as long as the prompts the patterns are for.
        budgets: name -> mean attention density to stay within (0 to 1), at that length.
        tiles: query tiles of each text that are compared.
        progress: show a progress bar.

    Returns:
        name -> HeadPatterns with the model's weight hash.

    Raises:
        ValueError: no text, texts too short, or a budget outside (0, 1].
    """
    if not texts:
        raise ValueError("search_heads: no texts to calibrate on")
    shortest = min(text.shape[1] for text in texts)
    if shortest < tiles * Q_BLOCK:
        raise ValueError(f"search_heads: a text has {shortest} tokens; {tiles} tiles need at least {tiles * Q_BLOCK}")
    for name, density in budgets.items():
        if not 0 < density <= 1:
            raise ValueError(f"search_heads: budget {name!r} is {density}; a density lies in (0, 1]")
    error, cost = measure_heads(model, texts, tiles, progress)
    digest = weight_hash(model)
    return {
        name: HeadPatterns(*choose(error, cost, density), SINKS, SEGMENT, SAMPLES, digest)
        for name, density in budgets.items()
    }


def measure_heads(model: PreTrainedModel, texts: Sequence[Tensor], tiles: int, progress: bool) -> tuple[Tensor, Tensor]:
    """Error and cost of every choice of every head, `[layers, H, windows, columns]`, the mean over the texts."""
    from tqdm.auto import tqdm

    layers, config = _decoder_layers(model), model.config.get_text_config()
    shape = (len(layers), config.num_attention_heads, len(WINDOWS), len(COLUMNS))
    error, cost, energy = torch.zeros(shape), torch.zeros(shape), torch.zeros(len(layers))

    def observe(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        index, count, D = int(module.__dict__["layer_idx"]), q.shape[2] // Q_BLOCK, q.shape[3]
        chosen = ((torch.arange(tiles) + 0.6) * count / tiles).long()
        weight = module.get_submodule("o_proj").get_parameter("weight").float()
        for h in range(q.shape[1]):
            g = h * k.shape[1] // q.shape[1]
            w_o = weight[:, h * D : (h + 1) * D]
            head = head_curves(q[0, h].float(), k[0, g].float(), v[0, g].float(), w_o, chosen, scale)
            error[index, h] += head[0] / len(texts)
            cost[index, h] += head[1] / len(texts)
        bar.update()

    def residual(index: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            energy[index] += inputs[0].float().pow(2).sum(-1).reciprocal().mean().cpu() / len(texts)

        return hook

    norms = [getattr(layer, "pre_feedforward_layernorm", None) or layer.post_attention_layernorm for layer in layers]
    hooks = [norm.register_forward_pre_hook(residual(i)) for i, norm in enumerate(norms)]
    bar = tqdm(total=len(layers) * len(texts), desc="heads", unit="layer", disable=not progress)
    try:
        with _observed_attention(model, observe), torch.no_grad():
            for text in texts:
                model(text, use_cache=False, logits_to_keep=1)
    finally:
        bar.close()
        for hook in hooks:
            hook.remove()
    return error * energy[:, None, None, None], cost


def head_curves(q: Tensor, k: Tensor, v: Tensor, w_o: Tensor, tiles: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Error (not yet divided by the residual) and cost of one head: q, k, v `[n, D]`, w_o `[hidden, D]` -> `[W, C]`."""
    n = q.shape[0]
    metric = w_o.T @ w_o  # |e w_o^T|^2 = e metric e^T
    rows = (tiles[:, None] * Q_BLOCK + torch.arange(Q_BLOCK)).flatten()
    dense = _probabilities(q, k, rows, scale).view(len(tiles), Q_BLOCK, n).mT.contiguous()  # [tiles, n, rows]
    exact = dense.mT @ v
    sampled = (torch.arange(SEGMENT // SAMPLES - 1, n + SEGMENT // SAMPLES - 1, SEGMENT // SAMPLES)).clamp(max=n - 1)
    sample, key = _probabilities(q, k, sampled, scale), torch.arange(n)
    error, cost = torch.zeros(2, len(WINDOWS), len(COLUMNS))
    for i, window in enumerate(WINDOWS):
        low = (sampled // Q_BLOCK * Q_BLOCK - window).clamp(min=0)
        outside = sample * ((key >= SINKS) & (key < low[:, None]))
        score = torch.zeros(-(-n // SEGMENT), n).index_add_(0, sampled // SEGMENT, outside)
        best, order = score.topk(min(COLUMNS[-1], n), dim=1)
        order.masked_fill_(best <= 0, n)  # beyond every window: never kept
        for t, p, whole in zip(tiles.tolist(), dense, exact, strict=True):
            start, stop = max(0, t * Q_BLOCK - window), (t + 1) * Q_BLOCK
            sinks, ranked, kept = min(SINKS, start), order[t * Q_BLOCK // SEGMENT], 0.0
            groups: list[slice | Tensor] = [slice(0, sinks), slice(start, stop)]
            weighted, total = torch.zeros_like(whole), torch.zeros(Q_BLOCK, 1)
            for c, count in enumerate(COLUMNS):
                if c:
                    new = ranked[COLUMNS[c - 1] : count]
                    groups = [new[new < start]]
                for group in groups:
                    part = p[group]
                    weighted, total = weighted + part.mT @ v[group], total + part.sum(0)[:, None]
                    kept += len(part) * (COLUMN_COST if c else 1.0)
                lost = weighted / total - whole
                error[i, c] += ((lost @ metric) * lost).sum()
                cost[i, c] += kept
    return error / (len(tiles) * Q_BLOCK), cost / ((tiles + 1) * Q_BLOCK).sum()


def choose(error: Tensor, cost: Tensor, density: float) -> tuple[Tensor, Tensor]:
    """Window and columns `[layers, H]` of least total error whose mean cost stays within `density`.

    Each head takes the choice with the least error + price x cost; bisection finds the price.
    """
    flat_error = torch.cat([error.flatten(2), torch.zeros(*error.shape[:2], 1)], 2)
    flat_cost = torch.cat([cost.flatten(2), torch.ones(*cost.shape[:2], 1)], 2)
    low, high = 1e-12, 1e6  # at the high price everybody takes the cheapest choice
    for _ in range(100):
        price = (low * high) ** 0.5
        picked = (flat_error + price * flat_cost).argmin(2, keepdim=True)
        too_much = flat_cost.gather(2, picked).mean() > density
        low, high = (price, high) if too_much else (low, price)
    picked = (flat_error + high * flat_cost).argmin(2)
    choices = torch.tensor([(w, c) for w in WINDOWS for c in COLUMNS] + [(DENSE_WINDOW, 0)], dtype=torch.int32)
    return choices[picked][..., 0].contiguous(), choices[picked][..., 1].contiguous()


def _probabilities(q: Tensor, k: Tensor, rows: Tensor, scale: float) -> Tensor:
    """Causal attention of some rows, `[rows, n]`."""
    hidden = torch.arange(k.shape[0]) > rows[:, None]
    return (scale * (q[rows] @ k.T)).masked_fill(hidden, -torch.inf).softmax(-1)


def _decoder_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "self_attn") and hasattr(m, "post_attention_layernorm")]


@contextmanager
def _observed_attention(model: PreTrainedModel, observe: Any) -> Iterator[None]:
    """Runs `model` with torch's dense attention and shows `observe` the inputs of every layer."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **rest: Any) -> Any:
        observe(module, q, k, v, scaling)
        return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **rest)

    AttentionInterface.register("scrimp_observed", attention)
    before = model.config._attn_implementation
    model.set_attn_implementation("scrimp_observed")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
