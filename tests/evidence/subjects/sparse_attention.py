"""Evidence of sparse_attention."""

import functools
from collections.abc import Callable

import torch
from mutations import BARRIER, COMMIT, MMA_A, MMA_B, SWAPPED, WAIT, Change, at_line, nth, shuffle, weaker
from scrimp.kernels.sparse_attention import sparse_attention_kernel

from scrimp import SparsePlan

from .subject import Case, Flat, Mutant, Subject, against_oracle, pairwise

HALVES = (torch.float16, torch.bfloat16)


def flat(plan: SparsePlan, n_k: int, D: int, H: int, G: int, dtype: torch.dtype, by_token: bool = False) -> Flat:
    """Random q, k and v under a plan; `by_token` puts the heads of a token side by side in memory."""
    B, n = plan.batch, plan.geometry.n_q

    def make(heads: int, tokens: int) -> torch.Tensor:
        shape = (B, tokens, heads, D) if by_token else (B, heads, tokens, D)
        x = torch.randn(shape).to(dtype)
        return x.transpose(1, 2) if by_token else x

    tensors = (plan.ranges, plan.range_slice, plan.columns, plan.column_slice, plan.row_start)
    return (make(H, n), make(G, n_k), make(G, n_k), *tensors, plan.q_block, plan.q_offset, plan.causal, D**-0.5)


def listed(
    tiles: list[tuple[list[list[int]], list[int]]], n_q: int, n_k: int, q_block: int = 64, causal: bool = True
) -> SparsePlan:
    """The plan of (ranges, columns) of every tile, as they stand: a column may lie inside a range."""
    ranges, columns = ([x for tile in tiles for x in tile[part]] for part in (0, 1))
    slices = []
    for part in (0, 1):
        counts = torch.tensor([len(tile[part]) for tile in tiles])
        slices.append(torch.stack([counts.cumsum(0) - counts, counts], 1).int()[None, None])
    return SparsePlan.from_tensors(
        ranges=torch.tensor(ranges, dtype=torch.int32).view(1, 1, -1, 2), range_slice=slices[0],
        columns=torch.tensor(columns, dtype=torch.int32).view(1, 1, -1), column_slice=slices[1],
        q_block=q_block, n_q=n_q, n_k=n_k, q_offset=n_k - n_q, causal=causal,
    )  # fmt: skip


