"""GPTQ: columns are rounded one after the other, and what a column loses the later ones make up for."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...int4_weight import Int4Weight
from .grid import Grid, codes_of, grouped, to_weight

Order = Literal["columns", "groups", "activations"]
BLOCK = 128


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor U of (gram + damping mean(diag) I)^-1 = U^T U; damping grows tenfold until it exists."""
    mean = gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    for attempt in range(6):
        damped = gram + torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device) * mean * damping * 10**attempt
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                return upper
    raise ValueError(f"gptq: X^T X of {gram.shape[0]} inputs cannot be inverted, even damped by {damping * 1e5}")


def column_order(importance: Tensor, group_size: int, order: Order) -> Tensor:
    """The order in which columns are rounded, int64 `[K]`."""
    K = importance.shape[0]
    if order == "columns":
        return torch.arange(K, device=importance.device)
    if order == "activations":
        return importance.argsort(descending=True, stable=True)
    by_group = importance.view(-1, group_size)
    groups = by_group.amax(1).argsort(descending=True, stable=True)
    inside = by_group[groups].argsort(dim=1, descending=True, stable=True)
    return (groups[:, None] * group_size + inside).flatten()


def gptq(
    weight: Tensor,
    gram: Tensor,
    group_size: int = 64,
    grid: Grid | None = None,
    *,
    order: Order = "groups",
    damping: float = 0.01,
) -> Int4Weight:
    """The weight whose outputs on the calibration inputs are nearest: minimises tr((W - W')^T X^T X (W - W')).

    Columns are rounded in `order`; after column j, the columns still to come move by -(w_j - w'_j) U_j / U_jj, with
    U^T U = (X^T X)^-1, in blocks of 128. A group's scale is found when its first column is reached.

    Args:
        weight: `[N, K]` fp32, bf16 or fp16.
        gram: X^T X of the layer's inputs, fp32 `[K, K]`, up to a positive factor.
        group_size: 16, 32, 64, 128, or -1 for one scale a row; it divides K.
        grid: how scales are found.
        order: "columns" as they stand; "groups": groups by their largest mean square input and likewise inside (the
            result needs no permutation); "activations": all columns so, groups are cut from that order and the
            weight permutes its inputs (act-order).
        damping: added to the diagonal, relative to its mean.

    Raises:
        ValueError: a shape, group size or value that does not fit, or a Gram matrix that cannot be inverted.

    Source: Frantar et al., GPTQ (2210.17323), algorithm 1; orders as in AutoGPTQ (desc_act) and GPTQModel
        (act_group_aware).

    >>> x = torch.randn(100, 32)
    >>> gptq(torch.randn(8, 32), x.T @ x, 16)
    Int4Weight(N=8, K=32, group_size=16, uint8, scales=float16)
    """
    grid = Grid() if grid is None else grid
    if order not in ("columns", "groups", "activations"):
        raise ValueError(f"gptq: order={order!r} must be columns, groups or activations")
    if damping <= 0:
        raise ValueError(f"gptq: damping={damping} must be above 0")
    N, G, size = grouped("gptq", weight, group_size).shape
    K = G * size
    if tuple(gram.shape) != (K, K):
        raise ValueError(f"gptq: gram has shape {list(gram.shape)}, expected {[K, K]}")
    gram = gram.float().clone()
    dead = gram.diagonal() == 0  # inputs that never occur: their weights do not matter
    gram.diagonal()[dead] = 1
    way = column_order(gram.diagonal(), size, order)
    work = weight.float().masked_fill(dead, 0)[:, way]
    factor = inverse_factor(gram[way][:, way], damping)
    codes = torch.zeros_like(work)
    scales, zeros = torch.ones(N, G, device=work.device), torch.zeros(N, G, device=work.device)
    for first in range(0, K, BLOCK):
        block = work[:, first : first + BLOCK]
        local = factor[first : first + BLOCK, first : first + BLOCK]
        lost = torch.zeros_like(block)
        for i in range(block.shape[1]):
            group, within = divmod(first + i, size)
            if within == 0:
                # The columns of this block are up to date, later ones are brought up to date here.
                ahead = work[:, first + i : first + i + size].clone()
                beyond = first + BLOCK
                if first + i + size > beyond:
                    span = factor[first:beyond, beyond : first + i + size]
                    ahead[:, beyond - first - i :] -= lost @ span
                scales[:, group], zeros[:, group] = grid.fit(ahead)
            s, z = scales[:, group], zeros[:, group]
            codes[:, first + i] = codes_of(block[:, i : i + 1], s, z)[:, 0]
            lost[:, i] = (block[:, i] - (codes[:, first + i] - z) * s) / local[i, i]
            block[:, i + 1 :] -= lost[:, i : i + 1] * local[i, i + 1 :]
        work[:, first + BLOCK :] -= lost @ factor[first : first + BLOCK, first + BLOCK :]
    if order != "groups":
        permutation = way.to(torch.int32) if order == "activations" else None
        return to_weight(codes.view(N, G, size), scales, zeros, grid, permutation)
    back = way.argsort()
    groups = way[::size].div(size, rounding_mode="floor").argsort()
    return to_weight(codes[:, back].view(N, G, size), scales[:, groups], zeros[:, groups], grid)
