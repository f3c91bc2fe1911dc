"""Evidence of tree_attention."""

import functools

import torch
from mutations import BARRIER, COMMIT, MMA_A, MMA_B, SWAPPED, WAIT, Change, at_line, nth, shuffle, weaker
from scrimp.kernels import tree_attention as kernels

from .subject import Case, Flat, Mutant, Subject, against_oracle

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def tree(T: int) -> torch.Tensor:
    """Ancestor words int64 [T] of a tree with chains and branches."""
    words = [1]
    for t in range(1, T):
        words.append((words[max(t - 1 - t % 3, 0)] if t % 5 else 0) | 1 << t)
    return torch.tensor([word - (1 << 64) if word >> 63 else word for word in words])


def make(
    kind: str, prefix: list[int], heads: tuple[int, int], T: int, D: int, dtype: torch.dtype, by_token: bool = False
) -> Flat:
    """`kind`: tree, empty (rows of a tree that see nothing but the prefix), chain or window; unseen slots are NaN."""
    (H, G), B, C = heads, len(prefix), max(prefix) + T + 3

    def random(count: int, tokens: int) -> torch.Tensor:
        x = torch.randn((B, tokens, count, D) if by_token else (B, count, tokens, D)).to(dtype)
        return x.transpose(1, 2) if by_token else x

    q, k, v = random(H, T), random(G, C), random(G, C)
    for b, tokens in enumerate(prefix):
        k[b, :, tokens + T :] = v[b, :, tokens + T :] = torch.nan
    words = {"tree": tree(T)[None].repeat(B, 1), "empty": torch.zeros(1, T, dtype=torch.int64)}.get(kind)
    window = 70 if kind == "window" else 0
    if window:
        for b, tokens in enumerate(prefix):
            k[b, :, : max(tokens + 1 - window, 0)] = v[b, :, : max(tokens + 1 - window, 0)] = torch.nan
    return q, k, v, torch.tensor(prefix, dtype=torch.int32), words, window, max(D, 1) ** -0.5


def cases(forms: list[tuple[str, int, torch.dtype]], small: bool) -> dict[str, Case]:
    """The forms at sizes on both sides of a block (64 keys) and of a split (512)."""
    sizes: list[tuple[list[int], tuple[int, int], int]] = [
        ([0], (2, 2), 1), ([63, 0], (6, 2), 3), ([64], (8, 1), 5), ([510], (3, 1), 4), ([1100], (2, 2), 1),
    ]  # fmt: skip
    if not small:
        sizes += [([512, 449], (4, 1), 17), ([1030], (8, 2), 9), ([470], (1, 1), 64)]
    return {
        f"{kind}-{'+'.join(map(str, prefix))}-{heads[0]}-{heads[1]}-{T}-{D}-{dtype}".replace("torch.", ""): (
            functools.partial(make, kind, prefix, heads, T, D, dtype)
        )
        for kind, D, dtype in forms for prefix, heads, T in sizes
    }  # fmt: skip


EMULATED = cases([("tree", 64, HALF), ("chain", 128, BRAIN), ("tree", 128, BRAIN), ("window", 40, HALF)], False) | {
    "rows that see nothing": functools.partial(make, "empty", [0, 40], (2, 1), 3, 64, HALF),
    "by token": functools.partial(make, "tree", [530], (6, 2), 3, 64, HALF, by_token=True),
    "more heads than a tile": functools.partial(make, "tree", [530], (80, 1), 2, 64, HALF),
    "nine splits": functools.partial(make, "tree", [4300], (8, 1), 4, 128, BRAIN),
}
INTERPRETED = cases([("tree", 64, SINGLE), ("window", 40, HALF)], True) | {
    "rows that see nothing": functools.partial(make, "empty", [0, 40], (2, 1), 3, 64, SINGLE),
    "by token": functools.partial(make, "chain", [530], (6, 2), 3, 19, SINGLE, by_token=True),
    "no dimensions": functools.partial(make, "chain", [600], (2, 1), 2, 0, SINGLE),
    "all bits": functools.partial(make, "tree", [30], (1, 1), 64, 64, HALF),
}


