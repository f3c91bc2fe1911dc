"""A model taken apart for quantization: its decoder layers, run one at a time on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .statistics import InputStatistics


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder layers by name: the longest list of modules of one class that hold linear layers.

    Raises: ValueError for a model without such a list.
    """
    best: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > len(best) and len({type(m) for m in module}) == 1:
            found = {f"{name}.{i}": block for i, block in enumerate(module)}
            if all(any(isinstance(m, nn.Linear) for m in block.modules()) for block in module):
                best = found
    if not best:
        raise ValueError(f"quantize: {type(model).__name__} has no list of decoder layers with linear layers")
    return best


def linears_of(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside a module, by name."""
    return {name: found for name, found in module.named_modules() if isinstance(found, nn.Linear)}


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Puts `new` where `root` has its submodule `name`."""
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, new)


@contextmanager
def _hooked(hooks: Iterator[Any]) -> Iterator[None]:
    handles = list(hooks)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Sample:
    """One calibration text on its way through the model: its hidden states, and each layer's other arguments."""

    hidden: Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]


def enter(model: nn.Module, blocks: Sequence[nn.Module], tokens: Tensor) -> Sample:
    """Runs the model on tokens `[1, n]` and keeps what its first layer gets, and the other arguments of all layers."""
    hidden: list[Tensor] = []
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        first = args[0] if args else rest.pop("hidden_states")
        if not hidden:
            hidden.append(first)
        arguments.append((args[1:], rest))

    with _hooked(block.register_forward_pre_hook(look, with_kwargs=True) for block in blocks):
        getattr(model, "base_model", model)(tokens, use_cache=False)
    if len(arguments) != len(blocks):
        raise ValueError(f"quantize: {len(blocks)} decoder layers were called {len(arguments)} times")
    return Sample(hidden[0], arguments)


def step(block: nn.Module, index: int, sample: Sample) -> Tensor:
    """The hidden states after layer `index`."""
    args, kwargs = sample.arguments[index]
    out = block(sample.hidden, *args, **kwargs)
    return out if isinstance(out, Tensor) else out[0]


def observe(block: nn.Module, index: int, samples: Sequence[Sample]) -> dict[str, InputStatistics]:
    """Statistics of the inputs of every linear layer in a block; layers that share an input share an object."""
    linears = linears_of(block)
    seen: dict[str, InputStatistics] = {}
    current: list[tuple[Tensor, str]] = []  # inputs of this call and the layer that counts them
    counted_by: dict[str, str] = {}

    def look(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if name not in counted_by:
                same = [owner for tensor, owner in current if tensor is x]
                counted_by[name] = same[0] if same else name
                seen[name] = seen[same[0]] if same else InputStatistics.empty(x.shape[-1], x.device)
                current.append((x, name))
            if counted_by[name] == name:
                seen[name].add(x)

        return hook

    with _hooked(module.register_forward_pre_hook(look(name)) for name, module in linears.items()):
        for sample in samples:
            current.clear()
            step(block, index, sample)
    return seen


def divide_norm(norm: nn.Module, s: Tensor) -> bool:
    """Makes a norm's outputs s times smaller through its gain, `w` or `1 + w`; False (unchanged) if it has none."""
    gain = getattr(norm, "weight", None)
    if not isinstance(gain, Tensor) or gain.shape != s.shape:
        return False
    old, x = gain.detach().clone(), torch.randn(4, s.shape[0], dtype=gain.dtype, device=gain.device)
    expected = norm(x) / s
    for candidate in (old / s, (1 + old) / s - 1):
        gain.data.copy_(candidate)
        bias = getattr(norm, "bias", None)
        if bias is None and torch.allclose(norm(x), expected.to(gain.dtype), rtol=1e-2, atol=1e-5):
            return True
    gain.data.copy_(old)
    return False


def divide_linear(linear: nn.Linear, s: Tensor) -> None:
    """Makes a linear layer's outputs s times smaller."""
    linear.weight.data.div_(s[:, None])
    if linear.bias is not None:
        linear.bias.data.div_(s)


def shared_inputs(block: nn.Module) -> list[tuple[str, list[str]]]:
    """(producer, consumers): whose outputs can be divided so that the consumers' weights can be multiplied.

    For Llama-like layers; what is not there is left out, an empty list means that the layer is of another make.
    """
    names = {name for name, _ in block.named_modules()}
    norms = [n for n in ("pre_feedforward_layernorm", "post_attention_layernorm") if n in names]
    wanted = [
        ("input_layernorm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("self_attn.v_proj", ["self_attn.o_proj"]),
        (norms[0] if norms else "", ["mlp.gate_proj", "mlp.up_proj"]),
        ("mlp.up_proj", ["mlp.down_proj"]),
    ]
    return [(producer, consumers) for producer, consumers in wanted if {producer, *consumers} <= names]
