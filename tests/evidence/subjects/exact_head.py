"""Evidence of exact_head: the k largest logits, equal to the reference's. All sums are exact, whatever their order."""

import functools
from typing import Any

import torch
from mutations import BARRIER, MMA_A, MMA_B, SWAPPED, Change, at_line, nth, shuffle
from scrimp.kernels import exact_head
from torch import Tensor

from scrimp.head_screen import HeadScreen

from .subject import Case, Flat, Mutant, Subject

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def make(
    rows: int, K: int, V: int, k: int, dtype: torch.dtype, wide: int | None = None, basis: bool = False,
    broken: bool = False,
) -> Flat:  # fmt: skip
    """Integers, so that logits are exact and many are equal. `broken`: states of NaN, infinity and large numbers."""
    x, weight = torch.randint(-7, 8, (rows, K)).to(dtype), torch.randint(-15, 16, (V, K)).to(dtype)
    if broken:
        x[2] = 0
        x[:3, 0] = torch.tensor([torch.nan, torch.inf, 6e4 if dtype == HALF else 1e38])
    states = torch.randn(300, K) * torch.linspace(2, 0.1, K) if basis else None
    screen = HeadScreen.build(weight.float(), states, wide=wide)
    return x, weight, *screen.tensors().values(), screen.slack, screen.wide, k


def unpacked(args: Flat) -> tuple[Tensor, Tensor, HeadScreen, int]:
    x, weight, codes, scales, basis, error, norm, slack, wide, k = (
        value.cpu() if isinstance(value, Tensor) else value for value in args
    )
    return x, weight, HeadScreen(codes, scales, basis, error, norm, slack, len(weight), wide), k


def check(results: Any, args: Flat) -> None:
    """The stable sort of the exact logits; hardly more rows were computed than a bound half as wide again asks for."""
    x, weight, screen, k = unpacked(args)
    values, ids, scored = (result.cpu() for result in results)
    logits = (x.double() @ weight.double().T).to(x.dtype)
    truth, order = logits.sort(dim=-1, descending=True, stable=True)
    sound = x.float().isfinite().all(-1) & (truth[:, :k].float().abs() < torch.inf).all(-1)
    if not torch.equal(values.nan_to_num(7.0), truth[:, :k].nan_to_num(7.0)) or not torch.equal(ids, order[:, :k]):
        raise AssertionError(f"ids {ids.tolist()}, expected {order[:, :k].tolist()}")
    centre, half = screen.interval(torch.where(sound[:, None], x, 0))
    last = centre.topk(k).values[:, -1:] - 1.5 * half.amax(-1, keepdim=True)
    spare = last.abs() * 2.0**-6  # of rounded logits
    most = torch.where(sound, (centre + 1.5 * half >= last - spare).sum(-1), len(weight))
    least = torch.where(sound, k, len(weight))
    if scored.dtype != torch.int32 or not bool(((least <= scored) & (scored <= most)).all()):
        raise AssertionError(f"{scored.tolist()} rows were computed, expected {least.tolist()} to {most.tolist()}")


