"""Evidence of rotary_append."""

import functools
from typing import Any

import torch
from mutations import BARRIER, Change, at_line, nth
from scrimp.kernels import rotary_append as kernels
from torch import Tensor

from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle

from .subject import Case, Flat, Mutant, Subject, pairwise

EMPTY = -3.0  # what a slot holds that was never written
TABLE = 50  # rows of cos and sin


def make(
    batch: int, tokens: int, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, layout: str,
    inside: bool,
) -> Flat:  # fmt: skip
    """`dims` are the head size and how much of it turns. Unless `inside`, the first sequence starts before its first
    slot, the last one ends behind its last, and positions lie outside the tables.

    q, k and v are views of one linear's output; `layout` is that of the caches: heads or slots first in memory.
    """
    (H, G), (D, R), capacity = heads, dims, tokens + 6
    q, k, v = torch.randn(batch, tokens, H + 2 * G, D).to(dtype).split((H, G, G), 2)
    angle = 6 * torch.rand(TABLE, R)
    positions, start = torch.randint(TABLE, (batch, tokens)), torch.randint(7, (batch,))
    if not inside:
        positions.flatten()[:2] = torch.tensor([-1, TABLE])[: positions.numel()]
        positions[-1, -1] = 2**31 - 1
        start[0], start[-1] = -1, 7
    shape = (2, batch, G, capacity, D) if layout == "heads" else (2, batch, capacity, G, D)
    k_cache, v_cache = torch.full(shape, EMPTY).to(dtype)
    if layout == "slots":
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    return q, k, v, angle.cos(), angle.sin(), positions.int(), start.int(), k_cache, v_cache


