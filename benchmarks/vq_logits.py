"""vq_logits beside the dense head that it stands for; codebook and head lie in memory, not in a cache."""

from functools import partial
from itertools import cycle

import torch
from torch import Tensor

import scrimp
from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle

from .linear import COLD_BYTES
from .registry import Call, Case, Problem, Work

# name: vocabulary, d
HEADS = {"smollm2": (49_152, 576), "128k": (131_072, 2048), "256k": (262_144, 640)}
SHARE = 100  # tokens for each code
ROWS = (1, 8)


def cases() -> list[Case]:
    """One row and a few; bf16 for the small head."""
    small = [case("smollm2", rows, torch.bfloat16) for rows in ROWS]
    return [*(case(head, rows, torch.float32) for head in HEADS for rows in ROWS), *small]


def case(head: str, rows: int, dtype: torch.dtype) -> Case:
    """One case of h `[rows, d]` and V / 100 codes."""
    V, d = HEADS[head]
    fields = {"m": rows, "vocab": V, "d": d, "codes": V // SHARE}
    peers = ("torch", "torch_dense")
    return Case("vq_logits", f"{head}-{rows}", dtype, fields, peers, partial(problem, rows, V, d, dtype))


def random_head(V: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A codebook `[V / 100, d]` and the codes of V tokens."""
    codebook = (torch.randn(V // SHARE, d) / d**0.5).to(dtype)
    return codebook, torch.randint(len(codebook), (V,), dtype=torch.int32)


def cold(codebook: Tensor, codes: Tensor) -> "cycle[tuple[Tensor, Tensor]]":
    """Copies of a head, so many that none is in a cache when its turn comes."""
    copies = COLD_BYTES // (codebook.nbytes + codes.nbytes) + 1
    return cycle([(codebook.clone(), codes.clone()) for _ in range(copies)])


def cold_dense(codebook: Tensor, codes: Tensor) -> "cycle[Tensor]":
    """Copies of the matrix that has each token's row."""
    copies = COLD_BYTES // (codebook.nbytes // len(codebook) * len(codes)) + 2
    return cycle([codebook[codes.long()] for _ in range(copies)])


def problem(rows: int, V: int, d: int, dtype: torch.dtype) -> Problem:
    """Inputs, call, check and limit."""
    h, head = torch.randn(rows, d).to(dtype), random_head(V, d, dtype)
    turns = cold(*head)
    K, size = len(head[0]), dtype.itemsize
    return Problem(
        inputs=(h, turns, cold_dense(*head)),
        ours=lambda: scrimp.ops.vq_logits(h, *next(turns)),
        check=lambda got: assert_matches_oracle(got, OPS["vq_logits"].reference, h, *head, None),
        work=Work(bytes=(K * d + rows * (d + V)) * size + 4 * V, flops=2 * rows * K * d),
    )


def tiny() -> Call:
    """A call that is all overhead."""
    h, codebook, codes = torch.randn(1, 8), torch.randn(4, 8), torch.zeros(8, dtype=torch.int32)
    return lambda: scrimp.ops.vq_logits(h, codebook, codes)
