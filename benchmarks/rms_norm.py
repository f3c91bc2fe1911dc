"""rms_norm: small calls between the linears of a decode step, whose rows are still in the cache."""

from functools import partial

import torch
from torch import Tensor

import scrimp
from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle

from .registry import Call, Case, Problem, Work

EPS = 1e-5
# rows of so many columns: one token, one tree and a prompt of SmolLM2-135M; an 8B model's; heads of Qwen3's queries
SHAPES = {
    "token": (1, 576),
    "tree": (64, 576),
    "prompt": (2048, 576),
    "token-8b": (1, 4096),
    "tree-8b": (64, 4096),
    "heads-8b": (64 * 32, 128),
}


def cases() -> list[Case]:
    """Every shape in fp32 and bf16."""
    return [case(name, *shape, dtype) for name, shape in SHAPES.items() for dtype in (torch.float32, torch.bfloat16)]


def case(name: str, rows: int, columns: int, dtype: torch.dtype) -> Case:
    """One case of x `[rows, columns]`."""
    fields = {"m": rows, "k": columns}
    return Case("rms_norm", name, dtype, fields, ("torch", "inductor"), partial(problem, rows, columns, dtype))


def problem(rows: int, columns: int, dtype: torch.dtype) -> Problem:
    """Inputs, call, check and limit."""
    x, weight = torch.randn(rows, columns).to(dtype), torch.randn(columns).to(dtype)
    return Problem(
        inputs=(x, weight, EPS),
        ours=lambda: scrimp.ops.rms_norm(x, weight, EPS),
        check=lambda got: assert_matches_oracle(got, OPS["rms_norm"].reference, x, weight, EPS),
        work=Work(bytes=2 * x.nbytes + weight.nbytes, flops=4 * x.numel()),
    )


def formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """transformers' LlamaRMSNorm."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def tiny() -> Call:
    """A call that is all overhead."""
    x = torch.randn(1, 8)
    return lambda: scrimp.ops.rms_norm(x, x[0], EPS)
