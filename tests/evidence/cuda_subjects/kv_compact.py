"""Evidence of kv_compact in CUDA C++."""

import functools

import torch
from mutations import Change, nth
from scrimp.benchmarks.kv_compact_cost import count_cuda
from subjects.kv_compact import PATHS, check, filled, make, wild
from subjects.subject import Case, Flat, Mutant, pairwise

from .subject import CudaSubject, source

# (head size, dtype): rows of whole vectors of 16 bytes, and one of no such
FORMS = [(64, torch.float16), (128, torch.bfloat16), (19, torch.float16), (256, torch.float32), (24, torch.float32)]


def cases() -> dict[str, Case]:
    rows = pairwise(
        layers=[1, 4], batch=[1, 5], heads=[1, 3], form=FORMS, rows=[3, 16, 40], path=list(PATHS),
        layout=["heads", "slots", "last"],
    )  # fmt: skip
    found: dict[str, Case] = {}
    for row in rows:
        head_dim, dtype = row.pop("form")
        case = row | {"head_dim": head_dim, "dtype": dtype}
        found["-".join(str(value).removeprefix("torch.") for value in case.values())] = functools.partial(make, **case)
    return found | {
        "outside": functools.partial(wild, torch.float16),
        OVERLAPPING: overlapping,
        LAST: to_the_end,
        "off the grid": lambda: shifted(overlapping()),
    }


def overlapping() -> Flat:
    """Each of 40 rows moves to the place before it."""
    path = torch.arange(1, 41, dtype=torch.int32)[None]
    return filled((2, 1, 3, 50, 128), torch.bfloat16), torch.tensor([4], dtype=torch.int32), path


def to_the_end() -> Flat:
    """The last head's path ends where the cache does."""
    path = torch.tensor([[0, 1, 3, 5]], dtype=torch.int32)
    return filled((1, 1, 2, 9, 64), torch.float16), torch.tensor([3], dtype=torch.int32), path


def shifted(args: Flat) -> Flat:
    """Rows that start off the 16-byte grid."""
    cache = filled((*args[0].shape[:4], args[0].shape[4] + 1), args[0].dtype)[..., 1:]
    cache.copy_(args[0])
    return cache, *args[1:]


def nothing(*shape: int, rows: int = 3) -> Flat:
    start = torch.zeros(shape[1], dtype=torch.int32)
    return filled(shape, torch.float32), start, torch.full((shape[1], rows), -1, dtype=torch.int32)


BAD = {
    "dtype": (lambda a: (a[0].double(), *a[1:]), "cache must be float32, float16 or bfloat16 on CUDA"),
    "index dtype": (lambda a: (a[0], a[1].long(), a[2]), "start and path must be int32"),
    "rank": (lambda a: (a[0][0], *a[1:]), r"cache must be \[L, B, G, C, D\], got \[4, 1, 50, 64\]"),
    "batch": (lambda a: (a[0], a[1][:2], a[2]), r"shapes start \[2\] and path \[4, 3\] do not fit .* batch of 4"),
    "expanded": (lambda a: (a[0][:1].expand(2, -1, -1, -1, -1), *a[1:]), "got stride 0 in dimension 0"),
    "transposed": (lambda a: (a[0].mT, *a[1:]), "got stride 64 in dimension 4"),
    "device": (lambda a: (a[0], a[1].to("meta"), a[2]), "cache, start and path must be on one CUDA device"),
}
line = source("kv_compact")
OVERLAPPING, LAST, WRONG = "next to it", "the last slot", ("value", "out_of_bounds", "misaligned")
BALLOT, END = r"vote\.sync\.ballot\.b32(\s+%r\d+), %p\d+, %r\d+;", r"setp\.lt\.s32(\s+%p\d+, %r\d+), 0;"
LOAD, STORE = r"ld\.global\.v4\.u32(\s+\{[^}]*\}, \[%rd\d+)\]", r"st\.global\.v4\.u32(\s+\[%rd\d+)\]"


def planted(change: Change, *caught_by: str, case: str = "") -> Mutant:
    return Mutant("kv_compact_kernel<16>", change, frozenset(caught_by), case=case)


