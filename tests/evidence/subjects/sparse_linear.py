"""Evidence of sparse_linear."""

import functools

import torch
from mutations import BARRIER, COMMIT, MMA_A, MMA_B, SWAPPED, WAIT, Change, at_line, nth, shuffle, weaker
from scrimp.kernels import sparse_linear as kernels

from .subject import Case, Flat, Mutant, Subject, against_oracle

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def make(
    rows: int, K: int, N: int, dtype: torch.dtype, chosen: str = "half", added: bool = False, strided: bool = False
) -> Flat:
    """`chosen` says which channels are listed; inputs and weights of the others are poison. `added`: bias, residual."""
    x, weight = torch.randn(rows, K).to(dtype), torch.randn(K, N + 8 * strided).to(dtype)[:, :N]
    listed = {
        "half": torch.rand(K) < 0.5, "all": torch.arange(K) >= 0, "none": torch.arange(K) < 0,
        "few": torch.arange(K) % 97 == 5, "ends": (torch.arange(K) == 0) | (torch.arange(K) == K - 1),
        "block": torch.arange(K) // 40 % 3 == 1,
    }[chosen]  # fmt: skip
    x[:, ~listed] = torch.nan
    if rows <= kernels.MAX_ROWS:
        weight[~listed] = torch.nan
    channels = listed.nonzero().flatten().int()
    index = torch.cat([channels, torch.full((K - len(channels),), -1, dtype=torch.int32)])
    if strided:
        x, index = x.T.contiguous().T, torch.stack([index, index + 1], 1)[:, 0]
    ends = (torch.randn(N).to(dtype), torch.randn(rows, N).to(dtype)) if added else (None, None)
    return x, weight, index, torch.tensor([len(channels)], dtype=torch.int32), *ends


LISTS = ["half", "few", "block", "ends", "all", "none"]
EMULATED: dict[str, Case] = {
    f"{rows}-{K}-{N}-{dtype}-{chosen}".replace("torch.", ""): functools.partial(
        make, rows, K, N, dtype, chosen, added, strided
    )
    for dtype, N, Ks, some_rows, added, strided in [
        (BRAIN, 112, (64, 512, 1536), (1, 16), False, False),
        (HALF, 208, (304, 1104, 2048), (3, 64), True, False),
        (BRAIN, 33, (100, 577), (5, 40), True, True),
    ]
    for i, (K, rows) in enumerate((K, rows) for K in Ks for rows in some_rows)
    for chosen in (LISTS[i % 6], LISTS[(i + 3) % 6])
}
INTERPRETED: dict[str, Case] = {
    f"{name}-{str(dtype).removeprefix('torch.')}": functools.partial(case, dtype=dtype)
    for dtype in (HALF, SINGLE)
    for name, case in {
        "one row": functools.partial(make, 1, 1100, 40),
        "rows": functools.partial(make, 19, 100, 70, added=True, chosen="block"),
        "chunks": functools.partial(make, 2, 1100, 39, added=True, chosen="few"),
        "strided": functools.partial(make, 3, 90, 24, strided=True),
        "nothing listed": functools.partial(make, 3, 90, 24, added=True, chosen="none"),
        "no inputs": functools.partial(make, 3, 0, 9, added=True),
        "more rows": functools.partial(make, 70, 33, 39, added=True),
    }.items()
}


def shipped() -> dict[str, Case]:
    """Every configuration: chunks apart, and one chunk with bias and residual."""

    def meta(rows: int, K: int, dtype: torch.dtype) -> Flat:
        empty = functools.partial(torch.empty, dtype=dtype, device="meta")
        index = torch.empty(K, dtype=torch.int32, device="meta")
        ends = (empty(4096), empty(rows, 4096)) if K <= kernels.CHUNK else (None, None)
        return empty(rows, K), empty(K, 4096), index, index[:1], *ends

    return {
        f"{rows}-{K}-{str(dtype).removeprefix('torch.')}": functools.partial(meta, rows, K, dtype)
        for rows, K, dtype in ((1, 4096, BRAIN), (64, 512, BRAIN), (64, 512, SINGLE))
    }  # fmt: skip


def planted(change: Change, *caught_by: str, case: str = "") -> Mutant:
    return Mutant("sparse_linear_kernel", change, frozenset(caught_by), case=case)


def looked_up(change: Change, *caught_by: str, case: str = "") -> Mutant:
    return Mutant("sparse_linear_inputs_kernel", change, frozenset(caught_by), case=case)


def short(kernel: str, case: str = "", **buffers: int) -> Mutant:
    return Mutant(kernel, caught_by=frozenset({"out_of_bounds"}), short=buffers, case=case)


COPY = ("race", "async_race", "uninitialised", "value")
WRONG = ("value", "out_of_bounds")
LESS, LESS_EQUAL = r"setp\.lt\.s32", "setp.le.s32"
SUM = r"add\.f32(\s+%r\d+), (%r\d+), %r\d+;"
ALL, ENDS, CHUNKS = "64-304-208-float16-all", "3-304-208-float16-ends", "3-1104-208-float16-block"
line = functools.partial(at_line, kernels.sparse_linear_kernel)
looks = functools.partial(at_line, kernels.sparse_linear_inputs_kernel)


