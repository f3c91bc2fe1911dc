"""channel_select: a pass over rows that are still in the cache; a sort by digits where a rule ranks the scores."""

from functools import partial

import torch
from torch import Tensor

import scrimp
from scrimp._registry import OPS
from scrimp.ops.channel_select import RULES

from .registry import Call, Case, Problem, Work

CHANNELS = {"token": 576, "token-8b": 4096, "token-8b-down": 14336}
LEVELS = {"threshold": 0.5, "relative": 0.8, "top_k": 0.5, "top_p": 0.9}  # of top_k, the share of the channels
ROWS = 4


def cases() -> list[Case]:
    """Every rule for one token; four tokens by threshold; bf16."""
    plain = [case(name, 1, rule, torch.float32) for name in CHANNELS for rule in RULES]
    more = [case("token-8b", ROWS, "threshold", torch.float32), case("token-8b", 1, "threshold", torch.bfloat16)]
    return [*plain, *more]


def case(name: str, rows: int, rule: str, dtype: torch.dtype) -> Case:
    """One case of x `[rows, K]`."""
    K = CHANNELS[name]
    make = partial(problem, rows, K, rule, dtype)
    return Case("channel_select", f"{name}-{rows}-{rule}", dtype, {"m": rows, "k": K}, ("torch",), make)


def problem(rows: int, K: int, rule: str, dtype: torch.dtype) -> Problem:
    """Inputs, call, check and limit."""
    x, norms = torch.randn(rows, K).to(dtype), 0.5 + torch.rand(K)
    level = torch.tensor([LEVELS[rule] * K if rule == "top_k" else LEVELS[rule]])
    written = rows * K * (dtype.itemsize + 4)
    return Problem(
        inputs=(x, level, norms, rule),
        ours=lambda: scrimp.ops.channel_select(x, level, rule=rule, scale=norms),
        check=lambda got: check(got, x, level, norms, rule),
        work=Work(bytes=x.nbytes + norms.nbytes + written, flops=6 * rows * K),
        fields={"rule": rule},
    )


def check(got: tuple[Tensor, ...], x: Tensor, level: Tensor, norms: Tensor, rule: str) -> None:
    """The reference's channels and kept values."""
    wanted = OPS["channel_select"].reference(x, level, norms, None, None, RULES.index(rule), False)
    for name, mine, theirs in zip(("kept", "index", "count"), got, wanted, strict=False):
        if not torch.equal(mine, theirs):
            raise AssertionError(f"{name} is not the reference's in {int((mine != theirs).sum())} places")


def tiny() -> Call:
    """A call that is all overhead."""
    x, level = torch.randn(1, 8), torch.ones(1)
    return lambda: scrimp.ops.channel_select(x, level)
