"""`scrimp train-draft MODEL`: trains maps for Hidden Transfer or Medusa heads, and says how often they are right."""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..demo import text as corpus
from ..demo.model import named_model
from ..loading import load
from ..methods.draft_training import Accuracy, Counter, FrozenModel, Tuner, Tuning, stages
from ..methods.draft_training.accuracy import TOPS
from . import common

Figures = dict[str, list[Accuracy]]


def main(arguments: argparse.Namespace) -> int:
    """Trains as the parsed arguments describe; exit status 0.

    Raises:
        ValueError: options, texts, model or an unfinished training that do not fit each other.
        OSError: a model or text that cannot be read, or a file that cannot be written.
    """
    for file in (arguments.out, arguments.json):
        if file is not None and not file.resolve().parent.is_dir():
            raise ValueError(f"the folder of {file} does not exist")
    if arguments.ahead < 1 or arguments.texts < 1 or arguments.judged < 1 or arguments.vocabulary < 0:
        raise ValueError("--ahead, --texts and --judged must be at least 1, --vocabulary at least 0")
    if arguments.prompts and (arguments.text or arguments.heldout or arguments.generated):
        raise ValueError("--prompts goes without --text, --heldout and --generated")
    tuning = Tuning(arguments.steps, arguments.minutes, arguments.rows, arguments.rate)
    with common.threads(arguments.threads):
        model, tokenizer = load(named_model(arguments.model))
        frozen = FrozenModel(model)
        layer, sweep = _layers(arguments, frozen.depth)
        texts, held = _answers(arguments, model, tokenizer) if arguments.prompts else _texts(arguments, tokenizer)
        if arguments.generated:
            with _bar(len(texts), "generating", "text") as bar:
                texts = stages.generated(model, texts, bar.update)
        figures = _train(arguments, frozen, tuning, layer, sweep, texts, held)
    if arguments.json is not None:
        found = {name: [asdict(each) for each in accuracy] for name, accuracy in figures.items()}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _train(
    arguments: argparse.Namespace,
    model: FrozenModel,
    tuning: Tuning,
    layer: int,
    sweep: Sequence[int],
    texts: Sequence[Tensor],
    held: Sequence[stages.Held],
) -> Figures:
    k, out = arguments.ahead, arguments.out
    unfinished = out.with_name(f"{out.name}.training")
    name = stages.identity(model, texts, layer, k, tuning.rows, tuning.rate)
    figures: Figures = {}
    start = (torch.zeros(k, model.width, model.width), torch.zeros(k, model.width))
    resumed = unfinished.exists()
    if not resumed:
        with _bar(len(texts), "reading", "text") as bar:
            moments = stages.gather(model, texts, [*sweep, layer], k, bar.update)
        start = moments.solve(layer, layer)
        if sweep:
            figures |= _judged(model, held, stages.contenders(model, moments, sweep), k)
    tuner = Tuner(model, layer, start, tuning, name)
    if resumed:
        tuner.resume(unfinished)
        print(f"going on from {unfinished}: {tuner.step} steps, {tuner.seconds / 60:.1f} minutes")
    else:
        figures |= _judged(model, held, {"ridge regression": Counter(model, layer, start, layer < model.depth)}, k)
    with _bar(tuning.steps, "tuning", "step", tuner.step) as bar:

        def tick(tuner: Tuner) -> None:
            bar.set_postfix_str(f"KL {tuner.loss:.3f}, {tuner.seconds / 60:.1f} min", refresh=False)
            bar.update()

        tuner.run(texts, unfinished, tick)
    tokens = stages.frequent(texts, model.view.vocabulary, arguments.vocabulary)
    maps = stages.finished(model, layer, tuner.maps, arguments.model, tokens)
    maps.save(out)
    unfinished.unlink(missing_ok=True)
    if tuner.step:
        tuned = Counter(model, layer, (maps.weight, maps.bias), layer < model.depth)
        figures |= _judged(model, held, {f"{tuner.step} steps": tuned}, k)
    if tokens is not None:
        share = float(torch.isin(torch.cat([text.tokens[text.first :] for text in held]), tokens).double().mean())
        print(f"guesses are among {len(tokens)} of {model.view.vocabulary} tokens, {share:.1%} of the held-out ones")
    print(f"written: {out} ({maps.kind}, layer {layer} of {model.depth}, weights {maps.weight_hash})")
    return figures


def _layers(arguments: argparse.Namespace, depth: int) -> tuple[int, list[int]]:
    """The layer to train, and those of the sweep."""
    layer = 2 * depth // 3 if arguments.layer is None else arguments.layer
    if arguments.kind == "medusa":
        if arguments.layer not in (None, depth):
            raise ValueError(f"--layer {layer}: Medusa heads read the last state, after layer {depth}")
        layer = depth
    elif not 0 <= layer < depth:
        raise ValueError(f"--layer {layer} is not from 0 to {depth - 1}")
    sweep = sorted(set(arguments.sweep or ()))
    if any(not 0 <= each <= depth for each in sweep):
        raise ValueError(f"--sweep {sweep} must be layers from 0 to {depth}")
    return layer, sweep


