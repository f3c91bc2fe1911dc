"""VQLogitsHead: an output head whose tokens share the rows of a codebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..._registry import OPS
from ...ops import vq_logits, vq_sample
from ...ops._vq import check_head, check_values, token_scores
from . import vq_build
from .vq_loss import vq_cross_entropy

OP = "VQLogitsHead"
_vq_logits = OPS["vq_logits"].call


class VQLogitsHead(nn.Module):
    """logits_v = h . codebook[codes_v] + bias_v: tokens of one code have one score, and their biases rank them.

    Args:
        codebook: `[K, d]`, K and d at least 1; becomes a parameter.
        codes: int32 `[V]`, or `[G, V]` for sums of G rows (residual codes); V at least 1. Codes without a token are
            allowed: they cost time and are never chosen.
        bias: `[V]`, dtype of `codebook`; becomes a parameter.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, codes out of range, values that are not finite.

    >>> import torch
    >>> from scrimp.methods.heads import VQLogitsHead
    >>> head = VQLogitsHead(torch.eye(2), torch.tensor([0, 1, 1], dtype=torch.int32), torch.tensor([0.0, 0.5, 0.0]))
    >>> head(torch.tensor([[1.0, 2.0]])).tolist()
    [[1.0, 2.5, 2.0]]
    """

    codes: Tensor

    def __init__(self, codebook: Tensor, codes: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        if codebook.dim() != 2 or 0 in codebook.shape or 0 in codes.shape:
            sizes = f"codebook has shape {list(codebook.shape)} and codes {list(codes.shape)}"
            raise ValueError(f"{OP}: {sizes}; there must be a code of at least one number, and a token")
        check_head(OP, codebook[:0], codebook, codes, bias)
        check_values(OP, codebook, codes)
        for name, values in (("codebook", codebook), ("bias", bias)):
            if values is not None and not values.isfinite().all():
                raise ValueError(f"{OP}: {name} has values that are not finite")
        self.codebook = nn.Parameter(codebook.detach().clone(memory_format=torch.contiguous_format))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.register_buffer("codes", codes.detach().clone(memory_format=torch.contiguous_format))

    @classmethod
    def from_head(
        cls,
        weight: Tensor,
        K: int,
        *,
        counts: Tensor | None = None,
        singles: int | None = None,
        states: Tensor | None = None,
        bias: bool = True,
        levels: int = 1,
        iterations: int = 10,
        seed: int = 0,
    ) -> VQLogitsHead:
        """A codebook for a trained head, by k-means.

        The `singles` most frequent tokens have codes of their own, which are their rows of the head. The others share
        codes by weighted k-means: a row counts by its token's frequency and, where there are hidden states, its
        distance to a centroid is the mean square error of the logit.

        Args:
            weight: `[V, d]`, of the trained head.
            K: rows of the codebook in all, from 1 to V.
            counts: `[V]`, how often each token occurs in some text, zeros allowed; all alike unless given.
            singles: tokens with codes of their own; half of the first level's codes where there are counts, else 0.
            states: `[n, d]`, some hundred or more inputs of the head.
            bias: where there are states, a bias for each token: the mean of what its code's logit lacks.
            levels: 2 or more give each token the sum of as many rows: the K rows are split among the levels, and each
                level codes what those before it leave over. Tokens with codes of their own have a row of zeros there.
            iterations: of k-means, at most.
            seed: of k-means.

        Raises:
            ValueError: shapes or numbers that do not fit, values that are not finite.
        """
        weight = weight.detach()
        _check_trained(weight, K, counts, singles, states, levels)
        V, rest = len(weight), weight.float()
        frequency = torch.ones(V) if counts is None else counts.float() + 1
        sizes = _sizes(K, levels)
        if singles is None:
            singles = sizes[0] // 2 if counts is not None and sizes[-1] > 1 else 0
        top = frequency.sort(descending=True, stable=True).indices[:singles]
        basis = None if states is None else vq_build.metric(states.float())
        generator = torch.Generator().manual_seed(seed)
        codebook, codes = list[Tensor](), list[Tensor]()
        for size in sizes:
            fixed = torch.full((V,), -1)
            fixed[top] = 0 if codes else torch.arange(singles)  # the first level leaves nothing over of them
            space = rest if basis is None else rest @ basis
            index = vq_build.assign(space, size, frequency, fixed, iterations, generator)
            centroids = vq_build.means(rest, index, size, frequency)
            centroids[index[top]] = rest[top]  # to the bit
            codes.append(index + sum(len(part) for part in codebook))
            codebook.append(centroids)
            rest = rest - centroids[index]
        found = torch.stack(codes) if levels > 1 else codes[0]
        left = (rest @ states.float().mean(0)).to(weight.dtype) if bias and states is not None else None
        return cls(torch.cat(codebook).to(weight.dtype), found.int(), left)

    def forward(self, h: Tensor) -> Tensor:
        """Logits `[.., V]`; with gradients where they are wanted, through a tensor of all logits (`loss` has none)."""
        wanted = (h, self.codebook, *(() if self.bias is None else (self.bias,)))
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in wanted):
            return token_scores(h @ self.codebook.T, self.codes, self.bias)
        return vq_logits(h, self.codebook, self.codes, self.bias)

    def loss(self, h: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy `[..]` of h `[.., d]` and tokens `[..]` (`vq_cross_entropy`)."""
        return vq_cross_entropy(h, self.codebook, self.codes, self.bias, target=target)

    @torch.no_grad()
    def sample(self, h: Tensor, **how: Any) -> Tensor:
        """Tokens `[..]` for h `[.., d]`; options as in `scrimp.ops.vq_sample`."""
        return vq_sample(h, self.codebook, self.codes, self.bias, **how)

    @staticmethod
    def engine_linear(modules: Sequence[VQLogitsHead]) -> EngineVQ:
        """The head, for the decoding loop."""
        return EngineVQ(modules)

    def extra_repr(self) -> str:
        K, d = self.codebook.shape
        levels = self.codes.shape[0] if self.codes.dim() == 2 else 1
        return f"V={self.codes.shape[-1]}, d={d}, K={K}, levels={levels}, bias={self.bias is not None}"


