"""The head that a VQ head stands for: one row of a matrix for every token, by torch's own operators."""

from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional

from ..registry import Peer
from .torch import chosen

DISTRIBUTION = "torch"


def available() -> str | None:
    """Always there."""
    return None


def vq_logits(h: Tensor, heads: Iterator[tuple[Tensor, Tensor]], matrices: Iterator[Tensor]) -> Peer:
    """F.linear with the rows of the tokens' codes."""
    return Peer(lambda: functional.linear(h, next(matrices)))


def vq_sample(
    h: Tensor, heads: Iterator[tuple[Tensor, Tensor]], matrices: Iterator[Tensor], heat: float, top_p: float
) -> Peer:
    """F.linear, and a choice from all logits."""
    return Peer(lambda: chosen(functional.linear(h, next(matrices)), heat, top_p), same=False)
