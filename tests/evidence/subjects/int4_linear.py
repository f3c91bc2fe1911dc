"""Evidence of int4_linear."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from mutations import BARRIER, COMMIT, MMA_A, MMA_B, SWAPPED, WAIT, Change, at_line, nth, shuffle, weaker
from scrimp.kernels.int4_linear import int4_linear_inputs_kernel, int4_linear_kernel

from scrimp._registry import OPS
from scrimp.int4_weight.check import ZERO_KINDS
from scrimp.ops.int4_linear import MODES
from scrimp.testing import assert_matches_oracle, random_int4_weight

from .subject import Case, Flat, Mutant, Subject, pairwise

# group size: K (of which 4 blocks at a time leave some over), and a K whose blocks are all in fours
INPUTS = {16: (208, 256), 32: (352, 256), 64: (576, 512), 128: (640, 1024), 300: (300, 300)}


def make(rows: int, outputs: int, group_size: int, even: bool, kind: str, mode: str, dtype: torch.dtype,
         permuted: bool) -> Flat:  # fmt: skip
    K = INPUTS[group_size][even]
    weight = random_int4_weight(outputs, K, group_size, kind, permuted=permuted)
    x, bias = torch.randn(rows, K).to(dtype), torch.randn(outputs).to(dtype) if even else None
    number = ZERO_KINDS.index(weight.zero_kind)
    return (x, *weight.tensors().values(), bias, group_size, number, MODES.index(mode))


def named(rows: list[dict[str, Any]], maker: Callable[..., Flat] = make) -> dict[str, Case]:
    return {
        "-".join(str(value).removeprefix("torch.") for value in row.values()): functools.partial(maker, **row)
        for row in rows
    }


def check(result: Any, args: Flat) -> None:
    """Exact mode within the tolerance; int8 mode bit for bit."""
    if MODES[args[-1]] == "exact":
        assert_matches_oracle(result, OPS["int4_linear"].reference, *args)
        return
    expected = OPS["int4_linear"].reference(*args)
    same = (result.cpu() == expected.cpu()) | (result.isnan() & expected.isnan()).cpu()
    if not bool(same.all()):
        raise AssertionError(f"{int((~same).sum())} of {same.numel()} numbers differ from the definition's")


HALF, BRAIN = torch.float16, torch.bfloat16
PAIRS = pairwise(
    rows=[1, 5, 17, 70], outputs=[40], group_size=[128, 64], even=[False, True], kind=["none8", "uint8"],
    mode=["exact", "int8"], dtype=[HALF, BRAIN], permuted=[False],
)  # fmt: skip
OTHERS = [
    dict(zip(PAIRS[0], row, strict=True))
    for row in [
        (7, 33, 32, False, "offset", "exact", HALF, False),
        (9, 33, 16, True, "float", "exact", BRAIN, True),
        (7, 33, 300, True, "float", "int8", HALF, True),
        (5, 33, 300, False, "none8", "exact", BRAIN, False),
    ]
]
ALONE = {"rows": 1, "outputs": 128, "group_size": 128, "even": True, "kind": "none8", "mode": "exact", "dtype": BRAIN}
EMULATED = named([*PAIRS, *OTHERS]) | {
    "alone": functools.partial(make, **ALONE, permuted=False),
    "three parts": functools.partial(make, 3, 40, 64, False, "uint8", "exact", torch.float32, True),
}
INTERPRETED = named(
    pairwise(
        rows=[3, 17, 70], outputs=[19], group_size=[16, 32, 64, 128, 300], even=[False, True],
        kind=["none8", "uint8", "float", "offset", "codebook", "codebook8"], mode=["exact"],
        dtype=[HALF, torch.float32], permuted=[False, True],
    )
    + pairwise(
        rows=[3, 70], outputs=[19], group_size=[32, 128, 300], even=[True],
        kind=["none8", "uint8", "float", "offset", "codebook8"], mode=["int8"], dtype=[HALF, torch.float32],
        permuted=[False],
    )
)  # fmt: skip


def shipped() -> dict[str, Case]:
    """Every configuration, and every form of the codes with one of them."""

    def meta(rows: int, group_size: int, kind: str, mode: str, dtype: torch.dtype) -> Flat:
        N = K = 4096
        weight = random_int4_weight(2, K, group_size, kind)
        tensors = {
            name: None if value is None else torch.empty(
                (N, *value.shape[1:]) if value.dim() == 2 else value.shape, dtype=value.dtype, device="meta"
            ) for name, value in weight.tensors().items()
        }  # fmt: skip
        x = torch.empty(rows, K, dtype=dtype, device="meta")
        number = ZERO_KINDS.index(weight.zero_kind)
        return (x, *tensors.values(), None, group_size, number, MODES.index(mode))

    forms = [(rows, 128, "none8", "exact", BRAIN) for rows in (1, 16, 64, 1024)]
    forms += [(1, 128, "uint8", "int8", BRAIN), (1024, 128, "uint8", "int8", HALF)]
    forms += [(1, 32, "offset", "exact", HALF), (64, 64, "uint8", "exact", HALF), (1024, 64, "uint8", "exact", HALF)]
    forms += [(rows, 128, "float", "exact", torch.float32) for rows in (16, 1024)]
    forms += [(16, 64, "codebook", "exact", dtype) for dtype in (BRAIN, torch.float32)]
    return named(
        [dict(zip(("rows", "group_size", "kind", "mode", "dtype"), form, strict=True)) for form in forms], meta
    )


def planted(change: Change, *caught_by: str) -> Mutant:
    return Mutant("int4_linear_kernel", change, frozenset(caught_by))


def made(change: Change, *caught_by: str) -> Mutant:
    return Mutant("int4_linear_inputs_kernel", change, frozenset(caught_by))


def short(kernel: str, **buffers: int) -> Mutant:
    return Mutant(kernel, caught_by=frozenset({"out_of_bounds"}), short=buffers)


COPY = ("race", "async_race", "uninitialised", "value")
line = functools.partial(at_line, int4_linear_kernel)
inputs = functools.partial(at_line, int4_linear_inputs_kernel)
LESS = r"setp\.lt\.s32"
MUTANTS = {
    **{f"barrier {k} removed": planted(nth(BARRIER, k, ""), *COPY) for k in (0, 1, 2, 3)},
    "wait weakened": planted(weaker(0), *COPY),
    **{f"wait {k} removed": planted(nth(WAIT, k, ""), *COPY) for k in (0, 1)},
    **{f"commit {k} removed": planted(nth(COMMIT, k, ""), *COPY) for k in (4, 5, 9, 10, 14)},
    **{f"operand A of product {k} swapped": planted(nth(MMA_A, k, SWAPPED), "value") for k in (8, 11)},
    **{f"operand B of product {k} swapped": planted(nth(MMA_B, k, SWAPPED), "value") for k in (8, 11)},
    "words past the rows": planted(line("there = (n < N) & (block < blocks)", LESS, 0, "setp.le.s32"), "out_of_bounds"),
    "words past the blocks": planted(
        line("there = (n < N) & (block < blocks)", LESS, -1, "setp.le.s32"), "out_of_bounds"
    ),
    "inputs past the rows": planted(line("(m < M) & (block < blocks)", LESS, 0, "setp.le.s32"), "out_of_bounds"),
    "inputs past the blocks": planted(line("(m < M) & (block < blocks)", LESS, 5, "setp.le.s32"), "out_of_bounds"),
    "rows past the end": planted(line("rows, tokens = n < N, m < M", LESS, 0, "setp.le.s32"), "out_of_bounds"),
    "tokens past the end": planted(line("rows, tokens = n < N, m < M", LESS, -1, "setp.le.s32"), "out_of_bounds"),
    "base of the codes": planted(nth(r"0x6400\b|1677747200", 0, "0x6401"), "value"),
    "nibbles from elsewhere": planted(
        line("words = words[:, :, None", r"shr\.u32(\s+%r\d+, %r\d+), 4;", 0, r"shr.u32\1, 5;"), "value"
    ),
    "mask of a nibble": planted(
        line("pairs = (words & MASK)", r"and\.b32(\s+%r\d+, %r\d+), 983055;", 0, r"and.b32\1, 917519;"), "value"
    ),
    "no zero": planted(line("-z, total.shape", r"neg\.f32(\s+%r\d+, )(%r\d+)", 0, r"mov.b32\1\2"), "value"),
    "scale of the inputs": planted(line("d *= a", r"mul\.f32(\s+%r\d+, )(%r\d+), %r\d+;", 0, r"mov.b32\1\2;"), "value"),
    "result stored without a mask": planted(nth(r"@%p\d+( st\.global\.b32)", -1, r"\1"), "out_of_bounds"),
    "a slice added twice": planted(
        line("total = (a + c) + (b + d)", r"add\.f32(\s+%r\d+, )(%r\d+), (%r\d+);", 0, r"add.f32\1\2, \2;"), "value"
    ),
    **{f"{name} short": short("int4_linear_kernel", **{name: size}) for name, size in
       {"x": 2, "qweight": 4, "scales": 2, "zeros": 1, "x_scale": 4, "out": 4}.items()},
    "blocks past the end": made(nth(LESS, 0, "setp.le.s32"), "out_of_bounds"),
    "results past the end": made(nth(LESS, 1, "setp.le.s32"), "out_of_bounds"),
    "inputs of the wrong columns": made(
        inputs("column = of * BLOCK", r"shl\.b32(\s+%r\d+, %r\d+), 3;", 0, r"shl.b32\1, 2;"), "value", "out_of_bounds"
    ),
    "maximum of some lanes": made(shuffle(0, 8, 4), "value"),
    "maximum of some more": made(shuffle(0, 4, 2), "value"),
    "maximum of neighbours": made(shuffle(0, 1, 2), "value"),
    "barrier removed": made(nth(BARRIER, 0, ""), *COPY),
    "power of two": made(nth(r"sub\.s32(\s+%r\d+), -2046820352,", 0, r"sub.s32\1, -2055208960,"), "value"),
    "power of two back": made(inputs("back = ((power - 14)", r", -\d+;", 0, ", -109051904;"), "value"),
    "first part kept": made(nth(r"sub\.f32(\s+%r\d+, )(%r\d+), %r\d+;", 0, r"mov.b32\1\2;"), "value"),
    "stored without a mask": made(nth(r"@%p\d+( st\.global\.v2)", -1, r"\1"), "out_of_bounds"),
    "scale stored without a mask": made(nth(r"@%p\d+( st\.global\.b32)", -1, r"\1"), "out_of_bounds"),
    **{f"{name} of the small kernel short": short("int4_linear_inputs_kernel", **{name: size}) for name, size in
       {"x": 4, "permutation": 4, "made": 2, "scale": 4}.items()},
    # The first wait of a pipeline is for its first two groups.
    "commit 0 removed": planted(nth(COMMIT, 0, "")),
    # Ones times inputs: their sum, in whatever order.
    "operand B of product 20 swapped": planted(nth(MMA_B, 20, SWAPPED)),
}  # fmt: skip
SHIPPED = shipped()
SUBJECT = Subject(
    op="int4_linear",
    cases=EMULATED,
    warp_cases=["alone", "three parts", *list(EMULATED)[1:3]],
    interpreted=INTERPRETED,
    check=check,
    reference_launch="alone",
    shipped=SHIPPED,
    defaults=["1-128-none8-exact-bfloat16", "64-64-uint8-exact-float16"],
    mutant_case="three parts",
    mutants=MUTANTS,
    tensor_kernels={"int4_linear_kernel": 1},
    # Entries of a codebook come from memory by their codes: what they feed cannot be asked for a round ahead.
    without_tensors=[name for name in SHIPPED if "codebook" in name],
)
