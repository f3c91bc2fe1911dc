"""DraftMaps: trained linear maps from a row's state to states of the tokens after it, and their file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.weak import WeakIdKeyDictionary

from .. import tensor_file
from ..generation.model import DecoderModel

FORMAT = "scrimp.draft_maps"
FORMAT_VERSION = 1
MAX_FILE_BYTES = 4 << 30
SAMPLES = 1024  # values of each tensor that its hash reads

Kind = Literal["hidden", "medusa"]

_hashes = WeakIdKeyDictionary()


@dataclass(frozen=True)
class DraftMaps:
    """For each of k tokens ahead an affine map of states, in units of the row's root mean square r:

        state_i = r (W_i state / r + b_i),  i = 1 .. k

    Map i stands for the row i positions on, whose logits guess the token at offset i + 1.

    Attributes:
        kind: "hidden": what the maps give goes through the layers from `layer` on; "medusa": only to the head.
        layer: how many layers a state has gone through before it is mapped.
        weight: fp32 `[k, d, d]`.
        bias: fp32 `[k, d]`.
        weight_hash: of the model that they were trained for (`model_hash`).
        model: its name, for people.
        tokens: int32 `[n]`, ascending: guesses are among these alone, so that little of the head is read for them; None
            for all.

    Raises:
        ValueError: an unknown kind, or tensors of wrong shapes or types, or not finite.

    Source: Hidden Transfer (2404.12022); Medusa (2401.10774); frequent tokens alone: FR-Spec (2502.14856).
    """

    kind: Kind
    layer: int
    weight: Tensor
    bias: Tensor
    weight_hash: str
    model: str = ""
    tokens: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"DraftMaps: kind={self.kind!r} is not 'hidden' or 'medusa'")
        if not isinstance(self.layer, int) or self.layer < 0:
            raise ValueError(f"DraftMaps: layer={self.layer!r} is not a number of layers")
        shape = self.weight.shape
        if len(shape) != 3 or 0 in shape or shape[1] != shape[2] or self.bias.shape != shape[:2]:
            raise ValueError(
                f"DraftMaps: weight {list(shape)} and bias {list(self.bias.shape)} must be [k, d, d] and [k, d]"
            )
        for name, value in (("weight", self.weight), ("bias", self.bias)):
            if value.dtype != torch.float32:
                raise ValueError(f"DraftMaps: {name} must be float32, got {value.dtype}")
            if not bool(value.isfinite().all()):
                raise ValueError(f"DraftMaps: {name} holds numbers that are not finite")
        if self.tokens is not None:
            one_dim = self.tokens.dtype == torch.int32 and self.tokens.dim() == 1 and self.tokens.numel() > 0
            if not one_dim or int(self.tokens[0]) < 0 or not bool((self.tokens.diff() > 0).all()):
                raise ValueError("DraftMaps: tokens must be int32 [n], ascending, from 0 on")

    @property
    def count(self) -> int:
        """Tokens that are guessed ahead, k."""
        return self.weight.shape[0]

    def __call__(self, states: Tensor) -> Tensor:
        """States `[.., d]` -> `[.., k, d]`, of the same dtype."""
        return transfer(states, self.weight, self.bias)

    def for_model(self, model: DecoderModel, kind: Kind) -> DraftMaps:
        """The maps on the model's device.

        Raises:
            ValueError: they are of another kind, or for other weights (both hashes are named) or sizes.
        """
        if self.kind != kind:
            raise ValueError(f"DraftMaps: these are of kind {self.kind!r}, not {kind!r}")
        if (own := model_hash(model)) != self.weight_hash:
            raise ValueError(
                f"DraftMaps: these are for weights {self.weight_hash} ({self.model or '?'}), but this model's are "
                f"{own}; train others by `scrimp train-draft`"
            )
        d, layers = model.embedding.shape[1], len(model.layers)
        fits = self.layer < layers if kind == "hidden" else self.layer == layers
        if self.weight.shape[1] != d or not fits:
            raise ValueError(
                f"DraftMaps: {kind} maps of {self.weight.shape[1]} numbers after layer {self.layer}, "
                f"but the model has {layers} layers of {d}"
            )
        if self.tokens is not None and int(self.tokens[-1]) >= model.vocabulary:
            raise ValueError(f"DraftMaps: token {int(self.tokens[-1])} of a model with {model.vocabulary}")
        weight, bias, tokens = (x if x is None else x.to(model.device) for x in (self.weight, self.bias, self.tokens))
        return DraftMaps(self.kind, self.layer, weight, bias, self.weight_hash, self.model, tokens)  # type: ignore[arg-type]

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        header = {name: getattr(self, name) for name in ("kind", "layer", "offsets", "model", "weight_hash")}
        tensor_file.write(path, FORMAT, FORMAT_VERSION, header, self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        found = {"weight": self.weight, "bias": self.bias}
        return found if self.tokens is None else {**found, "tokens": self.tokens}

    @property
    def offsets(self) -> list[int]:
        """Of the guessed tokens after the row's own: 2 .. k + 1."""
        return list(range(2, self.count + 2))

    @classmethod
    def load(cls, path: str | Path) -> DraftMaps:
        """Reads a file of `save`.

        Raises:
            ValueError: not such a file, damaged, or of another version.
            OSError: it cannot be read.
        """
        header, tensors = tensor_file.read(path, FORMAT, FORMAT_VERSION, MAX_FILE_BYTES)
        try:
            maps = cls(
                kind=header["kind"],
                layer=header["layer"],
                weight=tensors["weight"],
                bias=tensors["bias"],
                weight_hash=header["weight_hash"],
                model=str(header.get("model", "")),
                tokens=tensors.get("tokens"),
            )
            if header["offsets"] != maps.offsets:
                raise ValueError(f"offsets {header['offsets']} are not {maps.offsets}")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: the header and the tensors of the draft maps do not fit: {error}") from error
        return maps


def transfer(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What DraftMaps computes, in fp32: states `[.., d]`, weight `[k, d, d]`, bias `[k, d]` -> `[.., k, d]`."""
    unit, size = units(states)
    ahead = linear(unit, weight.flatten(0, 1), bias.flatten()).unflatten(-1, bias.shape)
    return (size[..., None] * ahead).to(states.dtype)


def units(states: Tensor) -> tuple[Tensor, Tensor]:
    """States `[.., d]` over their root mean squares, and these `[.., 1]`; fp32."""
    size = states.float().square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
    return states.float() / size, size


def model_hash(model: DecoderModel) -> str:
    """Identity of a model's weights: a digest of every tensor's shape and of some of its values, rounded to bf16."""
    versions = [rest for _, *rest in model.weights]
    known = _hashes.get(model.embedding)
    if known is None or known[0] != versions:
        digest = hashlib.sha256()
        for tensor, *_ in model.weights:
            flat = tensor.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // SAMPLES)].to("cpu", torch.float32).to(torch.bfloat16)
            digest.update(f"{list(tensor.shape)}".encode())
            digest.update(some.view(torch.int16).numpy().tobytes())
        known = _hashes[model.embedding] = (versions, digest.hexdigest()[:32])
    return str(known[1])
