"""What several commands share: threads, dtype, prompts, attention budgets."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options about the model and the machine."""
    parser.add_argument("--sparse", metavar="BUDGET", help="read long prompts sparsely, e.g. careful, balanced, fast")
    parser.add_argument("--patterns", type=Path, metavar="FILE", help="of `scrimp calibrate`, for --sparse")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "auto"), help="of the weights")
    parser.add_argument("--threads", type=int, metavar="N", help="default: torch's choice")


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """torch computes with `count` threads inside the block; None keeps its own choice."""
    import torch

    if count is not None and count < 1:
        raise ValueError(f"--threads {count} must be at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prompt_tokens(tokenizer: Any, text: str, raw: bool) -> list[int]:
    """A prompt as the model was taught to read one, unless `raw`."""
    if not raw and tokenizer.chat_template is not None:
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return list(tokenizer(text, verbose=False)["input_ids"])


def budget(model: Any, name: str | None, file: Path | None) -> Any:
    """The head patterns that a user named, or None.

    Raises:
        ValueError: there is no such budget, or no patterns for these weights.
    """
    from ..methods.head_patterns import load, shipped_patterns

    if name is None:
        if file is not None:
            raise ValueError("--patterns needs --sparse BUDGET, one of the file's budgets")
        return None
    budgets = shipped_patterns(model) if file is None else load(file, model)
    if budgets is None:
        raise ValueError("no head patterns come with scrimp for this model's weights; `scrimp calibrate` finds some")
    if name not in budgets:
        raise ValueError(f"there is no budget {name!r}; there are {', '.join(budgets)}")
    return budgets[name]
