"""Evidence of tree_accept."""

import functools
import re
from typing import Any

import torch
from mutations import BARRIER, Change, at_line, nth
from scrimp.kernels import tree_accept as kernels

from scrimp._registry import OPS

from .subject import Case, Flat, Mutant, Subject, pairwise

REFERENCE = OPS["tree_accept"].reference


def make(batch: int, rows: int, vocab: int, dtype: torch.dtype, heat: float, kind: str, strided: bool) -> Flat:
    """Random trees, rows of no tree among them, whose walks take some steps.

    `kind` is that of the logits: "random", "ties" (three values) or "wild" (NaN, infinities, nothing to choose).
    """
    logits = (3 * torch.randn(batch, rows, vocab + strided)).to(dtype)[..., :vocab]
    if kind == "ties":
        logits = torch.randint(3, (batch, rows, vocab)).to(dtype)
    parents = torch.full((batch, rows), -1, dtype=torch.int32)
    for b in range(batch):
        for t in range(1, rows):
            parents[b, t] = torch.randint(max(0, t - 4), t, ()) if torch.rand(()) < 0.9 else -1
    temperature = heat * torch.linspace(1.0, 0.2, batch)
    seed, position = torch.randint(-(2**62), 2**62, (batch,)), 2**40 * (torch.arange(batch) % 2) + 1000
    flat = logits, torch.randint(vocab, (batch, rows)), parents, temperature, seed, position
    lead(*flat)
    if kind == "wild":
        path = REFERENCE(*flat)[0]
        for b in range(batch):
            last = int(path[b].max())
            logits[b, last, vocab // 2 :: 3] = (torch.nan, torch.inf, -torch.inf)[b % 3]
            logits[b, last] = torch.where(torch.tensor(b % 3 == 2), -torch.inf, logits[b, last])
    return flat


def wide() -> Flat:
    """A greedy choice in a tree of many rows and few steps."""
    parents = ((torch.arange(300, dtype=torch.int32) + 2) // 3 - 1)[None]
    logits, zero = torch.randint(-99, 100, (1, 300, 32768)).bfloat16(), torch.zeros(1, dtype=torch.int64)
    flat = logits, torch.randint(32768, (1, 300)), parents, zero.float(), zero, zero
    lead(*flat)
    return flat


def lead(*flat: Any) -> None:
    """Gives children the tokens that are chosen, some steps long."""
    _, tokens, parents, *_ = flat
    for _ in range(4):
        path, chosen = REFERENCE(*flat)
        for b in range(len(tokens)):
            last = int(path[b].max())
            children = (parents[b] == last).nonzero().flatten()
            if len(children):
                tokens[b, children[len(children) // 2 :]] = chosen[b, path[b].argmax()]


def check(results: Any, args: Flat) -> None:
    """Paths and tokens are the reference's, as no two noisy scores are so near that the rounding of log decides."""
    for mine, theirs in zip(results, REFERENCE(*(x.cpu() for x in args)), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine.cpu(), theirs)


def cases(interpreted: bool) -> dict[str, Case]:
    # (vocabulary, 16-bit dtype, dtype of the interpreter): one chunk, several, those of the other configuration
    shapes = [
        (7, torch.float16, torch.float32), (300, torch.bfloat16, torch.float16), (3001, torch.float16, torch.float32),
        (2048, torch.bfloat16, torch.float32), (9001, torch.bfloat16, torch.float16),
    ]  # fmt: skip
    rows = pairwise(
        shape=shapes, tree=[(1, 1), (3, 9), (2, 70)], heat=[0.0, 1.0], kind=["random", "ties", "wild"],
        strided=[False, True],
    )  # fmt: skip
    found: dict[str, Case] = {}
    for row in rows:
        (vocab, *dtypes), (batch, T) = row.pop("shape"), row.pop("tree")
        if vocab > 1000 and T > 9:
            T = 12
        case = {"batch": batch, "rows": T, "vocab": vocab, "dtype": dtypes[interpreted]} | row
        found["-".join(str(value).removeprefix("torch.") for value in case.values())] = functools.partial(make, **case)
    return found


def shipped() -> dict[str, Case]:
    """Every configuration in two dtypes."""

    def meta(rows: int, dtype: torch.dtype) -> Flat:
        logits = torch.empty(1, rows, 131072, dtype=dtype, device="meta")
        tokens = torch.empty(1, rows, dtype=torch.int64, device="meta")
        number = torch.empty(1, dtype=torch.int64, device="meta")
        return logits, tokens, tokens.int(), number.float(), number, number

    return {
        f"{rows}-{str(dtype).removeprefix('torch.')}": functools.partial(meta, rows, dtype)
        for rows in (1, 64) for dtype in (torch.bfloat16, torch.float32)
    }  # fmt: skip


DRAWN, TIES, WILD, WIDE = "drawn", "greedy ties", "wild", "wide"
EMULATED = cases(interpreted=False) | {
    DRAWN: functools.partial(make, 3, 9, 2100, torch.float16, 1.0, "random", False),
    TIES: functools.partial(make, 3, 9, 2100, torch.float16, 0.0, "ties", False),
    WILD: functools.partial(make, 3, 9, 2100, torch.float16, 1.0, "wild", False),
    WIDE: wide,
}
WRONG = ("value", "out_of_bounds")
RACE = ("race", "uninitialised", "value")
LESS, LESS_EQUAL = r"setp\.lt\.s32", "setp.le.s32"


def chosen(change: Change, *caught_by: str, case: str = "") -> Mutant:
    return Mutant("tree_accept_choose_kernel", change, frozenset(caught_by), case=case)


def walked(change: Change, *caught_by: str, case: str = "") -> Mutant:
    return Mutant("tree_accept_walk_kernel", change, frozenset(caught_by), case=case)


def short(kernel: str, **buffers: int) -> Mutant:
    return Mutant(f"tree_accept_{kernel}_kernel", caught_by=frozenset({"out_of_bounds"}), short=buffers)


def every(old: str, new: str) -> Change:
    return lambda text: re.sub(old, new, text)


choose = functools.partial(at_line, kernels.tree_accept_choose_kernel)
walk = functools.partial(at_line, kernels.tree_accept_walk_kernel)
MUTANTS = {
    "tokens past the last": chosen(choose("x = tl.load(logits", LESS, None, LESS_EQUAL), *WRONG),
    "logits loaded without a mask": chosen(every(r"@%p\d+( ld\.global\.b16)", r"\1"), *WRONG),
    "depth not counted": chosen(choose("depth += 1", ", 1;", 0, ", 0;"), "value"),
    "rows off the tree instead": chosen(choose("if row == 0", r"setp\.ne\.b32", 0, "setp.eq.b32"), *WRONG),
    "temperature of another sequence": chosen(choose("heat = tl.load(", r", 2;", 0, ", 3;"), *WRONG),
    "not divided": chosen(choose("score = tl.div_rn", r"div\.rn\.f32(\s+%r\d+, %r\d+), %r\d+;", None,
                                 r"mul.f32\1, 1.0;"), "value"),
    "no noise": chosen(nth(r"setp\.leu\.f32", 0, "setp.gtu.f32"), "value"),
    "noise where there is none": chosen(nth(r"setp\.leu\.f32", 0, "setp.gtu.f32"), "value", case=TIES),
    "chunks overlap": chosen(choose("first = tl.program_id(0)", r"mul\.lo\.s32(\s+%r\d+, %r\d+), %r\d+;", 0,
                                    r"mul.lo.s32\1, 512;"), "value"),
    **{f"hash shifted by {old - 1}": chosen(choose(f"value >> {old}", f", {old};", None, f", {old - 1};"), "value")
       for old in (30, 27, 31)},
    "a bit more of the hash": chosen(choose("return mix(key", ", 12;", None, ", 11;"), "value"),
    "shuffle over 8, not 16": chosen(every(r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+,) 16,", r"\1 8,"), "value"),
    "the last of equals": chosen(every(r"redux\.sync\.min", "redux.sync.max"), "value", case=TIES),
    "NaN not seen": chosen(choose("return tl.where(wild", r"selp\.b64(\s+%rd\d+), \d+, (%rd\d+), %p\d+;", 0,
                                  r"mov.b64\1, \2;"), "value", case=WILD),
    **{f"barrier {k} removed": chosen(nth(BARRIER, k, ""), *RACE) for k in (0, -1)},
    **{f"{name} short": short("choose", **{name: size}) for name, size in
       {"logits": 2, "parents": 4, "temperature": 4, "seed": 8, "position": 8, "value": 8, "token": 4}.items()},
    "chunks past the last": walked(walk("tl.load(value + at", LESS, None, LESS_EQUAL), *WRONG),
    "choices loaded without a mask": walked(nth(r"@%p\d+( ld\.global\.b64)", 0, r"\1"), *WRONG),
    "children before their parents": walked(walk("child = tl.minimum", r"setp\.gt\.s32", None, "setp.lt.s32"), "value"),
    "children of others": walked(walk("child = tl.minimum", r"setp\.eq\.b32", None, "setp.ne.b32"), "value"),
    "children of other tokens": walked(walk("child = tl.minimum", r"setp\.eq\.b64", None, "setp.ne.b64"), "value"),
    "no child": walked(nth(r"redux\.sync\.min", -1, "redux.sync.max"), "value"),
    "rows past the last": walked(walk("above = tl.load(parents + t", LESS, None, LESS_EQUAL), *WRONG),
    "filled past the last": walked(walk("tl.store(path + t", LESS, None, LESS_EQUAL), *WRONG),
    "no step down": walked(walk("depth += 1", ", 1;", 0, ", 0;"), "value"),
    "nothing to choose not seen": walked(walk("found = tl.where(best", r"setp\.ne\.f64", 0, "setp.nan.f64"), "value"),
    "a choice where there is none": walked(walk("found = tl.where(best", r"selp\.b64(\s+%rd\d+), (%rd\d+), -1, %p\d+;",
                                                0, r"mov.b64\1, \2;"), "value", case=WILD),
    **{f"{name} short on the walk": short("walk", **{name: size}) for name, size in
       {"tokens": 8, "parents": 4, "path": 4, "chosen": 8}.items()},
}  # fmt: skip
SUBJECT = Subject(
    op="tree_accept",
    cases=EMULATED,
    warp_cases=[next(iter(EMULATED)), DRAWN, TIES, WILD],
    interpreted=cases(interpreted=True),
    check=check,
    reference_launch=WIDE,
    shipped=shipped(),
    defaults=["64-bfloat16"],
    mutant_case=DRAWN,
    mutants=MUTANTS,
    exact_bytes=False,
)
