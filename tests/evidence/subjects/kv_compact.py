"""Evidence of kv_compact."""

import functools
import itertools
from typing import Any

import torch
from mutations import Change, at_line, nth
from scrimp.kernels import kv_compact as kernels
from torch import Tensor

from scrimp._registry import OPS

from .subject import Case, Flat, Mutant, Subject, pairwise

# What the accepted rows are, each sequence taking the next: the last of the tree, the first chain, nothing, all, ...
PATHS = {
    "mixed": [[0, 2, 3, 6, 11], [0, 1, 2], [], [3], [0, 1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 18, 30, 31, 39]],
    "far": [list(range(5, 40)), list(range(0, 40, 2)), list(range(40)), [39]],
    "one": [[1], [0, 2]],
}


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers that every dtype holds; rows, heads and columns differ."""
    return (torch.arange(torch.Size(shape).numel()).view(shape) * 37 % 251).to(dtype)


def make(
    layers: int, batch: int, heads: int, head_dim: int, rows: int, path: str, dtype: torch.dtype, layout: str
) -> Flat:
    """`layout`: slots or heads first in memory; "last": each path ends where the cache does."""
    capacity = 50
    if layout == "slots":
        cache = filled((layers, batch, heads, capacity, head_dim), dtype).transpose(2, 3).contiguous().transpose(2, 3)
    else:
        cache = filled((layers, batch, heads, capacity, head_dim), dtype)
    chosen = list(itertools.islice(itertools.cycle(PATHS[path]), batch))
    fitting = [[row for row in some if row < rows][:rows] for some in chosen]
    padded = torch.tensor([some + [-1] * (rows - len(some)) for some in fitting], dtype=torch.int32)
    ends = [max(some, default=0) + 1 for some in fitting]
    start = [capacity - end if layout == "last" else (3 * b) % (capacity - end + 1) for b, end in enumerate(ends)]
    return cache, torch.tensor(start, dtype=torch.int32), padded.view(batch, rows)


def wild(dtype: torch.dtype) -> Flat:
    """Starts and rows outside the cache, which stay where they are, and rows behind a -1, which are none."""
    start = torch.tensor([-1, 45, 2**31 - 1, 2], dtype=torch.int32)
    path = torch.tensor([[1, 2, 3], [1, 4, 5], [1, 2, 2**31 - 1], [1, -1, 4]], dtype=torch.int32)
    return filled((2, 4, 1, 50, 64), dtype), start, path


def check(_: Any, args: Flat) -> None:
    """The whole cache, to the bit."""
    cache, start, path = (x.cpu() for x in args)
    expected = filled(tuple(cache.shape), cache.dtype)
    capacity = cache.shape[3]
    inside = path.clone()
    for b, first in enumerate(start.tolist()):  # what the op's own check refuses is not moved here
        legal = [row if 0 <= first < capacity - max(row, 0) else -1 for row in inside[b].tolist()]
        inside[b] = torch.tensor(legal, dtype=torch.int32)
    OPS["kv_compact"].reference(expected, start, inside)
    assert torch.equal(cache, expected)


# (head size, 16-bit dtype, dtype of the interpreter)
KERNELS = [
    (64, torch.float16, torch.float32), (128, torch.bfloat16, torch.float16), (19, torch.float16, torch.float32),
    (256, torch.bfloat16, torch.float16),
]  # fmt: skip


def cases(interpreted: bool) -> dict[str, Case]:
    rows = pairwise(
        layers=[1, 4], batch=[1, 5], heads=[1, 3], kernel=KERNELS, rows=[3, 16, 40], path=list(PATHS),
        layout=["heads", "slots", "last"],
    )  # fmt: skip
    found: dict[str, Case] = {}
    for row in rows:
        head_dim, *dtypes = row.pop("kernel")
        case = row | {"head_dim": head_dim, "dtype": dtypes[interpreted]}
        found["-".join(str(value).removeprefix("torch.") for value in case.values())] = functools.partial(make, **case)
    return found | {"outside": functools.partial(wild, torch.float32 if interpreted else torch.float16)}


def shipped() -> dict[str, Case]:
    """Every configuration in three dtypes."""

    def meta(head_dim: int, dtype: torch.dtype) -> Flat:
        cache = torch.empty(64, 1, 8, 8192, head_dim, dtype=dtype, device="meta")
        start, path = (torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((1,), (1, 64)))
        return cache, start, path

    return {
        f"{head_dim}-{str(dtype).removeprefix('torch.')}": functools.partial(meta, head_dim, dtype)
        for head_dim in (64, 128, 256) for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }  # fmt: skip


EMULATED = cases(interpreted=False)
TILES = "1-5-1-40-far-heads-256-bfloat16"  # paths of several tiles
LAST = "1-1-3-40-one-last-19-float16"  # the last head's path ends where the cache does
WRONG = ("value", "out_of_bounds")


def planted(change: Change, *caught_by: str, case: str = "") -> Mutant:
    return Mutant("kv_compact_kernel", change, frozenset(caught_by), case=case)


def line(words: str, pattern: str, index: int | None, replacement: str, *caught_by: str, case: str = "") -> Mutant:
    return planted(at_line(kernels.kv_compact_kernel, words, pattern, index, replacement), *caught_by, case=case)


def short(case: str = "", **buffers: int) -> Mutant:
    return Mutant("kv_compact_kernel", caught_by=frozenset({"out_of_bounds"}), short=buffers, case=case)


MUTANTS = {
    "rows past the cache": line("moves = (i < end)", r"setp\.gt\.s64", None, "setp.ge.s64", *WRONG),
    "starts below the cache": planted(nth(r"(setp\.gt\.s32\s+%p\d+, %r\d+), -1;", 0, r"\1, -2;"), *WRONG),
    "rows that would move back": line("moves = (i < end)", r"setp\.gt\.s32", None, "setp.lt.s32", *WRONG),
    "no end": planted(nth(r"\tmin\.s32(\s+%r\d+), (%r\d+), %r\d+;", 0, r"\tmov.b32\1, \2;"), "value"),
    "-1 is no end": line("end = tl.minimum(end", r"(setp\.lt\.s32\s+%p\d+, %r\d+), 0;", 0, r"\1, -1;", "value"),
    "path past its end": line("row = tl.load(path", r"setp\.lt\.s32", None, "setp.le.s32", *WRONG),
    "path loaded without a mask": planted(nth(r"@%p\d+( ld\.global\.b32)", -1, r"\1"), *WRONG),
    "rows loaded without a mask": planted(nth(r"@%p\d+( ld\.global\.v4)", 0, r"\1"), "out_of_bounds"),
    "rows stored without a mask": planted(nth(r"@%p\d+( st\.global\.v4)", 0, r"\1"), *WRONG),
    "stored without the start": line("tl.store(cache", r"add\.s64(\s+%rd\d+, )(%rd\d+), %rd2;", 0, r"add.s64\1\2, 0;",
                                     *WRONG),
    "loaded without the start": line("x = tl.load(cache", r"add\.s64(\s+%rd\d+, )(%rd\d+), %rd2;", 0,
                                     r"add.s64\1\2, 0;", *WRONG),
    "stored one row below": line("tl.store(cache", r"mul\.lo\.s64(\s+%rd\d+), (%rd\d+), %rd\d+;", 0,
                                 r"mul.lo.s64\1, \2, 0;", *WRONG),
    "sequence taken for layer": line("g, b, layer", r"div\.s32", 1, "rem.s32", *WRONG),
    "start of the first sequence": line("first = tl.load(start", r"(mad\.wide\.s32\s+%rd\d+, %r\d+), 4,", 0, r"\1, 0,",
                                        "value"),
    "every other tile": line("begin += BLOCK_T", ", 16;", 0, ", 32;", "value", case=TILES),
    "the first tile alone": line("while begin < end", r"(setp\.lt\.s32\s+%p\d+, %r\d+), %r\d+;", -1, r"\1, 0;",
                                 "value", case=TILES),
    "cache short": short(LAST, cache=2),
    "start short": short(start=4),
    "path short": short(path=4),
}  # fmt: skip
SUBJECT = Subject(
    op="kv_compact",
    cases=EMULATED,
    warp_cases=[*list(EMULATED)[:3], "outside"],
    interpreted=cases(interpreted=True),
    check=check,
    reference_launch=TILES,
    shipped=shipped(),
    defaults=["128-bfloat16", "64-float32"],
    mutant_case="outside",
    mutants=MUTANTS,
)
