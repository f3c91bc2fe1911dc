"""Evidence of codebook_topk. Most numbers are integers: sums are exact in any order, and equal scores are many."""

import functools
from typing import Any

import torch
from mutations import BARRIER, MMA_A, MMA_B, SWAPPED, WAIT, Change, at_line, nth, shuffle
from scrimp.kernels import codebook_topk as kernels
from torch import Tensor

from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle, oracle_tolerance

from .subject import Case, Flat, Mutant, Subject

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
REFERENCE = OPS["codebook_topk"].reference


def make(
    rows: int, G: int, C: int, D: int, k: int, dtype: torch.dtype, bias: bool = False, euclidean: bool = False,
    mean: bool = True, broken: bool = False, exact: bool = True,
) -> Flat:  # fmt: skip
    """`broken`: numbers that are NaN or infinite, codes that are never chosen, one that is forced."""
    x, codebook = torch.randn(rows, max(G, 1) * D), torch.randn(*([G] if G else []), C, D)
    added = torch.randn(codebook.shape[:-1])
    if exact:
        x, codebook, added = x.round().clamp(-2, 2), codebook.round().clamp(-2, 2), added.round() / 2
        x[:1] = 0
    if broken:
        x[1, 3], x[2, 2], codebook[0, 5, 1] = torch.nan, torch.inf, torch.inf
        codebook[1, :, 2], added[1] = 1.0, -torch.inf
        added[1, [7, 70, 90]], added[-1, 80] = 0.0, torch.inf
        x[2, D + 2] = -torch.inf
        codebook[-1, :, 1], x[0, 1 - D] = 1.0, torch.inf
    return x.to(dtype), codebook.to(dtype), added if bias else None, k, euclidean, mean


def strided(dtype: torch.dtype) -> Flat:
    """Nothing lies close."""
    x = torch.randint(-5, 6, (40, 2, 5)).to(dtype).permute(2, 1, 0)
    books = torch.randint(-5, 6, (4, 60, 50)).to(dtype)[::2, ::2, 5:25]
    return x, books, torch.randint(-9, 10, (2, 30, 3)).float()[..., 1], 4, True, False


