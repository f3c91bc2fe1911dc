"""tree_accept: chooses a token after each row of a token tree and walks down while a child holds the token chosen."""

import math

import torch
from torch import Tensor

from .._registry import register
from ._check import FLOATS, check_dtype, check_same
from ._noise import gumbel

SCHEMA = (
    "(Tensor logits, Tensor tokens, Tensor parents, Tensor temperature, Tensor seed, Tensor position)"
    " -> (Tensor, Tensor)"
)
OP = "tree_accept"


def _check(
    logits: Tensor, tokens: Tensor, parents: Tensor, temperature: Tensor, seed: Tensor, position: Tensor
) -> None:
    if logits.dim() != 3:
        raise ValueError(f"{OP}: logits must be [B, T, V], got shape {list(logits.shape)}")
    B, T, V = logits.shape
    check_dtype(OP, "logits", logits, FLOATS)
    check_dtype(OP, "tokens", tokens, (torch.int64,))
    check_dtype(OP, "parents", parents, (torch.int32,))
    check_dtype(OP, "temperature", temperature, (torch.float32,))
    check_dtype(OP, "seed", seed, (torch.int64,))
    check_dtype(OP, "position", position, (torch.int64,))
    check_same(OP, "device", **{name: value.device for name, value in locals().items() if isinstance(value, Tensor)})
    check_same(OP, "shape", expected=(B, T), tokens=tuple(tokens.shape), parents=tuple(parents.shape))
    shapes = {"temperature": tuple(temperature.shape), "seed": tuple(seed.shape), "position": tuple(position.shape)}
    check_same(OP, "shape", expected=(B,), **shapes)
    if V == 0 and B * T > 0:
        raise ValueError(f"{OP}: logits of shape {list(logits.shape)} offer no token")


def _check_values(parents: Tensor, temperature: Tensor) -> None:
    for b, row in enumerate(parents.tolist()):
        for t, parent in enumerate(row):
            if not -1 <= parent < t:
                raise ValueError(f"{OP}: parents[{b}, {t}]={parent} is not an earlier row, and not -1")
    for b, value in enumerate(temperature.tolist()):
        if not 0 <= value < math.inf:
            raise ValueError(f"{OP}: temperature[{b}]={value} must be finite and not negative")


def _fake(logits: Tensor, tokens: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
    _check(logits, tokens, *args)
    return tokens.new_empty(tokens.shape, dtype=torch.int32), tokens.new_empty(tokens.shape)


def _choose(logits: Tensor, temperature: float, seed: int, position: int) -> int:
    """The token for `position` from logits `[V]`; -1 where none can be chosen."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = precise / temperature if temperature else precise
    best = scores.max()
    if best.isnan() or best == -torch.inf:
        return -1
    if temperature == 0 or best == torch.inf:
        return int(scores.argmax())
    ids = torch.arange(len(scores), device=scores.device)
    return int((scores.double() + gumbel(seed, position, ids)).argmax())


def reference(
    logits: Tensor, tokens: Tensor, parents: Tensor, temperature: Tensor, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    _check(logits, tokens, parents, temperature, seed, position)
    _check_values(parents, temperature)
    path = torch.full_like(parents, -1).contiguous()
    chosen = torch.full_like(tokens, -1).contiguous()
    B, T = tokens.shape
    held, above, heat = tokens.tolist(), parents.tolist(), temperature.tolist()
    for b in range(B):
        node: int | None = 0 if T else None
        depth = 0
        while node is not None:
            path[b, depth] = node
            token = _choose(logits[b, node], heat[b], int(seed[b]), int(position[b]) + depth)
            chosen[b, depth] = token
            children = (t for t in range(node + 1, T) if above[b][t] == node and held[b][t] == token)
            node, depth = next(children, None), depth + 1
    return path, chosen


_call = register(OP, SCHEMA, fake=_fake, reference=reference)


def tree_accept(
    logits: Tensor, tokens: Tensor, parents: Tensor, temperature: Tensor, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Chooses the token after row 0 of each sequence's tree, steps to the child that holds it, and so on down.

    chosen_i = argmax_v(logits[path_i, v] / temperature + g_v);  path_0 = 0, path_{i+1} is path_i's child with chosen_i

    g_v is Gumbel noise of (seed, position + i, v) alone (splitmix64), so that the tokens are those of decoding one by
    one with that seed, whatever the tree: a child is accepted with the probability that the model gives its token. At
    temperature 0 there is no noise, and of equal logits the lowest id wins.

    Args:
        logits: `[B, T, V]` fp32 or bf16, of the token after each row; any strides. Only rows on the walk count.
        tokens: int64 `[B, T]`, the token that each row holds; that of row 0 does not matter.
        parents: int32 `[B, T]`, an earlier row; -1 for row 0 and for rows that are no part of the tree.
        temperature: fp32 `[B]`, finite, not negative.
        seed: int64 `[B]`.
        position: int64 `[B]`, absolute position of the token after row 0.

    Returns:
        path int32 `[B, T]`, the rows walked, ascending, then -1; chosen int64 `[B, T]`, the token chosen at each of
        them, then -1: as many new tokens as there are rows on the path, the last one held by no row. A chosen token is
        -1 where none can be chosen: a logit on the walk is NaN, or all are -inf.

    Raises:
        ValueError: a shape, device or dtype that does not fit, with the value.
        RuntimeError: parents or temperatures out of range (ValueError by the reference).

    The hash is the same everywhere, its logarithm each device's own: tokens drawn on two devices are equal unless two
    noisy scores are within its rounding, some 2^-50 of their size.

    Source: token matching of SpecInfer (2305.09781), section 4; noise shared with plain decoding as in Gumbel-max.

    >>> import torch, scrimp
    >>> logits = torch.eye(6)[torch.tensor([[4, 5, 2]])]  # rows 0, 1, 2 want tokens 4, 5, 2
    >>> tree = torch.tensor([[0, 3, 4]]), torch.tensor([[-1, 0, 0]], dtype=torch.int32)
    >>> one = torch.zeros(1, dtype=torch.int64)
    >>> [x.tolist() for x in scrimp.ops.tree_accept(logits, *tree, torch.zeros(1), one, one)]
    [[[0, 2, -1]], [[4, 2, -1]]]
    """
    try:
        return _call(logits, tokens, parents, temperature, seed, position)
    except RuntimeError:
        _check(logits, tokens, parents, temperature, seed, position)  # names what does not fit
        raise
