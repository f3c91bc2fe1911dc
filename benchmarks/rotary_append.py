"""rotary_append: the step between the qkv linear and attention; a cache's slots are written once."""

from functools import partial

import torch
from torch import Tensor

import scrimp
from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle

from .registry import Call, Case, Problem, Work

CAPACITY = 4096
# new tokens, query heads, key/value heads, head size: SmolLM2-135M and an 8B model
SHAPES = {
    "token": (1, 9, 3, 64),
    "tree": (64, 9, 3, 64),
    "prompt": (2048, 9, 3, 64),
    "token-8b": (1, 32, 8, 128),
    "tree-8b": (64, 32, 8, 128),
}


def cases() -> list[Case]:
    """Every shape in fp32 and bf16."""
    return [case(name, shape, dtype) for name, shape in SHAPES.items() for dtype in (torch.float32, torch.bfloat16)]


def case(name: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Case:
    """One case of one sequence."""
    T, H, G, D = shape
    fields = {"m": T, "batch": 1, "heads": H, "kv_heads": G, "head_dim": D}
    return Case("rotary_append", name, dtype, fields, ("torch", "inductor"), partial(problem, shape, dtype))


def problem(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Problem:
    """Inputs (views of one linear's output), call, check and limit."""
    T, H, G, D = shape
    q, k, v = torch.randn(1, T, H + 2 * G, D).to(dtype).split((H, G, G), 2)
    angle = torch.rand(CAPACITY, D)
    first = CAPACITY // 2
    positions = torch.arange(first, first + T, dtype=torch.int32).unsqueeze(0)
    start = torch.tensor([first], dtype=torch.int32)
    caches = [torch.zeros(1, G, CAPACITY, D, dtype=dtype) for _ in range(2)]
    args = (q, k, v, angle.cos(), angle.sin(), positions, start, *caches)
    elements = T * (H + 2 * G) * D
    return Problem(
        inputs=args,
        ours=lambda: scrimp.ops.rotary_append(*args),
        check=lambda got: check(got, args),
        work=Work(bytes=2 * elements * dtype.itemsize + 8 * T * D, flops=3 * T * (H + G) * D),
    )


def check(got: Tensor, args: tuple[Tensor, ...]) -> None:
    """The queries and all of both caches against the oracle."""
    caches = args[7:]

    def on_empty(*args: Tensor) -> tuple[Tensor, ...]:
        empty = [torch.zeros_like(cache) for cache in args[7:]]
        return OPS["rotary_append"].reference(*args[:7], *empty), *empty

    assert_matches_oracle((got, *caches), on_empty, *args, names=("q", "k_cache", "v_cache"))


def tiny() -> Call:
    """A call that is all overhead."""
    x, cache = torch.randn(1, 1, 1, 8), torch.zeros(1, 1, 2, 8)
    zeros = torch.zeros(1, 1, dtype=torch.int32)
    return lambda: scrimp.ops.rotary_append(x, x, x, cache[0, 0], cache[0, 0], zeros, zeros[0], cache, cache)
