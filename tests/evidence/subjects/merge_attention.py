"""Evidence of merge_attention."""

import functools

import torch
from mutations import Change, nth

from .subject import Case, Flat, Mutant, Subject, against_oracle, pairwise


def make(n: int, head_dim: int, heads: int, dtype: torch.dtype, lse: str, strided: bool) -> Flat:
    """Two partial results; `lse` says which rows have no keys on one side or on both."""
    shape = (2, n, heads, head_dim) if strided else (2, heads, n, head_dim)
    out_a, out_b = (torch.randn(shape).to(dtype) for _ in range(2))
    if strided:
        out_a, out_b = out_a.transpose(1, 2), out_b.transpose(1, 2)
    lse_a, lse_b = 4 * torch.randn(2, 2, heads, n)
    if lse in ("one", "both"):
        lse_a[..., ::2] = -torch.inf
    if lse == "both":
        lse_b[..., ::3] = -torch.inf
    return out_a, lse_a, out_b, lse_b


def cases(*dtypes: torch.dtype) -> dict[str, Case]:
    rows = pairwise(
        n=[1, 63, 65, 200], head_dim=[64, 128], heads=[1, 3], dtype=list(dtypes), lse=["none", "one", "both"],
        strided=[False, True],
    )  # fmt: skip
    return {"-".join(str(value).removeprefix("torch.") for value in row.values()): functools.partial(make, **row)
            for row in rows}  # fmt: skip


def shipped() -> dict[str, Case]:
    """Every configuration of the file, each in both dtypes, in the memory order of sparse_attention's results."""

    def meta(n: int, head_dim: int, dtype: torch.dtype) -> Flat:
        out = torch.empty(2, n, 8, head_dim, dtype=dtype, device="meta").transpose(1, 2)
        lse = torch.empty(2, 8, n, device="meta")
        return out, lse, out, lse

    return {
        f"{n}-{head_dim}-{str(dtype).removeprefix('torch.')}": functools.partial(meta, n, head_dim, dtype)
        for n in (1, 64, 4096) for head_dim in (64, 128, 256) for dtype in (torch.float16, torch.bfloat16)
    }  # fmt: skip


def planted(change: Change, *caught_by: str) -> Mutant:
    return Mutant("merge_attention_kernel", change, frozenset(caught_by))


def short(**buffers: int) -> Mutant:
    return Mutant("merge_attention_kernel", caught_by=frozenset({"out_of_bounds"}), short=buffers)


BOUND = r"setp\.lt\.s32(\s+%p\d+, %r\d+, %r10;)"  # row < N: three for the loads of lse, three for the rest
EXP = r"ex2\.approx\.f32(\s+%r\d+, )(%r\d+)"
MUTANTS = {
    **{f"bound {k} off by one": planted(nth(BOUND, k, r"setp.le.s32\1"), "out_of_bounds") for k in (1, 2, 3, 4)},
    "rows loaded without a mask": planted(nth(r"@%p9( ld\.global\.v4)", 1, r"\1"), "out_of_bounds"),
    "rows stored without a mask": planted(nth(r"@%p\d+( st\.global\.v4)", -1, r"\1"), "out_of_bounds"),
    "lse stored without a mask": planted(nth(r"@%p\d+( st\.global\.b32)", 0, r"\1"), "out_of_bounds"),
    "batch taken for head": planted(nth(r"div\.s32(\s+%r\d+, %r\d+, %r17;)", 0, r"rem.s32\1"), "value"),
    "wrong base of the exponential": planted(nth("0f3FB8AA3B", 2, "0f3F800000"), "value"),
    "no exponential of a": planted(nth(EXP, 4, r"mov.b32\1\2"), "value"),
    "no exponential in lse": planted(nth(EXP, 0, r"mov.b32\1\2"), "value"),
    "empty rows not seen in lse": planted(nth("0fFF800000", 0, "0fFF7FFFFF"), "value"),
    "empty rows not seen in out": planted(nth("0fFF800000", 2, "0fFF7FFFFF"), "value"),
    "empty rows divided": planted(nth(r"selp\.f32(\s+%r\d+, )(%r\d+), 0f00000000, %p12;", 0, r"mov.b32\1\2;"), "value"),
    "weights swapped": planted(nth(r"mul\.f32(\s+%r\d+, )%r110(, %r117;)", 0, r"mul.f32\1%r113\2"), "value"),
    "packed the wrong way": planted(nth(r"(cvt\.rn\.f16x2\.f32\s+%r\d+, )(%r\d+), (%r\d+)", 3, r"\1\3, \2"), "value"),
    "row of a thread": planted(nth(r"(bfe\.u32\s+%r\d+, %r\d+), 3, 3;", 0, r"\1, 4, 3;"), "value"),
    "columns overlap": planted(nth(r"(and\.b32\s+%r\d+, %r\d+), 56;", 0, r"\1, 48;"), "value"),
    "row stride of b": planted(nth(r"(mul\.lo\.s64\s+%rd\d+), %rd54, %rd4;", 0, r"\1, %rd54, %rd3;"), "value"),
    "logarithm off": planted(nth("0f3F317218", 0, "0f3F317000"), "value"),
    "out_b short": short(out_b=2),
    "lse_a short": short(lse_a=4),
    "out short": short(out=2),
    "lse short": short(lse=4),
    # Of the last block's 16 rows the first 8 are inside: only the second load of a thread meets row 200.
    "bound of the first 8 rows": planted(nth(BOUND, 0, r"setp.le.s32\1")),
    # Every warp holds every row's lse; that the others store it too changes nothing.
    "lse stored by all warps": planted(nth(r"@%p7( st\.global\.b32)", 0, r"@%p10\1")),
    # The larger term of the sum is 1 or both are 0: no sum is a denormal number, and none is infinite.
    "denormal sums not scaled": planted(nth("0f4B000000", 0, "0f3F800000")),
    "infinite sums not seen": planted(nth(r"@%p6( bra)", 0, r"\1")),
}
EMULATED = cases(torch.float16, torch.bfloat16)
SUBJECT = Subject(
    op="merge_attention",
    cases=EMULATED,
    warp_cases=list(EMULATED)[:4],
    interpreted=cases(torch.float16, torch.float32),
    check=against_oracle("merge_attention"),
    reference_launch="200-128-3-bfloat16-one-True",
    shipped=shipped(),
    defaults=["4096-64-bfloat16", "64-128-bfloat16"],
    mutant_case="200-64-1-float16-both-False",
    mutants=MUTANTS,
)