class EngineVQ:
    """The head as the decoding loop calls it (`scrimp.methods.generation.linear.Linear`)."""

    def __init__(self, heads: Sequence[VQLogitsHead]) -> None:
        (head,) = heads
        self.sizes = (head.codes.shape[-1],)
        self._parts = (head.codebook.detach(), head.codes, None if head.bias is None else head.bias.detach())

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = _vq_logits(x, *self._parts)
        return out if residual is None else out + residual


def _sizes(K: int, levels: int) -> list[int]:
    """Rows of the codebook for each level, the larger first."""
    return [K // levels + (level < K % levels) for level in range(levels)]


def _check_trained(
    weight: Tensor, K: int, counts: Tensor | None, singles: int | None, states: Tensor | None, levels: int
) -> None:
    """Raises ValueError unless the arguments of `from_head` fit together."""
    op = f"{OP}.from_head"
    if weight.dim() != 2 or 0 in weight.shape or not weight.is_floating_point():
        kind = f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
        raise ValueError(f"{op}: weight is {kind}; it must be floats [V, d], at least [1, 1]")
    V, d = weight.shape
    if not 1 <= K <= V:
        raise ValueError(f"{op}: K={K} must be from 1 to the {V} tokens")
    if counts is not None and list(counts.shape) != [V]:
        raise ValueError(f"{op}: counts has shape {list(counts.shape)}, expected [{V}]")
    if states is not None and (states.dim() != 2 or states.shape[1] != d or not len(states)):
        raise ValueError(f"{op}: states has shape {list(states.shape)}, expected [at least 1, {d}]")
    if not 1 <= levels <= K:
        raise ValueError(f"{op}: levels={levels} must be from 1 to the {K} rows of the codebook")
    sizes = _sizes(K, levels)
    most = V if sizes[-1] >= V else sizes[0] - 1 if sizes[-1] > 1 else 0
    if singles is not None and not 0 <= singles <= most:
        raise ValueError(f"{op}: singles={singles} must be from 0 to {most}, as the levels have {sizes} rows")
    for name, values in (("weight", weight), ("counts", counts), ("states", states)):
        if values is not None and not (values.isfinite().all() and (name != "counts" or (values >= 0).all())):
            what = "finite and not negative" if name == "counts" else "finite"
            raise ValueError(f"{op}: {name} has values that are not {what}")
