"""Evidence of int4_sparse_linear."""

import functools
from typing import Any

import torch
from mutations import BARRIER, COMMIT, MMA_A, MMA_B, SWAPPED, WAIT, Change, at_line, nth, weaker
from scrimp.kernels import int4_sparse_linear as kernels

from scrimp._registry import OPS
from scrimp.int4_weight import Int4Channels
from scrimp.ops.int4_linear import MODES
from scrimp.testing import assert_matches_oracle, random_int4_weight

from .sparse_linear import lookups
from .subject import Case, Flat, Mutant, Subject, pairwise

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def make(
    rows: int, outputs: int, K: int, group_size: int, kind: str, mode: str, dtype: torch.dtype, chosen: str = "half",
    permuted: bool = False, bias: bool = False,
) -> Flat:  # fmt: skip
    """`chosen` says which inputs are listed; the others are poison."""
    weight = random_int4_weight(outputs, K, group_size, kind, permuted=permuted)
    listed = {
        "half": torch.rand(K) < 0.5, "all": torch.arange(K) >= 0, "none": torch.arange(K) < 0,
        "few": torch.arange(K) % 37 == 5, "ends": (torch.arange(K) == 0) | (torch.arange(K) == K - 1),
    }[chosen]  # fmt: skip
    x = torch.randn(rows, K).to(dtype)
    x[:, ~listed] = torch.nan
    channels = listed.nonzero().flatten().int()
    index = torch.cat([channels, torch.full((K - len(channels),), -1, dtype=torch.int32)])
    turned = Int4Channels.of(weight)
    ends = torch.randn(outputs).to(dtype) if bias else None
    count = torch.tensor([len(channels)], dtype=torch.int32)
    return (x, *turned.tensors().values(), index, count, ends, *turned.numbers(), MODES.index(mode))


def check(result: Any, args: Flat) -> None:
    """Exact mode within the tolerance; int8 mode bit for bit."""
    reference = OPS["int4_sparse_linear"].reference
    if MODES[args[-1]] == "exact":
        assert_matches_oracle(result, reference, *args)
        return
    expected = reference(*args).cpu()
    same = (result.cpu() == expected) | (result.isnan().cpu() & expected.isnan())
    if not bool(same.all()):
        raise AssertionError(f"{int((~same).sum())} of {same.numel()} numbers differ from the definition's")


NAMES = ("rows", "outputs", "K", "group_size", "kind", "mode", "dtype", "chosen", "permuted", "bias")


def named(rows: list[tuple[Any, ...]]) -> dict[str, Case]:
    return {
        "-".join(str(value).removeprefix("torch.") for value in row): functools.partial(
            make, **dict(zip(NAMES, row, strict=False))
        )
        for row in rows
    }


EMULATED = named([
    (1, 128, 256, 128, "none8", "exact", BRAIN),
    (33, 384, 512, 128, "none8", "exact", BRAIN),
    (3, 112, 256, 128, "none8", "exact", BRAIN, "few"),
    (1, 256, 1280, 128, "none8", "exact", BRAIN, "half", False, True),
    (5, 144, 1280, 128, "none8", "exact", BRAIN, "ends", False, True),
    (11, 40, 320, 64, "uint8", "exact", HALF, "half", False, True),
    (16, 130, 320, 64, "uint8", "exact", HALF, "none", False, True),
    (33, 130, 320, 64, "uint8", "exact", HALF, "all", False, True),
    (3, 40, 320, 64, "uint8", "exact", HALF, "ends", False, True),
    (7, 33, 64, 32, "offset", "exact", HALF, "half", True),
    (2, 33, 300, 300, "float", "int8", BRAIN, "half", True, True),
    (9, 33, 300, 300, "float", "int8", BRAIN, "few", True, True),
    (3, 40, 192, 64, "uint8", "exact", SINGLE, "half", True, True),
])  # fmt: skip
INTERPRETED = named([
    tuple(row.values())
    for row in pairwise(
        rows=[3, 34], outputs=[130], K=[256], group_size=[16, 64, 128, 256],
        kind=["none8", "uint8", "float", "offset", "codebook", "codebook8"], mode=["exact"], dtype=[HALF, SINGLE],
        chosen=["half", "few", "none"], permuted=[False, True], bias=[False, True],
    ) + pairwise(
        rows=[3, 70], outputs=[130], K=[192], group_size=[32, 192],
        kind=["none8", "uint8", "float", "offset", "codebook8"], mode=["int8"], dtype=[HALF, SINGLE],
        chosen=["half", "few"], permuted=[False, True], bias=[True],
    )
] + [
    (3, 19, 0, 32, "none8", "exact", HALF, "all", False, True),
    (17, 19, 1280, 128, "uint8", "exact", HALF, "half", False, True),
])  # fmt: skip


