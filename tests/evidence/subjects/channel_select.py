"""Evidence of channel_select."""

import functools
import re
from typing import Any

import torch
from mutations import BARRIER, Change, at_line, nth
from scrimp.kernels import channel_select as kernels
from torch import Tensor

from scrimp._registry import OPS
from scrimp.ops.channel_select import RULES
from scrimp.testing import assert_matches_oracle

from .subject import Case, Flat, Mutant, Subject, pairwise

REFERENCE = OPS["channel_select"].reference
LEVELS = {"threshold": 0.6, "relative": 0.9, "top_k": 0.5, "top_p": 0.9}  # of top_k, the share of the channels


def make(
    rows: int, channels: int, dtype: torch.dtype, rule: str, common: bool, extras: bool, kind: str, strided: bool
) -> Flat:
    """`extras`: with scale, center and whole rows. `kind`: "random", "ties" (five values), "wild" or "zeros"."""
    x = torch.randn(rows, channels + strided).to(dtype)[:, :channels]
    if kind == "ties":
        x = torch.randint(-2, 3, (rows, channels)).to(dtype) / 2
    elif kind == "wild":
        x[::2, channels // 3] = torch.nan
        x[1::2, channels // 2] = -torch.inf if rule != "top_p" else 3.0
    elif kind == "zeros":
        x[:] = 0.0
    level = torch.tensor([round(LEVELS[rule] * channels) if rule == "top_k" else LEVELS[rule]], dtype=torch.float32)
    scale = 0.5 + torch.rand(channels) if kind == "random" else torch.ones(channels)
    center = 0.2 * torch.randn(channels) if kind == "random" else torch.zeros(channels)
    whole = torch.arange(rows) % 3 == 2
    vectors = (scale, center, whole) if extras else (None, None, None)
    return x, level, *vectors, RULES.index(rule), common


def check(results: Any, args: Flat) -> None:
    """Channels and kept numbers are the reference's to the bit; energies are as near as its own rounding."""
    args = tuple(x.cpu() if isinstance(x, Tensor) else x for x in args)
    kept, index, count, energy = (x.cpu() for x in results)
    plain = REFERENCE(*args)
    exact = REFERENCE(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args))
    assert torch.equal(plain[1], exact[1]), "the case is too close to call"
    for mine, theirs in zip((kept, index, count, energy), plain, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    assert torch.equal(index, plain[1])
    assert torch.equal(count, plain[2])
    assert torch.equal(kept.nan_to_num(nan=7e4), plain[0].nan_to_num(nan=7e4))
    assert_matches_oracle(energy, lambda *flat: REFERENCE(*flat)[3], *args)


# (channels, rule, common, extras, 16-bit dtype, dtype of the interpreter): one kernel each
KERNELS = [
    (577, "threshold", False, True, torch.bfloat16, torch.float16),
    (577, "top_k", False, True, torch.float16, torch.float32),
    (130, "relative", False, False, torch.float16, torch.float32),
    (130, "top_k", True, True, torch.bfloat16, torch.float32),
    (130, "top_p", False, True, torch.bfloat16, torch.float16),
    (64, "relative", True, True, torch.float16, torch.float32),
    (33, "top_p", True, False, torch.float16, torch.float32),
    (1, "threshold", True, False, torch.bfloat16, torch.float16),
]


def cases(interpreted: bool) -> dict[str, Case]:
    rows = pairwise(kernel=KERNELS, rows=[1, 5], kind=["random", "ties", "wild", "zeros"], strided=[False, True])
    rows += [{"kernel": (1536, "top_k", False, True, torch.bfloat16, torch.float16), "rows": 2, "kind": "random",
              "strided": False}]  # fmt: skip
    found: dict[str, Case] = {}
    for row in rows:
        channels, rule, common, extras, *dtypes = row.pop("kernel")
        case = {
            "rows": row["rows"], "channels": channels, "dtype": dtypes[interpreted], "rule": rule, "common": common,
            "extras": extras, "kind": row["kind"], "strided": row["strided"],
        }  # fmt: skip
        found["-".join(str(value).removeprefix("torch.") for value in case.values())] = functools.partial(make, **case)
    if interpreted:
        found["two steps"] = functools.partial(make, 2, 2100, torch.float16, "relative", False, True, "random", False)
        found["many"] = functools.partial(make, 2, 20000, torch.float16, "threshold", False, True, "random", False)
    return found


def shipped() -> dict[str, Case]:
    """Every configuration in bfloat16."""

    def meta(channels: int, rule: int, dtype: torch.dtype, common: bool) -> Flat:
        x = torch.empty(4, channels, dtype=dtype, device="meta")
        level, scale = torch.empty(1, device="meta"), torch.empty(channels, device="meta")
        return x, level, scale, scale, None, rule, common

    wanted = [(512, 0), (4096, 2), (4096, 3), (8192, 3), (14336, 2)]
    return {
        f"{K}-{RULES[rule]}-bfloat16": functools.partial(meta, K, rule, torch.bfloat16, rule > 1) for K, rule in wanted
    }


COMMON, EQUAL, ODD = "common choice", "equal scores", "scores that are NaN"
ABOVE, APART = "above a threshold", "choices apart"
EMULATED = cases(interpreted=False) | {
    COMMON: functools.partial(make, 5, 130, torch.bfloat16, "top_k", True, True, "random", True),
    EQUAL: functools.partial(make, 5, 130, torch.bfloat16, "top_k", True, True, "ties", True),
    ODD: functools.partial(make, 2, 130, torch.bfloat16, "top_k", True, True, "wild", True),
    "two steps": functools.partial(make, 2, 2100, torch.bfloat16, "top_k", True, True, "random", False),
    APART: functools.partial(make, 2, 130, torch.bfloat16, "top_k", False, True, "random", True),
    ABOVE: functools.partial(make, 5, 130, torch.float16, "threshold", True, True, "random", True),
}
WRONG = ("value", "out_of_bounds")
RACE = ("race", "uninitialised", "value")
LESS, LESS_EQUAL = r"setp\.lt\.(s32|u32)", r"setp.le.\1"
FIRST = r"(\s+%r\d+, )(%r\d+), %r\d+;"


def planted(kernel: str, change: Change, *caught_by: str, case: str = "") -> Mutant:
    return Mutant(f"channel_select_{kernel}kernel", change, frozenset(caught_by), case=case)


def every(old: str, new: str) -> Change:
    return lambda text: re.sub(old, new, text)


line = functools.partial(at_line, kernels.channel_select_kernel)
join = functools.partial(planted, "common_")
main = functools.partial(planted, "")
write = functools.partial(planted, "list_")
MUTANTS = {
    "channels past the last": join(line("_, score = scored(", LESS, None, LESS_EQUAL), *WRONG),
    "joined without a mask": join(nth(r"@%p\d+( ld\.global\.b16)", -1, r"\1"), "out_of_bounds"),
    "stored without a mask": join(nth(r"@%p\d+( st\.global\.b32)", -1, r"\1"), "out_of_bounds"),
    "center not subtracted": join(line("moved -= tl.load(center", r"sub\.f32" + FIRST, None, r"mov.b32\1\2;"), "value"),
    "not scaled": join(line("score *= tl.load(scale", r"mul\.f32" + FIRST, None, r"mov.b32\1\2;"), "value"),
    "the last row alone": join(line("sums = tl.fma", r"fma\.rn\.f32(\s+%r\d+, %r\d+, %r\d+), %r\d+;", None,
                                    r"mul.f32\1;"), "value"),
    "a row less": join(line("for _ in range(M)", r"add\.s32(\s+%r\d+, %r\d+), -1;", 0, r"add.s32\1, -2;"), *WRONG),
    "one row again and again": join(line("for _ in range(M)", r"add\.s64(\s+%rd\d+, %rd\d+), %rd\d+;", 0,
                                         r"add.s64\1, 0;"), "value"),
    "no mean": join(line("tl.store(judged", r"div\.rn\.f32" + FIRST, None, r"mov.b32\1\2;"), "value", case=ABOVE),
    "no root": join(line("tl.store(judged", r"sqrt\.rn\.f32", None, "mov.b32"), "value", case=ABOVE),
    **{f"{name} of all rows short": Mutant("channel_select_common_kernel", caught_by=frozenset({"out_of_bounds"}),
                                           short={name: size})
       for name, size in {"x": 2, "scale": 4, "center": 4, "judged": 4}.items()},
    "x past the last channel": main(line("moved, score = scored(x", LESS, None, LESS_EQUAL), *WRONG),
    "a digit less": main(line("for digit in range(31)", ", 31;", -1, ", 12;"), "value"),
    "digits lost": main(line("tried = found | (1", r"or\.b32(\s+%r\d+), %r\d+, (%r\d+);", 0, r"mov.b32\1, \2;"),
                             "value"),
    "more than enough": main(line("found = tl.where(amount", r"setp\.lt\.s32", 0, "setp.le.s32"), "value"),
    "scores of tried digits left out": main(line("found = tl.where(amount", r"setp\.ge\.s32", None, "setp.gt.s32"),
                                            "value", case=EQUAL),
    "equals all taken": main(nth(r"(setp\.lt\.s32\s+%p\d+, %r\d+), 2;", 0, r"\1, 1000;"), "value", case=EQUAL),
    "the higher of equals": main(line("chosen = (bits > found)", r"setp\.lt\.u32", None, "setp.ge.u32"),
                                       "value", case=EQUAL),
    "half of the channels searched": main(line("last = tl.where(amount", r"setp\.lt\.s32", None, "setp.gt.s32"),
                                          "value", case=EQUAL),
    "kept stored without a mask": main(nth(r"@%p\d+( st\.global\.b16)", -1, r"\1"), *WRONG),
    "mask stored without a mask": main(nth(r"@%p\d+( st\.global\.b8)", -1, r"\1"), *WRONG),
    "all energy dropped": main(line("dropped += tl.where", r"selp\.f32(\s+%r\d+), 0f00000000, (%r\d+), %p\d+;", None,
                                    r"mov.b32\1, \2;"), "value"),
    **{f"barrier {k} removed": main(nth(BARRIER, k, ""), *RACE) for k in (1, 3, -1)},
    **{f"{name} short": Mutant("channel_select_kernel", caught_by=frozenset({"out_of_bounds"}), short={name: size})
       for name, size in {"x": 2, "level": 4, "judged": 4, "whole": 1, "kept": 2, "energy": 4, "mask": 1}.items()},
    "masks loaded without a mask": write(every(r"@%p\d+( ld\.global\.b8)", r"\1"), *WRONG),
    "the last mask alone": write(line("needed |= tl.load(row", r"or\.b32(\s+%r\d+), %r\d+, (%r\d+);", None,
                                      r"mov.b32\1, \2;"), "value"),
    "a mask less": write(line("for _ in range(M)", r"add\.s32(\s+%r\d+, %r\d+), -1;", 0, r"add.s32\1, -2;"), *WRONG),
    "the scan over 4, not 2": write(every(r"(shfl\.sync\.up\.b32\s+%r\d+, %r\d+,) 2,", r"\1 4,"), *WRONG),
    "every channel listed": write(line("tl.store(index + listed", r"setp\.\w+\.s32(\s+%p\d+, %r\d+), \d;", None,
                                       r"setp.ge.s32\1, -9;"), *WRONG),
    "filled from elsewhere on": write(line("tl.store(index + i", r"setp\.\w+\.s32(\s+%p\d+, %r\d+, %r\d+);", None,
                                                  r"setp.ne.s32\1;"), *WRONG),
    "list filled without a mask": write(nth(r"@%p\d+( st\.global\.b32)", 3, r"\1"), *WRONG),
    "barrier of the scan removed": write(nth(BARRIER, 1, ""), *RACE),
    **{f"{name} of the list short": Mutant("channel_select_list_kernel", caught_by=frozenset({"out_of_bounds"}),
                                           short={name: size})
       for name, size in {"mask": 1, "index": 4, "count": 4}.items()},
}  # fmt: skip
SUBJECT = Subject(
    op="channel_select",
    cases=EMULATED,
    warp_cases=[next(iter(EMULATED)), COMMON, EQUAL, ODD],
    interpreted=cases(interpreted=True),
    check=check,
    reference_launch="2-1536-bfloat16-top_k-False-True-random-False",
    shipped=shipped(),
    defaults=["512-threshold-bfloat16", "4096-top_k-bfloat16"],
    mutant_case=COMMON,
    mutants=MUTANTS,
)
