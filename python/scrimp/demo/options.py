"""What `scrimp demo` can be asked: its options, and their form on the command line."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from .text import QUESTION


@dataclass(frozen=True)
class Options:
    """What to measure. Lengths in tokens; a round times every variant once, in turn."""

    model: Path | None = None
    text: Path | None = None
    question: str = QUESTION
    length: int = 8000
    window: int = 8192
    windows: int = 2
    rounds: int = 3
    answer_tokens: int = 48
    threads: int | None = None
    report: Path | None = Path("report.html")
    json: Path | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scrimp demo`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--report", type=Path, metavar="FILE", default=Options.report, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="1 window, 2 rounds: rougher figures")
    parser.add_argument("--rounds", type=_positive, metavar="N", help="paired timings of each variant (default: 3)")
    parser.add_argument("--windows", type=_positive, metavar="N", help="held-out windows of 8,192 tokens (default: 2)")
    parser.add_argument("--threads", type=_positive, metavar="N", help="default: torch's choice")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a transformers model of your own")
    parser.add_argument("--text", type=Path, metavar="FILE", help="a long text of your own to read")
    parser.add_argument("--question", default=QUESTION, help="what to ask (default: %(default)s)")


def from_arguments(arguments: argparse.Namespace) -> Options:
    """The options that parsed arguments stand for.

    Raises:
        ValueError: a file to write lies in a folder that does not exist.
    """
    for file in (arguments.json, arguments.report):
        if file is not None and not file.resolve().parent.is_dir():
            raise ValueError(f"the folder of {file} does not exist")
    rough = arguments.quick
    return Options(
        model=arguments.model,
        text=arguments.text,
        question=arguments.question,
        rounds=arguments.rounds or (2 if rough else Options.rounds),
        windows=arguments.windows or (1 if rough else Options.windows),
        threads=arguments.threads,
        report=arguments.report,
        json=arguments.json,
    )


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is not at least 1")
    return number
