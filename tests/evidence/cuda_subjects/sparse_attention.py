"""Evidence of sparse_attention in CUDA C++."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mutations import BARRIER, COMMIT, WAIT, Change, nth, weaker
from subjects.sparse_attention import FIRST, HALVES, PLANS, by_token, flat, listed, long, make, mixed
from subjects.subject import Case, Flat, Mutant, against_oracle, pairwise

from scrimp import SparsePlan

from .subject import CudaSubject, source

HALF, BRAIN = HALVES
REFERENCE, HEADS, PADDED, SPLIT = "mixed", "columns-200-64-1-float16", "padded-200-64-1-bfloat16", "split"
SORTED, LAST = "sorted", 1023  # a key that no plan of sorted blocks lists: without it they are not sorted


def scaled(scale: float) -> Flat:
    return (*mixed(64, HALF)[:11], scale)


def ends() -> Flat:
    """Tiles of 0 to 2 steps and equal weights."""
    plan = listed([([[0, 64 * i]][:i], []) for i in range(3)], 192, 192)
    return (*flat(plan, 192, 64, 2, 1, HALF)[:11], 0.0)


def split() -> Flat:
    """Few rows and many keys; the last rows see none."""
    tile = ([[0, 1100], [1110, 1190], [1400, 1536]], [*range(1200, 1400, 3)])
    return flat(listed([tile, ([], [])], 67, 1536), 1536, 64, 3, 1, HALF)


def uneven(heads: int, n_q: int, q_block: int, part: int = 1) -> SparsePlan:
    """Keys by chance: in one of three tiles none, in one up to 40 ranges and 40 columns; the second head has none."""
    counts = torch.randint(-20, 41, (2, heads, -(-n_q // q_block))).clamp(min=0) // part
    counts[:, 1:2] = 0
    plans = []
    for ranges, columns in counts.unbind(1):
        tiles = []
        for i, j in zip(ranges.tolist(), columns.tolist(), strict=True):
            tiles.append(([[20 * x, 20 * x + 1 + x * j % 19] for x in range(i)], [*range(800, 800 + j)]))
        plans.append(listed(tiles, n_q, LAST + 1, q_block, causal=False))
    return SparsePlan.cat(plans)


def blocks_of_rows(args: Flat) -> Iterator[tuple[int, int, int, range]]:
    """Sample, plan's head, tile and tokens of every block as it is numbered: the last tile of a head is the first."""
    q, k, _, *plan, _, q_block, _, _, _ = args
    (B, H, n_q, _), lanes = q.shape, max(x.shape[1] for x in plan)
    heads = H if lanes > 1 else k.shape[1]
    group, q_block = H // heads, min(q_block, n_q)
    left = q_block * group % 128
    rows = 128 if left == 0 or left > 64 else 64
    for b, head, tile in itertools.product(range(B), range(heads), reversed(range(-(-n_q // q_block)))):
        here = min(q_block, n_q - tile * q_block) * group
        for first in reversed(range(0, q_block * group, rows)):
            stop = -(-min(first + rows, here) // group)
            yield b, head, tile, range(tile * q_block + first // group, tile * q_block + stop)


def steps_of(args: Flat) -> list[int]:
    """Steps of 32 keys that each block takes at the most: of 32 ranges at a time, and of all columns."""
    ranges, range_slice, _, column_slice, row_start, _, q_offset, causal, _ = args[3:]
    n_k, found = args[1].shape[2], []

    def own(x: torch.Tensor, b: int, head: int) -> list[Any]:
        return x[min(b, x.shape[0] - 1), min(head, x.shape[1] - 1)].tolist()

    for b, head, tile, tokens in blocks_of_rows(args):
        if not tokens:
            found.append(0)
            continue
        low = 0 if row_start is None else int(row_start[min(b, len(row_start) - 1), tokens.start : tokens.stop].min())
        high = min(tokens[-1] + q_offset + 1, n_k) if causal else n_k
        first, count = own(range_slice, b, head)[tile]
        listed_here = own(ranges, b, head)[first : first + count]
        keys = [max(min(stop, high) - max(start, low), 0) for start, stop in listed_here]
        parts = [sum(keys[i : i + 32]) for i in range(0, count, 32)] + [own(column_slice, b, head)[tile][1]]
        found.append(sum(-(-part // 32) for part in parts))
    return found


def in_order(steps: Sequence[int]) -> list[int]:
    """Blocks sorted by log2(steps) in halves, equal ones as they are numbered; beyond 2^15.5 steps all are equal."""

    def halves(block: int) -> int:
        power = max(steps[block], 1).bit_length() - 1
        return min(2 * power + (2 * steps[block] >= 3 << power), 31)

    return sorted(range(len(steps)), key=halves, reverse=True)


def check_order(args: Flat, memory: Sequence[np.ndarray]) -> None:
    """Of the kernel that sorts: the steps of all blocks, and their order."""
    steps, order = (x.view(np.int32).tolist() for x in memory)
    assert steps == steps_of(args)
    assert order == in_order(steps)


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for row in pairwise(plan=list(PLANS), n=[1, 65, 200], D=[64, 128], group=[1, 3, 8], dtype=list(HALVES)):
        if row["plan"] in FIRST:
            row["dtype"] = HALVES[row["D"] == 64]
        found["-".join(str(value).removeprefix("torch.") for value in row.values())] = functools.partial(make, **row)
    return found | {
        "long": functools.partial(long, 128, HALF),
        "by_token": functools.partial(by_token, 64, BRAIN),
        "ends": ends,
        "negative scale": functools.partial(scaled, -0.2),
        SORTED: lambda: flat(uneven(9, 30, 1), LAST + 1, 64, 9, 1, HALF),
        SPLIT: split,
        "split heads": lambda: flat(SparsePlan.dense(16, 1100), 1100, 128, 8, 1, BRAIN),
        "split window": lambda: flat(SparsePlan.sliding_window(40, 1300, n_k=1500, q_block=40), 1500, 64, 2, 1, BRAIN),
        HEADS: functools.partial(make, "columns", 200, 64, 1, HALF),
        PADDED: functools.partial(make, "padded", 200, 64, 1, BRAIN),
        REFERENCE: functools.partial(mixed, 64, HALF),
    }


def nothing(B: int, n: int) -> Flat:
    q, k, v, ranges, range_slice, columns, column_slice, *rest = mixed(64, HALF)
    return (q[:B, :, :n], k[:B], v[:B], ranges, range_slice[:, :, :n], columns, column_slice[:, :, :n], *rest)


def changed(i: int, change: Change) -> Change:
    return lambda a: (*a[:i], change(a[i]), *a[i + 1 :])


BAD = {
    "rank": (changed(0, lambda x: x[0]), r"q must be \[B, H, N, D\], got \[2, 70, 64\]"),
    "dtypes": (changed(1, torch.Tensor.bfloat16), "k and q differ in dtype"),
    "dtype": (lambda a: (*(x.float() for x in a[:3]), *a[3:]), r"CUDA C\+\+ serves float16 and bfloat16"),
    "head size": (lambda a: (*(x[..., :32] for x in a[:3]), *a[3:]), r"CUDA C\+\+ serves .*, head sizes 64 and 128"),
    "shapes": (changed(2, lambda x: x[:, :, :-1]), r"v \[1, 1, 499, 64\] do not fit together"),
    "heads": (
        lambda a: (a[0].repeat(1, 2, 1, 1)[:, :3], *(x.repeat(1, 2, 1, 1) for x in a[1:3]), *a[3:]),
        "3 query heads are not a multiple of 2 key/value heads",
    ),
    "plan dtype": (changed(3, torch.Tensor.long), "ranges must be int32"),
    "plan shape": (changed(4, lambda x: x[:, :, :1]), r"range_slice has shape \[1, 1, 1, 2\], which does not fit q"),
    "row starts": (
        changed(7, lambda _: torch.zeros(1, 3, dtype=torch.int32)),
        r"row_start has shape \[1, 3\], which does not fit q",
    ),
    "row starts' dtype": (changed(7, lambda _: torch.zeros(1, 70)), "row_start must be int32"),
    "tile": (changed(8, lambda _: 0), "q_block=0 must be at least 1"),
    "offset": (changed(9, lambda _: 2**31), "q_offset=2147483648 does not fit int32"),
    "scale": (changed(11, lambda _: torch.inf), "scale=inf must be finite"),
    "rows off the grid": (
        changed(1, lambda x: torch.nn.functional.pad(x, (1, 0))[..., 1:]),
        "rows of .* at multiples of 16 bytes",
    ),
    "too many": (
        lambda a: (a[0], *(x[:, :, :1].expand(1, 1, 2**30, 64) for x in a[1:3]), *a[3:]),
        "tokens are too many for 32 bits",
    ),
    "device": (changed(3, lambda x: x.to("meta")), "all tensors must be on one CUDA device"),
}
line, parts, walk, order = (source(f"sparse_attention{part}") for part in ("", ".parts", ".walk", ".order"))
COPY, WRONG = ("race", "async_race", "uninitialised", "value"), ("value", "out_of_bounds", "misaligned")
MMA_A = r"(mma\.sync\S+ \{[^}]*\}, \{)(%r\d+),(%r\d+)"
MMA_B = r"(mma\.sync\S+ \{[^}]*\}, \{[^}]*\}, \{)(%r\d+),(%r\d+)"
SWAPPED, ANY = r"\1\3,\2", r"vote\.sync\.any\.pred(\s+%p\d+), %p\d+, %r\d+;"
SHUFFLE = r"(shfl\.sync\.bfly\.b32\s+%r\d+\|%p\d+, %r\d+), %r\d+,"
BEFORE = r"(shfl\.sync\.up\.b32\s+%r\d+\|%p\d+, %r\d+), %r\d+,"
PRODUCT = r"mul\.lo\.s64(\s+%rd\d+), %rd\d+, %rd\d+;"


def planted(change: Change, *caught_by: str, kernel: str = "kernel<__half, 64, 2>", case: str = "") -> Mutant:
    return Mutant(f"sparse_attention_{kernel}", change, frozenset(caught_by), case=case)


def short(size: int, *buffers: str, kernel: str = "kernel<__half, 64, 2>", case: str = "") -> dict[str, Mutant]:
    caught = frozenset({"out_of_bounds"})
    return {
        f"{name} short{case and f', {case}'}": Mutant(
            f"sparse_attention_{kernel}", caught_by=caught, short={name: size}, case=case
        )
        for name in buffers
    }


one = functools.partial(planted, kernel="kernel<__half, 64, 1>", case=HEADS)
merged = functools.partial(planted, kernel="merge_kernel<__half, 64>", case=SPLIT)
counted = functools.partial(planted, kernel="steps_kernel", case=SORTED)
ordered = functools.partial(planted, kernel="order_kernel", case=SORTED)
MUTANTS = {
    **{f"barrier {k} removed": planted(nth(BARRIER, k, ""), *COPY) for k in (0, 1)},
    "wait weakened": planted(weaker(1), *COPY),
    "wait removed": planted(nth(WAIT, 1, ""), *COPY),
    **{f"commit {k} removed": planted(nth(COMMIT, k, ""), *COPY) for k in (1, 2)},
    **{f"operand A of product {k} swapped": planted(nth(MMA_A, k, SWAPPED), "value") for k in (0, 63, 64, -1)},
    **{f"operand B of product {k} swapped": planted(nth(MMA_B, k, SWAPPED), "value") for k in (0, 63, 64, -1)},
    "queries transposed": planted(nth(r"x4\.shared", 0, "x4.trans.shared"), "value"),
    "keys transposed": planted(nth(r"x4\.shared", 2, "x4.trans.shared"), "value"),
    "values not transposed": planted(nth(r"x4\.trans", 0, "x4"), "value"),
    "maximum of another row": planted(nth(SHUFFLE, 0, r"\1, 4,"), "value"),
    "total of another row": planted(nth(SHUFFLE, -1, r"\1, 4,"), "value"),
    "sums not scaled": planted(nth(ANY, -1, r"setp.ne.s32\1, 0, 0;"), "value"),
    "totals not scaled": planted(
        parts("state.total[h] = fmaf", r"fma\.rn\.f32(\s+%f\d+), %f\d+, %f\d+, (%f\d+);", 0, r"mov.f32\1, \2;"), "value"
    ),
    "no exponential": planted(nth(r"ex2\.approx\.ftz\.f32(\s+%f\d+), (%f\d+);", 5, r"mov.f32\1, \2;"), "value"),
    "not inverted": planted(nth(r"rcp\.rn\.f32(\s+%f\d+), %f\d+;", -1, r"mov.f32\1, 0f3F800000;"), "value"),
    "logarithm to base 2": planted(nth("0f3F317218", 0, "0f3F800000"), "value"),
    "causal test off by one": planted(line("key.x > last", r"setp\.gt\.s32", None, "setp.ge.s32"), "value"),
    "no step masked": planted(nth(ANY, 5, r"setp.ne.s32\1, 0, 0;"), "value"),
    "a run of half a step": planted(
        walk("if (place + kKeys <= run_upto)", r"(add\.s32\s+%r\d+, %r\d+), 64;", -1, r"\1, 32;"), *WRONG
    ),
    "ranges counted wrongly": planted(nth(BEFORE, 11, r"\1, 3,"), *WRONG),
    "a key of the range before": planted(walk("step - 1) <= at", r"setp\.gt\.s32", None, "setp.ge.s32"), *WRONG),
    "a key behind the last": planted(walk("key[j] = at < total", r"setp\.lt\.s32", None, "setp.le.s32"), "value"),
    "columns inside a range twice": planted(
        walk("kept = column >=", r"setp\.eq\.s16(\s+%p\d+, %rs\d+), 0;", None, r"setp.ne.s16\1, 7;"), "value"
    ),
    "columns among ranges by the wrong end": planted(
        walk("range.y, ended + step - 1)", r"setp\.gt\.s32", None, "setp.lt.s32"), "value"
    ),
    "rows read past the tile": planted(
        line("r = min(rows.first", r"min\.s32(\s+%r\d+), (%r\d+), %r\d+;", None, r"mov.b32\1, \2;"), "out_of_bounds"
    ),
    "rows stored past the tile": planted(line("if (r >= rows.count)", r"setp\.ge\.s32", None, "setp.gt.s32"), *WRONG),
    "lse stored past the tile": one(line("&& r < rows.count)", r"setp\.ge\.s32", None, "setp.gt.s32"), *WRONG),
    "sign of the scale": planted(nth(r"xor\.b32(\s+%r\d+, %r\d+), -2147450880;", 0, r"xor.b32\1, 0;"), "value",
                                 case="negative scale"),
    "another head's keys": one(line("const T* const k =", PRODUCT, 1, r"mov.b64\1, 0;"), "value"),
    "another head's values": one(line("const T* const v =", PRODUCT, 1, r"mov.b64\1, 0;"), "value"),
    "operand A of one tile swapped": one(nth(MMA_A, 0, SWAPPED), "value"),
    "wait for one tile's queries weakened": one(weaker(0), *COPY),
    "wait for one tile's queries removed": one(nth(WAIT, 0, ""), *COPY),
    "commit of one tile's queries removed": one(nth(COMMIT, 0, ""), *COPY),
    "barrier of one tile removed": one(nth(BARRIER, 0, ""), *COPY),
    "first key off by one": planted(
        line("key.x > last", r"setp\.lt\.s32", None, "setp.le.s32"),
        "value",
        kernel="kernel<__nv_bfloat16, 64, 1>",
        case=PADDED,
    ),
    "every split from the first key": one(
        line("walk.limit(share", r"mul\.lo\.s32(\s+%r\d+), %r\d+, %r\d+;", 0, r"mov.b32\1, 0;"), *WRONG, case=SPLIT
    ),
    "splits without an end": one(
        walk("left-- > 0", r"setp\.\w+\.s32(\s+%p\d+, %r\d+), [01];", None, r"setp.eq.s32\1, 77;"), *WRONG, case=SPLIT
    ),
    "rows past the last": merged(line("if (row >= p.n_rows)", r"setp\.ge\.s64", 0, "setp.gt.s64"), *WRONG),
    "splits past the last": merged(line("const float mine", r"setp\.ge\.s32", 0, "setp.gt.s32"), *WRONG),
    **{f"maximum of half the splits, {k}": merged(nth(SHUFFLE, k, r"\1, 4,"), "value") for k in (3, 4)},
    **{f"total of half the splits, {k}": merged(nth(SHUFFLE, k, r"\1, 4,"), "value") for k in (8, 9)},
    "weights of no power": merged(nth(r"ex2\.approx\.ftz\.f32(\s+%f\d+), (%f\d+);", 0, r"mov.f32\1, \2;"), "value"),
    "weight of the first split": merged(
        nth(r"(shfl\.sync\.idx\.b32\s+%r\d+\|%p\d+, %r\d+), %r\d+,", -1, r"\1, 0,"), "value"
    ),
    "sums of the first split": merged(line("const float* from", PRODUCT, None, r"mov.b64\1, 0;"), "value"),
    "a number left out": merged(
        line("sums[0] = fmaf(of, two.x", r"fma\.rn\.f32(\s+%f\d+), %f\d+, %f\d+, (%f\d+);", None, r"mov.f32\1, \2;"),
        "value",
    ),
    "splits not inverted": merged(nth(r"rcp\.rn\.f32(\s+%f\d+), %f\d+;", 0, r"mov.f32\1, 0f3F800000;"), "value"),
    "base 2 after the merge": merged(line("p.lse[at] = total", "0f3F317218", -1, "0f3F800000"), "value"),
    "a warp past the last block": counted(order("if (block >= n_blocks)", r"setp\.ge\.s32", 0, "setp.gt.s32"), *WRONG),
    "blocks of two warps": counted(
        order("blockIdx.x * kWarps", r"(shr\.u32\s+%r\d+, %r\d+), 5;", 0, r"\1, 6;"), *WRONG
    ),
    "the tile behind": counted(
        line("block = tiles * parts - 1", r"not\.b32(\s+%r\d+), (%r\d+);", None, r"neg.s32\1, \2;"), *WRONG
    ),
    "ranges that end later": counted(walk("upto = max(min(range.y", r"min\.s32", 0, "max.s32"), "value"),
    "ranges that start earlier": counted(walk("start = max(range.x", r"max\.s32", 0, "min.s32"), "value"),
    **{f"ranges counted through wrongly, {k}": counted(nth(BEFORE, k, r"\1, 3,"), "value") for k in (0, 4)},
    "steps of ranges rounded down": counted(
        walk("steps += (total", r"(add\.s32\s+%r\d+, %r\d+), 31;", 0, r"\1, 0;"), "value"
    ),
    "steps of columns rounded down": counted(
        walk("return steps +", r"(add\.s32\s+%r\d+, %r\d+), 31;", 0, r"\1, 0;"), "value"
    ),
    "other ranges in the second round": counted(walk("next_range += 32", r", 32;", 0, ", 16;"), "value"),
    **short(4, "ranges", "range_slice", "column_slice", kernel="steps_kernel", case=SORTED),
    **{f"barrier {k} of the order removed": ordered(nth(BARRIER, k, ""), "race", *COPY) for k in range(3)},
    "blocks counted twice": ordered(nth(r"(atom\.shared\.add\.u32\s+%r\d+, \[%r\d+\]), 1;", 0, r"\1, 2;"), *WRONG),
    **{f"places counted through wrongly, {k}": ordered(nth(BEFORE, k, r"\1, 3,"), *WRONG) for k in (0, 4)},
    "total of eight warps": ordered(order("if (lane == 31)", "31;", 0, "7;"), *WRONG),
    "its class among those before": ordered(order("lane < warp ?", r"setp\.ge\.u32", 0, "setp.gt.u32"), *WRONG),
    "the greatest class before": ordered(nth(r"redux\.sync\.add", 0, "redux.sync.max"), *WRONG),
    "its share among those before": ordered(
        order("upto - mine", r"sub\.s32(\s+%r\d+), (%r\d+), %r\d+;", 0, r"mov.b32\1, \2;"), *WRONG
    ),
    "a class for each power of two": ordered(
        order("__float_as_uint", r"(shr\.u32\s+%r\d+, %r\d+), 22;", None, r"\1, 23;"), "value"
    ),
    "few steps first": ordered(nth(r"xor\.b32(\s+%r\d+), (%r\d+), 31;", -1, r"mov.b32\1, \2;"), *WRONG),
    "lanes behind among those before": ordered(nth(r"not\.b32(\s+%r\d+), (%r\d+);", -1, r"mov.b32\1, \2;"), *WRONG),
    "blocks past the last": ordered(
        order("const int begin", r"min\.s32(\s+%r\d+), (%r\d+), %r\d+;", 0, r"mov.b32\1, \2;"), *WRONG
    ),
    **short(2, "q", "k", "v"),
    **short(4, "ranges", "range_slice", "columns", "column_slice"),
}  # fmt: skip
CASES = cases()
SUBJECT = CudaSubject(
    op="sparse_attention",
    cases=CASES,
    warp_cases=["long", REFERENCE, "by_token", HEADS],
    check=against_oracle("sparse_attention"),
    reference_launch=REFERENCE,
    least_bytes=None,  # products bound it, not memory
    mutant_case=REFERENCE,
    mutants=MUTANTS,
    idle={"no queries": functools.partial(nothing, 1, 0), "no samples": functools.partial(nothing, 0, 70)},
    bad=BAD,
    shared={
        f"sparse_attention_kernel<{name}, {D}, {tiles}>": size
        for name in ("__half", "__nv_bfloat16")
        for (D, tiles), size in {(64, 1): 50176, (64, 2): 66560, (128, 1): 49792, (128, 2): 82560}.items()
    },
    tensor_kernels={"sparse_attention_kernel": 1},
    keep="sparse_attention_order_kernel",
    check_kept=check_order,
)
