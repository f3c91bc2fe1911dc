"""`scrimp demo`: a real model reads about 8,000 tokens with dense and with sparse attention; a table and a report."""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..loading import load
from . import measure
from . import text as corpus
from .measure import Quality, Timing, Variant
from .model import cache_dir, demo_model_path
from .options import Options, from_arguments
from .picture import Picture, choose, picture
from .report import Answer, table_text, write_report
from .variants import sparse_variants

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .. import SparsePlan

WARM_UP_TOKENS = 1024
PICTURES = 6


@dataclass(frozen=True)
class Result:
    """What a run found: flat figures (the JSON file), pictures of plans, and what the variants answered."""

    figures: dict[str, Any]
    pictures: list[Picture]
    answers: list[Answer]


def main(arguments: argparse.Namespace) -> int:
    """Run the demo as `scrimp demo` does; returns the exit status."""
    options = from_arguments(arguments)
    model, tokenizer = load(options.model or demo_model_path())
    result = run(model, tokenizer, sparse_variants(model, tokenizer), options)
    print(table_text(result.figures))
    if options.json is not None:
        options.json.write_text(json.dumps(result.figures, indent=1) + "\n")
        print(f"figures: {options.json}")
    if options.report is not None:
        write_report(options.report, result.figures, result.pictures, result.answers)
        print(f"report:  {options.report}")
    return 0


def run(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    sparse: Sequence[Variant],
    options: Options,
) -> Result:
    """Measure dense attention, every sparse variant and attention removed on one model.

    The first sparse variant is the main one: its figures have keys of their own, all variants are in `frontier`.

    Raises:
        ValueError: no sparse variant, or prompt and windows do not fit each other.
    """
    if not sparse:
        raise ValueError("demo: no sparse variant to compare with dense attention")
    own_text = None if options.text is None else options.text.read_text(errors="replace")
    prompt = corpus.prompt(tokenizer, options.length, own_text, options.question)
    windows = corpus.windows(tokenizer, options.window, "heldout", options.windows)
    dense, removed = measure.dense(), measure.removed()
    with measure.threads(options.threads):
        qualities = _qualities(model, dense, sparse, windows)
        plans = _warm_up(model, [dense, *sparse, removed], prompt)
        densities = {name: _density(seen, model.config.num_hidden_layers) for name, seen in plans.items()}
        timings = _timings(model, [dense, *sparse, removed], prompt, options)
        figures = {
            **_figures([dense, *sparse, removed], qualities, timings, densities),
            "budget": sparse[0].name,
            "model": options.model.resolve().name if options.model else "SmolLM2-135M-Instruct",
            "text": options.text.name if options.text else "pydoc_data.topics",
            "prompt_tokens": prompt.shape[1],
            "window_tokens": windows.shape[1],
            "windows": windows.shape[0],
            "rounds": options.rounds,
            **measure.environment(),
        }
    dense.switch(model)
    decoded = {name: tokenizer.decode(timing.answer) for name, timing in timings.items() if timing.answer}
    answers = [Answer(options.question, name, str(words)) for name, words in decoded.items()]
    seen = plans[sparse[0].name]
    chosen = _each(choose(seen, PICTURES), "drawing plans", "head")
    return Result(figures, [picture(seen[layer], layer, head) for layer, head in chosen], answers)


def _qualities(
    model: "PreTrainedModel", dense: Variant, sparse: Sequence[Variant], windows: torch.Tensor
) -> dict[str, Quality]:
    with _bar(windows.shape[0] * (1 + len(sparse)), "reading held-out windows", "window") as bar:
        key = measure.quality_key(model, windows)
        found = {
            dense.name: measure.cached_quality(
                cache_dir() / "quality",
                key,
                lambda: measure.quality(model, dense, windows, bar.update),
            )
        }
        bar.update(windows.shape[0] - bar.n)
        for variant in sparse:
            found[variant.name] = measure.quality(model, variant, windows, bar.update)
    return found