def shipped() -> dict[str, Case]:
    """Every configuration, and every form of the codes with one of them."""

    def meta(rows: int, group_size: int, kind: str, mode: str, dtype: torch.dtype, permuted: bool) -> Flat:
        N = K = 4096
        turned = Int4Channels.of(random_int4_weight(1, K, group_size, kind, permuted=permuted))
        shapes = {"codes": (K, N // 2), "scales": (K // group_size, N), "zeros": (K // group_size, N)}
        tensors = {
            name: None if t is None else torch.empty(shapes.get(name, t.shape), dtype=t.dtype, device="meta")
            for name, t in turned.tensors().items()
        }
        x = torch.empty(rows, K, dtype=dtype, device="meta")
        index = torch.empty(K, dtype=torch.int32, device="meta")
        return (x, *tensors.values(), index, index[:1], None, *turned.numbers(), MODES.index(mode))

    forms = [(rows, 128, "none8", "exact", BRAIN, False) for rows in (1, 16, 64)]
    forms += [(1, 128, "uint8", "exact", HALF, True), (1, 128, "uint8", "int8", BRAIN, False)]
    forms += [(1, 32, "offset", "exact", HALF, False), (16, 128, "float", "exact", SINGLE, False)]
    forms += [(16, 64, "codebook", "exact", SINGLE, False)]
    return {
        "-".join(str(value).removeprefix("torch.") for value in form[:5]): functools.partial(meta, *form)
        for form in forms
    }


def planted(change: Change, *caught_by: str, case: str = "") -> Mutant:
    return Mutant("int4_sparse_linear_kernel", change, frozenset(caught_by), case=case)


def short(case: str = "", **buffers: int) -> Mutant:
    return Mutant("int4_sparse_linear_kernel", caught_by=frozenset({"out_of_bounds"}), short=buffers, case=case)


COPY = ("race", "async_race", "uninitialised", "value")
WRONG = ("value", "out_of_bounds")
LESS, LESS_EQUAL = r"setp\.lt\.s32", "setp.le.s32"
HALVES = "320-64-uint8-exact-float16-half-False-True"
ALL, ENDS = HALVES.replace("half", "all"), HALVES.replace("half", "ends")
CHUNKS = "1-256-1280-128-none8-exact-bfloat16-half-False-True"
line = functools.partial(at_line, kernels.int4_sparse_linear_kernel)
MUTANTS = {
    **lookups(f"33-130-{ALL}", f"3-40-{ENDS}"),
    **{f"barrier {k} removed": planted(nth(BARRIER, k, ""), *COPY) for k in range(4)},
    "wait weakened": planted(weaker(0), *COPY),
    "wait removed": planted(nth(WAIT, 0, ""), *COPY),
    **{f"commit {k} removed": planted(nth(COMMIT, k, ""), *COPY) for k in (1, 4, 5)},
    **{f"operand A of product {k} swapped": planted(nth(MMA_A, k, SWAPPED), "value") for k in (0, 1)},
    **{f"operand B of product {k} swapped": planted(nth(MMA_B, k, SWAPPED), "value") for k in (0, 1)},
    "list past the end": planted(line("return tl.load(listed", r"@%p\d+( ld\.global)", -1, r"\1"), "out_of_bounds"),
    "codes past the end": planted(
        line("words = tl.load(at", r"selp\.b32(\s+%r\d+), %r\d+, 0, %p\d+;", -1, r"mov.b32\1, 16;"), "out_of_bounds"
    ),
    "rows past the end": planted(line("inputs = inputs + (tl.trans", LESS, 0, LESS_EQUAL), "out_of_bounds"),
    "outputs past the end": planted(line("inputs = inputs + (tl.trans", LESS, -1, LESS_EQUAL), "out_of_bounds"),
    "scales of the first group": planted(
        line("s = _dealt(", r"mul\.lo\.s64(\s+%rd\d+), %rd\d+, %rd\d+;", 0, r"mov.b64\1, 0;"), "value"
    ),
    "zeros of the first group": planted(
        line("z = _dealt(", r"mad\.lo\.s64(\s+%rd\d+), %rd\d+, %rd\d+, (%rd\d+);", 0, r"mov.b64\1, \2;"), "value"
    ),
    "scales of other outputs": planted(line("s, z = tl.broadcast_to", r"\+8\]", 0, "]"), "value"),
    "base of the codes": planted(nth("1677747200", 0, "1677747201"), "value"),
    "nibbles from elsewhere": planted(
        line("pairs = ((tl.reshape", r"(shr\.u32\s+%r\d+, %r\d+), 4;", 0, r"\1, 5;"), "value"
    ),
    "mask of a nibble": planted(line("pairs = ((tl.reshape", "983055", 0, "917519"), "value"),
    "no zero": planted(line("d = tl.fma(-z", r"neg\.f32(\s+%r\d+, %r\d+)", 0, r"mov.b32\1"), "value"),
    "no scale": planted(
        line("total = tl.fma(d, s", r"fma\.rn\.f32(\s+%r\d+), (%r\d+), %r\d+, (%r\d+);", 0, r"add.f32\1, \2, \3;"),
        "value",
    ),
    "no bias": planted(
        line("total += tl.load(bias", r"add\.f32(\s+%r\d+), (%r\d+), %r\d+;", 0, r"mov.b32\1, \2;"), "value"
    ),
    "stored without a mask": planted(nth(r"@%p\d+( st\.global)", 0, r"\1"), *WRONG),
    "every chunk the first": planted(
        line("first = tl.program_id(1)", r"mul\.lo\.s32(\s+%r\d+), %r\d+, %r\d+;", 0, r"mov.b32\1, 0;"),
        *WRONG, case=CHUNKS,
    ),
    "chunks without an end": planted(
        line("end = tl.minimum(", r"min\.s32(\s+%r\d+), %r\d+, (%r\d+);", 0, r"mov.b32\1, \2;"), "value", case=CHUNKS
    ),
    **{f"{name} short": short(**{name: size})
       for name, size in {"x": 2, "listed": 4, "scales": 2, "zeros": 1, "bias": 2, "out": 2}.items()},
    "codes short": short(f"33-130-{ALL}", codes=4),
    # The first wait of a pipeline is for its first two groups.
    "commit 0 removed": planted(nth(COMMIT, 0, "")),
    # Ones times inputs: their sum, in whatever order.
    "operand B of product 8 swapped": planted(nth(MMA_B, 8, SWAPPED)),
}  # fmt: skip
SHIPPED = shipped()
SUBJECT = Subject(
    op="int4_sparse_linear",
    cases=EMULATED,
    warp_cases=[name for name in EMULATED if name.split("-")[0] in ("3", "5", "9", "16")][:4],
    interpreted=INTERPRETED,
    check=check,
    reference_launch="33-384-512-128-none8-exact-bfloat16",
    shipped=SHIPPED,
    defaults=["1-128-none8-exact-bfloat16"],
    mutant_case=f"11-40-{HALVES}",
    mutants=MUTANTS,
    tensor_kernels={"int4_sparse_linear_kernel": 1},
    # Entries of a codebook come from memory by their codes: what they feed cannot be asked for a round ahead.
    without_tensors=[name for name in SHIPPED if "codebook" in name],
)
