"""Evidence of sparse_linear."""

import functools

import torch
from scrimp.kernels import sparse_linear as kernels

from .subject import Case, Flat, Mutant, Subject, against_oracle

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def make(
    rows: int, K: int, N: int, dtype: torch.dtype, chosen: str = "half", added: bool = False, strided: bool = False
) -> Flat:
    """`chosen` says which channels are listed; inputs and weights of the others are poison. `added`: bias, residual."""
    x, weight = torch.randn(rows, K).to(dtype), torch.randn(K, N + 8 * strided).to(dtype)[:, :N]
    listed = {
        "half": torch.rand(K) < 0.5, "all": torch.arange(K) >= 0, "none": torch.arange(K) < 0,
        "few": torch.arange(K) % 97 == 5, "ends": (torch.arange(K) == 0) | (torch.arange(K) == K - 1),
        "block": torch.arange(K) // 40 % 3 == 1,
    }[chosen]  # fmt: skip
    x[:, ~listed] = torch.nan
    if rows <= kernels.MAX_ROWS:
        weight[~listed] = torch.nan
    channels = listed.nonzero().flatten().int()
    index = torch.cat([channels, torch.full((K - len(channels),), -1, dtype=torch.int32)])
    if strided:
        x, index = x.T.contiguous().T, torch.stack([index, index + 1], 1)[:, 0]
    ends = (torch.randn(N).to(dtype), torch.randn(rows, N).to(dtype)) if added else (None, None)
    return x, weight, index, torch.tensor([len(channels)], dtype=torch.int32), *ends


LISTS = ["half", "few", "block", "ends", "all", "none"]
EMULATED: dict[str, Case] = {
    f"{rows}-{K}-{N}-{dtype}-{chosen}".replace("torch.", ""): functools.partial(
        make, rows, K, N, dtype, chosen, added, strided
    )
    for dtype, N, Ks, some_rows, added, strided in [
        (BRAIN, 112, (64, 512, 1536), (1, 16), False, False),
        (HALF, 208, (336, 1104, 2048), (3, 64), True, False),
        (BRAIN, 33, (100, 577), (5, 40), True, True),
    ]
    for i, (K, rows) in enumerate((K, rows) for K in Ks for rows in some_rows)
    for chosen in (LISTS[i % 6], LISTS[(i + 3) % 6])
}
INTERPRETED: dict[str, Case] = {
    f"{name}-{str(dtype).removeprefix('torch.')}": functools.partial(case, dtype=dtype)
    for dtype in (HALF, SINGLE)
    for name, case in {
        "one row": functools.partial(make, 1, 1100, 40),
        "rows": functools.partial(make, 19, 100, 70, added=True, chosen="block"),
        "chunks": functools.partial(make, 2, 1100, 39, added=True, chosen="few"),
        "strided": functools.partial(make, 3, 90, 24, strided=True),
        "nothing listed": functools.partial(make, 3, 90, 24, added=True, chosen="none"),
        "no inputs": functools.partial(make, 3, 0, 9, added=True),
        "more rows": functools.partial(make, 70, 33, 39, added=True),
    }.items()
}


def shipped() -> dict[str, Case]:
    """Every configuration: chunks apart, and one chunk with bias and residual."""

    def meta(rows: int, K: int, dtype: torch.dtype) -> Flat:
        empty = functools.partial(torch.empty, dtype=dtype, device="meta")
        index = torch.empty(K, dtype=torch.int32, device="meta")
        ends = (empty(4096), empty(rows, 4096)) if K <= kernels.CHUNK else (None, None)
        return empty(rows, K), empty(K, 4096), index, index[:1], *ends

    return {
        f"{rows}-{K}-{str(dtype).removeprefix('torch.')}": functools.partial(meta, rows, K, dtype)
        for rows, K, dtype in ((1, 4096, BRAIN), (64, 512, SINGLE))
    }  # fmt: skip


MUTANTS: dict[str, Mutant] = {}
SHIPPED = shipped()
SUBJECT = Subject(
    op="sparse_linear",
    cases=EMULATED,
    warp_cases=list(EMULATED)[1::5][:4],
    interpreted=INTERPRETED,
    check=against_oracle("sparse_linear"),
    reference_launch="64-1104-208-float16-half",
    shipped=SHIPPED,
    defaults=["1-4096-bfloat16"],
    mutant_case="3-336-208-float16-half",
    mutants=MUTANTS,
    tensor_kernels={"sparse_linear_kernel": 1},
    without_tensors=[name for name in SHIPPED if "float32" in name],
)
