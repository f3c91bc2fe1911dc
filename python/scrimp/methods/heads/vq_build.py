"""Codes and codebooks for the rows of a trained head: weighted k-means, codes of one token, residual codes."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 4096  # rows whose distances to all centroids are in memory at a time
RIDGE = 1e-3  # of the states' mean square, added to their second moments


def nearest(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance `[N]` and index `[N]` of the nearest centroid of each row; of equal ones the first."""
    norms = centroids.square().sum(1)
    found = [(norms - 2 * some @ centroids.T).min(1) for some in rows.split(CHUNK)]
    distance = torch.cat([part.values for part in found]) + rows.square().sum(1)
    return distance.clamp(min=0), torch.cat([part.indices for part in found])


def means(rows: Tensor, index: Tensor, K: int, weights: Tensor) -> Tensor:
    """Weighted mean `[K, d]` of the rows of each index; zeros where there is none."""
    sums = rows.new_zeros(K, rows.shape[1]).index_add_(0, index, rows * weights[:, None])
    return sums / rows.new_zeros(K).index_add_(0, index, weights).clamp(min=torch.finfo(rows.dtype).tiny)[:, None]


def k_means(rows: Tensor, K: int, weights: Tensor, iterations: int, generator: torch.Generator) -> Tensor:
    """Index `[N]` of the centroid of each row.

    Lloyd's algorithm from K rows drawn by weight; a centroid without a row moves to the row that costs most.

    Args:
        rows: `[N, d]`, N at least K.
        K: centroids, at least 1.
        weights: `[N]`, positive: what a row's squared distance counts.
        iterations: at most.
        generator: of the first centroids.
    """
    first = torch.log(weights) - torch.empty_like(weights).exponential_(generator=generator).log()
    centroids = rows[first.topk(K).indices]
    distance, index = nearest(rows, centroids)
    for _ in range(iterations):
        empty = (torch.bincount(index, minlength=K) == 0).nonzero().view(-1)
        centroids = means(rows, index, K, weights)
        centroids[empty] = rows[(distance * weights).topk(len(empty)).indices]
        before = index
        distance, index = nearest(rows, centroids)
        if torch.equal(index, before):
            break
    return index


def assign(rows: Tensor, K: int, weights: Tensor, fixed: Tensor, iterations: int, generator: torch.Generator) -> Tensor:
    """Codes `[V]` below K: those of `fixed` where they are not -1, for the others the codes behind them by k-means."""
    codes, free, taken = fixed.clone(), fixed < 0, int(fixed.max()) + 1
    if free.any():
        left = min(K - taken, int(free.sum()))
        codes[free] = taken + k_means(rows[free], left, weights[free], iterations, generator)
    return codes


def metric(states: Tensor) -> Tensor:
    """L `[d, d]` with |w L|^2 the mean of (w . h)^2 over hidden states h `[n, d]`, and a little of |w|^2."""
    moments = states.T @ states / len(states)
    ridge = RIDGE * moments.diagonal().mean().clamp(min=1e-20)
    return torch.linalg.cholesky(moments + ridge * torch.eye(len(moments)))
