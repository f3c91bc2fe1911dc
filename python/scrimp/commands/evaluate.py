"""`scrimp eval MODEL`: perplexity, and divergence and agreement beside a second model or configuration."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from ..demo import text as corpus
from ..demo.model import named_model
from ..loading import load
from ..methods.evaluate import PROTOCOL, Reader, needles, quality
from . import common


def main(arguments: argparse.Namespace) -> int:
    """Runs the command; exit status 0.

    Raises:
        ValueError: options, texts or models that do not fit each other.
        OSError: a model or text that cannot be read.
    """
    if arguments.json is not None and not arguments.json.resolve().parent.is_dir():
        raise ValueError(f"the folder of {arguments.json} does not exist")
    with common.threads(arguments.threads):
        model, tokenizer = load(named_model(arguments.model), arguments.dtype)
        patterns = common.budget(model, arguments.sparse, arguments.patterns)
        against: Any = model
        if arguments.against is not None:
            against = load(named_model(arguments.against), arguments.against_dtype or arguments.dtype)[0]
        elif arguments.against_dtype is not None:
            against = load(named_model(arguments.model), arguments.against_dtype)[0]
        reader = Reader(model, patterns)
        reference = Reader(against) if against is not model or patterns is not None else None
        text = corpus.corpus("heldout") if arguments.text is None else arguments.text.read_text("utf-8")
        windows = _windows(tokenizer, text, arguments.window, arguments.windows)
        figures = _measure(reader, reference, windows)
        if arguments.needle:
            asked = {"patterns": patterns} if patterns is not None else {}
            hidden = needles(model, tokenizer, text, arguments.needle, **asked)
            figures["needles"] = [vars(needle) | {"found": needle.found} for needle in hidden]
    print(f"protocol: {PROTOCOL}")
    name = "pydoc_data.topics (held-out documents)" if arguments.text is None else arguments.text.name
    print(f"text: {name}, {windows.shape[0]} windows of {windows.shape[1]} tokens")
    if not reader.by_engine:
        print(f"read by the model's own code: the decoding engine does not know a {type(model).__name__}")
    _print(figures)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
        print(f"figures: {arguments.json}")
    return 0


def _windows(tokenizer: Any, text: str, length: int, limit: int | None) -> torch.Tensor:
    """int64 [windows, length], the last, incomplete one dropped."""
    if length < 2 or (limit is not None and limit < 1):
        raise ValueError(f"--window {length} must be at least 2 and --windows {limit} at least 1")
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    count = len(ids) // length if limit is None else min(len(ids) // length, limit)
    if not count:
        raise ValueError(f"the text has {len(ids)} tokens, not one window of {length}")
    return torch.tensor(ids[: count * length]).view(count, length)


def _measure(reader: Reader, reference: Reader | None, windows: torch.Tensor) -> dict[str, Any]:
    from tqdm import tqdm

    with tqdm(total=len(windows), desc="reading", unit="window", disable=None) as bar:
        mine, theirs = quality(reader, windows, reference, bar.update)
    figures: dict[str, Any] = mine.figures()
    if theirs is not None:
        figures["reference_perplexity"] = theirs.perplexity
        figures["perplexity_ratio"] = mine.perplexity / theirs.perplexity
    return figures | {"windows": windows.shape[0], "window_tokens": windows.shape[1]}


def _print(figures: dict[str, Any]) -> None:
    error = f" +- {figures['perplexity_error']:.4f}" if "perplexity_error" in figures else ""
    print(f"perplexity {figures['perplexity']:.4f}{error}")
    if "kl_mean" in figures:
        ratio = figures["perplexity_ratio"]
        print(f"reference  {figures['reference_perplexity']:.4f}, ratio {ratio:.5f}")
        kl = ", ".join(f"{name} {figures['kl_' + name]:.3g}" for name in ("mean", "median", "p99", "max"))
        print(f"KL(reference || model) in nats: {kl}")
        print(f"same most likely token: {figures['top1_agreement']:.2%}")
    for needle in figures.get("needles", []):
        verdict = "found" if needle["found"] else "MISSED"
        print(f"pass key {needle['key']} at depth {needle['depth']:.2f}: {verdict} ({needle['answer']!r})")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scrimp eval`."""
    parser.add_argument("model", metavar="MODEL", help="a model folder, a .gguf file, a Hub name, or 'demo'")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what to read (UTF-8); default: Python's own topics")
    parser.add_argument("--window", type=int, default=2048, metavar="N", help="tokens of a window (default 2048)")
    parser.add_argument("--windows", type=int, metavar="N", help="at most so many windows (default: all)")
    parser.add_argument("--against", metavar="MODEL", help="a second model with the same tokenizer, the reference")
    dtypes = ("float32", "bfloat16", "auto")
    parser.add_argument("--against-dtype", choices=dtypes, help="its dtype; alone: the same model in another dtype")
    parser.add_argument("--needle", type=int, metavar="N", help="also hide pass keys in N tokens of the text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    common.add_arguments(parser)
