"""int4_sparse_linear: the selection of channels and the 4-bit product with them, beside our dense 4-bit product.

Bound by memory: the codes of the listed channels, and all scales.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

import scrimp
from scrimp import Int4Weight
from scrimp._registry import OPS
from scrimp.int4_weight import Int4Channels
from scrimp.ops.int4_linear import MODES
from scrimp.testing import assert_matches_oracle, random_int4_weight

from .int4_linear import copies, turns_of
from .linear import CHECKED_OUTPUTS, COLD_BYTES
from .registry import Call, Case, Problem, Work
from .sparse_linear import CHOICES

# name: N, K, group size, kind; two layers of an 8B model, then groups as GGUF has them and as GPTQ often has
SHAPES = {
    "square": (4096, 4096, 128, "none8"),
    "wide": (14336, 4096, 128, "none8"),
    "down": (4096, 14336, 128, "none8"),
    "square-g32": (4096, 4096, 32, "none8"),
    "square-g64-zeros": (4096, 4096, 64, "uint8"),
}
MORE_ROWS = ("square", "wide")  # where several rows choose apart
WITH_FLOATS = ("square",)  # beside the sparse product of fp32 weights, which take eight times the memory


def cases() -> list[Case]:
    """One row at two sparsities, and rows that choose apart: the union of their channels is read; both modes."""
    return [
        case(shape, choice, mode, torch.float32)
        for shape in SHAPES
        for choice, (rows, _) in CHOICES.items()
        for mode in MODES
        if rows == 1 or shape in MORE_ROWS
    ]


def case(shape: str, choice: str, mode: str, dtype: torch.dtype) -> Case:
    """One case by the names of its parts."""
    (N, K, group_size, kind), (rows, sparsity) = SHAPES[shape], CHOICES[choice]
    fields = {"m": rows, "n": N, "k": K, "group_size": group_size}
    peers = ("self-dense", "self-dense-exact") if mode == "int8" else ("self-dense",)
    peers += ("self-sparse-floats",) if shape in WITH_FLOATS else ()
    make = partial(problem, rows, N, K, group_size, kind, sparsity, mode, dtype)
    return Case("int4_sparse_linear", f"{shape}-{choice}-{mode}", dtype, fields, peers, make)


def problem(
    rows: int, N: int, K: int, group_size: int, kind: str, sparsity: float, mode: str, dtype: torch.dtype
) -> Problem:
    """Inputs, call, check and limit; each call takes the next copy of its weight."""
    x, norms = torch.randn(rows, K).to(dtype), 0.5 + torch.rand(K)
    level = (x.float().abs() * norms).flatten().quantile(sparsity).view(1)
    weight = random_int4_weight(N, K, group_size, kind)
    turned = Int4Channels.of(weight)
    turns = cycle(copies(lambda: replace(turned, codes=turned.codes.clone()), turned.bytes()))
    dense = turns_of(weight)
    kept, index, count, _ = scrimp.ops.channel_select(x, level, scale=norms)
    listed = int(count)

    def ours() -> Tensor:
        kept, index, count, _ = scrimp.ops.channel_select(x, level, scale=norms)
        return scrimp.ops.int4_sparse_linear(kept, next(turns), index, count, mode=mode)

    def floats() -> Iterator[Tensor]:
        matrix = weight.dequantize(dtype).T.contiguous()
        yield from cycle([matrix.clone() for _ in range(-(-COLD_BYTES // matrix.nbytes) + 1)])

    def sparse_floats() -> Tensor:
        kept, index, count, _ = scrimp.ops.channel_select(x, level, scale=norms)
        return scrimp.ops.sparse_linear(kept, next(matrices), index, count)

    matrices = floats()
    codes = listed * turned.codes.shape[1] + turned.bytes() - turned.codes.nbytes
    return Problem(
        inputs=(x, weight),
        ours=ours,
        check=lambda got: check(got, kept, weight, index, count, mode),
        work=Work(bytes=codes + rows * (K + N) * dtype.itemsize, flops=2 * rows * listed * N),
        own={
            "self-dense": lambda: scrimp.ops.int4_linear(x, next(dense), mode=mode),
            "self-dense-exact": lambda: scrimp.ops.int4_linear(x, next(dense), mode="exact"),
            "self-sparse-floats": sparse_floats,
        },
        fields={"mode": mode, "kind": kind, "sparsity": sparsity, "listed": round(listed / K, 4)},
    )


def check(got: Tensor, kept: Tensor, weight: Int4Weight, index: Tensor, count: Tensor, mode: str) -> None:
    """Some hundred outputs against the oracle: outputs do not depend on each other."""
    some = torch.linspace(0, weight.out_features - 1, min(CHECKED_OUTPUTS, weight.out_features)).long()
    zeros = None if weight.zeros is None else weight.zeros[some]
    part = Int4Channels.of(replace(weight, qweight=weight.qweight[some], scales=weight.scales[some], zeros=zeros))
    args = (kept, *part.tensors().values(), index, count, None, *part.numbers(), MODES.index(mode))
    assert_matches_oracle(got[:, some], OPS["int4_sparse_linear"].reference, *args)


def tiny() -> Call:
    """A call that is all overhead."""
    x, weight = torch.randn(1, 16), Int4Channels.of(random_int4_weight(8, 16, 16))
    _, index, count, _ = scrimp.ops.channel_select(x, 0.5)
    return lambda: scrimp.ops.int4_sparse_linear(x, weight, index, count)
