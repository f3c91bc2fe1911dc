"""scrimp.add_codebooks: CodebookLayers inside a Hugging Face model, at the outputs or inputs of its modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .layer import CodebookLayer

OP = "add_codebooks"
ATTENTION = ("self_attn", "attn", "attention")
MLP = ("mlp", "feed_forward", "ffn")
PROJECTION = ("o_proj", "c_proj", "out_proj", "dense")
PLACES = ("block", "attention", "mlp", "heads")


def add_codebooks(
    model: nn.Module,
    where: str | Sequence[str] = "heads",
    *,
    codes: int = 10_000,
    k: int = 8,
    layers: Iterable[int] | None = None,
    groups: int | None = None,
    tokens: Tensor | None = None,
    iterations: int = 10,
    seed: int = 0,
    **options: Any,
) -> dict[str, CodebookLayer]:
    """Puts a `CodebookLayer` behind modules of a Hugging Face model; returns the layers by the modules' names.

    | where | what is replaced |
    |---|---|
    | "block" | the hidden states that a decoder layer returns |
    | "attention", "mlp" | what these parts of a layer add to the hidden states |
    | "heads" | each head's output, before attention's last projection, by a codebook of its own; as published |
    | names of modules | what these return |

    The layers run wherever the model's modules do, in stock generate and in training; `scrimp.generate`, which does not
    call the modules, refuses such a model. Each is a child named `codebook` of its module, so that `parameters` and
    `state_dict` hold it; loading a state dict needs the same call first. What replaces modules (`scrimp.quantize`,
    `scrimp.sparsify`) has to come before.

    Args:
        model: of transformers.
        where: as in the table.
        codes: C of each codebook.
        k: codes of a row.
        layers: numbers of the decoder layers; all unless given.
        groups: codebooks of each site, side by side; the heads at "heads", else one, unless given.
        tokens: int64 `[B, n]`, typical text: codes are the centroids of what the sites see when the model reads it,
            text by text, by k-means. Without any they are random, of unit length, to be trained.
        iterations: of k-means, at most.
        seed: of the codes.
        **options: `euclidean`, `mean`, `learn`, `commitment` of `CodebookLayer`.

    Raises:
        ValueError: an unknown place or module, a site that has codes already, fewer activations than codes, or what
            `CodebookLayer` refuses.

    >>> import torch, scrimp
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, eos_token_id=None)
    >>> model = LlamaForCausalLM(LlamaConfig(intermediate_size=32, **sizes))
    >>> layers = scrimp.add_codebooks(model, "mlp", codes=20, k=2, layers=[1], tokens=torch.randint(99, (1, 60)))
    >>> layers["model.layers.1.mlp"].disable([3, 4])
    >>> text = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    >>> scrimp.remove_codebooks(model)
    1
    """
    sites = _sites(model, where, layers)
    for name in sites:
        if hasattr(model.get_submodule(name), "codebook"):
            raise ValueError(f"{OP}: {name} has codes already; remove_codebooks(model) takes all away")
    before = where == "heads"
    seen = _activations(model, sites, torch.zeros(1, 1, dtype=torch.int64) if tokens is None else tokens, before)
    if groups is None:
        groups = int(model.config.num_attention_heads) if before else 0  # type: ignore[union-attr, arg-type]
    made: dict[str, CodebookLayer] = {}
    for i, (name, rows) in enumerate(seen.items()):
        if tokens is not None:
            made[name] = CodebookLayer.from_rows(
                rows, codes, k, groups=groups, iterations=iterations, seed=seed + i, **options
            )
        else:
            made[name] = CodebookLayer(_random(rows, codes, groups, seed + i), k, **options)
    for name, layer in made.items():
        module = model.get_submodule(name)
        module.codebook = layer.train(module.training)
        layer.handle = module.register_forward_pre_hook(_inputs) if before else module.register_forward_hook(_outputs)
    return made


def codebooks(model: nn.Module) -> dict[str, CodebookLayer]:
    """The layers that `add_codebooks` put into a model, by the names of their modules."""
    found = ((name, getattr(module, "codebook", None)) for name, module in model.named_modules())
    return {name: layer for name, layer in found if isinstance(layer, CodebookLayer)}


def remove_codebooks(model: nn.Module) -> int:
    """Takes the layers out of a model, which is then as it was; returns how many there were."""
    found = codebooks(model)
    for name, layer in found.items():
        if layer.handle is not None:
            layer.handle.remove()
        del model.get_submodule(name).codebook
    return len(found)


def codebook_loss(model: nn.Module) -> Tensor:
    """The sum of `loss` over a model's layers, to be added to the model's own; 0 where they learn from that alone."""
    total = torch.zeros(())
    for layer in codebooks(model).values():
        if layer.loss is not None:
            total = total.to(layer.loss.device) + layer.loss
    return total


def _outputs(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
    return (module.codebook(out[0]), *out[1:]) if isinstance(out, tuple) else module.codebook(out)  # type: ignore[operator]


def _inputs(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.codebook(args[0]), *args[1:])  # type: ignore[operator]


def _sites(model: nn.Module, where: str | Sequence[str], layers: Iterable[int] | None) -> list[str]:
    """Names of the modules."""
    if not isinstance(where, str):
        if layers is not None:
            raise ValueError(f"{OP}: layers={list(layers)} cannot be chosen among named modules")
        known = dict(model.named_modules())
        for name in where:
            if name not in known:
                raise ValueError(f"{OP}: the model has no module {name!r}")
        return list(where)
    if where not in PLACES:
        raise ValueError(f"{OP}: where={where!r} must be one of {', '.join(PLACES)}, or a list of modules' names")
    blocks = _decoder_layers(model)
    numbers = range(len(blocks)) if layers is None else list(layers)
    sites = []
    for number in numbers:
        if not 0 <= number < len(blocks):
            raise ValueError(f"{OP}: layer {number} is not one of the {len(blocks)} layers")
        name, block = blocks[number]
        path = {"block": (), "attention": (ATTENTION,), "mlp": (MLP,), "heads": (ATTENTION, PROJECTION)}[where]
        for words in path:
            child = next((word for word in words if hasattr(block, word)), None)
            if child is None:
                raise ValueError(f"{OP}: {name} has no module {' or '.join(words)}; name the modules instead")
            name, block = f"{name}.{child}", getattr(block, child)
        sites.append(name)
    return sites


def _decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The longest list of modules that is not inside another, by name."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    best = max(outer, key=lambda name: len(lists[name]), default=None)
    if best is None:
        raise ValueError(f"{OP}: {type(model).__name__} has no list of decoder layers; name the modules")
    return [(f"{best}.{i}", block) for i, block in enumerate(lists[best])]


@torch.no_grad()
def _activations(model: nn.Module, sites: Sequence[str], tokens: Tensor, before: bool) -> dict[str, Tensor]:
    """What each site returns (or takes) for tokens `[B, n]`: `[B n, D]`."""
    if tokens.dim() != 2 or tokens.is_floating_point() or not tokens.numel():
        kind = f"{str(tokens.dtype).removeprefix('torch.')} {list(tokens.shape)}"
        raise ValueError(f"{OP}: tokens must be ids [B, n], at least one, got {kind}")
    seen: dict[str, list[Tensor]] = {name: [] for name in sites}

    def watch(name: str) -> RemovableHandle:
        def look(_: nn.Module, args: tuple[Any, ...], out: Any = None) -> None:
            value = args[0] if before else out[0] if isinstance(out, tuple) else out
            seen[name].append(value.reshape(-1, value.shape[-1]))

        module = model.get_submodule(name)
        return module.register_forward_pre_hook(look) if before else module.register_forward_hook(look)

    handles, training = [watch(name) for name in sites], model.training
    try:
        model.eval()
        for row in tokens.to(next(model.parameters()).device):
            model(input_ids=row[None], use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    for name, parts in seen.items():
        if not parts:
            raise ValueError(f"{OP}: the model does not call {name}")
    return {name: torch.cat(parts) for name, parts in seen.items()}


def _random(like: Tensor, codes: int, groups: int, seed: int) -> Tensor:
    """`[C, D]`, or `[G, C, D]`, of unit length."""
    if groups < 0 or like.shape[1] % max(groups, 1):
        raise ValueError(f"{OP}: groups={groups} must divide the {like.shape[1]} numbers of a row")
    shape = (*([groups] if groups else []), codes, like.shape[1] // max(groups, 1))
    book = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(book, dim=-1).to(like)
