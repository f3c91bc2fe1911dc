"""`scrimp generate MODEL --prompt TEXT`: streams a model's answer."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from ..demo.model import named_model
from ..loading import load
from ..methods.generation import KVCache, Settings, decoder_model, stream
from ..methods.generation.split import STEPS, measure
from ..methods.heads import compress_head
from . import common, drafts


def main(arguments: argparse.Namespace) -> int:
    """Runs the command; exit status 0.

    Raises:
        ValueError: settings, prompt or model that do not fit.
        OSError: a model or file that cannot be read.
    """
    text = _prompt(arguments)
    with common.threads(arguments.threads):
        model, tokenizer = load(named_model(arguments.model), arguments.dtype)
        if arguments.head is not None:
            compress_head(model, arguments.head)
        view = decoder_model(model)
        tokens = common.prompt_tokens(tokenizer, text, arguments.raw)
        settings = _settings(arguments, model)
        draft = drafts.named(arguments.draft, view) if arguments.draft else None
        room = settings.max_new_tokens + (2 * STEPS if arguments.split else 0)
        cache = KVCache(view, 1, max(1, min(view.context, len(tokens) + room)))
        start = time.perf_counter()
        first, count, reason = start, 0, None
        for piece in stream(view, [tokens], tokenizer, cache=cache, draft=draft, **vars(settings)):
            if not count:
                first = time.perf_counter()
            count, reason = count + 1, piece.reason
            print(piece.text, end="", flush=True)
        end = time.perf_counter()
        print(flush=True)
        rate = f"{(count - 1) / (end - first):.1f} tokens/s" if count > 1 else "one token"
        said = f"prompt {len(tokens)} tokens in {first - start:.2f} s; {count} new tokens, {rate}; ended by {reason}"
        print(said, file=sys.stderr)
        if draft is not None:
            print(drafts.said(draft), file=sys.stderr)
        if arguments.split:
            print("\n".join(measure(cache, tokens[-1]).lines()), file=sys.stderr)
    return 0


def _prompt(arguments: argparse.Namespace) -> str:
    if (arguments.prompt is None) == (arguments.file is None):
        raise ValueError("give the prompt by --prompt TEXT or by --file FILE ('-' reads standard input)")
    if arguments.prompt is not None:
        return str(arguments.prompt)
    return sys.stdin.read() if str(arguments.file) == "-" else Path(arguments.file).read_text("utf-8")


def _settings(arguments: argparse.Namespace, model: Any) -> Settings:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "prefill")
    return Settings(
        **{name: getattr(arguments, name) for name in names},
        stop=arguments.stop or (),
        patterns=common.budget(model, arguments.sparse, arguments.patterns),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scrimp generate`."""
    parser.add_argument("model", metavar="MODEL", help="a model folder, a .gguf file, a Hub name, or 'demo'")
    parser.add_argument("--prompt", metavar="TEXT", help="what to continue or answer")
    parser.add_argument("--file", type=Path, metavar="FILE", help="the prompt's file ('-': standard input)")
    parser.add_argument("--raw", action="store_true", help="continue the text, without the model's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K best tokens")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep the best tokens of probability P")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P", help="keep tokens of P times the best one's")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default 0)")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    parser.add_argument("--prefill", default="panels", choices=("panels", "rows"), help="how to read the prompt")
    parser.add_argument(
        "--head", choices=("exact",), help="find the best tokens by a screen of the head: the same text"
    )
    drafts.add_arguments(parser)
    parser.add_argument("--split", action="store_true", help="then say where a decoding step's time goes")
    common.add_arguments(parser)