def lookups(everything: str, ends: str) -> dict[str, Mutant]:
    """Faults of the kernel that looks channels up; cases that list every channel, and the first and the last."""
    return {
        "first channel left out": looked_up(
            looks("place, size = tl.where(under", LESS, 0, LESS_EQUAL), "value", case=everything
        ),
        "search from above": looked_up(
            looks("place, size = tl.where(under", r"(selp\.b32\s+%r\d+), (%r\d+), (%r\d+)", 0, r"\1, \3, \2"), *WRONG
        ),
        "the whole list": looked_up(looks("total = tl.minimum(", r"min\.s32", 0, "max.s32"), *WRONG, case=ends),
        "channels past the end": looked_up(
            looks("channels = tl.load(", LESS, 0, LESS_EQUAL), "out_of_bounds", case=everything
        ),
        "other channels": looked_up(looks("found = tl.max(", r"setp\.eq\.b32", 0, "setp.ne.b32"), "value"),
        "maximum of some lanes": looked_up(shuffle(0, 16, 8), "value"),
        **{f"barrier {k} of the search removed": looked_up(nth(BARRIER, k, ""), *COPY) for k in (0, 2)},
        "channels listed past the end": looked_up(
            looks("tl.store(listed + k", LESS, 0, LESS_EQUAL), "out_of_bounds", "race"
        ),
        "x of rows past the end": looked_up(looks("value = tl.load(x", LESS, None, LESS_EQUAL), "out_of_bounds"),
        "x past the end": looked_up(looks("found = tl.where(k < K", LESS, 0, LESS_EQUAL), "out_of_bounds"),
        "unlisted x": looked_up(
            looks("value = tl.where((found", r"(setp\.gt\.s32\s+%p\d+, %r\d+), 0;", None, r"\1, -1;"), "value"
        ),
        "rows too long": looked_up(looks("tl.store(rows", LESS, -1, LESS_EQUAL), *WRONG),
        **{f"{name} of the search short": short("sparse_linear_inputs_kernel", **{name: size})
           for name, size in {"x": 2, "count": 4, "rows": 2, "listed": 4}.items()},
        "list short": short("sparse_linear_inputs_kernel", everything, index=4),
    }  # fmt: skip


MUTANTS = {
    **lookups(ALL, ENDS),
    **{f"barrier {k} removed": planted(nth(BARRIER, k, ""), *COPY) for k in range(4)},
    "wait weakened": planted(weaker(0), *COPY),
    "wait removed": planted(nth(WAIT, 0, ""), *COPY),
    **{f"commit {k} removed": planted(nth(COMMIT, k, ""), *COPY) for k in (0, 1, 2)},
    **{f"operand A of product {k} swapped": planted(nth(MMA_A, k, SWAPPED), "value") for k in (0, 4)},
    **{f"operand B of product {k} swapped": planted(nth(MMA_B, k, SWAPPED), "value") for k in (0, 4)},
    "rows past the end": planted(line("x = tl.load(rows + at", LESS, 0, LESS_EQUAL), "out_of_bounds"),
    "weights past the end": planted(line("some = tl.load(weight", LESS, None, LESS_EQUAL), *WRONG, case=ALL),
    "weights of every channel": planted(
        line("some = tl.load(weight", r"(setp\.gt\.s32\s+%p\d+, %r\d+), 0;", None, r"\1, -1;"), *WRONG
    ),
    "list past the end": planted(line("# ahead of its use", r"@%p\d+( ld\.global)", -1, r"\1"), "out_of_bounds"),
    "weights advance by less": planted(line("BLOCK_K * weight_k", r", 6;", None, ", 5;"), *WRONG),
    "begin of a chunk": planted(line("begin = tl.program_id(1)", r", 9;", 0, ", 8;"), *WRONG, case=CHUNKS),
    "end of a chunk": planted(line("end = tl.minimum(begin", ", 512;", 0, ", 576;"), "value", case=CHUNKS),
    "bias past the end": planted(line("inside = (m < M)", LESS, 0, LESS_EQUAL), "out_of_bounds"),
    "no bias": planted(line("tl.load(bias + n", SUM, 0, r"mov.b32\1, \2;"), "value"),
    "no residual": planted(line("sums += tl.load(at", SUM, 0, r"mov.b32\1, \2;"), "value"),
    "stored without a mask": planted(nth(r"@%p\d+( st\.global)", 0, r"\1"), *WRONG),
    **{f"{name} short": short("sparse_linear_kernel", **{name: size}) for name, size in
       {"rows": 2, "listed": 4, "bias": 2, "residual": 2, "out": 2}.items()},
    "weight short": short("sparse_linear_kernel", ALL, weight=2),
    # Products with odd numbers are of rows 8 to 15, of which there are none: zeros.
    **{f"operand B of product {k} swapped": planted(nth(MMA_B, k, SWAPPED)) for k in (1, 5)},
}  # fmt: skip
SHIPPED = shipped()
SUBJECT = Subject(
    op="sparse_linear",
    cases=EMULATED,
    warp_cases=list(EMULATED)[1::5][:4],
    interpreted=INTERPRETED,
    check=against_oracle("sparse_linear"),
    reference_launch="64-1104-208-float16-half",
    shipped=SHIPPED,
    defaults=["1-4096-bfloat16"],
    mutant_case="3-304-208-float16-half",
    mutants=MUTANTS,
    tensor_kernels={"sparse_linear_kernel": 1},
    without_tensors=[name for name in SHIPPED if "float32" in name],
)
