"""Draft sources by name: `--draft lookup maps.safetensors early-exit:10`."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..demo.model import named_model
from ..loading import load
from ..methods.generation import DecoderModel
from ..methods.tree_decoding import (
    DraftMaps,
    DraftSource,
    EarlyExit,
    LookupDraft,
    ModelDraft,
    NgramDraft,
    RecyclingDraft,
    TreeDecoding,
    trained,
    tree_decoding,
)

PLAIN: dict[str, Callable[[], DraftSource]] = {"lookup": LookupDraft, "ngram": NgramDraft, "recycling": RecyclingDraft}


def named(words: Sequence[str], model: DecoderModel) -> TreeDecoding:
    """Tree decoding with the sources that a user named.

    Raises:
        ValueError: a name that says nothing, a file that is none of draft maps, or maps of another model.
        OSError: a file or model that cannot be read.
    """
    return tree_decoding(*(_source(word, model) for word in words))


def _source(word: str, model: DecoderModel) -> DraftSource:
    kind, _, rest = word.partition(":")
    if word in PLAIN:
        return PLAIN[word]()
    if kind == "early-exit" and rest.isdecimal():
        return EarlyExit(int(rest))
    if kind == "model" and rest:
        other: Any = load(named_model(rest))[0]
        return ModelDraft(other.to(model.dtype))
    if not Path(word).is_file():
        names = ", ".join(PLAIN)
        raise ValueError(f"--draft {word}: there is no such file; sources are {names}, early-exit:N, model:MODEL, FILE")
    maps = DraftMaps.load(word)
    maps.for_model(model, maps.kind)  # refused here, before the prompt is read
    return trained(maps)


def said(draft: TreeDecoding) -> str:
    """What the sources did, for people."""
    parts = [f"{name} {share:.0%} of {tried:.0f}" for name, (tried, share) in draft.report().items()]
    return f"{draft.tokens_per_step:.2f} tokens a step; guesses that were right: {', '.join(parts)}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The option of commands that generate."""
    parser.add_argument(
        "--draft",
        nargs="+",
        metavar="SOURCE",
        help="several tokens a step, the same text: lookup, ngram, recycling, early-exit:LAYERS, model:MODEL, or a "
        "FILE of `scrimp train-draft`",
    )
