"""What sorting its blocks gains sparse_attention in CUDA C++, predicted: each block starts where one has ended.

    python -m scrimp.benchmarks.sparse_attention_order

For plans of 32 heads (8 key/value heads) of 128 it prints how much longer than its share of the steps the last
multiprocessor of an A100 works, and how many key/value heads have blocks at work at a time, which share the cache.
"""

import heapq
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from scrimp import SparsePlan

from .minference_count import slashes
from .sparse_attention_cost import Programs, work_of_cuda

HEADS, KV_HEADS, STEP, MULTIPROCESSORS = 32, 8, 32, 108
OVERHEAD = 2  # steps' time that a block needs besides
# Heads of Llama-3-8B-262K by (columns, diagonals) in MInference's configuration.
CHOSEN = {(1000, 6096): 473, (30, 800): 278, (100, 800): 153, (3500, 100): 89, (500, 700): 31}


def slashes_of_heads(n_q: int, n: int, chosen: dict[tuple[int, int], int]) -> SparsePlan:
    """The last n_q of n queries; (columns, diagonals) of each head at random, by how many heads have them."""
    chance = torch.Generator().manual_seed(0)
    picked = torch.tensor(list(chosen.values()), dtype=torch.float64).multinomial(HEADS, True, generator=chance)
    sizes = [list(chosen)[i] for i in picked.tolist()]
    columns, bands = zip(*(slashes(n, head, *size) for head, size in enumerate(sizes)), strict=True)
    return SparsePlan.vertical_slash(n_q, [c.tolist() for c in columns], bands=[b.tolist() for b in bands], n_k=n)


def uneven_blocks(n_q: int, n: int) -> SparsePlan:
    """Blocks of 128, a tenth of them on average, for some heads and rows many more than for others (log-normal)."""
    chance = torch.Generator().manual_seed(0)
    rows, columns = n_q // 128, n // 128
    share = torch.exp(
        0.8 * torch.randn(HEADS, 1, 1, generator=chance) + 0.5 * torch.randn(HEADS, rows, 1, generator=chance)
    )
    mask = torch.rand(1, HEADS, rows, columns, generator=chance) < (0.1 * share).clamp(max=1)
    diagonal = torch.arange(columns) == torch.arange(columns - rows, columns)[:, None]
    return SparsePlan.from_block_mask((mask | diagonal).tril(columns - rows), 128, 128, n_q=n_q, n_k=n)


PLANS: dict[str, Callable[[], SparsePlan]] = {
    **{f"dense, {n:,}": partial(SparsePlan.dense, n) for n in (2048, 4096, 8192, 32768)},
    **{f"vertical-slash, {n:,}": partial(slashes_of_heads, n, n, {(1000, 6096): 1}) for n in (8192, 32768, 131072)},
    **{
        f"heads differ, {n_q:,} of {n:,}": partial(slashes_of_heads, n_q, n, CHOSEN)
        for n_q, n in ((2048, 32768), (4096, 32768), (8192, 32768), (4096, 131072), (32768, 32768), (131072, 131072))
    },
    **{
        f"rows differ, {n_q:,} of {n:,}": partial(uneven_blocks, n_q, n)
        for n_q, n in ((8192, 8192), (4096, 32768), (32768, 32768))
    },
}


def steps_of(plan: SparsePlan) -> tuple[Tensor, int]:
    """int64 [plans of heads that have their own, blocks of one] as they are numbered; resident blocks."""
    group = HEADS // KV_HEADS if plan.heads == 1 else 1
    block = 128 if 0 <= -plan.q_block * group % 128 < 64 else 64
    args = {"q_block": plan.q_block, "group": group, "n_q": plan.n_q, "n_k": plan.n_k, "q_offset": plan.q_offset}
    programs, found = Programs.of(args, block, plan.q_block * group, None), []
    for head in range(plan.heads):
        tensors = (plan.ranges, plan.range_slice, plan.columns, plan.column_slice)
        own = [x[0, min(head, x.shape[1] - 1)] for x in tensors]
        found.append(work_of_cuda(programs, *own, STEP, plan.n_k)[1].flip(0))
    return torch.stack(found).repeat_interleave(HEADS // group // plan.heads, 0), 2 if block == 128 else 3


def halves(steps: Tensor) -> Tensor:
    """The classes in which the kernel sorts: log2(steps) in halves, the upper ones from 1.5 times a power of two."""
    fraction, power = steps.clamp(min=1).double().frexp()
    return 2 * power + (fraction >= 0.75)


def last_end(steps: Sequence[int], slots: int) -> int:
    """When the last block ends if each, in this order, takes the slot that is free first."""
    ends = [0] * slots
    for each in steps:
        heapq.heapreplace(ends, ends[0] + each + OVERHEAD)
    return max(ends)


def heads_at_work(order: Tensor, of_head: int, slots: int) -> float:
    """Key/value heads among the blocks of each round, on average."""
    rounds = (order // of_head).split(slots)
    return sum(len(each.unique()) for each in rounds) / len(rounds)


def main() -> None:
    print(
        "| plan | blocks | rounds | unsorted | sorted | gain | by exact steps | heads at work |\n" + "| --- " * 8 + "|"
    )
    for name, make in PLANS.items():
        table, resident = steps_of(make())
        steps, slots = table.flatten(), resident * MULTIPROCESSORS
        by = [
            torch.arange(len(steps)),
            *(key.sort(descending=True, stable=True).indices for key in (halves(steps), steps)),
        ]
        share = int((steps + OVERHEAD).sum()) / slots
        now, coarse, exact = (last_end(steps[order].tolist(), slots) / share - 1 for order in by)
        heads = "/".join(f"{heads_at_work(order, len(steps) // KV_HEADS, slots):.1f}" for order in by)
        print(
            f"| {name} | {len(steps):,} | {len(steps) / slots:.1f} | +{now:.1%} | +{coarse:.1%} | "
            f"{(1 + now) / (1 + coarse):.2f}x | +{exact:.1%} | {heads} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
