"""Evidence of merge_attention."""

import functools

import torch

from .subject import Case, Flat, Subject, against_oracle, pairwise


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


EMULATED = cases(torch.float16, torch.bfloat16)
SUBJECT = Subject(
    op="merge_attention",
    cases=EMULATED,
    warp_cases=list(EMULATED)[:4],
    interpreted=cases(torch.float16, torch.float32),
    check=against_oracle("merge_attention"),
    reference_launch=next(iter(EMULATED)),
    shipped={},
    mutant_case=next(iter(EMULATED)),
)
