"""Calibration: what is known of a model's activations, from which any sparsity can be chosen later."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...int4_weight.tensor_file import TensorFiles
from ..head_patterns import weight_hash

FORMAT = "scrimp.calibration"
FORMAT_VERSION = 2
METHODS = ("teal", "wina", "wina-centred", "teal-rotated", "wina-rotated", "cats")
SPARSITIES = (*(0.05 * i for i in range(20)), 0.99)


@dataclass(frozen=True)
class Group:
    """Linear layers of one input of K channels.

    Attributes:
        names: of the layers.
        outputs: N, of all of them.
        norms: fp32 `[K]`, of the columns of their weights, stacked.
        centers: fp32 `[K]`, medians of the input's channels: a few tokens would move means far away.
        levels: fp32 `[METHODS, SPARSITIES]`, above which scores are kept, in units of a token's mean score.
        errors: fp32 `[METHODS, SPARSITIES]`, |Y - Y'| / |Y| of all outputs on calibration text.
        sensitivity: by which a squared error, times a half, is the divergence that it causes (`sensitivity.py`).

    Levels and errors are 0 for a method that this group has no part in.
    """

    names: tuple[str, ...]
    outputs: int
    norms: Tensor
    centers: Tensor
    levels: Tensor
    errors: Tensor
    sensitivity: float = 1.0

    def level(self, method: str, sparsity: float) -> float:
        """The level that drops the share `sparsity` of the channels."""
        return between(self.levels[METHODS.index(method)], sparsity)

    def error(self, method: str, sparsity: float) -> float:
        """The relative error of the outputs at a sparsity."""
        return between(self.errors[METHODS.index(method)], sparsity)


NUMBERS = ("names", "outputs", "sensitivity")
TENSORS = tuple(field.name for field in fields(Group) if field.type == "Tensor")


def between(curve: Tensor, sparsity: float) -> float:
    """A curve over SPARSITIES at any point of their range, linear between them."""
    above = next(i for i, s in enumerate(SPARSITIES) if s >= sparsity)
    if above == 0:
        return float(curve[0])
    low, high = SPARSITIES[above - 1 : above + 1]
    return float(torch.lerp(curve[above - 1], curve[above], (sparsity - low) / (high - low)))


@dataclass(frozen=True)
class Calibration:
    """Norms, medians, thresholds and error curves of a model's linear layers; `scrimp.calibrate` makes one.

    Attributes:
        layers: for each decoder layer its groups.
        weight_hash: of the model it was made for.
        model: the model's name, for people.
        tokens: how many were read.
    """

    layers: tuple[tuple[Group, ...], ...]
    weight_hash: str
    model: str = ""
    tokens: int = 0

    def check(self, model: nn.Module) -> None:
        """ValueError with both hashes where this was made for other weights."""
        found = weight_hash(model)
        if found != self.weight_hash:
            raise ValueError(
                f"the calibration is for weights {self.weight_hash} ({self.model}), but this model's are {found}; "
                "run scrimp.calibrate on it"
            )

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with a JSON header."""
        from safetensors.torch import save_file

        header = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "model": self.model,
            "weight_hash": self.weight_hash,
            "tokens": self.tokens,
            "methods": METHODS,
            "sparsities": SPARSITIES,
            "layers": [[{name: getattr(g, name) for name in NUMBERS} for g in layer] for layer in self.layers],
        }
        groups = [group for layer in self.layers for group in layer]
        tensors = {f"{g.names[0]}.{name}": getattr(g, name).contiguous() for g in groups for name in TENSORS}
        save_file(tensors, path, metadata={FORMAT: json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Calibration:
        """Reads a file of `save`; with `model`, one for other weights is refused.

        Raises:
            ValueError: not such a file, damaged, of another version, or for other weights (both hashes are named).
        """
        file = TensorFiles(Path(path), [Path(path)])
        header = _header(file)
        try:
            layers = tuple(tuple(_group(file, group) for group in layer) for layer in header["layers"])
            made = cls(layers, str(header["weight_hash"]), str(header["model"]), int(header["tokens"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: the header of the calibration is damaged: {error!r}") from error
        if model is not None:
            made.check(model)
        return made


def _header(file: TensorFiles) -> Any:
    try:
        header = json.loads(file.metadata.get(FORMAT, "null"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file.path}: the header of the calibration is damaged: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{file.path}: not a calibration")
    if header.get("version") != FORMAT_VERSION:
        raise ValueError(f"{file.path}: version {header.get('version')} of calibrations; this reads {FORMAT_VERSION}")
    if header.get("methods") != list(METHODS) or header.get("sparsities") != list(SPARSITIES):
        raise ValueError(f"{file.path}: the curves of the calibration are of other methods or sparsities")
    return header


def _group(file: TensorFiles, entry: Any) -> Group:
    names = tuple(str(name) for name in entry["names"])
    (K,) = file.shape(f"{names[0]}.norms", 1)
    curve = (len(METHODS), len(SPARSITIES))
    shapes = {"norms": (K,), "centers": (K,), "levels": curve, "errors": curve}
    tensors = {name: file.read_finite(f"{names[0]}.{name}", shapes[name]) for name in TENSORS}
    sensitivity = float(entry["sensitivity"])
    if not 0 <= sensitivity < math.inf:
        raise ValueError(f"{file.path}: {names[0]} has sensitivity {sensitivity}; it must be finite and not negative")
    return Group(names, int(entry["outputs"]), **tensors, sensitivity=sensitivity)
