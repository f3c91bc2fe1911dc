"""HeadPatterns: how many keys each attention head of a model needs, found once per model and kept in a file.

Each head has two numbers: a local window, and columns (scattered keys that a few rows of each segment of the prompt
choose online). A head with a window as long as the prompt is dense, one without columns is static.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops import vertical_slash_index
from ..sparse_plan import SparsePlan
from . import tensor_file

if TYPE_CHECKING:
    from torch import nn

FORMAT = "scrimp.head_patterns"
FORMAT_VERSION = 1
MAX_FILE_BYTES = 64 << 20
SHIPPED = Path(__file__).with_name("patterns")


@dataclass(frozen=True)
class HeadPatterns:
    """Budgets of every head of a model.

    Attributes:
        window: int32 `[layers, H]`, tokens before each tile that it sees.
        columns: int32 `[layers, H]`, scattered keys per segment.
        sinks: first tokens that every query sees.
        segment: queries that share a list of columns.
        samples: rows of a segment that choose its columns.
        weight_hash: of the model that the numbers were found for (`weight_hash`), or "" for any.

    >>> import torch, scrimp
    >>> patterns = scrimp.HeadPatterns(torch.full((2, 4), 512).int(), torch.zeros(2, 4).int())
    >>> patterns.layers, patterns.heads, round(patterns.expected_density(0, 8192), 3)
    (2, 4, 0.139)
    """

    window: Tensor
    columns: Tensor
    sinks: int = 16
    segment: int = 512
    samples: int = 16
    weight_hash: str = ""

    def __post_init__(self) -> None:
        for name, value in (("window", self.window), ("columns", self.columns)):
            if value.dtype != torch.int32 or value.dim() != 2 or value.shape != self.window.shape:
                raise ValueError(
                    f"HeadPatterns: {name} must be int32 [layers, heads], got {value.dtype} {list(value.shape)}"
                )
            if value.numel() and int(value.min()) < 0:
                raise ValueError(f"HeadPatterns: {name} has {int(value.min())}; it must not be negative")

    @property
    def layers(self) -> int:
        return self.window.shape[0]

    @property
    def heads(self) -> int:
        return self.window.shape[1]

    def plan(self, layer: int, q: Tensor, k: Tensor, scale: float | None = None) -> SparsePlan:
        """The plan of one layer for q `[B, H, n_q, D]`, k `[B, G, n_k, D]`."""
        window, columns = self.window[layer].to(q.device), self.columns[layer].to(q.device)
        return vertical_slash_index(
            q,
            k,
            window,
            columns,
            sinks=self.sinks,
            segment=self.segment,
            samples=self.samples,
            scale=scale,
            max_columns=min(int(self.columns[layer].max()), k.shape[2]),
        )

    def expected_density(self, layer: int, n: int) -> float:
        """Share of the causal pairs that a prompt of n tokens costs in one layer, if every column is used."""
        ranges, columns = self.expected_keys(layer, n, n)
        return (ranges + columns) / max(1.0, self.heads * (n + 64) / 2)

    def expected_keys(self, layer: int, n_q: int, n_k: int) -> tuple[float, float]:
        """Keys per query, summed over the heads of one layer: in ranges, and as columns."""
        q_block = 64
        end = torch.arange(0, max(n_q, 1), q_block) + (n_k - n_q) + q_block  # [T]
        window, columns = self.window[layer][:, None].long(), self.columns[layer][:, None].long()
        near = torch.minimum(end, window + q_block)
        sinks = (end - near).clamp(max=self.sinks)
        scattered = torch.minimum(columns, end - near - sinks)
        return float((near + sinks).double().mean(1).sum()), float(scattered.double().mean(1).sum())


def weight_hash(model: nn.Module) -> str:
    """Identity of a model's weights: a digest of every parameter's name, shape and a sample of its values."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 1024)].to("cpu", torch.float32).to(torch.bfloat16)
        digest.update(f"{name}{list(value.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def save(path: str | Path, budgets: Mapping[str, HeadPatterns], model: str) -> None:
    """Writes named budgets of one model to a safetensors file.

    Args:
        path: file to write.
        budgets: name -> patterns; all for the same weights.
        model: the model's name, for people.
    """
    hashes = {patterns.weight_hash for patterns in budgets.values()}
    if len(hashes) != 1:
        raise ValueError(f"HeadPatterns: budgets of one file must be of one model, got weight hashes {sorted(hashes)}")
    header = {
        "model": model,
        "weight_hash": hashes.pop(),
        "budgets": {n: {"sinks": p.sinks, "segment": p.segment, "samples": p.samples} for n, p in budgets.items()},
    }
    tensors = {f"{n}.{field}": getattr(p, field) for n, p in budgets.items() for field in ("window", "columns")}
    tensor_file.write(path, FORMAT, FORMAT_VERSION, header, tensors)


def load(path: str | Path, model: nn.Module | None = None) -> dict[str, HeadPatterns]:
    """Reads a file of `save`; with `model`, refuses patterns that were found for other weights.

    Raises:
        ValueError: not such a file, damaged, of a newer version, or for other weights (both hashes are named).
    """
    header, tensors = _read(path)
    if model is not None and header["weight_hash"] != weight_hash(model):
        raise ValueError(
            f"{path}: the patterns are for weights {header['weight_hash']} ({header.get('model', '?')}), "
            f"but this model's are {weight_hash(model)}; run `scrimp calibrate` for it"
        )
    try:
        return {
            name: HeadPatterns(
                window=tensors[f"{name}.window"],
                columns=tensors[f"{name}.columns"],
                sinks=int(numbers["sinks"]),
                segment=int(numbers["segment"]),
                samples=int(numbers["samples"]),
                weight_hash=header["weight_hash"],
            )
            for name, numbers in header["budgets"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: the header and the tensors of the head patterns do not fit: {error}") from error


def _read(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    return tensor_file.read(path, FORMAT, FORMAT_VERSION, MAX_FILE_BYTES)


@lru_cache
def _shipped() -> dict[str, Path]:
    """Weight hash -> file, of the patterns that come with scrimp."""
    return {_read(path)[0]["weight_hash"]: path for path in sorted(SHIPPED.glob("*.safetensors"))}


def shipped_patterns(model: nn.Module) -> dict[str, HeadPatterns] | None:
    """Budgets that come with scrimp for exactly this model's weights, or None."""
    path = _shipped().get(weight_hash(model))
    return None if path is None else load(path)
