"""What the evidence suite must know of an op's kernels in CUDA C++: cases to execute, bytes, faults to plant."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cuda_device import ROOT, Run
from mutations import Change, at_line
from scrimp.benchmarks.roofline import Count
from subjects.subject import Case, Flat, Mutant


@dataclass(frozen=True)
class CudaSubject:
    """One op's entry. Kernels are named as in C++, "merge_attention_kernel<__half, 8>", or by how such a name begins.

    Args:
        op: its name; `csrc/cuda/<op>.cu` registers it.
        cases: executed on the emulator; at most 40, chosen pairwise, and each kernel must run in one of them.
        warp_cases: names of those that also run warp by warp; at most 4.
        check: raises unless results are right for the arguments.
        reference_launch: name of the case whose counters go into the passport.
        least_bytes: what a call must move, by formula; the reference launch may ask for 5 % more. None where the op
            is not bound by memory.
        count: what the op's own kernels do, by formula; None where its own test compares it.
        exact_bytes: whether the formula knows all bytes of a call; of others it is a bound from above.
        mutant_case: name of the case the mutants run on, unless they name another.
        mutants: by name; at least 10 that must be caught in every kernel.
        idle: calls that launch nothing, which `check` takes, too.
        bad: name -> change of the mutant case's arguments, words of the message that refuses them.
        shared: kernel -> bytes of dynamic shared memory that its launches ask for.
        keep, check_kept: a kernel, and what raises unless the memory that its pointers lead to is right after it ran;
            for what results do not show.
        tensor_kernels: kernels whose loops must hold tensor-core instructions and only 128-bit or asynchronous global
            loads; with the number of their loops that may load indices otherwise.
    """

    op: str
    cases: Mapping[str, Case]
    warp_cases: Sequence[str]
    check: Callable[[Any, Flat], None]
    reference_launch: str
    least_bytes: Callable[[Flat], int] | None
    mutant_case: str
    mutants: Mapping[str, Mutant]
    count: Callable[..., Count] | None = None
    exact_bytes: Callable[[Flat], bool] = lambda _: True
    idle: Mapping[str, Case] = field(default_factory=dict)
    bad: Mapping[str, tuple[Callable[[Flat], Flat], str]] = field(default_factory=dict)
    shared: Mapping[str, int] = field(default_factory=dict)
    tensor_kernels: Mapping[str, int] = field(default_factory=dict)
    keep: str = ""
    check_kept: Callable[[Flat, Sequence[np.ndarray]], None] = lambda args, memory: None

    def check_call(self, called: tuple[Any, Sequence[Run]], args: Flat) -> None:
        """Raises unless results, and the memory that was kept, are right for the arguments."""
        results, runs = called
        self.check(results, args)
        for run in runs:
            if run.kernel == self.keep:
                self.check_kept(args, run.memory)

    def dynamic_shared(self, kernel: str) -> int:
        """Bytes that a launch of `kernel` asks for."""
        return next((size for name, size in self.shared.items() if kernel.startswith(name)), 0)

    def index_loops(self, kernel: str) -> int | None:
        """The entry of `tensor_kernels`; None where there is nothing to demand."""
        return next((loops for name, loops in self.tensor_kernels.items() if kernel.startswith(name)), None)


def source(name: str, folder: str = "cuda") -> Callable[..., Change]:
    """`mutations.at_line` of an op's kernels, or of what kernels share in another folder of csrc.

    source("kv_compact")("if (item >=", pattern, index, replacement)
    """
    return functools.partial(at_line, ROOT / "csrc" / folder / f"{name}.cuh")
