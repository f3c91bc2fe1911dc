"""What quantization cost: the error of every layer, and how far the model's predictions moved."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from ...int4_weight import Int4Weight
from .statistics import InputStatistics


@dataclass(frozen=True)
class LayerReport:
    """One linear layer.

    Attributes:
        name: of the layer.
        shape: N, K.
        group_size: of the weight; K for one scale a row.
        bits: of all tensors of the weight, per element.
        error: |Y - Y'| / |Y| of the outputs on the calibration inputs, or of the weight itself without any.
        weighed: whether `error` is that of the outputs.
    """

    name: str
    shape: tuple[int, int]
    group_size: int
    bits: float
    error: float
    weighed: bool

    @classmethod
    def of(cls, name: str, weight: Tensor, rough: Int4Weight, inputs: InputStatistics | None) -> LayerReport:
        """Compares a weight with its 4-bit form."""
        exact = weight.float()
        change = rough.dequantize() - exact
        if inputs is None:
            error = float(change.norm() / exact.norm().clamp(min=1e-30))
        else:
            whole = inputs.energy(exact).clamp(min=1e-30)
            error = float((inputs.energy(change) / whole).clamp(min=0).sqrt())
        N, K = exact.shape
        return cls(name, (N, K), rough.group_size, 8 * rough.bytes() / max(1, N * K), error, inputs is not None)


@dataclass
class Report:
    """What `quantize` did.

    Attributes:
        method: "rtn", "hqq", "gptq" or "awq".
        group_size: that was asked for.
        layers: one entry a linear layer, in the order in which they were quantized.
        divergence: decoder layer -> mean KL divergence (nats a token) of the model's predictions from the original
            ones, with all layers up to this one quantized.
    """

    method: str
    group_size: int
    layers: list[LayerReport] = field(default_factory=list)
    divergence: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        width = max([5, *(len(layer.name) for layer in self.layers)])
        what = "outputs" if any(layer.weighed for layer in self.layers) else "weights"
        lines = [
            f"{self.method}, error of the {what}",
            f"{'layer':<{width}}  {'N x K':>13}  group  bits   error      KL",
        ]
        for index, layer in enumerate(self.layers):
            last = index + 1 == len(self.layers)
            at = next((at for at in self.divergence if layer.name.startswith(f"{at}.")), "")
            ends = at and (last or not self.layers[index + 1].name.startswith(f"{at}."))
            shown = f"{self.divergence[at]:8.5f}" if ends else ""
            size = f"{layer.shape[0]} x {layer.shape[1]}"
            lines.append(
                f"{layer.name:<{width}}  {size:>13}  {layer.group_size:>5}  {layer.bits:4.2f}  {layer.error:6.4f}  "
                f"{shown}".rstrip()
            )
        return "\n".join(lines)


def divergence(original: Tensor, changed: Tensor) -> float:
    """Mean over rows of KL(softmax(original) | softmax(changed)) in nats; logits `[..., V]`.

    >>> import torch
    >>> round(divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])), 4)
    0.1201
    """
    total, rows = 0.0, original.shape[:-1].numel()
    for a, b in zip(original.flatten(0, -2).split(64), changed.flatten(0, -2).split(64), strict=True):
        p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    return total / max(1, rows)
