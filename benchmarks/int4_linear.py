"""int4_linear: few rows are bound by reading the codes, which lie in memory, not in a cache; many by arithmetic."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from itertools import cycle
from typing import Any, TypeVar

import torch
from torch import Tensor

import scrimp
from scrimp import Int4Weight
from scrimp._registry import OPS
from scrimp.int4_weight.check import ZERO_KINDS
from scrimp.ops.int4_linear import MODES
from scrimp.testing import assert_matches_oracle, random_int4_weight

from .linear import CHECKED_OUTPUTS, COLD_BYTES
from .registry import Call, Case, Problem, Work

FP32, BF16 = torch.float32, torch.bfloat16
REQUANTIZED = 0.2  # relative error of a peer whose format cannot hold the weights; a wrong layout gives about 1.4
# name: N, K, group size, kind; two layers of an 8B model, then groups as GGUF has them and as GPTQ often has
SHAPES = {
    "square": (4096, 4096, 128, "none8"),
    "wide": (14336, 4096, 128, "none8"),
    "square-g32": (4096, 4096, 32, "none8"),
    "square-g64-zeros": (4096, 4096, 64, "uint8"),
}
ROWS = {"square": (1, 16, 64, 512), "wide": (1, 16, 64, 512), "square-g32": (1, 16), "square-g64-zeros": (1, 16)}

Made = TypeVar("Made")


def cases() -> list[Case]:
    """One row, a few, the most that are row-invariant, and a prompt; both modes."""
    return [
        case(f"{name}-{rows}-{mode}", rows, *shape, mode, dtype)
        for name, shape in SHAPES.items()
        for dtype in (FP32, BF16)
        for rows in ROWS[name]
        for mode in ("int8", "exact")
    ]


def case(name: str, rows: int, N: int, K: int, group_size: int, kind: str, mode: str, dtype: torch.dtype) -> Case:
    """One case of x `[rows, K]` and a weight `[N, K]`."""
    fields = {"m": rows, "n": N, "k": K, "group_size": group_size}
    make = partial(problem, rows, N, K, group_size, kind, mode, dtype)
    return Case("int4_linear", name, dtype, fields, peers(rows, group_size, kind, mode, dtype), make)


def peers(rows: int, group_size: int, kind: str, mode: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Who can do it; those that take 50 ms a row and more are asked for one row only."""
    found = ["torch"]
    if dtype == BF16:
        found += ["aten"]
    else:
        found += ["onnxruntime", "ggml_q4_0", "ggml_q4_k"] if mode == "int8" else ["onnxruntime_fp32"]
        found += ["openvino"]
        if rows == 1 and mode == "exact":
            found += ["aten"]
    if rows == 1 and mode == "exact":
        found += ["bitsandbytes"]
    return tuple(found)


@lru_cache(maxsize=1)
def weight_of(N: int, K: int, group_size: int, kind: str) -> Int4Weight:
    """The same weight for every case of a shape, so that peers pack it once."""
    return random_int4_weight(N, K, group_size, kind)


def copies(make: Callable[[], Made], nbytes: int) -> list[Made]:
    """So many that none is in a cache when its turn comes again."""
    return [make() for _ in range(-(-COLD_BYTES // nbytes) + 1)]


def cold(make: Callable[[], Made], nbytes: int) -> Iterator[Made]:
    """Endless turns through `copies`."""
    return cycle(copies(make, nbytes))


@lru_cache(maxsize=1)
def turns_of(weight: Int4Weight) -> Iterator[Int4Weight]:
    """Our copies."""

    def copy() -> Int4Weight:
        parts: dict[str, Any] = {name: None if t is None else t.clone() for name, t in weight.tensors().items()}
        return replace(weight, **parts)

    return cold(copy, weight.bytes())


def problem(rows: int, N: int, K: int, group_size: int, kind: str, mode: str, dtype: torch.dtype) -> Problem:
    """Inputs, call, check and limit."""
    weight, x = weight_of(N, K, group_size, kind), torch.randn(rows, K).to(dtype)
    turns = turns_of(weight)

    def ours() -> Tensor:
        return scrimp.ops.int4_linear(x, next(turns), mode=mode)

    return Problem(
        inputs=(x, weight),
        ours=ours,
        check=lambda got: check(got, x, weight, mode),
        work=Work(bytes=weight.bytes() + rows * (K + N) * dtype.itemsize, flops=2 * rows * N * K),
        fields={"mode": mode, "kind": kind},
    )


def check(got: Tensor, x: Tensor, weight: Int4Weight, mode: str) -> None:
    """Some hundred outputs against the oracle: outputs do not depend on each other."""
    some = torch.linspace(0, weight.out_features - 1, min(CHECKED_OUTPUTS, weight.out_features)).long()
    rows = ("qweight", "scales", "zeros")
    parts = [t[some] if t is not None and name in rows else t for name, t in weight.tensors().items()]
    numbers = (weight.group_size, ZERO_KINDS.index(weight.zero_kind), MODES.index(mode))
    assert_matches_oracle(got[:, some], OPS["int4_linear"].reference, x, *parts, None, *numbers)


def tiny() -> Call:
    """A call that is all overhead."""
    x, weight = torch.randn(1, 16), random_int4_weight(8, 16, 16)
    return lambda: scrimp.ops.int4_linear(x, weight)
