"""scrimp.calibrate: reads text with the dense model and measures what skipping channels would cost each layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from ..generation.huggingface import activation_of
from ..head_patterns import weight_hash
from ..int4 import blocks as parts
from .calibration import METHODS, SPARSITIES, Calibration, Group
from .cats import activation
from .groups import gated, groups_of, reads_residual
from .int4_linear import dequantized
from .rotation import axes
from .sensitivity import sensitivities

LEVEL_ROWS = 1024  # inputs of a group from which levels are taken
ERROR_ROWS = 128  # and those of them on which errors are measured


def calibrate(model: nn.Module, text: Tensor | Sequence[Tensor], *, progress: bool = True) -> Calibration:
    """Measures norms, medians, thresholds and error curves of every linear layer; the sparsity is chosen later.

    Decoder layers are taken one after the other: the inputs of one of them are in memory; in the end, for what errors
    do to the model, the activations of 256 tokens in all layers. The first token of a text takes no part: its
    activations are unlike all others, and it is always read densely.

    Args:
        model: a Hugging Face Llama, Mistral, Qwen2, Qwen3, Gemma (1, 2, 3) or Phi (1, 2, 3, 4). 4-bit layers are
            measured as the dense ones that they stand for, which take their memory for the time being.
        text: tokens int64 `[samples, n]`, or a list of `[1, n]`, n at least 2.
        progress: show a progress bar.

    Raises:
        ValueError: another model, no text or misshapen text, or activations that are not finite.

    Example:
        calibration = scrimp.calibrate(model, tokens)
        calibration.save("calibration.safetensors")
        scrimp.sparsify(model, calibration, sparsity=0.5)
    """
    from tqdm.auto import tqdm

    with dequantized(model) as was_int4:
        if was_int4:
            made = calibrate(model, text, progress=progress)
    if was_int4:
        return replace(made, weight_hash=weight_hash(model))
    groups = groups_of(model, "calibrate")
    texts = list(text.split(1)) if isinstance(text, Tensor) else list(text)
    if not texts:
        raise ValueError("calibrate: there is no text")
    for index, tokens in enumerate(texts):
        if tokens.dtype != torch.int64 or tokens.dim() != 2 or tokens.shape[0] != 1 or tokens.shape[1] < 2:
            raise ValueError(f"calibrate: text[{index}] is {tokens.dtype} {list(tokens.shape)}, not int64 [1, n > 1]")
    layers = [model.get_submodule(f"model.layers.{i}") for i in range(len(groups))]
    found = []
    with torch.inference_mode():
        samples = [parts.enter(model, layers, tokens) for tokens in texts]
        for index, layer in enumerate(tqdm(layers, desc="calibrate", unit="layer", disable=not progress)):
            firsts = [names[0] for names in groups[index]]
            with _inputs(model, firsts) as inputs:
                for sample in samples:
                    sample.hidden = parts.step(layer, index, sample)
            found.append(tuple(_measure(model, names, inputs) for names in groups[index]))
    minds = iter(sensitivities(model, groups, texts))
    found = [tuple(replace(group, sensitivity=next(minds)) for group in layer) for layer in found]
    name = str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)
    return Calibration(tuple(found), weight_hash(model), name, sum(tokens.numel() for tokens in texts))


@contextmanager
def _inputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collects the inputs of some layers, without those of each text's first token."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook(name: str) -> torch.utils.hooks.RemovableHandle:
        def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name].append(args[0][0, 1:].float())

        return model.get_submodule(name).register_forward_pre_hook(look)

    handles = [hook(name) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _measure(model: nn.Module, names: tuple[str, ...], inputs: dict[str, list[Tensor]]) -> Group:
    """All curves of the layers of one input."""
    weight = torch.cat([model.get_submodule(name).get_parameter("weight").float() for name in names])  # [N, K]
    rows = sampled(inputs[names[0]])
    if not bool(rows.isfinite().all()):
        raise ValueError(f"calibrate: the inputs of {names[0]} are not finite")
    norms, centers = weight.norm(dim=0), rows.median(0).values
    levels, errors = torch.zeros(2, len(METHODS), len(SPARSITIES))

    def curves(method: str, moved: Tensor, scores: Tensor, weight: Tensor = weight) -> None:
        i = METHODS.index(method)
        levels[i], errors[i] = curve(moved, scores, weight, whole)

    some = slice(None, None, -(-len(rows) // ERROR_ROWS))
    whole = (rows[some] @ weight.T).norm().clamp(min=1e-30)
    curves("teal", rows, rows.abs())
    curves("wina", rows, rows.abs() * norms)
    curves("wina-centred", rows - centers, (rows - centers).abs() * norms)
    if reads_residual(names):
        basis = axes(weight)
        rows, weight = rows @ basis.T, weight @ basis.T
        curves("teal-rotated", rows, rows.abs(), weight)
        curves("wina-rotated", rows, rows.abs() * weight.norm(dim=0), weight)
    else:
        for plain, rotated in (("teal", "teal-rotated"), ("wina", "wina-rotated")):
            i, j = METHODS.index(plain), METHODS.index(rotated)
            levels[j], errors[j] = levels[i], errors[i]
    gates = _gates(model, names, inputs)
    if gates is not None:
        curves("cats", rows, gates.abs())
    return Group(names, weight.shape[0], norms, centers, levels, errors)


def _gates(model: nn.Module, names: tuple[str, ...], inputs: dict[str, list[Tensor]]) -> Tensor | None:
    """act(gate) of the rows that `sampled` takes, for the layer behind a gate; None for others."""
    opened = inputs.get(names[0].replace("down", "gate"))
    mlp = model.get_submodule(names[0].rpartition(".")[0])
    if opened is None or not gated(names) or activation_of(mlp.get_submodule("act_fn")) is None:
        return None
    gate = mlp.get_submodule("gate_proj")
    found: Tensor = gate(sampled(opened).to(gate.get_parameter("weight").dtype))
    return activation(mlp, "calibrate")(found).float()


def sampled(inputs: list[Tensor]) -> Tensor:
    """At most LEVEL_ROWS of all rows, `[rows, K]`."""
    rows = torch.cat(inputs)
    return rows[:: -(-len(rows) // LEVEL_ROWS)]


def curve(moved: Tensor, scores: Tensor, weight: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Levels and errors at SPARSITIES.

    Args:
        moved: `[rows, K]`, what is kept or dropped.
        scores: `[rows, K]` at least 0, by which.
        weight: `[N, K]`.
        whole: norm of the dense outputs of the rows that errors are measured on.
    """
    scores = scores / scores.mean(-1, keepdim=True).clamp(min=1e-30)
    levels = quantiles(scores)
    some = slice(None, None, -(-len(moved) // ERROR_ROWS))
    errors = [(moved[some].masked_fill(scores[some] > level, 0) @ weight.T).norm() / whole for level in levels]
    return levels, torch.stack(errors)


def quantiles(scores: Tensor) -> Tensor:
    """The levels that as large a share of all scores does not exceed as SPARSITIES say; 0 for none."""
    ordered = torch.from_numpy(np.sort(scores.flatten().numpy()))  # several times as fast as torch's
    at = torch.tensor([max(0, round(s * len(ordered)) - 1) for s in SPARSITIES])
    found = ordered[at]
    found[0] = 0
    return found
