"""Where a decoding step's time goes: the ops, and the overhead (Python, dispatch, checks, small tensors)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch.autograd.profiler_legacy import profile

from . import forward
from .cache import KVCache
from .linear import DenseLinear
from .loop import step
from .model import POSITION_BLOCK, DecoderLayer, DecoderModel, Norm, Positions

STEPS = 20


@dataclass(frozen=True)
class Split:
    """Milliseconds of one decoding step.

    Attributes:
        step: median of the timed steps.
        overhead: the fastest step of a model with the same layers whose tensors are tiny: all but the kernels' work.
        ops: for each op of scrimp the time inside it by the profiler, which adds some microseconds to every call, when
            the layers' ops are called one by one (a step itself calls `decoder_layers` where it can).
        calls: for each op its calls in such a step.
    """

    step: float
    overhead: float
    ops: dict[str, float]
    calls: dict[str, int]

    def lines(self) -> list[str]:
        """A table for people."""
        found = [f"one step takes {self.step:.2f} ms, of which {self.overhead:.2f} ms are overhead; op by op"]
        for name, spent in sorted(self.ops.items(), key=lambda item: -item[1]):
            found.append(f"  {name:<18} {spent:7.3f} ms  {self.calls[name]:4d} calls")
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
    model, held = cache.model, [len(tokens) for tokens in cache.tokens]
    if max(held) + 2 * steps > cache.capacity:
        raise ValueError(f"the cache has {max(held)} of {cache.capacity} tokens; {2 * steps} steps do not fit")
    tokens: list[int] = [token] * cache.batch
    times: list[float] = []
    try:
        for _ in range(steps):
            start = time.perf_counter()
            tokens = _greedy_step(cache, tokens)
            times.append(1e3 * (time.perf_counter() - start))
        cache.model = replace(model, packing=False)  # op by op, so that each is seen
        with profile() as seen:
            for _ in range(steps):
                tokens = _greedy_step(cache, tokens)
    finally:
        cache.model = model
        for b, count in enumerate(held):
            cache.keep(b, count)
    spent, calls = {}, {}
    for event in seen.key_averages():
        if event.key.startswith("scrimp::"):
            name = event.key.removeprefix("scrimp::")
            spent[name] = event.cpu_time_total / 1e3 / steps
            calls[name] = event.count // steps
    return Split(median(times), _overhead(model, cache.batch, steps), spent, calls)


def _overhead(model: DecoderModel, batch: int, steps: int) -> float:
    """Milliseconds of the fastest step of the tiny twin: what disturbs a step only adds to it."""
    cache = KVCache(_twin(model), batch, 2 * steps + 1)
    tokens, best = [0] * batch, math.inf
    for _ in range(2 * steps):
        start = time.perf_counter()
        tokens = _greedy_step(cache, tokens)
        best = min(best, 1e3 * (time.perf_counter() - start))
    return best


def _twin(model: DecoderModel) -> DecoderModel:
    """A model that takes the same steps, of dense layers with two heads of eight numbers."""
    like: Any = {"dtype": model.dtype, "device": model.device}
    norm = Norm(torch.ones(16, **like), 1e-6)
    own = Norm(torch.ones(8, **like), 1e-6)

    def linear(*sizes: int) -> DenseLinear:
        return DenseLinear([torch.zeros(size, 16, **like) for size in sizes], [])

    layers = tuple(
        DecoderLayer(
            attention_norm=norm,
            qkv=linear(16, 8, 8),
            q_norm=layer.q_norm and own,
            k_norm=layer.k_norm and own,
            o=linear(16),
            mlp_norm=norm,
            gate_up=linear(16, 16),
            down=linear(16),
            window=layer.window,
        )
        for layer in model.layers
    )
    small: Any = {"embedding": torch.zeros(16, 16, **like), "layers": layers, "norm": norm, "head": linear(16)}
    still = torch.ones(POSITION_BLOCK, 8, device=model.device), torch.zeros(POSITION_BLOCK, 8, device=model.device)
    positions = Positions(lambda _: still)
    return replace(model, **small, positions=positions, heads=2, kv_heads=1, head_dim=8, weights=())


@torch.inference_mode()
def _greedy_step(cache: KVCache, tokens: Sequence[int]) -> list[int]:
    found: list[int] = forward.logits(cache.model, step(cache, tokens), largest=1)[:, 0].argmax(-1).tolist()
    return found