def _warm_up(
    model: "PreTrainedModel", variants: Sequence[Variant], prompt: torch.Tensor
) -> "dict[str, dict[int, SparsePlan]]":
    """Run every variant once untimed, the sparse ones on the whole prompt to see their plans by layer."""
    plans: dict[str, dict[int, SparsePlan]] = {}
    for variant in _each(variants, "warming up", "variant"):
        if variant.watch is None:
            measure.time_first_token(model, variant, prompt[:, :WARM_UP_TOKENS], Timing())
        else:
            seen: dict[int, SparsePlan] = {}
            with variant.watch(model, seen.__setitem__):
                measure.time_first_token(model, variant, prompt, Timing())
            plans[variant.name] = seen
    return plans


def _timings(
    model: "PreTrainedModel", variants: Sequence[Variant], prompt: torch.Tensor, options: Options
) -> dict[str, Timing]:
    """Time every variant once a round, in turn, so that a slow minute of the machine meets all of them."""
    timings = {variant.name: Timing() for variant in variants}
    turns = [(number, variant) for number in range(options.rounds) for variant in variants]
    for number, variant in _each(turns, "time to first token", "run"):
        last = number == options.rounds - 1 and variant.name != variants[-1].name
        answer_tokens = options.answer_tokens if last else 0
        measure.time_first_token(model, variant, prompt, timings[variant.name], answer_tokens)
    return timings


def _figures(
    variants: Sequence[Variant],
    qualities: dict[str, Quality],
    timings: dict[str, Timing],
    densities: dict[str, float],
) -> dict[str, Any]:
    dense, *sparse, removed = (variant.name for variant in variants)
    base = qualities[dense]
    bound, bound_low, bound_high = measure.ratio(timings[dense].seconds, timings[removed].seconds)
    points = []
    for name in sparse:
        middle, low, high = measure.ratio(timings[dense].seconds, timings[name].seconds)
        points.append(
            {
                "name": name,
                "ttft_s": _median(timings[name]),
                "ttft_ratio": middle,
                "ttft_ratio_p20": low,
                "ttft_ratio_p80": high,
                "density": densities[name],
                "perplexity": qualities[name].perplexity,
                "perplexity_ratio": qualities[name].perplexity / base.perplexity,
                "top1_agreement": qualities[name].agreement(base),
                "peak_memory_bytes": timings[name].peak_bytes,
            }
        )
    main = points[0]
    return {
        "ttft_dense_s": _median(timings[dense]),
        "ttft_sparse_s": main["ttft_s"],
        "ttft_removed_s": _median(timings[removed]),
        **{key: main[key] for key in ("ttft_ratio", "ttft_ratio_p20", "ttft_ratio_p80")},
        "attention_share": 1 - 1 / bound,
        "bound_ratio": bound,
        "bound_ratio_p20": bound_low,
        "bound_ratio_p80": bound_high,
        "density": main["density"],
        "perplexity_dense": base.perplexity,
        "perplexity_sparse": main["perplexity"],
        "perplexity_ratio": main["perplexity_ratio"],
        "top1_agreement": main["top1_agreement"],
        "peak_memory_dense_bytes": timings[dense].peak_bytes,
        "peak_memory_sparse_bytes": main["peak_memory_bytes"],
        "frontier": points,
    }


def _density(plans: "dict[int, SparsePlan]", layers: int) -> float:
    """Mean over all layers; one that ran without a plan is dense."""
    return (layers - len(plans) + sum(float(plan.density()) for plan in plans.values())) / layers


def _median(timing: Timing) -> float:
    return float(torch.tensor(timing.seconds, dtype=torch.float64).quantile(0.5))


@contextmanager
def _bar(total: int, title: str, unit: str) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(total=total, desc=f"{title:<26}", unit=unit) as bar:
        yield bar


def _each(items: Sequence[Any], title: str, unit: str) -> Iterator[Any]:
    with _bar(len(items), title, unit) as bar:
        for item in items:
            yield item
            bar.update()
