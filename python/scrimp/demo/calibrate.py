"""`scrimp calibrate`: finds the head patterns of a model and writes them to a file."""

import argparse

from ..loading import load
from ..methods import head_patterns
from ..methods.head_search import search_heads
from . import text as corpus
from .model import named_model


def main(arguments: argparse.Namespace) -> int:
    """Runs the search that the parsed arguments describe; exit status 0.

    Raises:
        ValueError: texts too short for the asked length, or a folder to write to that does not exist.
        OSError: a model or text that cannot be read.
    """
    if not arguments.out.resolve().parent.is_dir():
        raise ValueError(f"the folder of {arguments.out} does not exist")
    model, tokenizer = load(named_model(arguments.model))
    if arguments.text:
        tokens = tokenizer(
            "\n\n".join(file.read_text("utf-8") for file in arguments.text), return_tensors="pt"
        ).input_ids
        if tokens.shape[1] < arguments.length:
            raise ValueError(f"the texts have {tokens.shape[1]} tokens, fewer than --length {arguments.length}")
        texts = list(tokens[:, : tokens.shape[1] // arguments.length * arguments.length].split(arguments.length, 1))
    else:
        texts = list(corpus.windows(tokenizer, arguments.length, "calibration").split(1))
    found = search_heads(model, texts[: arguments.texts])
    head_patterns.save(arguments.out, found, model=arguments.model)
    for name, patterns in found.items():
        densities = [patterns.expected_density(layer, arguments.length) for layer in range(patterns.layers)]
        print(f"{name:<10} density {sum(densities) / len(densities):.3f} at {arguments.length} tokens")
    print(f"written: {arguments.out} (weights {next(iter(found.values())).weight_hash})")
    return 0
