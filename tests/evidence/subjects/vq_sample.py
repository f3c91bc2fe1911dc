"""Evidence of vq_sample: tokens, equal to the reference's. Scores are multiples of 1/8, so that sums are exact."""

import functools
import math
from typing import Any

import torch
from mutations import BARRIER, MMA_A, MMA_B, SWAPPED, WAIT, Change, at_line, nth, shuffle, weaker
from scrimp.kernels import linear, vq_sample
from torch import Tensor

from scrimp.ops.vq_sample import _choose

from .subject import Case, Flat, Mutant, Subject

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
HEATS = (0.0, 1.0, 0.3, 3.0)


def make(
    rows: int, K: int, V: int, levels: int, dtype: torch.dtype, bias: bool = False, top_k: int = 0, top_p: float = 1.0,
    min_p: float = 0.0, heats: tuple[float, ...] = HEATS, broken: bool = False, spread: int = 4, d: int = 32,
) -> Flat:  # fmt: skip
    """Many equal logits. `broken`: rows of NaN, of -inf, with one code at inf, with all but one at -inf, sound ones."""
    h, codebook = torch.randint(-2, 3, (rows, d)), torch.randint(-spread, spread + 1, (K, d)) / 8
    codes = torch.randint(K, (levels, V), dtype=torch.int32)
    h, codebook = h.to(dtype), codebook.to(dtype)
    if broken:
        big = 6e4 if dtype == HALF else 3e38
        h[:4], h[:, :4], codebook[:, :4] = 0, 0, 0
        h[0, 0] = torch.nan
        h[1, 1] = h[2, 2] = h[3, 3] = big
        codebook[:, 1], codebook[0, 2], codebook[1:, 3] = -big, big, -big
    temperature = torch.tensor([heats[m % len(heats)] for m in range(rows)])
    seed, position = torch.randint(-(2**62), 2**62, (rows,)), torch.randint(10**6, (rows,))
    some = torch.randint(-8, 9, (V,)).to(dtype) / 8 if bias else None
    return h, codebook, codes if levels > 1 else codes[0], some, temperature, seed, position, top_k, top_p, min_p


