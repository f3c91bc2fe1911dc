"""`scrimp quantize`: makes a model's linear layers 4-bit and writes the model to a folder."""

import argparse
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..demo import text as corpus
from ..demo.model import named_model
from ..int4_weight import save_gptq
from ..loading import load
from ..methods.int4 import int4_layers, quantize
from ..methods.int4.blocks import linears_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scrimp quantize`."""
    parser.add_argument("model", metavar="MODEL", help="a transformers model folder, or 'demo'")
    parser.add_argument("--method", default="gptq", choices=["rtn", "hqq", "gptq", "awq"], help="default gptq")
    parser.add_argument(
        "--group-size", type=int, default=64, metavar="N", help="16, 32, 64 (default), 128 or -1: a row"
    )
    parser.add_argument("--symmetric", action="store_true", help="no zeros (not for hqq)")
    parser.add_argument("--order", default="groups", choices=["columns", "groups", "activations"], help="of gptq")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="texts to calibrate on (UTF-8)")
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens of a text (default 512)")
    parser.add_argument("--texts", type=int, default=32, metavar="N", help="texts to use, 0 for none (default 32)")
    parser.add_argument("--format", default="scrimp", choices=["scrimp", "gptq"], help="gptq: GPTQ 2, as vLLM reads")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report as JSON")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write, new or empty")


def main(arguments: argparse.Namespace) -> int:
    """Quantizes as the parsed arguments describe; exit status 0.

    Raises:
        ValueError: options or a model that do not fit, texts too short, or a folder that holds something.
        OSError: a model or text that cannot be read, or a folder that cannot be written.
    """
    out: Path = arguments.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there and not an empty folder")
    if arguments.length < 1 or arguments.texts < 0:
        raise ValueError(f"--length {arguments.length} and --texts {arguments.texts} must be at least 1 and 0")
    model, tokenizer = load(named_model(arguments.model))
    if arguments.format == "gptq":
        _check_gptq(model, arguments.method)
    tokens = _calibration(tokenizer, arguments)
    report = quantize(
        model,
        arguments.method,
        arguments.group_size,
        tokens,
        symmetric=arguments.symmetric,
        order=arguments.order,
    )
    print(report)
    out.mkdir(parents=True, exist_ok=True)
    if arguments.format == "gptq":
        _save_gptq(model, out)
    else:
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    if arguments.report:
        arguments.report.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    print(f"written: {out}")
    return 0


def _check_gptq(model: nn.Module, method: str) -> None:
    """Says before the work what the GPTQ format could not hold after it."""
    if method == "hqq":
        raise ValueError("--format gptq holds integer zeros; --method hqq makes floating ones")
    for name, linear in linears_of(model).items():
        if (linear.in_features % 8 or linear.out_features % 8) and name != "lm_head":
            raise ValueError(f"--format gptq packs multiples of 8; {name} is {linear.weight.shape}")


def _calibration(tokenizer: Any, arguments: argparse.Namespace) -> Tensor | None:
    if arguments.texts == 0:
        return None
    if not arguments.text:
        return corpus.windows(tokenizer, arguments.length, "calibration")[: arguments.texts]
    read = "\n\n".join(file.read_text("utf-8") for file in arguments.text)
    tokens = tokenizer(read, return_tensors="pt").input_ids
    count = tokens.shape[1] // arguments.length
    if count == 0:
        raise ValueError(f"the texts have {tokens.shape[1]} tokens, fewer than --length {arguments.length}")
    return tokens[0, : count * arguments.length].view(count, arguments.length)[: arguments.texts]


def _save_gptq(model: Any, out: Path) -> None:
    """GPTQ 2: our writer's tensors and its quantization_config in the model's config.json."""
    layers = dict(int4_layers(model))
    inside = tuple(f"{name}." for name in layers)
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    plain = {k: v for k, v in model.state_dict().items() if not k.startswith(inside) and k not in tied}
    plain |= {f"{name}.bias": layer.bias.detach() for name, layer in layers.items() if layer.bias is not None}
    model.config.quantization_config = save_gptq(out, {name: layer.weight for name, layer in layers.items()}, plain)
    model.config.save_pretrained(out)
    if model.can_generate():
        model.generation_config.save_pretrained(out)
