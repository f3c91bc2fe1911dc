"""Timing on a GPU: calls captured in CUDA graphs and timed by events, so that the host's part is left out."""

from math import ceil
from time import perf_counter
from typing import Any

import torch

from .registry import Call

GRAPH_S = 1e-3  # a graph holds as many calls as last about so long
MAX_CALLS = 64


class Graph:
    """`call` captured so often, one after the other, that copies of its inputs take turns."""

    def __init__(self, call: Call) -> None:
        self.call = call  # the graph holds addresses only, so its inputs must live as long
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles and allocates what only a first call does
            call()
            call()
        torch.cuda.synchronize()
        start = perf_counter()
        call()
        torch.cuda.synchronize()
        self.calls = min(MAX_CALLS, ceil(GRAPH_S / (perf_counter() - start)))
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(self.calls):
                self.result: Any = call()

    def __call__(self) -> Any:
        """The results of the last call of a replay."""
        self.graph.replay()
        return self.result

    def seconds(self) -> float:
        """One call's time within a replay."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / self.calls


class Synchronised:
    """A call that cannot be captured, as whole generations: wall time until the GPU is done."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def __call__(self) -> Any:
        """The call's own result."""
        return self.call()

    def seconds(self) -> float:
        """The host's time and the GPU's."""
        torch.cuda.synchronize()
        start = perf_counter()
        self.call()
        torch.cuda.synchronize()
        return perf_counter() - start
