"""The host's cost of one call (checks, dispatch, allocation): a guard against a slow way of registering or checking."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scrimp.benchmarks import measure, registry

import scrimp
from scrimp._registry import OPS

# A tensor argument may cost as much as so many torch.add of eight numbers; two to four were measured.
ADDS_PER_TENSOR = 8
CALLS, BATCHES = 20, 60


def batch(call: Callable[[], Any]) -> float:
    return measure.seconds(lambda: [call() for _ in range(CALLS)]) / CALLS


@pytest.mark.parametrize("op", [op for op in registry.ops() if scrimp.implementations(op)])
def test_overhead(op: str, benchmark: Any) -> None:
    call, numbers = registry.case_file(op).tiny(), torch.zeros(8)
    tensors = sum(str(argument.type) == "Tensor" for argument in OPS[op].call._schema.arguments)
    torch.use_deterministic_algorithms(False)  # filling fresh memory costs a call of its own
    with measure.threads(1), torch.no_grad():
        pairs = [(batch(call), batch(lambda: torch.add(numbers, numbers))) for _ in range(BATCHES)]
        benchmark.pedantic(call, rounds=BATCHES, iterations=CALLS)
    ours, add = (min(times) for times in zip(*pairs, strict=True))  # the least is what noise leaves alone
    benchmark.extra_info["adds"] = ours / add
    assert ours <= ADDS_PER_TENSOR * tensors * add, f"{op}: {1e6 * ours:.1f} us, torch.add {1e6 * add:.2f} us"
