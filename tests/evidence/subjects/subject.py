"""What the evidence suite must know of an op: cases to execute, configurations to compile, faults to plant."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle

Flat = tuple[Any, ...]
Case = Callable[[], Flat]  # makes the op's flat arguments, as CPU tensors; seeded by the test


def against_oracle(op: str) -> Callable[[Any, Flat], None]:
    """The check of an op whose results are those of its reference, within the tolerance of the dtype."""
    return lambda results, args: assert_matches_oracle(results, OPS[op].reference, *args)


@dataclass(frozen=True)
class Mutant:
    """One planted fault in the PTX of one of an op's kernels.

    `kernel` names the kernel; `change` maps its PTX to the faulty one (and must change it). `caught_by` are the kinds
    of fault that may catch it ("value" is a wrong result); empty where it is equivalent on the mutant case, which the
    test then shows: same results, same address ranges, same copies in flight. `short` instead makes a buffer end
    early: argument name to the number of bytes it lacks, with `change` left as it is. `case` names the case on which
    it is run where that is not the subject's `mutant_case`.
    """

    kernel: str
    change: Callable[[str], str] = str
    caught_by: frozenset[str] = frozenset()
    short: Mapping[str, int] = field(default_factory=dict)
    case: str = ""


@dataclass(frozen=True)
class Subject:
    """One op's entry.

    Args:
        op: its name; `scrimp.kernels.<op>.launches` takes its flat arguments.
        cases: executed on the emulator in 16-bit dtypes; at most 40, chosen pairwise.
        warp_cases: names of those that also run warp by warp; at most 4.
        interpreted: executed by the Triton interpreter in fp16 and fp32.
        check: raises unless results are right for the arguments.
        reference_launch: name of the case whose counters go into the passport.
        shipped: name -> flat arguments, on the meta device or small, of every shipped configuration to compile.
        defaults: names of those that every test run compiles for sm_80 and sm_90; `make evidence` compiles all.
        tensor_kernels: kernels whose loops must hold tensor-core instructions, only 128-bit or asynchronous global
            loads, and at least two stages; with the number of their loops that may load indices otherwise.
        exact_bytes: whether the formula's bytes are exact; False where passes over memory depend on values.
        exact_flops: the same of its FLOPs; False where they are the least.
        repeated_exps: how often the formula's exponentials may be computed: several threads hold a row's factors.
        without_tensors: names of those of `shipped` whose products run on no tensor core (fp32 with fp32 precision).
        mutant_case: name of the case the mutants run on, unless they name another.
        mutants: by name.
    """

    op: str
    cases: Mapping[str, Case]
    warp_cases: Sequence[str]
    interpreted: Mapping[str, Case]
    check: Callable[[Any, Flat], None]
    reference_launch: str
    shipped: Mapping[str, Case]
    mutant_case: str
    mutants: Mapping[str, Mutant] = field(default_factory=dict)
    defaults: Sequence[str] = ()
    tensor_kernels: Mapping[str, int] = field(default_factory=dict)
    without_tensors: Sequence[str] = ()
    exact_bytes: bool = True
    exact_flops: bool = True
    repeated_exps: float = 1.25

    def index_loops(self, config: str, kernel: str) -> int | None:
        """The entry of `tensor_kernels`; None where there is nothing to demand."""
        return None if config in self.without_tensors else self.tensor_kernels.get(kernel)


def pairwise(**factors: Sequence[Any]) -> list[dict[str, Any]]:
    """Combinations in which every pair of values of two factors occurs at least once; deterministic and short.

    >>> len(pairwise(a=[0, 1], b=[0, 1], c=[0, 1]))
    4
    """
    names = list(factors)
    sizes = [range(len(factors[name])) for name in names]
    corners = list(itertools.combinations(range(len(names)), 2))
    missing = {(i, a, j, b) for i, j in corners for a in sizes[i] for b in sizes[j]}
    rows = []

    def gain(row: tuple[int, ...]) -> int:
        return sum((i, row[i], j, row[j]) in missing for i, j in corners)

    while missing:
        i, a, j, b = min(missing)
        row = [0] * len(names)
        row[i], row[j] = a, b
        for _ in range(2):  # coordinate ascent on the pairs that are new
            for k in (k for k in range(len(names)) if k not in (i, j)):
                row[k] = max(sizes[k], key=lambda value: gain((*row[:k], value, *row[k + 1 :])))
        missing -= {(i, row[i], j, row[j]) for i, j in corners}
        rows.append({name: factors[name][value] for name, value in zip(names, row, strict=True)})
    return rows
