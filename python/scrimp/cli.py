"""The command line: `scrimp generate`, `eval`, `demo`, ... A user's mistake is one line, never a traceback."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .commands import evaluate, generate, quantize, train_draft
from .demo import options as demo_options


class UserError(Exception):
    """Something the user can mend; the text says how."""


def _doctor(args: argparse.Namespace) -> int:
    from . import doctor

    return doctor.main()


def _demo(args: argparse.Namespace) -> int:
    from .demo import run

    return run.main(args)


def _calibrate(args: argparse.Namespace) -> int:
    from .demo import calibrate

    return calibrate.main(args)


def _bench(args: argparse.Namespace) -> int:
    try:
        from .benchmarks import predict, run
    except ImportError as error:
        raise UserError(f"the benchmark harness could not be loaded: {error}") from error
    return predict.main(args) if args.predict or args.against else run.main(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scrimp", description="LLM inference by not doing work that does not matter.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    command("doctor", _doctor, "say what runs on this machine, what does not, and why")
    demo = command("demo", _demo, "a real model reads a long prompt, with dense and with sparse attention")
    demo_options.add_arguments(demo)
    generate.add_arguments(command("generate", generate.main, "stream a model's answer"))
    evaluate.add_arguments(command("eval", evaluate.main, "perplexity of a model, and how far it is from another one"))
    calibrate = command("calibrate", _calibrate, "find the attention patterns of a model's heads, once")
    calibrate.add_argument("model", metavar="MODEL", help="a transformers model folder, or 'demo'")
    calibrate.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="texts like those to read (UTF-8)")
    calibrate.add_argument("--length", type=int, default=8192, metavar="N", help="tokens of a text (default 8192)")
    calibrate.add_argument("--texts", type=int, default=3, metavar="N", help="texts to use (default 3)")
    calibrate.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    quantize.add_arguments(command("quantize", quantize.main, "make a model's linear layers 4-bit, into a folder"))
    train = command("train-draft", train_draft.main, "train a draft for tree decoding: Hidden Transfer or Medusa heads")
    train_draft.add_arguments(train)
    bench = command("bench", _bench, "measure an op against its peers, paired")
    bench.add_argument("op", nargs="?", metavar="OP", help="the op to measure")
    bench.add_argument("--all", action="store_true", help="measure every op")
    bench.add_argument("--list", action="store_true", help="list the ops, their cases and their peers")
    bench.add_argument("--case", metavar="TEXT", help="only cases whose name contains TEXT")
    bench.add_argument(
        "--threads",
        type=int,
        nargs="+",
        metavar="N",
        help="thread counts to measure (default 1 and all)",
    )
    bench.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to measure (default cpu)")
    bench.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    bench.add_argument("--csv", metavar="FILE", help="replace these rows in FILE ('device': the checked-in results)")
    bench.add_argument("--budget", type=float, metavar="SECONDS", help="time per case and thread count (default 3)")
    bench.add_argument(
        "--predict",
        choices=["h100", "a100", "rtx4090", "mi300x"],
        help="measure nothing: print the least time that this GPU's data sheet allows our kernels",
    )
    bench.add_argument("--against", metavar="NAME", help="with --predict: beside another kernel ('minference')")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, or 2 for a mistake of the user."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("scrimp: interrupted", file=sys.stderr)
        return 130
    except (UserError, ValueError, OSError, RuntimeError) as error:
        print(f"scrimp {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
