"""What a run with or without a planted fault gave, and what must hold of it: for kernels in Triton and in CUDA C++."""

from dataclasses import dataclass

import ptx
import torch
from ptx.errors import KINDS
from subjects.subject import Mutant

ORDERS = ["lockstep", "warp"]


@dataclass(frozen=True)
class Run:
    """What a run of the mutant case gave: "fine", "value" or the kind of a fault; every tensor; the counters."""

    outcome: str
    tensors: tuple[torch.Tensor, ...]
    counters: tuple[ptx.Counters, ...]


def assert_sound(found: Run) -> None:
    """The result is right, and no asynchronous copy was left unwaited for."""
    assert found.outcome == "fine"
    assert sum(counters.unwaited_copies for counters in found.counters) == 0


def assert_is_a_fault(name: str, mutant: Mutant) -> None:
    """What catches it exists, and it changes something."""
    assert mutant.caught_by <= {"value", *KINDS.values()}, name
    assert mutant.short or mutant.change is not str, name


def assert_caught(found: Run, mutant: Mutant) -> None:
    assert found.outcome in mutant.caught_by, f"{found.outcome}, not {' or '.join(mutant.caught_by)}"


def assert_touches_the_same(before: Run, after: Run) -> None:
    """A fault that is none: the same bits in every tensor, the same addresses, no copy left unwaited for."""
    assert_sound(after)
    for mine, theirs in zip(before.tensors, after.tensors, strict=True):
        assert torch.equal(bits(mine), bits(theirs))
    for mine, theirs in zip(before.counters, after.counters, strict=True):
        assert mine.address_ranges == theirs.address_ranges
        assert mine.buffer_ranges == theirs.buffer_ranges


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as integers, so that NaN equals NaN."""
    return tensor.contiguous().view(-1).view(torch.uint8)
