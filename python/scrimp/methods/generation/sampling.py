"""Choosing a token: filters as in transformers, and noise that depends on (seed, position, token) alone.

A token is drawn as argmax_i(logit_i / temperature + g_i) with Gumbel noise g_i = -log(-log(u_i)) (which draws from the
softmax), where u_i is a counter-based uniform number: a hash of the sequence's seed, the absolute position and the
token id. Whatever computes the logits, in whatever batch or chunk, gives the same text; and a method that sees only
some tokens' logits can still draw the same token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._registry import OPS
from ...ops._noise import signed

COLDEST, HOTTEST = 1e-4, 1e4  # temperatures by which logits can be divided without leaving what fp32 can hold

_tree_accept = OPS["tree_accept"].call


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits.

    Attributes:
        temperature: 0 takes the largest logit (of equal ones the lowest id); the other fields matter above 0 only.
        top_k: keep the k largest logits (and equals of the last); 0 keeps all.
        top_p: then keep the fewest tokens whose probabilities sum to at least top_p.
        min_p: then keep tokens of at least min_p times the largest probability.
        seed: of the sequence.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be finite and not negative")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be from 0 to 1")

    @property
    def largest(self) -> int:
        """How many of the largest logits the choice depends on, with equals of the last above 1; 0 for all."""
        if self.temperature == 0:
            return 1
        return max(self.top_k, 2) if self.top_k and COLDEST <= self.temperature <= HOTTEST else 0

    @property
    def filters(self) -> bool:
        """Whether some tokens are left out before one is drawn."""
        return self.temperature > 0 and bool(self.top_k or self.top_p < 1 or self.min_p)


def kept(logits: Tensor, sampling: Sampling) -> Tensor:
    """Ids of the tokens that the filters keep, ascending; logits `[V]` fp32 already divided by the temperature."""
    ids = torch.arange(logits.shape[0], device=logits.device)
    if 0 < sampling.top_k < logits.shape[0]:
        ids = (logits >= logits.topk(sampling.top_k).values[-1]).nonzero().view(-1)
    if sampling.top_p < 1:
        ids = _nucleus(logits, ids, sampling.top_p)
    if sampling.min_p > 0:
        some = logits[ids]
        ids = ids[some >= some.max() + math.log(sampling.min_p)]
    return ids


def _nucleus(logits: Tensor, ids: Tensor, top_p: float) -> Tensor:
    """The fewest of `ids` whose probabilities among `ids` sum to at least top_p; of equal ones the lower id first."""
    some = logits[ids].double()
    total = some.logsumexp(0)
    most = min(1024, ids.numel())
    while True:
        low = some.topk(most).values[-1]
        first = (some >= low).nonzero().view(-1)  # ascending ids, so that the stable sort puts equals in their order
        order = first[some[first].sort(descending=True, stable=True).indices]
        before = (some[order] - total).exp().cumsum(0)
        if before[-1] >= top_p or most == ids.numel():
            needed = int((before < top_p).sum()) + 1
            return ids[order[:needed].sort().values]
        most = min(8 * most, ids.numel())


def choose(logits: Tensor, position: int, sampling: Sampling) -> int:
    """The token for absolute position `position` from logits `[V]`.

    Raises:
        ValueError: a logit is NaN, or none is finite.
    """
    row = logits.float()
    if sampling.filters:
        scaled = row / sampling.temperature
        if math.isfinite(float(scaled.max())):
            ids = kept(scaled, sampling)
            row = torch.full_like(row, -math.inf).index_copy_(0, ids, row[ids])
    one = torch.zeros(1, 1, dtype=torch.int64, device=row.device)
    numbers = (torch.tensor([number], device=row.device) for number in (signed(sampling.seed), position))
    heat = torch.tensor([sampling.temperature], dtype=torch.float32, device=row.device)
    token = int(_tree_accept(row[None, None], one, one.int() - 1, heat, *numbers)[1])
    return token if token >= 0 else check(int(logits.argmax()), logits)


def check(token: int, logits: Tensor) -> int:
    """The token, if its logit is a number that an argmax may choose."""
    value = float(logits[token])
    if value != value:
        raise ValueError(f"the logit of token {token} is NaN: the model's weights or inputs are broken")
    if value == -math.inf:
        raise ValueError("no token is left: logits processors and filters gave all of them minus infinity")
    return token
