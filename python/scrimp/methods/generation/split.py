"""Where a decoding step's time goes: ops of scrimp, and everything outside them (Python, views, small tensors)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch.autograd.profiler import profile

from . import forward
from .cache import KVCache
from .loop import step

STEPS = 20


@dataclass(frozen=True)
class Split:
    """Milliseconds of one decoding step.

    Attributes:
        step: median of steps timed without a profiler.
        ops: for each op of scrimp the time inside it, from the profiler: checks, allocation and kernel.
        calls: for each op its calls in a step.
    """

    step: float
    ops: dict[str, float]
    calls: dict[str, int]

    @property
    def outside(self) -> float:
        """The rest of the step."""
        return self.step - sum(self.ops.values())

    def lines(self) -> list[str]:
        """A table for people."""
        found = [f"one step takes {self.step:.2f} ms: {self.outside:.2f} ms outside the ops, and inside them"]
        for name, spent in sorted(self.ops.items(), key=lambda item: -item[1]):
            found.append(f"  {name:<18} {spent:7.3f} ms  {spent / self.step:6.1%}  {self.calls[name]:4d} calls")
        return found


def measure(cache: KVCache, token: int, steps: int = STEPS) -> Split:
    """Times greedy steps after what the cache holds, and forgets them again.

    Args:
        cache: after a prompt; needs room for 2 `steps` more tokens.
        token: the first token to feed to every sequence.
        steps: how many are timed, and how many are profiled.

    Raises:
        ValueError: the cache has no room.
    """
    held = [len(tokens) for tokens in cache.tokens]
    if max(held) + 2 * steps > cache.capacity:
        raise ValueError(f"the cache has {max(held)} of {cache.capacity} tokens; {2 * steps} steps do not fit")
    tokens: list[int] = [token] * cache.batch
    times: list[float] = []
    try:
        for _ in range(steps):
            start = time.perf_counter()
            tokens = _greedy_step(cache, tokens)
            times.append(1e3 * (time.perf_counter() - start))
        with profile(use_kineto=False) as seen:
            for _ in range(steps):
                tokens = _greedy_step(cache, tokens)
    finally:
        for b, count in enumerate(held):
            cache.keep(b, count)
    spent, calls = {}, {}
    for event in seen.key_averages():
        if event.key.startswith("scrimp::"):
            name = event.key.removeprefix("scrimp::")
            spent[name] = event.cpu_time_total / 1e3 / steps
            calls[name] = event.count // steps
    return Split(median(times), spent, calls)


@torch.inference_mode()
def _greedy_step(cache: KVCache, tokens: Sequence[int]) -> list[int]:
    found: list[int] = forward.logits(cache.model, step(cache, tokens))[:, 0].argmax(-1).tolist()
    return found