# One line for each set of compiled kernels.
EMULATED: dict[str, Case] = {
    f"{dtype}-{wide}-{rows}-{V}-{k}".removeprefix("torch."): functools.partial(
        make, rows, K, V, k, dtype, wide, basis
    )
    for dtype, K, wide, basis, sizes in [
        (BRAIN, 64, None, False, ((1, 1100, 1), (5, 2100, 3), (16, 1088, 20))),
        (HALF, 130, 1, True, ((1, 700, 2), (4, 2083, 5))),
        (BRAIN, 64, 0, False, ((3, 1100, 4),)),
    ]
    for rows, V, k in sizes
} | {
    "broken": functools.partial(make, 5, 64, 1100, 3, BRAIN, broken=True),
    "few rows": functools.partial(make, 2, 64, 40, 7, BRAIN),
    "a wide head": functools.partial(make, 3, 1088, 2048, 60, BRAIN),
}  # fmt: skip
INTERPRETED: dict[str, Case] = {
    f"{name}-{word}": functools.partial(case, dtype=dtype)
    for word, dtype in (("half", HALF), ("single", SINGLE))
    for name, case in {
        "one state": functools.partial(make, 1, 70, 1500, 1),
        "states": functools.partial(make, 6, 70, 1500, 8, basis=True),
        "narrow": functools.partial(make, 3, 64, 1200, 3, wide=0),
        "one row": functools.partial(make, 2, 8, 1, 1),
        "broken": functools.partial(make, 4, 20, 300, 5, broken=True),
        "no inputs": functools.partial(make, 2, 0, 40, 3),
    }.items()
} | {"more states": functools.partial(make, 66, 8, 100, 1, HALF)}


