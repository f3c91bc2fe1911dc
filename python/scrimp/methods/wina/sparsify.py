"""scrimp.sparsify: a model's linear layers become SparseLinear, at a sparsity chosen now."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..int4.blocks import replace_module
from ..int4.linear import Int4Linear
from .allocation import ALLOCATIONS as CHOICES
from .allocation import allocate, weights
from .calibration import METHODS, SPARSITIES, Calibration, Group
from .cats import CatsGate, activation
from .groups import groups_of, reads_residual
from .int4_linear import is_int4, swap_int4
from .linear import Selection, SparseLinear
from .rotation import axes

ALLOCATIONS = tuple(CHOICES)


@dataclass(frozen=True)
class LayerReport:
    """Layers of one input.

    Attributes:
        names: of the layers.
        sparsity: share of their channels that a token drops.
        error: relative error of their outputs that the calibration measured there.
        weights: how many they have.
        rotation: how many weights of a rotation a token reads for them in addition.
    """

    names: tuple[str, ...]
    sparsity: float
    error: float
    weights: int = 0
    rotation: int = 0


@dataclass
class Report:
    """What `sparsify` did."""

    method: str
    allocation: str
    layers: list[LayerReport] = field(default_factory=list)

    @property
    def saved(self) -> float:
        """Share of the weights of all decoder layers that a token does not read, rotations counted as read."""
        less = sum(layer.sparsity * layer.weights - layer.rotation for layer in self.layers)
        return less / sum(layer.weights for layer in self.layers)

    def __str__(self) -> str:
        rotation = sum(layer.rotation for layer in self.layers) / sum(layer.weights for layer in self.layers)
        more = f" (rotations read {rotation:.1%} more)" if rotation else ""
        lines = [
            f"{self.method}, {self.allocation}: {self.saved:.1%} of the weights not read{more}; error of the outputs"
        ]
        lines.append("sparsity   error  layers")
        lines += [f"{layer.sparsity:7.1%} {layer.error:8.4f}  {', '.join(layer.names)}" for layer in self.layers]
        return "\n".join(lines)


def sparsify(
    model: nn.Module,
    calibration: Calibration,
    sparsity: float = 0.5,
    method: str = "wina-centred",
    allocation: str = "knapsack",
    max_error: float | None = None,
) -> Report:
    """Replaces a model's linear layers by `SparseLinear`, 4-bit ones by `Int4SparseLinear`, in place; the head stays.

    Each token that is decoded skips the weights of the input channels with the lowest scores; prompts are read
    densely. It works in Hugging Face's generate and in `scrimp.generate`. The weights are turned so that a channel's
    outputs lie side by side, one group of layers at a time; there is no second copy. The model is for inference
    afterwards.

    Args:
        model: a Hugging Face Llama, Mistral, Qwen2, Qwen3, Gemma or Phi, the one that was calibrated
            (`scrimp.generate` runs the first four; the others have transformers' own generate).
        calibration: of `scrimp.calibrate` or `Calibration.load`.
        sparsity: share of the weights of the decoder layers that are skipped, from 0 to 0.99.
        method: what a channel's score is: "teal" |x|; "wina" |x| times the norm of the weight's column;
            "wina-centred" the same of x less its median over the calibration text, whose product is a bias;
            "teal-rotated", "wina-rotated" what reads the residual stream chooses among orthogonal columns, for which
            each token reads a rotation; "cats" |act(gate)|, for the MLPs' channels only.
        allocation: "uniform"; "greedy": layers within a decoder layer share its budget by their error curves and what
            errors do to the model; "knapsack": all layers of the model do.
        max_error: a layer takes all channels of a token for which its estimated relative error would be larger.

    Raises:
        ValueError: another model (both hashes are named), an unknown method or allocation, a sparsity or an error out
            of range, or more than "cats" can skip.

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
    if max_error is not None and not max_error > 0:
        raise ValueError(f"sparsify: max_error={max_error} must be above 0")
    if method == "cats" and max_error is not None:
        raise ValueError("sparsify: method='cats' estimates no errors; leave max_error out")
    names = groups_of(model, "sparsify", Int4Linear)
    calibration.check(model)
    if (known := [[group.names for group in layer] for layer in calibration.layers]) != names:
        raise ValueError(
            f"sparsify: the calibration's {len(known)} layers are not the model's; run scrimp.calibrate on it"
        )
    report = Report(method, allocation)
    shares = allocate(calibration, method, sparsity, allocation)
    for layer, wanted in zip(calibration.layers, shares, strict=True):
        for group, share in zip(layer, wanted, strict=True):
            rotation = 0
            if is_int4(model, group.names, method):
                swap_int4(model, group, method, share, max_error)
            elif method == "cats":
                _swap_gated(model, group, share)
            else:
                selection = _swap(model, group, method, share, max_error)
                rotation = 0 if selection.axes is None else selection.axes.numel()
            error = group.error(method, share)
            report.layers.append(LayerReport(group.names, share, error, weights(group), rotation))
    model.requires_grad_(False)
    return report


@torch.no_grad()
def _swap(model: nn.Module, group: Group, method: str, sparsity: float, limit: float | None) -> Selection:
    """Puts sparse layers, parts of one matrix `[K, sum N]`, in the place of the dense ones of a group."""
    matrix = _matrix(model, group.names)
    basis, norms = None, group.norms
    if method.endswith("-rotated") and reads_residual(group.names):
        basis = axes(matrix.T).to(matrix)
        matrix = basis @ matrix
        norms = matrix.float().norm(dim=1)
    device = matrix.device
    selection = Selection(
        level=torch.tensor([group.level(method, sparsity)], device=device),
        scale=None if method.startswith("teal") else norms.to(device),
        center=group.centers.to(device) if method == "wina-centred" else None,
        limit=limit,
        axes=basis,
    )
    _replace(model, group.names, matrix, selection)
    return selection


@torch.no_grad()
def _swap_gated(model: nn.Module, group: Group, sparsity: float) -> None:
    """A gate that drops channels, before a layer that does not read the dropped ones; other groups stay dense."""
    if not sparsity:
        return
    place, _, _ = group.names[0].rpartition(".")
    mlp, matrix = model.get_submodule(place), _matrix(model, group.names)
    level = torch.tensor([group.level("cats", sparsity)], device=matrix.device)
    gate = mlp.get_submodule("gate_proj")
    replace_module(model, f"{place}.gate_proj", CatsGate(gate, level, activation(mlp, "sparsify")))  # type: ignore[arg-type]
    _replace(model, group.names, matrix, Selection(torch.zeros_like(level)))


def _matrix(model: nn.Module, names: tuple[str, ...]) -> Tensor:
    """The weights of layers of one input as one matrix `[K, sum N]`."""
    dense = [model.get_submodule(name).get_parameter("weight").detach() for name in names]
    return torch.cat(dense).T.contiguous()


def _replace(model: nn.Module, names: tuple[str, ...], matrix: Tensor, selection: Selection) -> None:
    """Puts sparse layers on parts of a matrix in the place of dense ones."""
    dense = [model.get_submodule(name) for name in names]
    parts = matrix.split([layer.get_parameter("weight").shape[0] for layer in dense], 1)
    for name, layer, part in zip(names, dense, parts, strict=True):
        replace_module(model, name, SparseLinear(part, layer._parameters.get("bias"), selection))