def check(results: Any, args: Flat) -> None:
    """Of integers the reference's results; else the oracle's scores, each that of its code, and their mean."""
    results = [result.cpu() for result in results]
    x, codebook, *_ = args = [value.cpu() if isinstance(value, Tensor) else value for value in args]
    if bool((codebook.nan_to_num(0, 0, 0) % 1 == 0).all()):
        for name, mine, theirs in zip(("out", "index", "scores"), results, REFERENCE(*args), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
        return
    out, index, scores = results
    assert_matches_oracle(scores, lambda *some: REFERENCE(*some)[2], *args)
    exact = x.double() @ codebook.double().T - (codebook.double().square().sum(-1) / 2 if args[4] else 0)
    own = exact.gather(-1, index.long())
    if not (own - scores).abs().max() <= 2 * oracle_tolerance(own, REFERENCE(*args)[2]):
        raise AssertionError("a score is not that of its code")
    assert_matches_oracle(out, lambda some: some[index.long()].mean(-2), codebook)


# One line for each set of compiled kernels.
EMULATED: dict[str, Case] = {
    **{
        f"scores-{rows}-{C}-{k}": functools.partial(make, rows, 0, C, 64, k, HALF)
        for rows, C, k in ((1, 64, 1), (5, 200, 8), (64, 130, 3), (130, 700, 8))
    },
    **{
        f"groups-{rows}-{C}-{k}": functools.partial(make, rows, 3, C, 37, k, BRAIN, True, True, mean)
        for rows, C, k, mean in ((3, 100, 20, True), (65, 333, 17, False))
    },
    "broken": functools.partial(make, 4, 3, 133, 37, 20, BRAIN, True, True, broken=True),
    "most": functools.partial(make, 9, 0, 150, 80, 64, HALF, True, mean=False),
    **{
        f"distances-{rows}-{C}-{k}": functools.partial(make, rows, 1, C, 64, k, BRAIN, False, True)
        for rows, C, k in ((70, 129, 4), (2, 64, 5))
    },
    "any numbers": functools.partial(make, 66, 0, 200, 64, 8, HALF, exact=False),
}
INTERPRETED: dict[str, Case] = {
    f"{name}-{word}": functools.partial(case, dtype=dtype)
    for word, dtype in (("half", HALF), ("single", SINGLE))
    for name, case in {
        "one row": functools.partial(make, 1, 0, 300, 70, 8),
        "rows": functools.partial(make, 67, 2, 200, 20, 5, bias=True, euclidean=True),
        "all codes": functools.partial(make, 3, 0, 64, 9, 64, euclidean=True, mean=False),
        "one code": functools.partial(make, 3, 1, 1, 1, 1),
        "no inputs": functools.partial(make, 3, 2, 90, 0, 4, bias=True, euclidean=True),
        "broken": functools.partial(make, 5, 3, 133, 6, 9, bias=True, broken=True),
        "any numbers": functools.partial(make, 9, 0, 100, 300, 8, euclidean=True, exact=False),
        "strided": strided,
    }.items()
}


def shipped() -> dict[str, Case]:
    """Scores of many rows, distances of one, the most codes of several codebooks."""

    def meta(rows: int, G: int, D: int, k: int, dtype: torch.dtype, bias: bool, euclidean: bool) -> Flat:
        empty = functools.partial(torch.empty, device="meta")
        codebook = empty(G, 10_000, D, dtype=dtype)
        return empty(rows, G * D, dtype=dtype), codebook, empty(G, 10_000) if bias else None, k, euclidean, True

    return {
        f"{rows}-{G}-{D}-{k}-{str(dtype).removeprefix('torch.')}": functools.partial(
            meta, rows, G, D, k, dtype, bias, euclidean
        )
        for rows, G, D, k, dtype, bias, euclidean in (
            (4096, 1, 64, 8, BRAIN, False, False), (1, 1, 576, 8, BRAIN, False, True),
            (4096, 9, 64, 64, HALF, True, True), (4096, 1, 64, 8, SINGLE, False, False),
        )
    }  # fmt: skip


ANY, CLOSE = "groups-65-333-17", "scores-130-700-8"


def of(kernel: str, change: Change, *caught_by: str, case: str = ANY) -> Mutant:
    return Mutant(f"codebook_topk{kernel}_kernel", change, frozenset(caught_by), case=case)


def short(kernel: str, **buffers: int) -> dict[str, Mutant]:
    early = frozenset({"out_of_bounds"})
    return {
        f"{name} of {kernel.strip('_') or 'search'} short": Mutant(
            f"codebook_topk{kernel}_kernel", str, early, {name: size}
        )
        for name, size in buffers.items()
    }  # fmt: skip


COPY = ("race", "async_race", "uninitialised", "value")
WRONG = ("value", "out_of_bounds")
LESS, LESS_EQUAL = r"setp\.lt\.s32", "setp.le.s32"
line = functools.partial(at_line, kernels.codebook_topk_kernel)
norm, gather, search = (functools.partial(of, kernel) for kernel in ("_norm", "_gather", ""))
MUTANTS = {
    **short("_norm", codebook=2, bias=4, added=4),
    **{f"norm's barrier {k} removed": norm(nth(BARRIER, k, ""), *COPY) for k in range(3)},
    "squares over 8, not 16": norm(shuffle(0, 16, 8), "value"),
    "codes of norms past the end": norm(line("for at in range(0, D", LESS, None, LESS_EQUAL), *WRONG),
    "numbers of norms past the end": norm(line("own = tl.load(codebook + at, mask=(c", LESS, 1, LESS_EQUAL), *WRONG),
    "no square": norm(
        line("squares = tl.fma(own", r"(fma\.rn\.f32\s+%r\d+, %r\d+), %r\d+", 0, r"\1, 0f3F800000"), "value"
    ),
    "whole squares": norm(nth("0fBF000000", 0, "0fBF800000"), "value"),
    "bias of the first codebook": norm(
        line("total += tl.load(bias + g", r"mul\.lo\.s64(\s+%rd\d+, )%rd\d+, ", 0, r"mul.lo.s64\g<1>0, "), "value"
    ),
    "norms of the first codebook": norm(
        line("g = (tl.program_id(0) //", r"div\.s32(\s+%r\d+), .*;", 0, r"mov.b32\1, 0;"), *WRONG, "race"
    ),
    **short("", x=2, codebook=2, added=4, keys=8),
    **{f"barrier {k} removed": search(nth(BARRIER, k, ""), *COPY) for k in (0, 1, 2, 5, 7, 10, 12, 14, 16, 18)},
    "operand A swapped": search(nth(MMA_A, 0, SWAPPED), "value"),
    "operand B swapped": search(nth(MMA_B, 0, SWAPPED), "value"),
    "wait removed": search(nth(WAIT, 0, ""), *COPY, case=CLOSE),
    "rows past the end": search(line("found = tl.where((m < M)", LESS, -1, LESS_EQUAL), *WRONG),
    "codes past the end": search(line("codes = tl.load(codes_at + at", LESS, None, LESS_EQUAL), *WRONG),
    "numbers past the end": search(line("inside = (d < D - at)", LESS, 0, LESS_EQUAL), *WRONG),
    "addends past the end": search(
        line("scores += tl.load(added + g", LESS, None, LESS_EQUAL), "out_of_bounds", case="broken"
    ),
    "codes behind the last": search(
        line("scores = tl.where(there", r"selp\.f32(\s+%r\d+), (%r\d+), 0fFF800000, %p\d+;", None, r"mov.b32\1, \2;"),
        *WRONG,
    ),
    "NaN not seen": search(
        line("there, missing = (c < C)", r"setp\.nan(\.f32\s+%p\d+, %r\d+, %r\d+);", None, r"setp.lt\1;"),
        "value",
        case="broken",
    ),
    "NaN behind the last code": search(
        line("broken = tl.max((there", r"and\.pred(\s+%p\d+), %p\d+, (%p\d+);", None, r"mov.pred\1, \2;"),
        "value",
        case="broken",
    ),
    "a broken row keeps its codes": search(
        line("found = tl.where(broken", r"selp\.b64(\s+%rd\d+), \d+, (%rd\d+), %p\d+;", None, r"mov.b64\1, \2;"),
        "value",
        case="broken",
    ),
    "key of the higher code": search(line("return ((bits ^ ((bits", "2147483647", -1, "2147483646"), "value"),
    "any place": search(line("found = tl.where(better[:", r"setp\.eq\.b64", 0, "setp.ne.b64"), "value"),
    "the last of equals": search(
        line("best, at_best = tl.max", r"setp\.ge\.f32", None, "setp.gt.f32"), "value", case=CLOSE
    ),
    "best found again": search(line("scores = tl.where(i[None", r"setp\.eq\.b32", 0, "setp.ne.b32"), *WRONG),
    "first range": search(
        line("first = tl.program_id(1)", r"mul\.lo\.s32(\s+%r\d+), .*;", 0, r"mov.b32\1, 0;"), *WRONG
    ),
    "ranges end early": search(
        line("for tile in range(first", r"add\.s32(\s+%r\d+, %r\d+), %r\d+;", 0, r"add.s32\1, 1;"), "value"
    ),
    "keys of the second range": search(
        line("to = ((m.to(tl.int64)", r"cvt\.u64\.u32(\s+%rd\d+), %r\d+;", -1, r"mov.b64\1, 1;"), *WRONG
    ),
    **short("_gather", keys=8, codebook=2, out=2, index=4, scores=4),
    "keys past the end": gather(line("some = tl.load(keys + row", LESS, None, LESS_EQUAL), *WRONG),
    "keys of the first row": gather(
        line("some = tl.load(keys + row", r"mul\.lo\.s64(\s+%rd\d+), .*;", 0, r"mov.b64\1, 0;"), "value"
    ),
    "a key stays": gather(
        line("some = tl.where(some == best", r"selp\.b64(\s+%rd\d+), -\d+, (%rd\d+), %p\d+;", 0, r"mov.b64\1, \2;"),
        "value",
    ),
    "ranks from 1": gather(
        line("chosen = tl.where(j == rank", r"(setp\.eq\.b32\s+%p\d+, %r\d+), 0", 0, r"\1, 1"), "value"
    ),
    "scores past the end": gather(line("tl.store(index + row", LESS, 0, LESS_EQUAL), *WRONG),
    "always the mean": gather(nth(r"ld\.param\.b32(\s+%r\d+), \[\w+_param_11\];", 0, r"mov.b32\1, 1;"), "value"),
    "codes of the next codebook": gather(line("codebook += row % G", r"rem\.s32", 0, "div.s32"), *WRONG),
    "numbers gathered past the end": gather(
        line("own = tl.load(codebook + at, mask=there", LESS, None, LESS_EQUAL), *WRONG
    ),
    "nothing is broken": gather(line("score = tl.where(broken", r"0f7FC00000", 0, "0f00000000"), *WRONG, case="broken"),
    "a code left out": gather(
        line("total = tl.where(broken", r"add\.f32(\s+%r\d+, %r\d+), %r\d+;", 0, r"add.f32\1, 0f00000000;"), "value"
    ),
    # Which numbers a reduction leaves in shared memory is read before its next round writes them elsewhere.
    "barrier 8 removed": search(nth(BARRIER, 8, "")),
    "gather's barrier removed": gather(nth(BARRIER, 0, "")),  # of one warp
}
SHIPPED = shipped()
SUBJECT = Subject(
    op="codebook_topk",
    cases=EMULATED,
    warp_cases=["scores-5-200-8", "groups-3-100-20", "broken", "most"],
    interpreted=INTERPRETED,
    check=check,
    reference_launch=CLOSE,
    shipped=SHIPPED,
    defaults=["4096-1-64-8-bfloat16", "1-1-576-8-bfloat16"],
    mutant_case=ANY,
    mutants=MUTANTS,
    tensor_kernels={"codebook_topk_kernel": 0},
    without_tensors=[name for name in SHIPPED if "float32" in name],
    exact_bytes=False,  # a row that finds fewer codes gathers fewer
)
