"""CostCurve: what a pass of so many rows costs on this machine, measured."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Mapping

import torch

from ..generation import forward
from ..generation.cache import KVCache
from ..generation.model import DecoderModel

SIZES = (1, 4, 8, 16, 32, 64)
FADE = 0.1  # share of a new measurement


class CostCurve:
    """Seconds by rows: measured points, linear in between and beyond; more rows never cost less.

    Args:
        points: rows -> seconds, of at least one number of rows.

    Raises:
        ValueError: no points, or some that are not positive.
    """

    def __init__(self, points: Mapping[int, float]) -> None:
        if not points or min(points) < 1 or min(points.values()) <= 0:
            raise ValueError(f"CostCurve: {points} must give positive seconds of at least one number of rows")
        self._points = dict(points)
        self._rising = self._risen()

    @property
    def points(self) -> dict[int, float]:
        """Rows -> seconds."""
        return dict(self._rising)

    def _risen(self) -> list[tuple[int, float]]:
        """A time above that of more rows was disturbed and counts as theirs."""
        rising: list[tuple[int, float]] = []
        for rows, seconds in sorted(self._points.items(), reverse=True):
            rising.append((rows, min(seconds, rising[-1][1]) if rising else seconds))
        return rising[::-1]

    def __call__(self, rows: int) -> float:
        known = self._rising
        if len(known) == 1 or rows <= known[0][0]:
            return known[0][1]
        above = bisect_left(known, (rows, 0.0))
        (r0, s0), (r1, s1) = known[above - 1 : above + 1] if above < len(known) else known[-2:]
        return s0 + (s1 - s0) * (rows - r0) / (r1 - r0)

    def note(self, rows: int, seconds: float) -> None:
        """Takes in the time of a real pass; one that was disturbed counts little."""
        before = self(rows)
        self._points[rows] = before + FADE * (min(seconds, 2 * before) - before)
        self._rising = self._risen()

    @classmethod
    @torch.inference_mode()
    def measure(cls, model: DecoderModel, limit: int = forward.MAX_ROWS, repeats: int = 2) -> CostCurve:
        """Times passes of the model with logits of every row, after an empty text."""
        cache = KVCache(model, 1, min(limit, model.context))
        start = torch.zeros(1, dtype=torch.int32, device=model.device)
        points: dict[int, float] = {}
        for rows in [size for size in SIZES if size <= cache.capacity]:
            ids = torch.zeros(1, rows, dtype=torch.int64, device=model.device)
            times = []
            for _ in range(repeats + (rows == 1)):
                begin = time.perf_counter()
                forward.logits(model, forward.rows(model, cache.keys, cache.values, ids, start))[0, 0, 0].item()
                times.append(time.perf_counter() - begin)
            points[rows] = min(times)
        return cls(points)
