"""sparse_linear: the selection of channels and the product with them, beside the dense product; bound by memory."""

from collections.abc import Iterator
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

import scrimp
from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle

from .linear import CHECKED_OUTPUTS, COLD_BYTES
from .registry import Call, Case, Problem, Work

# K, N: layers of an 8B model, then SmolLM2-135M's down projection
SHAPES = {"square": (4096, 4096), "down": (14336, 4096), "up": (4096, 14336), "small": (1536, 576)}
# name: rows, share of its channels that each row drops
CHOICES = {"1-half": (1, 0.5), "1-two-thirds": (1, 0.65), "2-half": (2, 0.5), "4-half": (4, 0.5)}
BF16 = ("square-1-half", "square-4-half")


def cases() -> list[Case]:
    """One row at two sparsities, and rows that choose their channels apart: the union of them is read."""
    names = [f"{shape}-{choice}" for shape in SHAPES for choice in CHOICES]
    return [*(case(name, torch.float32) for name in names), *(case(name, torch.bfloat16) for name in BF16)]


def case(name: str, dtype: torch.dtype) -> Case:
    """One case by its name."""
    shape, choice = name.split("-", 1)
    (K, N), (rows, sparsity) = SHAPES[shape], CHOICES[choice]
    make = partial(problem, rows, K, N, sparsity, dtype)
    return Case("sparse_linear", name, dtype, {"m": rows, "n": N, "k": K}, ("torch", "self-dense"), make)


def problem(rows: int, K: int, N: int, sparsity: float, dtype: torch.dtype) -> Problem:
    """Inputs, call, check and limit; the dense peers read the same numbers as matrices `[N, K]`."""
    x, norms = torch.randn(rows, K).to(dtype), 0.5 + torch.rand(K)
    level = (x.float().abs() * norms).flatten().quantile(sparsity).view(1)
    weight = torch.randn(K, N).to(dtype)
    copies = -(-COLD_BYTES // weight.nbytes) + 1
    turns = cycle([weight.clone() for _ in range(copies)])
    kept, index, count, _ = scrimp.ops.channel_select(x, level, scale=norms)
    listed = int(count)

    def ours() -> Tensor:
        kept, index, count, _ = scrimp.ops.channel_select(x, level, scale=norms)
        return scrimp.ops.sparse_linear(kept, next(turns), index, count)

    def check(got: Tensor) -> None:
        some = torch.linspace(0, N - 1, min(CHECKED_OUTPUTS, N)).long()
        args = (kept, weight[:, some].contiguous(), index, count, None, None)
        assert_matches_oracle(got[:, some], OPS["sparse_linear"].reference, *args)

    def matrices() -> Iterator[Tensor]:
        for matrix in turns:
            yield matrix.view(N, K)

    dense = matrices()
    return Problem(
        inputs=(x, dense),
        ours=ours,
        check=check,
        work=Work(bytes=(listed * N + rows * (K + N)) * dtype.itemsize, flops=2 * rows * listed * N),
        own={"self-dense": lambda: scrimp.ops.linear(x, next(dense))},
        standard="torch",
        fields={"sparsity": sparsity, "listed": round(listed / K, 4)},
    )


def tiny() -> Call:
    """A call that is all overhead."""
    x, weight = torch.randn(1, 8), torch.randn(8, 8)
    _, index, count, _ = scrimp.ops.channel_select(x, 0.5)
    return lambda: scrimp.ops.sparse_linear(x, weight, index, count)