def shipped() -> dict[str, Case]:
    """Every configuration for trees, some of them for chains and windows."""

    def meta(kind: str, D: int, dtype: torch.dtype) -> Flat:
        q, k = (torch.empty(1, H, n, D, dtype=dtype, device="meta") for H, n in ((32, 16), (8, 4096)))
        words = torch.empty(1, 16, dtype=torch.int64, device="meta") if kind == "tree" else None
        prefix = torch.empty(1, dtype=torch.int32, device="meta")
        return q, k, k, prefix, words, 512 if kind == "window" else 0, D**-0.5

    forms = [("tree", D, dtype) for dtype in (BRAIN, SINGLE) for D in (64, 128, 256)] + [("tree", 96, BRAIN)]
    forms += [("chain", 64, BRAIN), ("chain", 128, BRAIN), ("window", 64, BRAIN)]
    return {
        f"{kind}-{D}-{str(dtype).removeprefix('torch.')}": functools.partial(meta, kind, D, dtype)
        for kind, D, dtype in forms
    }


def planted(change: Change, *caught_by: str, case: str = "") -> Mutant:
    return Mutant("tree_attention_kernel", change, frozenset(caught_by), case=case)


def merged(change: Change, *caught_by: str) -> Mutant:
    return Mutant("tree_attention_merge_kernel", change, frozenset(caught_by))


def short(kernel: str, **buffers: int) -> Mutant:
    return Mutant(kernel, caught_by=frozenset({"out_of_bounds"}), short=buffers)


