"""kv_compact: a few rows of every layer move by a few slots; bytes moved twice, once read and once written."""

from functools import partial

import torch

import scrimp
from scrimp._registry import OPS

from .registry import Call, Case, Problem, Work

CAPACITY = 2048
# layers, key/value heads, head size
MODELS = {"smollm2": (30, 3, 64), "8b": (32, 8, 128)}
PATHS = {"one": [0, 5], "four": [0, 2, 7, 9, 15], "stays": [0, 1, 2, 3]}


def cases() -> list[Case]:
    """A row that moves, four, and the first chain, which stays where it is."""
    return [case(model, path, dtype) for model in MODELS for path in PATHS for dtype in (torch.float32, torch.bfloat16)]


def case(model: str, path: str, dtype: torch.dtype) -> Case:
    """One sequence."""
    layers, G, D = MODELS[model]
    fields = {"m": len(PATHS[path]), "batch": 1, "layers": layers, "kv_heads": G, "head_dim": D}
    return Case("kv_compact", f"{model}-{path}", dtype, fields, ("torch",), partial(problem, model, path, dtype))


def problem(model: str, path: str, dtype: torch.dtype) -> Problem:
    """Keys and values of all layers, call, check and limit."""
    layers, G, D = MODELS[model]
    cache = torch.randn(2 * layers, 1, G, CAPACITY, D).to(dtype)
    start, rows = torch.tensor([CAPACITY // 2], dtype=torch.int32), torch.tensor([PATHS[path]], dtype=torch.int32)
    moving = sum(row != i for i, row in enumerate(PATHS[path]))
    return Problem(
        inputs=(cache, start, rows),
        ours=lambda: scrimp.ops.kv_compact(cache, start, rows),
        check=lambda _: check(cache, start, rows),
        work=Work(bytes=2 * moving * cache[:, :, :, 0].nbytes, flops=0),
    )


def check(cache: torch.Tensor, start: torch.Tensor, rows: torch.Tensor) -> None:
    """A further call does to fresh numbers what the reference does."""
    ours, theirs = (torch.randn(cache.shape, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    scrimp.ops.kv_compact(ours, start, rows)
    OPS["kv_compact"].reference(theirs, start, rows)
    if not torch.equal(ours, theirs):
        raise AssertionError("other rows were moved than by the reference")


def tiny() -> Call:
    """A call that is all overhead."""
    cache, zero = torch.zeros(1, 1, 1, 2, 8), torch.zeros(1, dtype=torch.int32)
    path = torch.tensor([[0, 1]], dtype=torch.int32)
    return lambda: scrimp.ops.kv_compact(cache, zero, path)
