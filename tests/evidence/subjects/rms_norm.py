"""Evidence of rms_norm."""

import functools

import torch
from mutations import BARRIER, Change, nth, shuffle

from .subject import Case, Flat, Mutant, Subject, against_oracle, pairwise


def make(rows: int, columns: int, dtype: torch.dtype, layout: str) -> Flat:
    """x as rows that lie close, as heads of a slice of one linear's output, or off every multiple of 16 bytes."""
    if layout == "heads":
        x = torch.randn(2, rows, 5, columns).to(dtype)[:, :, 1:4]
    else:
        x = torch.randn(rows * columns + 1).to(dtype)[layout == "shifted" :][: rows * columns].view(rows, columns)
    return x, torch.randn(columns).to(dtype), 1e-5


def cases(*dtypes: torch.dtype) -> dict[str, Case]:
    rows = pairwise(
        rows=[1, 5, 21], columns=[64, 65, 576, 9000], dtype=list(dtypes), layout=["close", "heads", "shifted"]
    )
    return {"-".join(str(value).removeprefix("torch.") for value in row.values()): functools.partial(make, **row)
            for row in rows}  # fmt: skip


def shipped() -> dict[str, Case]:
    """Every configuration of the files in three dtypes."""

    def meta(columns: int, dtype: torch.dtype) -> Flat:
        return *(torch.empty(shape, dtype=dtype, device="meta") for shape in ((64, columns), (columns,))), 1e-5

    return {
        f"{columns}-{str(dtype).removeprefix('torch.')}": functools.partial(meta, columns, dtype)
        for columns in (64, 128, 576, 2048, 4096, 8192)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }


def planted(change: Change, *caught_by: str) -> Mutant:
    return Mutant("rms_norm_kernel", change, frozenset(caught_by))


def short(**buffers: int) -> Mutant:
    return Mutant("rms_norm_kernel", caught_by=frozenset({"out_of_bounds"}), short=buffers)


MUTANTS = {
    "barrier removed": planted(nth(BARRIER, 0, ""), "race", "uninitialised"),
    **{
        f"shuffle over {new}, not {old}": planted(shuffle(0, old, new), "value")
        for old, new in ((16, 8), (8, 4), (2, 1))
    },
    "shuffle between warps over 2": planted(shuffle(1, 1, 2), "value"),
    "column bound": planted(nth(r"(setp\.lt\.u32\s+%p\d+, %r\d+), 576;", 0, r"\1, 592;"), "value", "out_of_bounds"),
    "second half loaded without a mask": planted(nth(r"@%p\d+( ld\.global\.v4)", 1, r"\1"), "value", "out_of_bounds"),
    "weight loaded without a mask": planted(nth(r"@%p\d+( ld\.global\.v4)", 3, r"\1"), "out_of_bounds"),
    "stored without a mask": planted(nth(r"@%p\d+( st\.global\.v4)", -1, r"\1"), "value", "out_of_bounds"),
    "mean of 512": planted(nth("0f44100000", 0, "0f44000000"), "value"),
    "no square": planted(
        nth(r"(fma\.rn\.f32\s+%r\d+, %r\d+), %r\d+, 0f00000000;", 0, r"\1, 0f3F800000, 0f00000000;"), "value"
    ),
    "no root": planted(nth(r"sqrt\.rn\.f32", 0, "mov.b32"), "value"),
    "not inverted": planted(nth(r"div\.rn\.f32(\s+%r\d+, )(%r\d+), (%r\d+)", -1, r"div.rn.f32\1\3, \2"), "value"),
    "one element not scaled": planted(nth(r"mul\.f32(\s+%r\d+), %r\d+, (%r\d+);", 0, r"mov.b32\1, \2;"), "value"),
    "row of x": planted(nth(r"div\.s32", 0, "rem.s32"), "value", "out_of_bounds"),
    "weight for x": planted(nth("rms_norm_kernel_param_1]", 0, "rms_norm_kernel_param_0]"), "value"),
    "rows of out overlap": planted(nth(r", 1152,", 0, ", 1136,"), "value"),
    "x short": short(x=2),
    "weight short": short(weight=2),
    "out short": short(out=2),
}
EMULATED = cases(torch.float16, torch.bfloat16)
SUBJECT = Subject(
    op="rms_norm",
    cases=EMULATED,
    warp_cases=list(EMULATED)[:4],
    interpreted=cases(torch.float16, torch.float32),
    check=against_oracle("rms_norm"),
    reference_launch=next(name for name in EMULATED if "576" in name and "heads" in name),
    shipped=shipped(),
    defaults=["128-bfloat16", "576-bfloat16", "4096-bfloat16"],
    mutants=MUTANTS,
    mutant_case="5-576-float16-heads",
)