COPY = ("race", "async_race", "uninitialised", "value")
WRONG = ("value", "out_of_bounds", "misaligned")
CROSSING = "tree-510-3-1-4-128-bfloat16"  # new rows in two splits
BEHIND = 3 * 64 * 2 + 2  # bytes of the slots that nobody sees, and one number more
line = functools.partial(at_line, kernels.tree_attention_kernel)
states = functools.partial(at_line, kernels.tree_attention_merge_kernel)
MUTANTS = {
    **{
        f"barrier {k} removed": planted(nth(BARRIER, k, ""), *COPY)
        for k in (0, 1, 2, 3, 5, 7, 12, 15, 16, 17, 18, 21, 22)
    },
    **{f"wait {k} weakened": planted(weaker(k), *COPY) for k in (0, 2)},
    **{f"wait {k} removed": planted(nth(WAIT, k, ""), *COPY) for k in (0, 1, 2, 3)},
    **{f"commit {k} removed": planted(nth(COMMIT, k, ""), *COPY) for k in (1, 4, 5, 7)},
    **{f"operand A of product {k} swapped": planted(nth(MMA_A, k, SWAPPED), "value") for k in (0, 32, 64, 96)},
    **{f"operand B of product {k} swapped": planted(nth(MMA_B, k, SWAPPED), "value") for k in (0, 32, 64, 96)},
    "maximum of a pair": planted(shuffle(0, 2, 1), "value"),
    "a row too few": planted(
        line("query = _load(rows, (row <= last_row)", r"setp\.le\.s32", 0, "setp.lt.s32"), "value"
    ),
    "a key too many": planted(line("seen = slot < end", r"setp\.lt\.s32", None, "setp.le.s32"), "value"),
    "another key's head": planted(line("k += b * k_b + g * k_g", r"mul\.lo\.s64", -1, "add.s64"), *WRONG),
    "another value's head": planted(line("v += b * v_b + g * v_g", r"mul\.lo\.s64", -1, "add.s64"), *WRONG),
    "splits of 256 begin": planted(line("begin, end = split * SPLIT", r", 9;", 0, ", 8;"), *WRONG),
    "splits of 520 end": planted(line("begin, end = split * SPLIT", r", 512;", 0, ", 520;"), *WRONG),
    "path without its order": planted(
        line("slot = tl.where(slot < cached", r"setp\.lt\.s32", None, "setp.gt.s32"), *WRONG
    ),
    "two splits for one": planted(
        line("split = tl.where(alone, cached // SPLIT", r"and\.b32(\s+%r\d+, %r\d+), 1;", 0, r"and.b32\1, 0;"),
        *WRONG,
        case=CROSSING,
    ),
    "logarithm of another base": planted(
        line("scale = tl.maximum(tl.abs(scale)", "0f3FB8AA3B", 0, "0f3F800000"), "value"
    ),
    "sums not scaled": planted(
        line("past = tl.exp2(top - high)", r"sub\.f32(\s+%r\d+), (%r\d+), %r\d+;", 0, r"sub.f32\1, \2, \2;"), "value"
    ),
    "weights of another maximum": planted(line("weight = tl.exp2(tl.fma(score", r"neg\.f32", 0, "mov.b32"), "value"),
    "query not negated": planted(line("query = tl.where(scale < 0", r"setp\.lt\.f32", 0, "setp.ge.f32"), "value"),
    **{
        f"{name} short": short("tree_attention_kernel", **{name: size})
        for name, size in {
            "q": 2,
            "k": BEHIND,
            "v": BEHIND,
            "prefix": 4,
            "ancestors": 8,
            "tops": 4,
            "totals": 4,
            "sums": 4,
        }.items()
    },
    **{f"barrier {k} of the merge removed": merged(nth(BARRIER, k, ""), *COPY) for k in (0, 2, 4)},
    "highest of some": merged(shuffle(0, 8, 4), "value"),
    "sum of some warps": merged(shuffle(2, 2, 1), "value"),
    "one split more": merged(states("inside = (split + s >= first)", r"setp\.lt\.u64", 0, "setp.le.u64"), *WRONG),
    "one split less": merged(states("stop = tl.cdiv(cached", ", 511;", 0, ", -1;"), "value"),
    "totals not weighed": merged(
        states(
            "total = tl.fma(tl.load(totals", r"fma\.rn\.f32(\s+%r\d+, %r\d+), %r\d+,", 0, r"fma.rn.f32\1, 0f3F800000,"
        ),
        "value",
    ),
    "not inverted": merged(
        states("inverse = tl.where", r"div\.full\.f32(\s+%r\d+, )(%r\d+), (%r\d+)", 0, r"div.full.f32\1\3, \2"), "value"
    ),
    "logarithm to base 2": merged(
        states("result = tl.where", r"(fma\.rn\.f32\s+%r\d+, %r\d+), 0f3F317218", -1, r"\1, 0f3F800000"), "value"
    ),
    "another row's results": merged(
        states("t, h, H = row // group", r"sub\.s32(\s+%r\d+), (%r\d+), %r\d+;", 0, r"mov.b32\1, 0;"), "value"
    ),
    "columns of out": merged(
        states("tl.store(out +", r"shl\.b64(\s+%rd\d+, %rd\d+), 7;", 0, r"shl.b64\1, 6;"), "value"
    ),
    **{
        f"{name} of the merge short": short("tree_attention_merge_kernel", **{name: size})
        for name, size in {"tops": 4, "totals": 4, "sums": 4, "prefix": 4, "ancestors": 8, "out": 2, "lse": 4}.items()
    },
}
SHIPPED = shipped()
SUBJECT = Subject(
    op="tree_attention",
    cases=EMULATED,
    warp_cases=[
        "tree-63+0-6-2-3-64-float16",
        "tree-1030-8-2-9-128-bfloat16",
        "window-510-3-1-4-40-float16",
        "by token",
    ],
    interpreted=INTERPRETED,
    check=against_oracle("tree_attention"),
    reference_launch="nine splits",
    shipped=SHIPPED,
    defaults=["tree-64-bfloat16", "chain-128-bfloat16"],
    mutant_case="tree-1030-8-2-9-64-float16",
    mutants=MUTANTS,
    tensor_kernels={"tree_attention_kernel": 0},
    without_tensors=[name for name in SHIPPED if "float32" in name],
    repeated_exps=1.5,
)
