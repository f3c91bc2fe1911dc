"""Where a decoding step of a large 4-bit model that skips channels spends its time, beside what its bytes take.

    python -m scrimp.benchmarks.int4_sparse_step --layers 6 --threads 1 2

A random Llama with layers as wide as those of an 8B model (small layers lie in caches) and few tokens, since the head
is left out here. The limit: the codes of the listed channels and all scales, at the stream rate of the same run.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from scrimp.methods.generation import KVCache, decoder_model
from scrimp.methods.generation import generate as decode
from scrimp.methods.generation.split import Split
from scrimp.methods.generation.split import measure as split
from scrimp.methods.int4 import Int4Linear
from scrimp.methods.wina import Int4SparseLinear, Selection, Usage, metered
from scrimp.methods.wina.groups import SHARED
from scrimp.testing import random_int4_weight

from . import measure

WIDE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
LINEARS = ("channel_select", "int4_sparse_linear", "int4_linear")
PROMPT, STEPS = 32, 20
SPARSITY = 0.5
PROBED = 5  # times


def random_model(layers: int, group_size: int, mode: str, **sizes: int) -> nn.Module:
    """A Llama of 4-bit layers whose codes are random; nothing of it was ever dense."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**WIDE, **sizes}, num_hidden_layers=layers, vocab_size=256, eos_token_id=None)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        for name in (name for names in SHARED for name in names):
            place, _, child = name.partition(".")
            dense = layer.get_submodule(name)
            weight = random_int4_weight(dense.out_features, dense.in_features, group_size)
            setattr(layer.get_submodule(place), child, Int4Linear(weight, mode=mode))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                made = torch.ones(parameter.shape) if parameter.dim() == 1 else torch.randn(parameter.shape)
                module._parameters[name] = nn.Parameter(made, requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.requires_grad_(False)


@torch.no_grad()
def make_sparse(model: Any, sparsity: float) -> None:
    """Replaces the layers; each level drops that share of the channels of a random text's tokens."""
    levels: dict[str, torch.Tensor] = {}

    def look(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            scores = args[0][0, 1:].abs()
            levels[name] = (scores / scores.mean(-1, keepdim=True)).flatten().quantile(sparsity).view(1)

        return hook

    named = {
        f"{index}.{names[0]}": (layer, names) for index, layer in enumerate(model.model.layers) for names in SHARED
    }
    handles = [
        layer.get_submodule(names[0]).register_forward_pre_hook(look(name)) for name, (layer, names) in named.items()
    ]
    model(torch.randint(0, 256, (1, PROMPT)), use_cache=False)
    for handle in handles:
        handle.remove()
    for group, (layer, names) in named.items():
        selection = Selection(levels[group])
        for name in names:
            place, _, child = name.partition(".")
            plain = layer.get_submodule(name)
            setattr(layer.get_submodule(place), child, Int4SparseLinear(plain.weight, None, selection, plain.mode))


def step_of(model: nn.Module, prompt: Sequence[int]) -> Split:
    """The split of a step after a prompt."""
    view = decoder_model(model)
    cache = KVCache(view, 1, len(prompt) + 2 * STEPS + 2)
    decode(view, [list(prompt)], max_new_tokens=1, cache=cache, ignore_eos=True)
    return split(cache, 1, STEPS)


def sparse_bytes(usage: Usage) -> float:
    """Bytes of all linears that a step reads."""
    total = 0.0
    for layer in usage.layers():
        module: Any = usage.meters[layer.name][0]
        rest = sum(t.nbytes for t in (module.scales, module.zeros) if t is not None)
        total += layer.read * module.in_features * module.channel_bytes + rest
    return total


def stream_rate() -> float:
    """Bytes a second, the best of torch.sum and a copy."""
    found = [probe for probe in measure.probes(torch.float32, *measure.PROBE_SIZES["cpu"]) if not probe.is_gemm]
    return max(probe.amount / min(measure.seconds(probe.call) for _ in range(PROBED)) for probe in found)


def line(name: str, found: Split, read: float, rate: float) -> str:
    """A row of the table."""
    spent = {op: found.ops.get(op, 0.0) for op in LINEARS}
    selecting, limit = spent["channel_select"], 1e3 * read / rate
    linears = sum(spent.values()) - selecting
    shares = f"{limit / linears:7.1%} {limit / (linears + selecting):12.1%}"
    return f"{name:<7} {found.step:8.2f} {1e3 / found.step:9.1f} {linears:9.2f} {selecting:10.2f} {limit:8.2f} {shares}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, metavar="N", help="default: %(default)s")
    parser.add_argument("--group-size", type=int, default=128, metavar="G", help="default: %(default)s")
    parser.add_argument("--mode", default="int8", choices=("int8", "exact"), help="default: %(default)s")
    parser.add_argument("--sparsity", type=float, default=SPARSITY, metavar="S", help="default: %(default)s")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="T", help="default: 1 2")
    parser.add_argument("--width", type=int, metavar="D", help="a narrow model, to try the command")
    asked = parser.parse_args(arguments)
    width = asked.width or WIDE["hidden_size"]
    narrow = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = random_model(asked.layers, asked.group_size, asked.mode, **(narrow if asked.width else {}))
    prompt = torch.randint(0, 256, (PROMPT,)).tolist()
    whole = float(sum(m.weight.bytes() for m in model.modules() if isinstance(m, Int4Linear)))
    rows = []
    for threads in asked.threads:
        with measure.threads(threads):
            rows.append((threads, "dense", step_of(model, prompt), whole, stream_rate()))
    make_sparse(model, asked.sparsity)
    with metered(model) as usage:
        step_of(model, prompt)
    read = sparse_bytes(usage)
    for threads in asked.threads:
        with measure.threads(threads):
            rows.append((threads, "sparse", step_of(model, prompt), read, stream_rate()))
    print(f"{asked.layers} layers, {asked.mode}, {usage.dropped:.1%} of the channels dropped; milliseconds of a step")
    print("layers      step  tokens/s   linears  selection    limit  reached  with selection")
    for threads, name, found, bytes_read, rate in sorted(rows, key=lambda row: row[0]):
        print(f"{line(name, found, bytes_read, rate)}  {threads} thread{'s' * (threads > 1)}, {rate / 1e9:.1f} GB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