def shipped() -> dict[str, Case]:
    """Without a basis and with one."""

    def meta(rows: int, dtype: torch.dtype, basis: bool) -> Flat:
        empty = functools.partial(torch.empty, device="meta")
        V, K = 131_072, 2048
        G, wide = K // 64, 13 if basis else K // 64
        codes = empty(V // 16, 16 * 64 * (8 * wide + 4 * (G - wide)) // 8, dtype=torch.uint8)
        parts = empty(V), empty(64 * G, K) if basis else None, empty(G), empty(G)
        return empty(rows, K, dtype=dtype), empty(V, K, dtype=dtype), codes, *parts, 1e-3, wide, 1

    return {
        f"{rows}-{str(dtype).removeprefix('torch.')}-{'basis' if basis else 'plain'}": functools.partial(
            meta, rows, dtype, basis
        )
        for rows, dtype, basis in ((1, BRAIN, False), (64, BRAIN, True))
    }


def of(kernel: str, change: Change, *caught_by: str, case: str = "") -> Mutant:
    return Mutant(f"exact_head_{kernel}_kernel", change, frozenset(caught_by), case=case)


def short(kernel: str, **buffers: int) -> dict[str, Mutant]:
    early = frozenset({"out_of_bounds"})
    return {
        f"{name} of {kernel} short": Mutant(f"exact_head_{kernel}_kernel", str, early, {name: size})
        for name, size in buffers.items()
    }


def unordered(kernel: str, *barriers: int) -> dict[str, Mutant]:
    return {f"barrier {k} of {kernel} removed": of(kernel, nth(BARRIER, k, ""), *COPY) for k in barriers}


COPY = ("race", "async_race", "uninitialised", "value")
WRONG = ("value", "out_of_bounds")
LESS, LESS_EQUAL = r"setp\.lt\.s32", "setp.le.s32"
ADDRESS = r"add\.s64(\s+%rd\d+, %rd\d+), %rd\d+;"
NARROW, TURNED = "bfloat16-0-3-1100-4", "float16-1-4-2083-5"
line = functools.partial(at_line, exact_head.exact_head_state_kernel)
MUTANTS = {
    **short("state", x=2, coordinates=2, error=4, norm=4, pieces=1, step=4, bound=4),
    "no bound": of("state", line("found = (found *", "0d3FF00001", None, "0d00000000"), "value", case=TURNED),
    "nothing is sound": of("state", line("fine = tl.abs(h)", "0f7149F2CA", None, "0f00000000"), "value"),
    "high pieces of half": of("state", line("high = (integer + 128)", ", 8;", None, ", 9;"), "value"),
    "inputs past the end": of("state", line("own = tl.load(x + first", LESS, None, LESS_EQUAL), *WRONG),
    **short("screen", codes=1, scales=4, pieces=1, step=4, centre=4, best=4),
    **unordered("screen", 1, 2, 3, 10, 11, 12, 13),
    "operand A swapped": of("screen", nth(MMA_A, 0, SWAPPED), *WRONG),
    "low nibbles of no sign": of("screen", line("q = (codes & 15)", ", -8;", None, ", 0;"), "value", case=NARROW),
    "high nibbles of no sign": of("screen", line("q = (codes >> 4)", ", -8;", None, ", 0;"), "value", case=NARROW),
    "operand B swapped": of("screen", nth(MMA_B, 0, SWAPPED), *WRONG),
    "codes without their middle": of("screen", line("q = (codes ^ 128)", "-128", None, "0"), *WRONG),
    **short("select", best=4, bound=4, cut=4),
    **unordered("select", 0, 1),
    "every cut infinite": of(
        "select", nth(r"selp\.b32(\s+%r\d+), %r\d+, 2139095040", 0, r"selp.b32\1, 2139095040, 2139095040"), "value"
    ),
    "search from above": of("select", nth("-32768", 0, "20000"), "value"),
    "tiles of the first state": of(
        "select", line("best += tl.cast(m", r"mul\.lo\.s64(\s+%rd\d+, )%rd\d+, ", 0, r"mul.lo.s64\g<1>0, "), "value"
    ),
    "bound of the first state": of(
        "select", line("tl.store(cut + m", ADDRESS, 1, r"add.s64\1, 0;"), "value", case="broken"
    ),
    "one tile wanted": of("select", nth(r"ld\.param\.b32(\s+%r\d+), \[\w+_param_4\];", 0, r"mov.b32\1, 1;"), "value"),
    "tiles past the end": of("select", line("some = tl.load(best + t", LESS, None, LESS_EQUAL), *WRONG),
    **short("count", centre=4, scales=4, bound=4, cut=4, own=4, some=4),
    **unordered("count", 0, 1, 2, 3),
    **short("list", centre=4, scales=4, bound=4, cut=4, total=4),
    **unordered("list", *range(0, 6)),
    "places one too high": of("list", line("tl.store(listed + upto - 1", "-4", None, "0"), *WRONG),
    **short("rerank", x=2, total=4),
    **unordered("rerank", *range(0, 4)),
    "operand A of logits swapped": of("rerank", nth(MMA_A, 0, SWAPPED), "value"),
    "operand B of logits swapped": of("rerank", nth(MMA_B, 0, SWAPPED), "value"),
    "states past the end": of("rerank", line("rows = tl.load(rows_at", LESS, 0, LESS_EQUAL), *WRONG),
    "inputs of logits past the end": of("rerank", line("inside = (k < K - at)", LESS, None, LESS_EQUAL), *WRONG),
    "the first rows of the head": of(
        "rerank", line("row = tl.load(listed + n", r"ld\.global\.b32 \{ (%r\d+) \}.*", None, r"mov.b32 \1, 1;"), *WRONG
    ),
    **short("top", total=4, own=4, threshold=4, values=2, ids=8, scored=4),
    **unordered("top", 0, 1),
    "best over 1, not 2": of("top", shuffle(0, 2, 1), *WRONG),
    "one place for all": of("top", line("key = (ordered(value)", r", 21474\d+;", None, ", 7;"), *WRONG),
    "list past the end": of("top", line("need = tl.load(needs", LESS, None, LESS_EQUAL), *WRONG),
}  # fmt: skip
SUBJECT = Subject(
    op="exact_head",
    cases=EMULATED,
    warp_cases=["bfloat16-None-5-2100-3", "float16-1-4-2083-5", "bfloat16-0-3-1100-4", "broken"],
    interpreted=INTERPRETED,
    check=check,
    reference_launch="a wide head",
    shipped=shipped(),
    defaults=["1-bfloat16-plain", "64-bfloat16-basis"],
    mutant_case="bfloat16-None-5-2100-3",
    mutants=MUTANTS,
    tensor_kernels={"exact_head_rerank_kernel": 0},
    exact_bytes=False,  # how many rows are computed depends on values
    exact_flops=False,
)
