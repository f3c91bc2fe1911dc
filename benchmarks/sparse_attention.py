"""sparse_attention: plans of four kinds against dense attention and against flex_attention with the same mask.

Random q, k, v: speed does not depend on the values. The number of heads falls with n, so that heads x n x D is the same
for all and a dense case lasts from tens of milliseconds to a second.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import scrimp
from scrimp import SparsePlan
from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle

from .registry import Call, Case, Problem, Ratios, Work

ELEMENTS = 2**21  # heads x n x D
Q_BLOCK = 128
LOCAL = 256  # keys of the local window beside scattered columns
FP32, BF16 = torch.float32, torch.bfloat16


def dense(n: int, heads: int) -> SparsePlan:
    """Causal attention; one plan for all heads."""
    return SparsePlan.dense(n, q_block=Q_BLOCK)


def blocks(density: float, n: int, heads: int) -> SparsePlan:
    """Blocks of 128 x 128 at random below the diagonal, and the whole diagonal."""
    tiles = -(-n // Q_BLOCK)
    # Of the t (t - 1) / 2 blocks below the diagonal, as many as make `density` with half of each diagonal block.
    share = (density * n * n / 2 - tiles * Q_BLOCK**2 / 2) / (tiles * (tiles - 1) / 2 * Q_BLOCK**2)
    mask = torch.rand(1, heads, tiles, tiles) < share
    mask = mask.tril(-1) | torch.eye(tiles, dtype=torch.bool)
    return SparsePlan.from_block_mask(mask, Q_BLOCK, Q_BLOCK, n_q=n, n_k=n)


def columns(n: int, heads: int) -> SparsePlan:
    """1,000 scattered columns per head and a local window."""
    return SparsePlan.vertical_slash(n, columns=scattered(1000, n, heads), bands=[(0, LOCAL)])


def vertical_slash(n: int, heads: int) -> SparsePlan:
    """500 columns per head, a local window and eight bands of 64 diagonals."""
    bands = [[(0, LOCAL), *((int(start), 64) for start in head)] for head in scattered(8, n - 64, heads)]
    return SparsePlan.vertical_slash(n, columns=scattered(500, n, heads), bands=torch.tensor(bands))


def scattered(count: int, n: int, heads: int) -> Tensor:
    """int64 [heads, count]: different numbers below n."""
    return torch.stack([torch.randperm(n)[:count] for _ in range(heads)])


def cases() -> list[Case]:
    """Dense from 512 to 16K, sparse plans from 4K, grouped heads of the demo model, some bf16."""
    found = [case("dense", dense, n, D) for D in (64, 128) for n in (512, 1024, 2048, 4096, 8192, 16384)]
    found.append(case("dense", dense, 8192, 64, heads=9, groups=3))
    for D in (64, 128):
        for n in (4096, 16384):
            found += [case(f"blocks-{d}", partial(blocks, d), n, D) for d in (0.1, 0.25, 0.5)]
        for n in (8192, 16384):
            found.append(case("columns", columns, n, D))
            found.append(case("vertical_slash", vertical_slash, n, D))
    for D in (64, 128):
        found.append(case("dense", dense, 4096, D, BF16))
        found.append(case("blocks-0.25", partial(blocks, 0.25), 16384, D, BF16))
    return found


def cuda_cases() -> list[Case]:
    """A layer of an 8B model, whose group of four query heads shares a kv head."""
    sizes: dict[str, Any] = {"heads": 32, "groups": 8}
    found = [case("dense", dense, n, 128, BF16, **sizes) for n in (8192, 32768)]
    found += [case(f"blocks-{d}", partial(blocks, d), 32768, 128, BF16, **sizes) for d in (0.1, 0.25)]
    for n in (32768, 131072):
        found.append(case("columns", columns, n, 128, BF16, **sizes))
        found.append(case("vertical_slash", vertical_slash, n, 128, BF16, **sizes))
    found.append(case("dense", dense, 8192, 64, torch.float16, heads=9, groups=3))
    return found


def case(
    plan: str,
    make: Callable[[int, int], SparsePlan],
    n: int,
    D: int,
    dtype: torch.dtype = FP32,
    heads: int | None = None,
    groups: int | None = None,
) -> Case:
    """One case; as many heads as ELEMENTS allows unless said, and no grouping."""
    heads = max(1, ELEMENTS // (n * D)) if heads is None else heads
    name = f"{plan}-{n}-d{D}" + (f"-h{heads}g{groups}" if groups else "")
    shape = {"m": n, "batch": 1, "heads": heads, "kv_heads": groups or heads, "n": n, "head_dim": D}
    peers = ["sdpa"]
    if plan != "dense":
        peers.append("self-dense")
    if plan.startswith(("dense", "blocks")):  # flex has no block mask for scattered columns
        peers.append("flex")
    kind = plan.split("-")[0]
    return Case(
        "sparse_attention", name, dtype, shape, tuple(peers), lambda: problem(kind, make(n, heads), shape, dtype)
    )


def problem(kind: str, plan: SparsePlan, shape: dict[str, int], dtype: torch.dtype) -> Problem:
    """Inputs, call, check and limit; the limit counts the pairs that the plan shows, on both matrix products."""
    H, G, n, D = (shape[name] for name in ("heads", "kv_heads", "n", "head_dim"))
    q, k, v = (torch.randn(1, heads, n, D).to(dtype) for heads in (H, G, G))
    whole = dense(n, H)
    density = float(plan.density())
    pairs = density * H * n * (n + 1) / 2

    def derive(ratio: Ratios) -> dict[str, float | None]:
        if kind == "dense":
            return {"efficiency": 1.0}
        return {"efficiency": density * ratio["self-dense"] if "self-dense" in ratio else None}

    return Problem(
        inputs=(q, k, v, plan),
        ours=lambda: scrimp.ops.sparse_attention(q, k, v, plan),
        check=lambda got: check(got, q, k, v, plan),
        work=Work(bytes=2 * q.nbytes + k.nbytes + v.nbytes, flops=4 * D * pairs),
        own={"self-dense": lambda: scrimp.ops.sparse_attention(q, k, v, whole)},
        standard="sdpa",
        fields={"plan": kind, "density": float(f"{density:.4g}")},
        derive=derive,
    )


def check(got: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan) -> None:
    """Five tiles of the first and the last head, one sample, against the oracle: tiles do not depend on each other."""
    H, D = q.shape[1], q.shape[3]
    repeats = H // k.shape[1]
    tiles = sorted({0, 1 % plan.tiles, plan.tiles // 3, 2 * plan.tiles // 3, plan.tiles - 1})
    places = [(head, tile) for head in sorted({0, H - 1}) for tile in tiles]

    def rows(tensor: Tensor, head: int, tile: int) -> Tensor:
        begin = tile * plan.q_block
        return tensor[:, head : head + 1, begin : begin + plan.q_block]

    def reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for head, tile in places:
            own, group = plan.select(heads=[head]), slice(head // repeats, head // repeats + 1)
            at = slice(tile, tile + 1)
            start = None if plan.row_start is None else plan.row_start[:, tile * plan.q_block :][:, : plan.q_block]
            flat = (own.ranges, own.range_slice[:, :, at], own.columns, own.column_slice[:, :, at], start)
            sizes = (plan.q_block, plan.q_offset + tile * plan.q_block, plan.causal, D**-0.5)
            parts.append(
                OPS["sparse_attention"].reference(rows(q, head, tile), k[:, group], v[:, group], *flat, *sizes)
            )
        return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)

    sample = [torch.cat([rows(x, head, tile) for head, tile in places], 2) for x in got]
    assert_matches_oracle(sample, reference, q, k, v, names=("out of sampled tiles", "lse of sampled tiles"))


def tiny() -> Call:
    """A call that is all overhead."""
    q = torch.randn(1, 1, 1, 8)
    plan = SparsePlan.dense(1)
    return lambda: scrimp.ops.sparse_attention(q, q, q, plan)
