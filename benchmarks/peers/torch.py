"""Plain torch operators, one after the other."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear as linear_of

from ..registry import Peer

DISTRIBUTION = "torch"


def available() -> str | None:
    """Always there."""
    return None


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """What a user writes: no case of empty rows, no layout of its own."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = torch.exp(lse_a - lse).unsqueeze(-1), torch.exp(lse_b - lse).unsqueeze(-1)
    return (weight_a * out_a + weight_b * out_b).to(out_a.dtype), lse


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Peer:
    """Six operators, two of them over the outputs."""
    return Peer(lambda: merge(out_a, lse_a, out_b, lse_b))


def linear(x: Tensor, turns: Iterator[list[Tensor]], added: Tensor | None) -> Peer:
    """One F.linear for each weight, as a model calls them; their results stay apart."""

    def call() -> list[Tensor]:
        parts = [linear_of(x, weight) for weight in next(turns)]
        return parts if added is None else [part + added for part in parts]

    return Peer(call, same=len(call()) == 1)
