"""Real English text for the demo: the reference topics that every Python carries (`pydoc_data.topics`).

A topic is a document. A paragraph that several topics share is kept in the longest one only, and the documents are
split into held-out and calibration by the hash of their name: nothing measured was seen when anything was tuned.
"""

import hashlib
from functools import cache
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["heldout", "calibration"]

SHORTEST_DOCUMENT = 200
SHORTEST_SHARED_PARAGRAPH = 40
QUESTION = "In one or two sentences: what is the text above about?"


@cache
def documents() -> dict[str, str]:
    """Every document by name, in an arbitrary but fixed order; no paragraph occurs in two of them."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept: dict[str, str] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = []
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if words in seen:
                continue
            if len(words) >= SHORTEST_SHARED_PARAGRAPH:
                seen.add(words)
            paragraphs.append(paragraph)
        text = "\n\n".join(paragraphs)
        if len(text) >= SHORTEST_DOCUMENT:
            kept[name] = text
    return {name: kept[name] for name in sorted(kept, key=_digest)}


def split_of(name: str) -> Split:
    """Which side a document is on, by its name alone: the same on every machine and for every Python version."""
    return "heldout" if _digest(name)[0] % 2 else "calibration"


def corpus(split: Split) -> str:
    """The documents of one split, one after the other.

    Raises:
        ValueError: unknown split.
    """
    if split not in ("heldout", "calibration"):
        raise ValueError(f"corpus: split={split!r} is not 'heldout' or 'calibration'")
    return "\n\n".join(text for name, text in documents().items() if split_of(name) == split)


def windows(
    tokenizer: "PreTrainedTokenizerBase",
    length: int = 8192,
    split: Split = "heldout",
    limit: int | None = None,
) -> torch.Tensor:
    """Token windows of one split that do not overlap: [windows, length] int64. The last, incomplete one is dropped.

    Raises:
        ValueError: length or limit below 1, unknown split, or not a single window fits.
    """
    if length < 1 or (limit is not None and limit < 1):
        raise ValueError(f"windows: length={length} and limit={limit} must be at least 1")
    ids = _ids(tokenizer, corpus(split))
    count = len(ids) // length
    if count == 0:
        raise ValueError(f"windows: length={length} exceeds the {len(ids)} tokens of split {split!r}")
    count = count if limit is None else min(count, limit)
    return torch.tensor(ids[: count * length]).view(count, length)


def prompt(
    tokenizer: "PreTrainedTokenizerBase",
    length: int = 8000,
    text: str | None = None,
    question: str = QUESTION,
) -> torch.Tensor:
    """A chat prompt of at most `length` tokens, [1, length] int64: a long text, cut to fit, and a question about it.

    Args:
        text: what to read; default the held-out documents, so that the prompt is exactly `length` long.

    Raises:
        ValueError: length leaves no room for the text.
    """
    before, after = _around(tokenizer, question)
    room = length - len(before) - len(after)
    if room < 1:
        raise ValueError(f"prompt: length={length} leaves no room beside the {length - room} tokens of the question")
    read = _ids(tokenizer, corpus("heldout") if text is None else text)[:room]
    return torch.tensor([before + read + after])


def _around(tokenizer: "PreTrainedTokenizerBase", question: str) -> tuple[list[int], list[int]]:
    """The tokens of the chat template before and after the text."""
    mark = "<<text>>"
    if tokenizer.chat_template is None:
        before, after = "", f"\n\n{question}\n"
    else:
        message = {"role": "user", "content": f"Read this text.\n\n{mark}\n\n{question}"}
        rendered = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        before, _, after = str(rendered).partition(mark)
    return _ids(tokenizer, before), _ids(tokenizer, after)


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