def expected(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the reference makes of positions moved into the tables, and of those tokens that have a slot."""
    q, k, v, cos, sin, positions, start, k_cache, v_cache = args
    (B, T), (G, capacity, D) = q.shape[:2], k_cache.shape[1:]
    fresh = [torch.empty(B, G, T, D, dtype=q.dtype) for _ in range(2)]
    near = positions.clamp(0, cos.shape[0] - 1)
    out = OPS["rotary_append"].reference(q, k, v, cos, sin, near, torch.zeros_like(start), *fresh)
    caches = torch.full_like(k_cache, EMPTY), torch.full_like(v_cache, EMPTY)
    for b, first in enumerate(start.tolist()):
        kept = [t for t in range(T) if 0 <= first + t < capacity]
        for cache, new in zip(caches, fresh, strict=True):
            cache[b, :, [first + t for t in kept]] = new[b, :, kept]
    return out, *caches


def check(results: Any, args: Flat) -> None:
    """The queries, and both caches whole."""
    on_cpu = [x.cpu() for x in args]
    assert_matches_oracle((results.cpu(), *on_cpu[7:]), expected, *on_cpu, names=("q", "k_cache", "v_cache"))


# (head size, rotated, 16-bit dtype, dtype of the interpreter): every two of them meet, and few kernels are built.
KERNELS = [
    (64, 64, torch.float16, torch.float32), (128, 128, torch.bfloat16, torch.float16),
    (80, 32, torch.bfloat16, torch.float32), (19, 6, torch.float16, torch.float32),
    (16, 0, torch.bfloat16, torch.float16),
]  # fmt: skip


def cases(interpreted: bool) -> dict[str, Case]:
    rows = pairwise(
        batch=[1, 3], tokens=[1, 5, 9], heads=[(1, 1), (9, 3), (32, 8)], kernel=KERNELS, layout=["heads", "slots"],
        inside=[True, False],
    )  # fmt: skip
    rows += [{"batch": 1, "tokens": 40, "heads": (32, 8), "kernel": KERNELS[0], "layout": "heads", "inside": True}]
    rows += [{"batch": 2, "tokens": 33, "heads": (9, 3), "kernel": KERNELS[1], "layout": "slots", "inside": False}]
    found: dict[str, Case] = {}
    for row in rows:
        D, R, *dtypes = row.pop("kernel")
        case = row | {"dims": (D, R), "dtype": dtypes[interpreted]}
        words = (str(value).removeprefix("torch.").replace(" ", "") for value in case.values())
        found["-".join(words)] = functools.partial(make, **case)
    return found


def shipped() -> dict[str, Case]:
    """Every configuration of the files in three dtypes."""

    def meta(tokens: int, D: int, dtype: torch.dtype) -> Flat:
        q, k, v = torch.empty(1, tokens, 48, D, dtype=dtype, device="meta").split((32, 8, 8), 2)
        angle = torch.empty(8192, D, device="meta")
        positions, start = (torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((1, tokens), (1,)))
        cache = torch.empty(1, 8, 8192, D, dtype=dtype, device="meta")
        return q, k, v, angle, angle, positions, start, cache, cache

    return {
        f"{tokens}-{D}-{str(dtype).removeprefix('torch.')}": functools.partial(meta, tokens, D, dtype)
        for tokens in (1, 4096) for D in (64, 128) for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }  # fmt: skip


KERNEL = kernels.rotary_append_kernel
OUT = ("value", "out_of_bounds")
POSITION = "tl.minimum(tl.maximum(position"


def planted(change: Change, *caught_by: str) -> Mutant:
    return Mutant("rotary_append_kernel", change, frozenset(caught_by))


def line(words: str, pattern: str, index: int | None, replacement: str, *caught_by: str) -> Mutant:
    return planted(at_line(KERNEL, words, pattern, index, replacement), *caught_by)


MUTANTS = {
    **{f"barrier {k} removed": planted(nth(BARRIER, k, ""), "race", "uninitialised", "value") for k in (0, 1, 2)},
    "slots below the cache": line("slot < 0", r"setp\.gt\.s64(\s+%p\d+, %rd\d+), -1;", 0, r"setp.gt.s64\1, -2;", *OUT),
    "slots past the cache": line("slot < 0", r"setp\.lt\.s64", 0, "setp.le.s64", *OUT),
    "negative positions": line(POSITION, r"max\.s32", 0, "min.s32", *OUT),
    "positions past the table": line(POSITION, r"min\.s32", 0, "max.s32", *OUT),
    "last row of the table": line(POSITION, r"add\.s32(\s+%r\d+, %r\d+), -1;", 0, r"add.s32\1, 0;", *OUT),
    "heads past the last": line("inside = (h < heads)", r"setp\.lt\.s32", None, "setp.le.s32", *OUT),
    "sine not negated": planted(nth(r"xor\.b32(\s+%r\d+, )(%r\d+), -2147483648;", 0, r"mov.b32\1\2;"), "value"),
    "second half's sine": line(
        "b, cos_b, a * sin_b", r"mul\.f32(\s+%r\d+, )(%r\d+), %r\d+;", 0, r"mov.b32\1\2;", "value"
    ),
    "sine for cosine": planted(nth("rotary_append_kernel_param_3]", 0, "rotary_append_kernel_param_4]"), "value"),
    "keys for values": planted(nth("rotary_append_kernel_param_2]", 0, "rotary_append_kernel_param_1]"), "value"),
    "values into the keys": planted(nth("rotary_append_kernel_param_9]", 0, "rotary_append_kernel_param_8]"), "value"),
    "token of another sequence": line("b, t = (token // T)", r"div\.s32", 0, "rem.s32", *OUT),
    "queries stored without a mask": planted(nth(r"@%p11( st\.global\.v4)", 0, r"\1"), *OUT),
    **{
        f"{name} short": Mutant("rotary_append_kernel", caught_by=frozenset({"out_of_bounds"}), short={name: 2})
        for name in ("q", "out", "k_cache", "v_cache", "cos", "positions")
    },
}
EMULATED = cases(interpreted=False)
SUBJECT = Subject(
    op="rotary_append",
    cases=EMULATED,
    warp_cases=list(EMULATED)[:4],
    interpreted=cases(interpreted=True),
    check=check,
    reference_launch="1-40-(32,8)-heads-True-(64,64)-float16",
    shipped=shipped(),
    defaults=["1-128-bfloat16", "4096-64-bfloat16", "4096-128-bfloat16"],
    mutants=MUTANTS,
    mutant_case="2-33-(9,3)-slots-False-(128,128)-bfloat16",
)