def short(**buffers: int) -> Mutant:
    return Mutant("kv_compact_kernel<16>", caught_by=frozenset({"out_of_bounds"}), short=buffers)


MUTANTS = {
    "heads past the last": planted(line("if (item >= p.items)", r"setp\.ge", 0, "setp.gt"), *WRONG, case=OVERLAPPING),
    "half of a start": planted(
        line("const int64_t b = item", r"(shl\.b64\s+%rd\d+, %rd\d+), 2;", 0, r"\1, 1;"), *WRONG
    ),
    "starts below the cache": planted(
        line("const int64_t behind", r"selp\.b64(\s+%rd\d+), (%rd\d+), 0, %p\d+;", 0, r"mov.b64\1, \2;"), *WRONG
    ),
    "the first layer alone": planted(
        line("char* cache = p.cache", r"mul\.lo\.s64(\s+%rd\d+), %rd\d+, %rd\d+;", 0, r"mov.b64\1, 0;"), *WRONG
    ),
    "the first sequence alone": planted(
        line("char* cache = p.cache", r"mul\.lo\.s64(\s+%rd\d+), %rd\d+, %rd\d+;", 1, r"mov.b64\1, 0;"), *WRONG
    ),
    "rows past the cache": planted(line("const bool moves", r"setp\.gt\.s64", None, "setp.ge.s64"), *WRONG),
    "rows that would move back": planted(line("const bool moves", r"setp\.lt\.s64", None, "setp.gt.s64"), *WRONG),
    "vectors past the last": planted(
        line("const bool moves", r"setp\.lt\.u32(\s+%p\d+, %r\d+), %r\d+;", None, r"setp.ge.u32\1, 0;"), *WRONG
    ),
    "no end": planted(nth(BALLOT, 0, r"mov.b32\1, 0;"), "value"),
    "-1 is no end": planted(nth(END, 0, r"setp.lt.s32\1, -1;"), "value"),
    "path past its end": planted(line("const int32_t row = begin", r"setp\.ge\.s64", 0, "setp.gt.s64"), *WRONG),
    "every row the first": planted(
        nth(r"(shfl\.sync\.idx\.b32\s+%r\d+\|%p\d+, %r\d+), %r\d+,", 0, r"\1, 0,"), "value", case=OVERLAPPING
    ),
    "vector of the next lane": planted(nth(LOAD, 0, r"ld.global.v4.u32\1+16]"), *WRONG),
    "misaligned vector": planted(nth(LOAD, 1, r"ld.global.v4.u32\1+8]"), "misaligned", case=OVERLAPPING),
    "store to the next vector": planted(nth(STORE, 0, r"st.global.v4.u32\1+16]"), *WRONG),
    "every other part of the path": planted(
        line("for (int64_t begin = 0", ", 32;", -1, ", 64;"), "value", case=OVERLAPPING
    ),
    "every other round": planted(line("for (uint32_t done = 0", ", 256;", -1, ", 512;"), "value", case=OVERLAPPING),
    "cache short": Mutant(
        "kv_compact_kernel<16>", caught_by=frozenset({"out_of_bounds"}), short={"cache": 16}, case=LAST
    ),
    "start short": short(start=4),
    "path short": short(path=4),
    # The lanes of a warp take every instruction together here.
    "no wait for the other lanes": planted(nth(r"bar\.warp\.sync\s+\S+;", 0, ""), case=OVERLAPPING),
}
CASES = cases()
SUBJECT = CudaSubject(
    op="kv_compact",
    cases=CASES,
    warp_cases=[*list(CASES)[:2], "outside", OVERLAPPING],
    check=check,
    reference_launch=OVERLAPPING,
    least_bytes=lambda args: count_cuda(*args).bytes,
    count=count_cuda,
    mutant_case="outside",
    mutants=MUTANTS,
    idle={
        "no layers": functools.partial(nothing, 0, 1, 2, 9, 8),
        "no head dim": functools.partial(nothing, 2, 1, 2, 9, 0),
        "no path": functools.partial(nothing, 2, 1, 2, 9, 8, rows=0),
    },
    bad=BAD,
)
