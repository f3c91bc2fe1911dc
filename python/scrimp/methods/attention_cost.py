"""When sparse attention pays: a cost model of three rates, measured once on the machine at hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .. import ops
from ..sparse_plan import SparsePlan
from .head_patterns import HeadPatterns

N = 1024  # tokens of the measured problem
HEADS = 4


@dataclass(frozen=True)
class AttentionCost:
    """Seconds per (query, key) pair: torch's dense attention, and ours over ranges and over columns.

    >>> from scrimp.methods.attention_cost import AttentionCost
    >>> AttentionCost(dense=4e-9, ranges=3e-9, columns=4e-9) == AttentionCost(4e-9, 3e-9, 4e-9)
    True
    """

    dense: float
    ranges: float
    columns: float

    @staticmethod
    @lru_cache
    def measured(head_dim: int, dtype: torch.dtype, device: str, threads: int) -> AttentionCost:
        """The rates of this machine, from a few milliseconds of work; kept for the process.

        Args:
            head_dim: D.
            dtype: of q, k and v.
            device: type of the device.
            threads: torch's number of threads, part of the key.
        """
        q, k, v = (torch.randn(1, heads, N, head_dim, device=device).to(dtype) for heads in (HEADS, 1, 1))
        every = SparsePlan.dense(N, device=device)
        third = torch.arange(0, N, 3)
        scattered = SparsePlan.vertical_slash(N, columns=third.tolist(), diagonals=[], causal=False, device=device)
        pairs = HEADS * N * (N + 64) / 2
        runs: dict[str, tuple[Callable[[], Tensor], float]] = {
            "dense": (lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), pairs),
            "ranges": (lambda: ops.sparse_attention(q, k, v, every)[0], pairs),
            "columns": (lambda: ops.sparse_attention(q, k, v, scattered)[0], HEADS * N * third.numel()),
        }
        best = dict.fromkeys(runs, float("inf"))
        with torch.no_grad():
            for _ in range(4):  # in turn, so that a disturbance hits all alike
                for name, (run, count) in runs.items():
                    start = time.perf_counter()
                    run().flatten()[0].item()  # waits for the device
                    best[name] = min(best[name], (time.perf_counter() - start) / count)
        return AttentionCost(**best)

    def predict(self, patterns: HeadPatterns, layer: int, n_q: int, n_k: int) -> tuple[float, float]:
        """Seconds of one layer's attention over a sequence: sparse (with its estimate) and dense."""
        ranges, columns = patterns.expected_keys(layer, n_q, n_k)
        dynamic = int((patterns.columns[layer] > 0).sum())
        estimated = 2 * patterns.samples / patterns.segment * dynamic * (n_k - n_q / 2)  # keys scored per query, twice
        sparse = n_q * (self.ranges * ranges + self.columns * columns + self.ranges * estimated / 2)
        return sparse, n_q * self.dense * patterns.heads * (n_k - n_q / 2)
