"""Paired timing: ours, peer, ours, peer, ... in one process, with probes of the machine's limits in between."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles
from time import perf_counter_ns

import torch

from .registry import Call, Work

MIN_PAIRS, MAX_PAIRS = 5, 300
WARM_UP_S = 0.1
PROBE_SHARE = 0.25  # of a case's time at most goes to probes once each has run
# Side of the matrix product, and fp32 elements of the stream: 512 MiB are above the last-level caches of large servers
PROBE_SIZES = {"cpu": (1024, 2**27), "cuda": (8192, 2**29)}


@dataclass(frozen=True)
class Spread:
    """Median and 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """The spread of at least two values."""
        tenths = quantiles(values, n=10, method="inclusive")
        return cls(median(values), tenths[1], tenths[7])


@dataclass(frozen=True)
class Probe:
    """A torch call whose speed is a limit of the machine: `amount` is its flops or bytes."""

    call: Call
    amount: float
    is_gemm: bool


@dataclass
class Samples:
    """Seconds: for each peer its own and those of ours right before, for each probe its own."""

    ours: dict[str, list[float]] = field(default_factory=dict)
    peers: dict[str, list[float]] = field(default_factory=dict)
    probes: list[list[float]] = field(default_factory=list)

    def ratio(self, peer: str) -> Spread:
        """Peer over ours, pair by pair: above 1 is faster than the peer."""
        return Spread.of([theirs / mine for mine, theirs in zip(self.ours[peer], self.peers[peer], strict=True)])

    def against(self, peer: str, standard: str) -> float:
        """How fast `peer` is beside `standard`, round by round: above 1 is faster."""
        return median(b / a for a, b in zip(self.peers[peer], self.peers[standard], strict=True))


@dataclass(frozen=True)
class Limits:
    """Rates of the machine: flops/s of a matrix product, bytes/s of a stream."""

    gemm: float
    stream: float

    def seconds(self, work: Work) -> float:
        """The least time in which `work` can be done."""
        return max(work.bytes / self.stream, work.flops / self.gemm)


def seconds(call: Call) -> float:
    """One call's wall time, or what a call with a clock of its own says (`gpu`)."""
    if (own := getattr(call, "seconds", None)) is not None:
        return float(own())
    start = perf_counter_ns()
    call()
    return (perf_counter_ns() - start) * 1e-9


def warm_up(call: Call) -> None:
    """At least one call, and calls for a tenth of a second."""
    spent = 0.0
    while spent < WARM_UP_S:
        spent += max(seconds(call), WARM_UP_S / 100)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch computes with `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def probes(dtype: torch.dtype, size: int, elements: int) -> list[Probe]:
    """torch.mm in fp32 and in `dtype`; torch.sum and a copy of fp32 memory."""
    found = []
    for kind in dict.fromkeys((torch.float32, dtype)):
        a, b, c = (torch.full((size, size), 0.01, dtype=kind) for _ in range(3))
        found.append(Probe(lambda a=a, b=b, c=c: torch.mm(a, b, out=c), 2 * size**3, True))  # type: ignore[misc]
    memory = torch.ones(elements)
    half, target = memory.chunk(2)
    found.append(Probe(memory.sum, 4 * elements, False))
    found.append(Probe(lambda: target.copy_(half), 4 * elements, False))
    return found


def limits(found: list[Probe], samples: Samples) -> Limits:
    """The best median rate of each kind; the stream rate is therefore never below torch.sum's."""
    rates: dict[bool, float] = {True: 0.0, False: 0.0}
    for probe, times in zip(found, samples.probes, strict=True):
        rates[probe.is_gemm] = max(rates[probe.is_gemm], probe.amount / median(times))
    return Limits(rates[True], rates[False])


def interleave(ours: Call, peers: Mapping[str, Call], found: list[Probe], budget_s: float) -> Samples:
    """Times ours before every peer, round after round, until `budget_s` is spent; warm callables.

    At least MIN_PAIRS and at most MAX_PAIRS rounds; the probes run in the first round and then as often as
    PROBE_SHARE allows.
    """
    samples = Samples({peer: [] for peer in peers}, {peer: [] for peer in peers}, [[] for _ in found])
    spent = probing = 0.0
    rounds = 0
    collecting = gc.isenabled()
    gc.disable()
    try:
        while rounds < MIN_PAIRS or (spent < budget_s and rounds < MAX_PAIRS):
            for peer, call in peers.items():
                samples.ours[peer].append(seconds(ours))
                samples.peers[peer].append(seconds(call))
                spent += samples.ours[peer][-1] + samples.peers[peer][-1]
            if probing <= PROBE_SHARE * spent or not rounds:
                for probe, times in zip(found, samples.probes, strict=True):
                    times.append(seconds(probe.call))
                    probing, spent = probing + times[-1], spent + times[-1]
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return samples