def _texts(arguments: argparse.Namespace, tokenizer: Any) -> tuple[list[Tensor], list[stages.Held]]:
    """Windows to train on, and held-out ones."""
    if not arguments.text:
        if arguments.heldout:
            raise ValueError("--heldout goes with --text")
        trained, held = (corpus.windows(tokenizer, arguments.length, split) for split in ("calibration", "heldout"))
    else:
        trained = _windows(tokenizer, arguments.text, arguments.length)
        if arguments.heldout:
            held = _windows(tokenizer, arguments.heldout, arguments.length)
        elif len(trained) < 2:
            raise ValueError(f"the texts make one window of {arguments.length} tokens, which leaves none to judge by")
        else:
            trained, held = trained.split([len(trained) - (len(trained) + 9) // 10, (len(trained) + 9) // 10])
    return list(trained[: arguments.texts]), [stages.Held(text) for text in held[: arguments.judged]]


def _answers(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> tuple[list[Tensor], list[stages.Held]]:
    """The model's answers to the prompts; every tenth is held out, and judged after its prompt."""
    lines = [line for file in arguments.prompts for line in file.read_text("utf-8").splitlines() if line.strip()]
    prompts = [common.prompt_tokens(tokenizer, line, raw=False) for line in lines[: arguments.texts]]
    with _bar(len(prompts), "answering", "prompt") as bar:
        found = stages.answered(model, prompts, arguments.length, bar.update)
    pairs = [
        stages.Held(text, len(prompt) - 1)
        for prompt, text in zip(prompts, found, strict=True)
        if len(text) > arguments.ahead + 1
    ]
    if len(pairs) < 2:
        raise ValueError(f"{len(pairs)} of {len(lines)} answers are long enough, which leaves none to judge by")
    return [text.tokens for i, text in enumerate(pairs) if i % 10], pairs[::10][: arguments.judged]


def _windows(tokenizer: Any, files: Sequence[Path], length: int) -> Tensor:
    read = "\n\n".join(file.read_text("utf-8") for file in files)
    ids = list(tokenizer(read, add_special_tokens=False, verbose=False)["input_ids"])
    if not 0 < length <= len(ids):
        raise ValueError(f"the texts have {len(ids)} tokens, not one window of --length {length}")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def _judged(model: FrozenModel, held: Sequence[stages.Held], counters: dict[str, Counter], k: int) -> Figures:
    """Judges and prints a table."""
    with _bar(len(held), "judging", "text") as bar:
        figures = stages.judge(held, model, counters, k, bar.update)
    offsets = "".join(f"  {f'+{offset}':<{7 * (len(TOPS) + 1) - 1}}" for offset in range(2, k + 2))
    print(f"{'held-out':<24} {offsets.rstrip()}")
    print(f"{'':<24} " + "  ".join(" ".join(f"{f'top-{top}':>6}" for top in TOPS) + "   same" for _ in range(k)))
    for name, accuracy in figures.items():
        shares = "  ".join(" ".join(f"{share:6.1%}" for share in (*each.top, each.same)) for each in accuracy)
        print(f"{name:<24} {shares}", flush=True)
    return figures


@contextmanager
def _bar(total: int, title: str, unit: str, done: int = 0) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(total=total, desc=title, unit=unit, initial=done, disable=None) as bar:
        yield bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scrimp train-draft`."""
    parser.add_argument("model", metavar="MODEL", help="a model folder, a Hub name, or 'demo'")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    parser.add_argument("--kind", default="hidden", choices=["hidden", "medusa"], help="default %(default)s")
    parser.add_argument("--layer", type=int, metavar="N", help="layers before the maps (hidden; default: two thirds)")
    parser.add_argument("--ahead", type=int, default=3, metavar="K", help="tokens guessed ahead (default 3)")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="texts (UTF-8); default: Python's topics")
    parser.add_argument("--heldout", type=Path, nargs="+", metavar="FILE", help="to judge by; default: a tenth of them")
    parser.add_argument("--generated", action="store_true", help="train on what the model writes after their starts")
    parser.add_argument(
        "--prompts", type=Path, nargs="+", metavar="FILE", help="train on the model's answers to these, one a line"
    )
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens of a text (default 512)")
    parser.add_argument("--texts", type=int, default=1000, metavar="N", help="texts to train on (default 1000)")
    parser.add_argument("--judged", type=int, default=16, metavar="N", help="held-out texts to judge by (default 16)")
    parser.add_argument(
        "--sweep", type=int, nargs="+", metavar="N", help="first compare the regressions of these layers"
    )
    parser.add_argument(
        "--steps", type=int, default=1000, metavar="N", help="texts to tune on; 0 leaves the regression"
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="of tuning at most, in a thread's processor time")
    parser.add_argument(
        "--rows", type=int, default=128, metavar="N", help="rows of a text tuned in a step (default 128)"
    )
    parser.add_argument(
        "--vocabulary", type=int, default=8192, metavar="N", help="guess among the N commonest tokens (8192; 0: all)"
    )
    parser.add_argument("--rate", type=float, default=3e-4, metavar="R", help="learning rate (default 3e-4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    parser.add_argument("--threads", type=int, metavar="N", help="default: torch's choice")
