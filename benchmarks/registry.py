"""What is measured: each op's cases live in a file of this folder named after the op, peers in `peers/<peer>.py`.

A case file has two functions: `cases() -> list[Case]`, and `tiny() -> Call`, a call so small that only the
host's overhead is left; one whose cases are too small for a GPU has `cuda_cases()` too. A peer file has `DISTRIBUTION`
(its name on PyPI), `available() -> str | None` (why not, with the line that installs it) and one function per op it can
do, named after the op: it takes the case's inputs and returns a `Peer`. `WHOLE` names the files that measure more than
one op; they need no `tiny`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from scrimp._registry import OPS

WHOLE = ("e2e",)

Call = Callable[[], Any]
Ratios = Mapping[str, float]


@dataclass(frozen=True)
class Work:
    """The least a case can do: bytes read and written once, floating-point operations."""

    bytes: float
    flops: float


def no_fields(_: Any) -> dict[str, Any]:
    """The extra fields of an op that has none."""
    return {}


@dataclass(frozen=True)
class Peer:
    """Somebody else's way to do a case.

    Args:
        call: what is timed.
        same: whether its results are ours up to rounding.
        fields: extra fields of its row, from (our result, its result).
    """

    call: Call
    same: bool = True
    fields: Callable[[tuple[Any, Any]], dict[str, Any]] = no_fields


@dataclass(frozen=True)
class Problem:
    """A case made concrete.

    Args:
        inputs: what the functions of the peer files take.
        ours: the timed call.
        check: raises AssertionError where a result of `ours` is not the reference's, on these inputs.
        work: the formula's bytes and flops.
        own: our own calls to compare with, by peer name ("self-...").
        standard: the peer that every "self-..." is held against: a comparison counts from 0.95 of its speed.
        fields: the op's extra fields known from the inputs.
        derive: the op's extra fields computed from the ratios (peer over ours, by peer; those that count).
        of_row: the op's extra fields computed from a row's own numbers, which are None where there are none.
    """

    inputs: tuple[Any, ...]
    ours: Call
    check: Callable[[Any], None]
    work: Work
    own: Mapping[str, Call] = field(default_factory=dict)
    standard: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    derive: Callable[[Ratios], dict[str, Any]] = no_fields
    of_row: Callable[[Mapping[str, Any]], dict[str, Any]] = no_fields


@dataclass(frozen=True)
class Case:
    """One row per peer and thread count: `shape` holds `m` (rows) and the op's shape fields."""

    op: str
    name: str
    dtype: torch.dtype
    shape: Mapping[str, int]
    peers: tuple[str, ...]
    make: Callable[[], Problem]

    @property
    def dtype_name(self) -> str:
        """fp32, bf16 or fp16, as rows and users say it."""
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]

    @property
    def full_name(self) -> str:
        """The name with the dtype, which `--case` searches."""
        return f"{self.name}-{self.dtype_name}"


def ops() -> list[str]:
    """The ops that have cases."""
    folder = Path(__file__).parent
    return sorted(op for op in OPS if (folder / f"{op}.py").exists())


def names() -> list[str]:
    """Everything that has cases: the ops, then what measures more than one."""
    return [*ops(), *WHOLE]


def case_file(op: str) -> ModuleType:
    """The module with the cases of `op`."""
    if op not in names():
        raise ValueError(f"there are no benchmark cases for {op!r}; ops with cases are {', '.join(names())}")
    return import_module(f"{__package__}.{op}")


def cases_of(op: str, device: str) -> list[Case]:
    """The cases of `op` for that device."""
    file = case_file(op)
    found: list[Case] = getattr(file, f"{device}_cases", file.cases)()
    return found


def peer_file(name: str) -> ModuleType:
    """The module that adapts peer `name`."""
    return import_module(f"{__package__}.peers.{name}")


def is_self(peer: str) -> bool:
    """Whether `peer` is a call of our own."""
    return peer.startswith("self-")
