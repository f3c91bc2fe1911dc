"""SparseLinear: a linear layer that multiplies, for each new token, the input channels which matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..._registry import OPS
from ...ops.channel_select import RULES, Selected
from ..generation.linear import NO_PART, Linear, Packed, Part, SideBySide, dense_parts
from ..generation.model import MAX_ROWS
from .certificate import certificate
from .usage import Meter

RULE = RULES.index("relative")
ALL = -1.0  # a level below every score

_channel_select = OPS["channel_select"].run
_linear = OPS["linear"].run
_sparse_linear = OPS["sparse_linear"].run


def is_prompt(x: Tensor) -> bool:
    """Whether a call `[.., K]` reads more than one token of a sequence."""
    return x.dim() > 1 and x.shape[-2] > 1


@dataclass(eq=False)
class Selection:
    """How rows choose their channels (`scrimp.ops.channel_select`); layers of one input share one.

    Attributes:
        level: fp32 `[1]`, above which scores are kept, in units of their mean over the row's channels.
        scale: fp32 `[K]`, or None for 1.
        center: fp32 `[K]`, or None for 0.
        limit: rows of which more than this share of the energy's root would be dropped take all channels.
        axes: `[K, K]`, dtype of the layers: the channels are the row times these (`rotation.axes`); None for its own.
    """

    level: Tensor
    scale: Tensor | None = None
    center: Tensor | None = None
    limit: float | None = None
    axes: Tensor | None = None

    def __call__(self, x: Tensor) -> Selected:
        x = self.turned(x)
        found: Selected = _channel_select(x, self.level, self.scale, self.center, None, RULE, False)
        if self.limit is None:
            return found
        dropped, energy = found[3].unbind(-1)
        whole = ~(dropped / energy <= self.limit**2)  # NaN, of overflows and of zeros, is above every limit
        chosen: Selected = _channel_select(x, self.level, self.scale, self.center, whole, RULE, False)
        return chosen

    def turned(self, x: Tensor) -> Tensor:
        """Rows `[.., K]` in the layers' basis."""
        if self.axes is None:
            return x
        out: Tensor = _linear(x, [self.axes], [], None)
        return out

    def everything(self) -> Selection:
        """All channels of the same rows."""
        return Selection(torch.full_like(self.level, ALL), axes=self.axes)

    def pack(self, parts: list[Part], layers: Sequence[nn.Module] = ()) -> Packed | None:
        """Layers of this input for `scrimp.ops.decoder_layers`, which knows neither limits nor other bases."""
        if self.limit is not None or self.axes is not None:
            return None
        return Packed(parts, (self.level, self.scale, self.center), layers)  # type: ignore[arg-type]

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Follows the layers, which share it; what scores are made of stays fp32."""
        self.level = self.level.to(device)
        self.scale = None if self.scale is None else self.scale.to(device)
        self.center = None if self.center is None else self.center.to(device)
        self.axes = None if self.axes is None else self.axes.to(device, dtype)


class SparseLinear(nn.Module):
    """y = x W^T + bias, where a token that is read alone takes the channels of its `Selection`; inference only.

    Prompts (more than one token of a sequence at once) are read densely. The weight is `[N, K]` as that of
    torch.nn.Linear, but a channel's outputs lie side by side in memory: the one copy serves both ways.

    Args:
        weight: `[K, N]`, outputs adjacent; may be a part of a wider matrix.
        bias: `[N]`, or None.
        selection: which channels a token takes.

    >>> layer = SparseLinear(torch.tensor([[1.0], [10.0]]), None, Selection(torch.tensor([0.5])))  # of the mean, 1.2
    >>> layer(torch.tensor([[[0.4, 2.0]]])).item(), layer(torch.tensor([[[0.4, 2.0]] * 2])).flatten().tolist()
    (20.0, [20.399999618530273, 20.399999618530273])
    """

    offset: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, selection: Selection) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.shape
        self.selection = selection
        self.meter: Meter | None = None
        self.weight = nn.Parameter(weight.detach().T, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        offset = None if bias is None else bias.detach()
        if selection.center is not None:  # W (x - center) + (W center + bias)
            of_center = (selection.center @ weight.detach().float()).to(weight.dtype)
            offset = of_center if offset is None else of_center + offset
        self.register_buffer("offset", offset, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if is_prompt(x):
            return functional.linear(self.selection.turned(x), self.weight, self.bias)
        selected = self.selection(x)
        self.note(selected)
        return product(selected, self.weight.T, self.offset, None)

    def note(self, selected: Selected) -> None:
        """Tells the meter, if there is one, what was read for these rows."""
        if self.meter is not None:
            certified = self.meter.constant is not None
            self.meter.add(selected, product(selected, self.weight.T, self.offset, None) if certified else None)

    @property
    def channel_bytes(self) -> float:
        """Of the weights of an input channel."""
        return self.out_features * self.weight.element_size()

    def certificate(self) -> float:
        """What bounds this layer's error by the dropped energy of its input (`certificate.certificate`)."""
        return certificate(self.weight, self.selection.scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        super()._apply(fn, recurse)
        self.selection.move(self.weight.device, self.weight.dtype)
        return self

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """The dense layer's. Writers of files want a row's elements side by side, and tensors that share no memory."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            weight, axes = destination[f"{prefix}weight"], self.selection.axes
            destination[f"{prefix}weight"] = weight.contiguous() if axes is None else weight @ axes

    @staticmethod
    def engine_linear(modules: Sequence[SparseLinear]) -> Linear:
        """The layers, which share their input, for the decoding loop."""
        alike = all(module.selection is modules[0].selection for module in modules)
        return EngineSparse(modules) if alike else SideBySide([EngineSparse([module]) for module in modules])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def product(selected: Selected, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Selected rows `[.., K]` times weight `[K, N]`; more than MAX_ROWS of them by torch's matrix product."""
    kept, index, count, _ = selected
    if kept.shape[:-1].numel() <= MAX_ROWS:
        out: Tensor = _sparse_linear(kept, weight, index, count, bias, residual)
        return out
    many = functional.linear(kept, weight.T, bias)
    return many if residual is None else many + residual


class EngineSparse:
    """Layers of one input and one selection, as the decoding loop calls them (`scrimp.methods.generation.Linear`).

    Attributes:
        dense: the same layers with all channels, for prompts.
    """

    def __init__(self, layers: Sequence[SparseLinear]) -> None:
        self.sizes = tuple(layer.out_features for layer in layers)
        self.layers = list(layers)
        self.selection = layers[0].selection
        self.weights = stacked([layer.weight for layer in layers])
        self.offsets = self._of_weights([layer.offset for layer in layers])
        biases = self._of_weights([layer.bias for layer in layers])
        self.dense = EngineWhole(self.sizes, self.weights, biases, self.selection)

    def _of_weights(self, biases: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The layers' biases as `weights` are: joined where that is one matrix."""
        if len(self.weights) == len(biases) or all(bias is None for bias in biases):
            return list(biases[: len(self.weights)])
        pairs = zip(self.sizes, biases, strict=True)
        like = self.weights[0]
        return [torch.cat([like.new_zeros(size) if bias is None else bias for size, bias in pairs])]

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        selected = self.selection(x)
        for layer in self.layers:
            layer.note(selected)
        return _side_by_side(selected, self.weights, self.offsets, residual)

    def pack(self) -> Packed | None:
        """As `scrimp.methods.generation.linear.Packable` says."""
        return self.selection.pack(_parts(self.sizes, self.weights, self.offsets), self.layers)


class EngineWhole:
    """The layers of an EngineSparse without any selection, on the same memory."""

    def __init__(
        self,
        sizes: tuple[int, ...],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        selection: Selection,
    ) -> None:
        self.sizes, self.weights, self.biases, self.selection = sizes, list(weights), list(biases), selection
        K, device = weights[0].shape[0], weights[0].device
        self.index = torch.arange(K, dtype=torch.int32, device=device)
        self.count = torch.tensor([K], dtype=torch.int32, device=device)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = self.selection.turned(x)
        return _side_by_side((x, self.index, self.count, x), self.weights, self.biases, residual)

    def pack(self) -> Packed | None:
        """As `scrimp.methods.generation.linear.Packable` says."""
        return self.selection.everything().pack(_parts(self.sizes, self.weights, self.biases))


def _parts(sizes: Sequence[int], weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Part]:
    return dense_parts(weights, biases) + [NO_PART] * (len(sizes) - len(weights))


def _side_by_side(
    selected: Selected, weights: Sequence[Tensor], biases: Sequence[Tensor | None], residual: Tensor | None
) -> Tensor:
    if len(weights) == 1:
        return product(selected, weights[0], biases[0], residual)
    parts = [product(selected, weight, bias, None) for weight, bias in zip(weights, biases, strict=True)]
    out = torch.cat(parts, -1)
    return out if residual is None else out + residual


def stacked(weights: Sequence[Tensor]) -> list[Tensor]:
    """Weights `[N_i, K]` as `[K, N_i]` each, or as one `[K, sum N_i]` where they lie side by side in memory."""
    turned = [weight.T for weight in weights]
    first, end = turned[0], 0
    for weight in turned:
        begin = first.data_ptr() + end * first.element_size()
        if weight.data_ptr() != begin or weight.stride() != first.stride():
            return turned
        end += weight.shape[1]
    if len(turned) > 1 and first.stride(0) < end:
        return turned
    return [first.as_strided((first.shape[0], end), first.stride())]