def many_columns(n: int) -> SparsePlan:
    """Two keys of three as columns, in all tiles but the first; two short ranges that hold some of them."""
    scattered = [key for key in range(n) if key % 3]
    ranges = [[n // 4, n // 4 + min(9, n // 8)], [n // 2, n // 2 + n // 5]]
    ranges = [[start, stop] for start, stop in ranges if start < stop]
    return listed([(ranges, scattered if tile or n < 64 else []) for tile in range(-(-n // 64))], n, n)


def heads(n: int, H: int) -> SparsePlan:
    """A plan of its own for each head."""
    some = [
        SparsePlan.tri_shape(n, sink=5, window=33, last=40),
        SparsePlan.vertical_slash(n, columns=sorted({0, n // 3, n // 2, n - 1}), diagonals=[0, n // 2]),
        SparsePlan.a_shape(n, sink=7, window=70),
    ]
    return SparsePlan.cat([some[head % 3] for head in range(H)])


def slashes(n: int) -> SparsePlan:
    return SparsePlan.vertical_slash(
        n, columns=list(range(0, n, 7)), diagonals=[min(7, n - 1), n // 2], bands=[(0, 20)] if n > 20 else [(0, 1)]
    )


def blocks(n: int, H: int) -> SparsePlan:
    mask = torch.rand(1, H, -(-n // 48), -(-n // 23)) < 0.6
    return SparsePlan.from_block_mask(mask, q_block=48, k_block=23, n_q=n, n_k=n)


def padded(n: int) -> SparsePlan:
    return SparsePlan.a_shape(n, sink=n // 3, window=80).expand(batch=2).with_padding([n // 4, 0])


PLANS: dict[str, Callable[[int, int], SparsePlan]] = {
    "dense": lambda n, H: SparsePlan.dense(n),
    "bidirectional": lambda n, H: SparsePlan.dense(n, causal=False),
    "heads": heads,
    "vertical_slash": lambda n, H: slashes(n),
    "blocks": blocks,
    "columns": lambda n, H: many_columns(n),
    "documents": lambda n, H: SparsePlan.from_documents([n // 3, n - n // 3]),
    "window": lambda n, H: SparsePlan.sliding_window(n, window=50, n_k=n + 100, q_block=100),
    "padded": lambda n, H: padded(n),
}
FIRST = ("documents", "window", "padded")  # with row_start: kernels of their own, compiled in half of the forms


def make(plan: str, n: int, D: int, group: int, dtype: torch.dtype) -> Flat:
    """One case; a single query makes too few numbers for a bound, so it comes in a batch."""
    H, G = {1: (2, 2), 3: (3, 1), 8: (8, 1)}[group]
    made = PLANS[plan](n, H)
    if n == 1 and made.batch == 1:
        made = made.expand(batch=4)
    return flat(made, n + 100 if plan == "window" else n, D, H, G, dtype)


def long(D: int, dtype: torch.dtype) -> Flat:
    """More columns and ranges than the kernel looks up at once, columns inside ranges among them."""
    tile = ([[50 * i, 50 * i + 3 + i % 2] for i in range(40)], list(range(0, 2300, 2)))
    return flat(listed([tile], 17, 2300), 2300, D, 2, 2, dtype)


def mixed(D: int, dtype: torch.dtype) -> Flat:
    """Whole pieces, range ends, a diagonal and columns, some of them inside a range, others late; two heads of one."""
    scattered = [*range(301, 420, 3), 433, 460, 499]
    tiles = [([[0, 140], [150, 300], [380, 390], [436, 494]], scattered), ([[10, 331], [440, 500]], scattered)]
    return flat(listed(tiles, 70, 500), 500, D, 2, 1, dtype)


def by_token(D: int, dtype: torch.dtype) -> Flat:
    """q, k and v as a projection leaves them; a plan of its own for each sample; some rows see nothing."""
    plan = SparsePlan.cat([SparsePlan.a_shape(65, 3, 30, q_offset=-9), SparsePlan.dense(65, q_offset=-9)], "batch")
    return flat(plan, 65, D, 3, 1, dtype, by_token=True)


def chunk(D: int, dtype: torch.dtype) -> Flat:
    """The last rows of a longer sequence, which end in a block of 128."""
    return flat(SparsePlan.dense(65, 300, q_block=128), 300, D, 3, 1, dtype)


def cases(*dtypes: torch.dtype) -> dict[str, Case]:
    rows = pairwise(plan=list(PLANS), n=[1, 63, 65, 200], D=[64, 128], group=[1, 3, 8], dtype=list(dtypes))
    found: dict[str, Case] = {}
    for row in rows:
        if row["plan"] in FIRST:
            row["dtype"] = dtypes[row["D"] == 64]
        name = "-".join(str(value).removeprefix("torch.") for value in row.values())
        found[name] = functools.partial(make, **row)
    return found


EMULATED = cases(*HALVES) | {
    "long": functools.partial(long, 128, torch.bfloat16),
    "mixed": functools.partial(mixed, 64, torch.float16),
    "by_token": functools.partial(by_token, 64, torch.bfloat16),
}
PARTS = {
    **{plan: functools.partial(make, plan, 65, 64, 3) for plan in PLANS},
    "by_token": functools.partial(by_token, 64), "chunk": functools.partial(chunk, 40),
    "mixed": functools.partial(mixed, 64),
}  # fmt: skip
INTERPRETED = {  # each in one of the two types: the interpreter is slow
    f"{name}-{str(dtype).removeprefix('torch.')}": functools.partial(PARTS[name], dtype=dtype)
    for k, name in enumerate(PARTS) for dtype in [(torch.float16, torch.float32)[k % 2]]
}  # fmt: skip


def shipped() -> dict[str, Case]:
    """Every configuration: plans per head, shared ones (four times the rows in a tile), and some with row_start."""

    def meta(D: int, dtype: torch.dtype, kind: str) -> Flat:
        made = {
            "heads": lambda: SparsePlan.a_shape(4096, [64] * 32, 512),
            "shared": lambda: SparsePlan.a_shape(4096, 64, 512),
            "rows": lambda: SparsePlan.sliding_window(4096, 512),
        }
        plan = made[kind]().to("meta")
        q, k = (torch.empty(1, H, 4096, D, dtype=dtype, device="meta") for H in (32, 8))
        tensors = (plan.ranges, plan.range_slice, plan.columns, plan.column_slice, plan.row_start)
        return (q, k, k, *tensors, plan.q_block, plan.q_offset, plan.causal, D**-0.5)

    forms = [(D, torch.bfloat16, kind) for D in (64, 96, 128, 256) for kind in ("heads", "shared")]
    forms += [(128, torch.float16, "shared")]
    forms += [(D, torch.bfloat16, "rows") for D in (64, 128)]
    forms += [(D, torch.float32, "shared") for D in (64, 128, 256)]
    return {
        f"{D}-{str(dtype).removeprefix('torch.')}-{kind}": functools.partial(meta, D, dtype, kind)
        for D, dtype, kind in forms
    }


def planted(change: Change, *caught_by: str) -> Mutant:
    return Mutant("sparse_attention_kernel", change, frozenset(caught_by))


def short(**buffers: int) -> Mutant:
    return Mutant("sparse_attention_kernel", caught_by=frozenset({"out_of_bounds"}), short=buffers)


COPY = ("race", "async_race", "uninitialised")
RACE = ("race", "async_race")
line = functools.partial(at_line, sparse_attention_kernel)
MUTANTS = {
    **{f"barrier {k} removed": planted(nth(BARRIER, k, ""), *COPY) for k in (1, 2, 5, 8, 16, -1)},
    # Waits 1, 3 and 5 are those inside the loops over whole pieces, edges and columns.
    **{f"wait {k} weakened": planted(weaker(k), *RACE) for k in (1, 3, 5)},
    **{f"wait {k} removed": planted(nth(WAIT, k, ""), *RACE) for k in (1, 3, 5)},
    **{f"commit {k} removed": planted(nth(COMMIT, k, ""), *RACE) for k in (1, 4, 5, 7, 10, 14)},
    **{f"ldmatrix {k} without trans": planted(nth(r"x4\.trans", k, "x4"), "value") for k in (0, 40)},
    **{f"ldmatrix {k} with trans": planted(nth(r"x4\.shared", k, "x4.trans.shared"), "value") for k in (0, 40)},
    **{f"shuffle {k} over 4": planted(shuffle(k, 2, 4), "value") for k in (0, 5, 8)},
    **{f"shuffle {k} over 2": planted(shuffle(k, 1, 2), "value") for k in (0, 5, -1)},
    **{f"operand A of product {k} swapped": planted(nth(MMA_A, k, SWAPPED), "value") for k in (0, 100)},
    **{f"operand B of product {k} swapped": planted(nth(MMA_B, k, SWAPPED), "value") for k in (0, 100)},
    "weights packed the wrong way": planted(
        nth(r"(cvt\.rn\.f16x2\.f32\s+%r\d+, )(%r\d+), (%r\d+)", 3, r"\1\3, \2"), "value"
    ),
    "causal test off by one": planted(
        line("seen = key[None, :] <= last[:, None]", r"setp\.gt\.s32", None, "setp.ge.s32"), "value"
    ),
    "causal test of one score": planted(
        line("seen = key[None, :] <= last[:, None]", r"setp\.gt\.s32", 0, "setp.ge.s32"), "value"
    ),
    "end of a range off by one": planted(line("(ahead < end)", r"setp\.lt\.s32", None, "setp.le.s32"), "value"),
    "start of a piece off by one": planted(
        line("mine = (piece < upto) & (piece >= upto - pieces)", r"setp\.ge\.s32", 0, "setp.gt.s32"), "value"
    ),
    "half pieces counted": planted(
        line("pieces = tl.maximum", r"(shr\.u32\s+%r\d+, %r\d+), 6;", 0, r"\1, 5;"), "value", "out_of_bounds"
    ),
    "columns inside a range twice": planted(
        line("keep = (column >= low)", r"setp\.\w+\.s32(\s+%p\d+, %r\d+, %r\d+);", -1, r"setp.ne.s32\1;"), "value"
    ),
    "columns past the list": planted(
        line("keep = (column >= low)", r"setp\.\w+\.s32(\s+%p\d+, %r\d+, %r\d+);", 0, r"setp.ne.s32\1;"),
        "out_of_bounds",
    ),
    "columns among ranges by the wrong end": planted(
        line("(stop <= column)", r"setp\.\w+\.s32", 0, "setp.ne.s32"), "value"
    ),
    "bits of columns to the right": planted(
        line("words |= tl.sum", r"shl\.b32(\s+%r\d+, %r\d+), (%r\d+);", 0, r"shr.u32\1, \2;"), "value"
    ),
    "late columns for all rows": planted(line("until += (tl.load", r", 1, 0,", None, ", 1, 1,"), "value"),
    "wrong base of the exponential": planted(nth("0f3FB8AA3B", 0, "0f3F800000"), "value"),
    "no exponential": planted(nth(r"ex2\.approx\.ftz\.f32(\s+%r\d+, )(%r\d+)", 0, r"mov.b32\1\2"), "value"),
    "sums not scaled down": planted(
        line("updated = updated + (tl.dot", r"mul\.f32(\s+%r\d+, )(%r\d+), %r\d+;", 0, r"mov.b32\1\2;"), "value"
    ),
    "rows stored without a mask": planted(nth(r"@%p\d+( st\.global\.v4)", -1, r"\1"), "out_of_bounds"),
    "lse stored without a mask": planted(nth(r"@%p\d+( st\.global\.b32)", -1, r"\1"), "out_of_bounds"),
    **{f"{name} short": short(**{name: 2}) for name in ("q", "k", "v", "out")},
    **{f"{name} short": short(**{name: 4}) for name in ("lse", "ranges", "columns")},
    # The first wait of a pipeline is for its first two groups.
    **{f"commit {k} removed": planted(nth(COMMIT, k, "")) for k in (0, 6, 12)},
    # No range ends past n_k, so no key is n_k.
    "key n_k loaded": planted(line("seen = (key < n_k)", r"setp\.lt\.s32", None, "setp.le.s32")),
}  # fmt: skip
SHIPPED = shipped()
SUBJECT = Subject(
    op="sparse_attention",
    cases=EMULATED,
    warp_cases=["long", "mixed", "by_token", "columns-200-64-1-float16"],
    interpreted=INTERPRETED,
    check=against_oracle("sparse_attention"),
    reference_launch="mixed",
    shipped=SHIPPED,
    defaults=["64-bfloat16-shared", "128-bfloat16-heads"],
    mutant_case="mixed",
    mutants=MUTANTS,
    tensor_kernels={"sparse_attention_kernel": 1},
    without_tensors=[name for name in SHIPPED if "float32" in name],
)
