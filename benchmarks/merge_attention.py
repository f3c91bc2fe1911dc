"""merge_attention: a memory-bound op; three outputs and three log-sum-exps cross the memory bus."""

from functools import partial

import torch
from torch import Tensor

import scrimp
from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle

from .registry import Call, Case, Problem, Work

Merge = tuple[Tensor, Tensor, Tensor, Tensor]
SHAPES = {"decode": (1, 32, 64, 128), "prefill": (1, 9, 8192, 64), "large": (1, 32, 4096, 128)}
CHECKED_ROWS = 500


def cases() -> list[Case]:
    """Chunked decode (fits a cache), one layer's prefill, and one above any cache."""
    return [case(name, shape, dtype) for name, shape in SHAPES.items() for dtype in (torch.float32, torch.bfloat16)]


def case(name: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Case:
    """One case of outputs `[B, H, N, D]`."""
    B, H, N, D = shape
    fields = {"m": B * N, "batch": B, "heads": H, "n": N, "head_dim": D}
    return Case("merge_attention", name, dtype, fields, ("torch", "inductor"), partial(problem, shape, dtype))


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Merge:
    """Random states in the memory order of sparse_attention's outputs: B, N, H, D."""
    B, H, N, D = shape

    def out() -> Tensor:
        return torch.randn(B, N, H, D).to(dtype).transpose(1, 2)

    return out(), torch.randn(B, H, N), out(), torch.randn(B, H, N)


def problem(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Problem:
    """Inputs, call, check and limit."""
    args = inputs(shape, dtype)
    out, lse = args[:2]
    return Problem(
        inputs=args,
        ours=lambda: scrimp.ops.merge_attention(*args),
        check=lambda got: check(got, args),
        work=Work(bytes=3 * (out.nbytes + lse.nbytes), flops=3 * out.numel()),
    )


def check(got: tuple[Tensor, Tensor], args: Merge) -> None:
    """Some hundred rows, first and last among them, against the oracle: rows do not depend on each other."""
    rows = torch.linspace(0, args[1].shape[2] - 1, min(CHECKED_ROWS, args[1].shape[2])).long()
    some = [x[:, :, rows] for x in args]
    assert_matches_oracle([x[:, :, rows] for x in got], OPS["merge_attention"].reference, *some, names=("out", "lse"))


def tiny() -> Call:
    """A call that is all overhead."""
    args = inputs((1, 1, 1, 8), torch.float32)
    return lambda: scrimp.ops.merge_attention(*args)
