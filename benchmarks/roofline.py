"""What a call's kernels do, counted from shapes, and the time that a named GPU's data sheet allows for it.

`benchmarks/<op>_cost.py` holds an op's formulas: `count(*flat) -> Count` of the kernels in Triton for the same flat
arguments as the op's `launches` (large tensors may be on the meta device), `count_cuda(*flat)` of those in CUDA C++,
and `cases() -> list[CountedCase]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .devices import Device

ASSUMPTIONS = (
    "no kernel here was timed on a GPU: the time is the least that the peak rates of the data sheet allow",
    "memory, tensor cores and exponentials work at the same time, each at its peak; launches cost nothing",
    "bytes that are read again come from the last-level cache if what must stay there fits, else from memory",
)


@dataclass(frozen=True)
class Count:
    """The work of one call, summed over the blocks of all its launches.

    Args:
        bytes: asked for by global loads and stores, a byte as often as some block asks for it; masked lanes ask for
            none. The emulator counts the same (`Counters.useful_bytes`), and a test compares the two.
        unique_bytes: every byte that is touched, once: the least that crosses the memory bus.
        flops_issued: of tensor-core instructions, masked and padded elements included (2 per multiply-add).
        flops_useful: of them those that the op's formula needs.
        exps: exponentials that are computed, masked ones included.
        resident_bytes: what has to stay in the L2 cache so that only `unique_bytes` cross the memory bus (for
            attention: K and V of the heads that run at the same time); 0 where nothing is read twice.
    """

    bytes: int
    unique_bytes: int
    flops_issued: int = 0
    flops_useful: int = 0
    exps: int = 0
    resident_bytes: int = 0

    def __add__(self, other: Count) -> Count:
        """One after the other: sums, and the larger of the resident sets."""
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Count(**sums | {"resident_bytes": max(self.resident_bytes, other.resident_bytes)})


@dataclass(frozen=True)
class CountedCase:
    """One line of a prediction.

    Args:
        name: unique within the op.
        dtype: "bf16", "fp16" or "fp32": the rate of the tensor cores.
        fields: what the row says of the case: batch, heads, kv_heads, n, head_dim, plan, density, ...
        count: computes the counts.
        cuda: computes those of the kernels in CUDA C++, where they take the case; `count` is Triton's then.
    """

    name: str
    dtype: str
    count: Callable[[], Count]
    fields: Mapping[str, Any] = field(default_factory=dict)
    cuda: Callable[[], Count] | None = None


@dataclass(frozen=True)
class Prediction:
    """Seconds of each resource on one device; the largest is the limit."""

    seconds: Mapping[str, float]
    memory_bytes: int

    @property
    def limit(self) -> str:
        """The resource that takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def time(self) -> float:
        """Predicted seconds of the call."""
        return self.seconds[self.limit]


def predict(count: Count, device: Device, dtype: str) -> Prediction:
    """What `ASSUMPTIONS` make of a count; products in fp32 do not run on tensor cores."""
    moved = count.unique_bytes if count.resident_bytes <= device.cache else count.bytes
    unit, rate = ("fp32", "32") if dtype == "fp32" else ("tensor cores", "16")
    seconds = {
        "memory": moved / device.memory,
        unit: count.flops_issued / device.flops[rate],
        "exponentials": count.exps / device.exps if device.exps else 0.0,
    }
    return Prediction(seconds, moved)


# An op's `AGAINST`: name of somebody else's kernel -> function that gives, by case name, (ours, theirs).
Against = Mapping[str, Callable[[], Mapping[str, tuple[Count, Count]]]]