def logits_of(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    """Those of the kernels to the bit: sums in fp32, rounded once."""
    scores = (h.double() @ codebook.double().T).to(h.dtype).float()
    total = sum(scores[..., some.long()] for some in torch.atleast_2d(codes)) + 0.0
    return (total if bias is None else total + bias.float()).to(h.dtype).float()


def check(results: Any, args: Flat) -> None:
    """The reference's choice from these logits; -1 where a temperature is none."""
    h, codebook, codes, bias, temperature, seed, position, *filters = args
    logits = logits_of(h.cpu(), codebook.cpu(), codes.cpu(), None if bias is None else bias.cpu())
    logits = logits.reshape(-1, codes.shape[-1])
    numbers = (x.flatten().tolist() for x in (temperature, seed, position))
    expected = [
        _choose(row, *some, *filters) if 0 <= some[0] < math.inf else -1
        for row, some in zip(logits, zip(*numbers, strict=True), strict=True)
    ]
    if results.shape != seed.shape or results.dtype != torch.int64 or results.flatten().tolist() != expected:
        raise AssertionError(f"tokens {results.flatten().tolist()}, expected {expected}")


# One line for each set of compiled kernels.
EMULATED: dict[str, Case] = {
    **{
        f"drawn-{rows}-{K}-{V}": functools.partial(make, rows, K, V, 1, HALF)
        for rows, K, V in ((1, 16, 1024), (5, 48, 3088), (16, 160, 1024), (9, 16, 64), (4, 1024, 2064))
    },
    "broken": functools.partial(make, 8, 16, 2064, 1, HALF, broken=True),
    "no temperature": functools.partial(make, 5, 16, 64, 1, HALF, heats=(-1.0, math.inf, math.nan, 1.0, 0.0)),
    **{
        f"top-k-{rows}-{V}-{top_k}": functools.partial(make, rows, 32, V, 1, HALF, top_k=top_k)
        for rows, V, top_k in ((4, 1024, 1), (5, 3088, 40), (3, 1024, 1023))
    },
    **{
        f"all-{rows}-{V}-{top_k}-{top_p}-{min_p}": functools.partial(
            make, rows, 37, V, 2, BRAIN, True, top_k, top_p, min_p
        )
        for rows, V, top_k, top_p, min_p in (
            (4, 77, 9, 0.9, 0.0), (5, 1501, 300, 0.5, 0.01), (3, 3001, 2000, 0.95, 0.0), (4, 3001, 1, 1e-6, 0.3),
        )
    },
    "top-p-5-3088": functools.partial(make, 5, 48, 3088, 1, HALF, top_k=900, top_p=0.6),
    "one sector of scores": functools.partial(
        make, 4, 16, 2048, 1, HALF, top_k=1500, top_p=0.9, spread=1, d=256, heats=(3.0, 9.0)
    ),
    "flat": functools.partial(make, 4, 37, 3001, 2, BRAIN, True, 3000, 0.49, 0.0, spread=0),
    "one row": functools.partial(make, 1, 37, 1030, 2, BRAIN, True, 300, 0.004, 0.01, heats=(3.0,), spread=0),
    "broken, all": functools.partial(make, 8, 37, 77, 2, BRAIN, True, 20, 0.9, 0.1, broken=True),
}  # fmt: skip
INTERPRETED: dict[str, Case] = {
    f"{name}-{word}": functools.partial(case, dtype=dtype)
    for word, dtype in (("half", HALF), ("single", SINGLE))
    for name, case in {
        "drawn": functools.partial(make, 5, 40, 3000, 1),
        "greedy": functools.partial(make, 3, 40, 1025, 2, bias=True, heats=(0.0,)),
        "top-p": functools.partial(make, 2, 30, 300, 1, top_p=0.8),
        "min-p": functools.partial(make, 4, 30, 1500, 1, bias=True, min_p=0.05),
        "all": functools.partial(make, 2, 30, 300, 3, top_k=100, top_p=0.95, min_p=0.01),
        "more than all": functools.partial(make, 4, 30, 90, 1, top_k=10**6),
        "one token": functools.partial(make, 4, 1, 1, 1),
        "broken": functools.partial(make, 5, 9, 50, 1, min_p=0.1, broken=True),
    }.items()
}


def shipped() -> dict[str, Case]:
    """Without filters, and all of them with residual codes and a bias."""

    def meta(levels: int, dtype: torch.dtype) -> Flat:
        empty = functools.partial(torch.empty, device="meta")
        V, K, d, rows = 131_072, 1312, 2048, 1
        codes = empty((V,) if levels == 1 else (levels, V), dtype=torch.int32)
        number = empty(rows, dtype=torch.int64)
        head = empty(rows, d, dtype=dtype), empty(K, d, dtype=dtype), codes
        filters = (0, 1.0, 0.0) if levels == 1 else (50, 0.9, 0.05)
        return *head, None if levels == 1 else empty(V, dtype=dtype), empty(rows), number, number, *filters

    return {
        "drawn-bfloat16": functools.partial(meta, 1, BRAIN),
        "drawn-float32": functools.partial(meta, 1, SINGLE),
        "filtered-bfloat16": functools.partial(meta, 2, BRAIN),
    }


def planted(kernel: str, change: Change, *caught_by: str, case: str = "drawn-5-48-3088") -> Mutant:
    return Mutant(kernel, change, frozenset(caught_by), case=case)


def short(kernel: str, case: str = "drawn-5-48-3088", **buffers: int) -> dict[str, Mutant]:
    return {
        f"{name} of {kernel} short": Mutant(kernel, str, frozenset({"out_of_bounds"}), {name: size}, case)
        for name, size in buffers.items()
    }


COPY = ("race", "async_race", "uninitialised", "value")
WRONG = ("value", "out_of_bounds")
LESS, LESS_EQUAL = r"setp\.lt\.s32", "setp.le.s32"
PRODUCT, SCAN, DRAW, WEIGH = "linear_kernel", "vq_sample_scan_kernel", "vq_sample_draw_kernel", "vq_sample_weigh_kernel"
FIRST, SECOND = r"-4658895280553007687", r"-7723592293110705685"  # factors of the hash
SUM = r"add\.f32(\s+%r\d+), (%r\d+), %r\d+;"
product = functools.partial(planted, PRODUCT)
scan, draw = functools.partial(planted, SCAN), functools.partial(planted, DRAW)
weigh, filtered = (functools.partial(planted, kernel, case="one row") for kernel in (WEIGH, DRAW))
matrix = functools.partial(at_line, linear.linear_kernel)
line = functools.partial(at_line, vq_sample.vq_sample_scan_kernel)
OTHER_HASH = line("value = (value ^ (value >> 27))", SECOND, None, "-7723592293110705687")
MUTANTS = {
    **{f"barrier {k} of products removed": product(nth(BARRIER, k, ""), *COPY) for k in (0, 1)},
    "wait of products weakened": product(weaker(0), *COPY),
    "wait of products removed": product(nth(WAIT, 0, ""), *COPY),
    "operand A swapped": product(nth(MMA_A, 0, SWAPPED), "value"),
    "operand B swapped": product(nth(MMA_B, 0, SWAPPED), "value"),
    "rows past the end": product(matrix("rows = tl.load(x + at", LESS, 0, LESS_EQUAL), *WRONG),
    "inputs past the end": product(matrix("inside = (k < K - at)", LESS, 0, LESS_EQUAL), *WRONG),
    **short(PRODUCT, x=2, weight0=2, out=2),
    **{f"scan's barrier {k} removed": scan(nth(BARRIER, k, ""), *COPY) for k in (0, 1, 2)},
    "noise of another hash": scan(OTHER_HASH, "value"),
    "noise without the seed": scan(nth(FIRST, 0, "0"), "value"),
    "upper ends too low": scan(line("tl.store(high + part", SUM, None, r"mov.b32\1, \2;"), "value"),
    **short(SCAN, scores=2, codes=4, temperature=4, seed=8, position=8, best_out=4, high=4, low=4),
    **{f"draw's barrier {k} removed": draw(nth(BARRIER, k, ""), *COPY) for k in (0, 1, 2)},
    "best of blocks over 8, not 16": draw(shuffle(0, 16, 8), "value"),
    "drawn by another hash": draw(OTHER_HASH, "value"),
    "noise where there is no heat": draw(
        line("value = tl.where(plain", r"selp\.f64(\s+%rd\d+, )%rd\d+, (%rd\d+), %p\d+", None, r"mov.b64\1\2"), "value"
    ),
    "the last of equals": draw(line("chosen = tl.min(", r"redux\.sync\.min", None, "redux.sync.max"), "value"),
    **short(DRAW, scores=2, temperature=4, seed=8, position=8, best_in=4, high=4, low=4, token=8),
    **{f"weigh's barrier {k} removed": weigh(nth(BARRIER, k, ""), *COPY) for k in (0, 1, 2)},
    "a digit of 3 bits": weigh(line("own = (rank >> shift) & 15", r", 15;", None, ", 7;"), "value"),
    "digits overlap": weigh(line("upper = upper * 16 + chosen", r", 4;", None, ", 3;"), "value"),
    "below the digit": weigh(line("from_digit = tl.sum", r"setp\.lt", None, "setp.gt"), "value"),
    **short(WEIGH, "one row", scores=2, codes=4, bias=2, temperature=4, best=4),
    **short(WEIGH, "one row", weights_in=8, state_in=8, weights_out=8, state_out=8),
    "below the threshold": filtered(line("keep = keep & (rank >= low)", r"setp\.ge", None, "setp.ne"), "value"),
    "all of the equals": filtered(line("keep = keep & ((equal == 0)", r"setp\.lt\.s64", None, "setp.ne.s64"), "value"),
}  # fmt: skip
SHIPPED = shipped()
SUBJECT = Subject(
    op="vq_sample",
    cases=EMULATED,
    warp_cases=["drawn-5-48-3088", "top-k-5-3088-40", "all-5-1501-300-0.5-0.01", "flat"],
    interpreted=INTERPRETED,
    check=check,
    reference_launch="one sector of scores",
    shipped=SHIPPED,
    defaults=["drawn-bfloat16", "filtered-bfloat16"],
    mutant_case="one row",
    mutants=MUTANTS,
    tensor_kernels={"linear_kernel": 0},
    without_tensors=[name for name in SHIPPED if "float32" in name],
    exact_bytes=False,  # how many blocks are drawn from depends on values
)  # fmt: skip
