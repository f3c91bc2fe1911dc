"""scrimp.sparsify: a model's linear layers become SparseLinear, at a sparsity chosen now."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ..int4.blocks import replace_module
from .allocation import ALLOCATIONS as CHOICES
from .calibration import METHODS, SPARSITIES, Calibration, Group
from .groups import groups_of
from .linear import Selection, SparseLinear

ALLOCATIONS = tuple(CHOICES)


@dataclass(frozen=True)
class LayerReport:
    """Layers of one input.

    Attributes:
        names: of the layers.
        sparsity: share of their channels that a token drops.
        error: relative error of their outputs that the calibration measured there.
    """

    names: tuple[str, ...]
    sparsity: float
    error: float


@dataclass
class Report:
    """What `sparsify` did."""

    method: str
    allocation: str
    layers: list[LayerReport] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.method}, {self.allocation}; error of the outputs", "sparsity   error  layers"]
        lines += [f"{layer.sparsity:7.1%} {layer.error:8.4f}  {', '.join(layer.names)}" for layer in self.layers]
        return "\n".join(lines)


def sparsify(
    model: nn.Module,
    calibration: Calibration,
    sparsity: float = 0.5,
    method: str = "wina-centred",
    allocation: str = "greedy",
) -> Report:
    """Replaces a model's linear layers by `SparseLinear`, in place; the head stays dense.

    Each token that is decoded skips the weights of the input channels with the lowest scores; prompts are read
    densely. It works in Hugging Face's generate and in `scrimp.generate`. The weights are turned so that a channel's
    outputs lie side by side, one group of layers at a time; there is no second copy. The model is for inference
    afterwards.

    Args:
        model: a Hugging Face Llama, Mistral, Qwen2 or Qwen3, the one that was calibrated.
        calibration: of `scrimp.calibrate` or `Calibration.load`.
        sparsity: share of the channels that are skipped, from 0 to 0.99.
        method: what a channel's score is: "teal" |x|; "wina" |x| times the norm of the weight's column;
            "wina-centred" the same of x less its median over the calibration text, whose product is a bias.
        allocation: "uniform", or "greedy": layers within a decoder layer share its budget by their error curves.

    Raises:
        ValueError: another model (both hashes are named), an unknown method or allocation, or a sparsity out of range.

    Example:
        calibration = scrimp.Calibration.load("calibration.safetensors")
        print(scrimp.sparsify(model, calibration, sparsity=0.5))
        scrimp.generate(model, "Once upon a time", tokenizer)
    """
    if method not in METHODS:
        raise ValueError(f"sparsify: method={method!r} must be one of {', '.join(METHODS)}")
    if allocation not in CHOICES:
        raise ValueError(f"sparsify: allocation={allocation!r} must be one of {', '.join(CHOICES)}")
    if not 0 <= sparsity <= SPARSITIES[-1]:
        raise ValueError(f"sparsify: sparsity={sparsity} must be from 0 to {SPARSITIES[-1]}")
    groups_of(model, "sparsify")
    calibration.check(model)
    report = Report(method, allocation)
    shares = CHOICES[allocation](calibration, method, sparsity)
    for layer, wanted in zip(calibration.layers, shares, strict=True):
        for group, share in zip(layer, wanted, strict=True):
            _swap(model, group, method, share)
            report.layers.append(LayerReport(group.names, share, group.error(method, share)))
    model.requires_grad_(False)
    return report


@torch.no_grad()
def _swap(model: nn.Module, group: Group, method: str, sparsity: float) -> None:
    """Puts sparse layers, parts of one matrix `[K, sum N]`, in the place of the dense ones of a group."""
    dense = [model.get_submodule(name) for name in group.names]
    weights = [layer.get_parameter("weight") for layer in dense]
    matrix = torch.cat([weight.detach() for weight in weights]).T.contiguous()  # [K, sum N]
    device = matrix.device
    selection = Selection(
        level=torch.tensor([group.level(method, sparsity)], device=device),
        scale=None if method == "teal" else group.norms.to(device),
        center=group.centers.to(device) if method == "wina-centred" else None,
    )
    parts = matrix.split([weight.shape[0] for weight in weights], 1)
    for name, layer, part in zip(group.names, dense, parts, strict=True):
        bias = layer._parameters.get("bias")
        replace_module(model, name, SparseLinear(part, bias, selection))
