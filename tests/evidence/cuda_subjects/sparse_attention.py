"""Evidence of sparse_attention in CUDA C++."""

import functools

import torch
from mutations import BARRIER, COMMIT, WAIT, Change, nth, weaker
from subjects.sparse_attention import FIRST, HALVES, PLANS, by_token, flat, listed, long, make, mixed
from subjects.subject import Case, Flat, Mutant, against_oracle, pairwise

from .subject import CudaSubject, source

HALF, BRAIN = HALVES
REFERENCE, HEADS, PADDED = "mixed", "columns-200-64-1-float16", "padded-200-64-1-bfloat16"


def scaled(scale: float) -> Flat:
    return (*mixed(64, HALF)[:11], scale)


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for row in pairwise(plan=list(PLANS), n=[1, 65, 200], D=[64, 128], group=[1, 3, 8], dtype=list(HALVES)):
        if row["plan"] in FIRST:
            row["dtype"] = HALVES[row["D"] == 64]
        found["-".join(str(value).removeprefix("torch.") for value in row.values())] = functools.partial(make, **row)
    return found | {
        "long": functools.partial(long, 128, BRAIN),
        "by_token": functools.partial(by_token, 64, BRAIN),
        "ends": lambda: flat(listed([([[0, 64 * i]][:i], []) for i in range(3)], 192, 192), 192, 64, 2, 1, HALF),
        "negative scale": functools.partial(scaled, -0.2),
        "no scale": functools.partial(scaled, 0.0),
        "wide": functools.partial(make, "dense", 65, 128, 8, BRAIN),
        HEADS: functools.partial(make, "columns", 200, 64, 1, HALF),
        PADDED: functools.partial(make, "padded", 200, 64, 1, BRAIN),
        REFERENCE: functools.partial(mixed, 64, HALF),
    }


def nothing(B: int, n: int) -> Flat:
    q, k, v, ranges, range_slice, columns, column_slice, *rest = mixed(64, HALF)
    return (q[:B, :, :n], k[:B], v[:B], ranges, range_slice[:, :, :n], columns, column_slice[:, :, :n], *rest)


def changed(i: int, change: Change) -> Change:
    return lambda a: (*a[:i], change(a[i]), *a[i + 1 :])


BAD = {
    "rank": (changed(0, lambda x: x[0]), r"q must be \[B, H, N, D\], got \[2, 70, 64\]"),
    "dtypes": (changed(1, torch.Tensor.bfloat16), "k and q differ in dtype"),
    "dtype": (lambda a: (*(x.float() for x in a[:3]), *a[3:]), r"CUDA C\+\+ serves float16 and bfloat16"),
    "head size": (lambda a: (*(x[..., :32] for x in a[:3]), *a[3:]), r"CUDA C\+\+ serves .*, head sizes 64 and 128"),
    "shapes": (changed(2, lambda x: x[:, :, :-1]), r"v \[1, 1, 499, 64\] do not fit together"),
    "heads": (
        lambda a: (a[0].repeat(1, 2, 1, 1)[:, :3], *(x.repeat(1, 2, 1, 1) for x in a[1:3]), *a[3:]),
        "3 query heads are not a multiple of 2 key/value heads",
    ),
    "plan dtype": (changed(3, torch.Tensor.long), "ranges must be int32"),
    "plan shape": (changed(4, lambda x: x[:, :, :1]), r"range_slice has shape \[1, 1, 1, 2\], which does not fit q"),
    "row starts": (
        changed(7, lambda _: torch.zeros(1, 3, dtype=torch.int32)),
        r"row_start has shape \[1, 3\], which does not fit q",
    ),
    "row starts' dtype": (changed(7, lambda _: torch.zeros(1, 70)), "row_start must be int32"),
    "tile": (changed(8, lambda _: 0), "q_block=0 must be at least 1"),
    "offset": (changed(9, lambda _: 2**31), "q_offset=2147483648 does not fit int32"),
    "scale": (changed(11, lambda _: torch.inf), "scale=inf must be finite"),
    "rows off the grid": (
        changed(1, lambda x: torch.nn.functional.pad(x, (1, 0))[..., 1:]),
        "rows of .* at multiples of 16 bytes",
    ),
    "too many": (
        lambda a: (a[0], *(x[:, :, :1].expand(1, 1, 2**30, 64) for x in a[1:3]), *a[3:]),
        "tokens are too many for 32 bits",
    ),
    "device": (changed(3, lambda x: x.to("meta")), "all tensors must be on one CUDA device"),
}
line, parts, walk = (source(f"sparse_attention{part}") for part in ("", ".parts", ".walk"))
COPY, WRONG = ("race", "async_race", "uninitialised", "value"), ("value", "out_of_bounds", "misaligned")
MMA_A = r"(mma\.sync\S+ \{[^}]*\}, \{)(%r\d+),(%r\d+)"
MMA_B = r"(mma\.sync\S+ \{[^}]*\}, \{[^}]*\}, \{)(%r\d+),(%r\d+)"
SWAPPED, ANY = r"\1\3,\2", r"vote\.sync\.any\.pred(\s+%p\d+), %p\d+, %r\d+;"
SHUFFLE = r"(shfl\.sync\.bfly\.b32\s+%r\d+\|%p\d+, %r\d+), %r\d+,"
BEFORE = r"(shfl\.sync\.up\.b32\s+%r\d+\|%p\d+, %r\d+), %r\d+,"
PRODUCT = r"mul\.lo\.s64(\s+%rd\d+), %rd\d+, %rd\d+;"


def planted(change: Change, *caught_by: str, kernel: str = "__half, 64, 2", case: str = "") -> Mutant:
    return Mutant(f"sparse_attention_kernel<{kernel}>", change, frozenset(caught_by), case=case)


def short(size: int, *buffers: str) -> dict[str, Mutant]:
    return {
        f"{name} short": Mutant(
            "sparse_attention_kernel<__half, 64, 2>", caught_by=frozenset({"out_of_bounds"}), short={name: size}
        )
        for name in buffers
    }


one = functools.partial(planted, kernel="__half, 64, 1", case=HEADS)
MUTANTS = {
    **{f"barrier {k} removed": planted(nth(BARRIER, k, ""), *COPY) for k in (0, 1)},
    "wait weakened": planted(weaker(1), *COPY),
    "wait removed": planted(nth(WAIT, 1, ""), *COPY),
    **{f"commit {k} removed": planted(nth(COMMIT, k, ""), *COPY) for k in (1, 2)},
    **{f"operand A of product {k} swapped": planted(nth(MMA_A, k, SWAPPED), "value") for k in (0, 63, 64, -1)},
    **{f"operand B of product {k} swapped": planted(nth(MMA_B, k, SWAPPED), "value") for k in (0, 63, 64, -1)},
    "queries transposed": planted(nth(r"x4\.shared", 0, "x4.trans.shared"), "value"),
    "keys transposed": planted(nth(r"x4\.shared", 2, "x4.trans.shared"), "value"),
    "values not transposed": planted(nth(r"x4\.trans", 0, "x4"), "value"),
    "maximum of another row": planted(nth(SHUFFLE, 0, r"\1, 4,"), "value"),
    "total of another row": planted(nth(SHUFFLE, -1, r"\1, 4,"), "value"),
    "sums not scaled": planted(nth(ANY, -1, r"setp.ne.s32\1, 0, 0;"), "value"),
    "totals not scaled": planted(
        parts("state.total[h] = fmaf", r"fma\.rn\.f32(\s+%f\d+), %f\d+, %f\d+, (%f\d+);", 0, r"mov.f32\1, \2;"), "value"
    ),
    "no exponential": planted(nth(r"ex2\.approx\.ftz\.f32(\s+%f\d+), (%f\d+);", 5, r"mov.f32\1, \2;"), "value"),
    "not inverted": planted(nth(r"rcp\.rn\.f32(\s+%f\d+), %f\d+;", 0, r"mov.f32\1, 0f3F800000;"), "value"),
    "logarithm to base 2": planted(nth("0f3F317218", 0, "0f3F800000"), "value"),
    "causal test off by one": planted(line("key.x > last", r"setp\.gt\.s32", None, "setp.ge.s32"), "value"),
    "no step masked": planted(nth(ANY, 5, r"setp.ne.s32\1, 0, 0;"), "value"),
    "a run of half a step": planted(
        walk("if (place + kKeys <= run_upto)", r"(add\.s32\s+%r\d+, %r\d+), 64;", -1, r"\1, 32;"), *WRONG
    ),
    "ranges counted wrongly": planted(nth(BEFORE, 1, r"\1, 3,"), *WRONG),
    "a key of the range before": planted(walk("step - 1) <= at", r"setp\.gt\.s32", None, "setp.ge.s32"), *WRONG),
    "a key behind the last": planted(walk("key[j] = at < total", r"setp\.lt\.s32", None, "setp.le.s32"), "value"),
    "columns inside a range twice": planted(
        walk("kept = column >=", r"setp\.eq\.s16(\s+%p\d+, %rs\d+), 0;", None, r"setp.ne.s16\1, 7;"), "value"
    ),
    "columns among ranges by the wrong end": planted(
        walk("range.y, ended + step - 1)", r"setp\.gt\.s32", None, "setp.lt.s32"), "value"
    ),
    "rows read past the tile": planted(
        line("r = min(rows.first", r"min\.s32(\s+%r\d+), (%r\d+), %r\d+;", None, r"mov.b32\1, \2;"), "out_of_bounds"
    ),
    "rows stored past the tile": planted(line("if (r >= rows.count)", r"setp\.ge\.s32", None, "setp.gt.s32"), *WRONG),
    "lse stored past the tile": one(line("&& r < rows.count)", r"setp\.ge\.s32", None, "setp.gt.s32"), *WRONG),
    "sign of the scale": planted(nth(r"xor\.b32(\s+%r\d+, %r\d+), -2147450880;", 0, r"xor.b32\1, 0;"), "value",
                                 case="negative scale"),
    "another head's keys": one(line("const T* const k =", PRODUCT, 1, r"mov.b64\1, 0;"), "value"),
    "another head's values": one(line("const T* const v =", PRODUCT, 1, r"mov.b64\1, 0;"), "value"),
    "operand A of one tile swapped": one(nth(MMA_A, 0, SWAPPED), "value"),
    "wait for one tile's queries weakened": one(weaker(0), *COPY),
    "wait for one tile's queries removed": one(nth(WAIT, 0, ""), *COPY),
    "commit of one tile's queries removed": one(nth(COMMIT, 0, ""), *COPY),
    "barrier of one tile removed": one(nth(BARRIER, 0, ""), *COPY),
    "first key off by one": planted(
        line("key.x > last", r"setp\.lt\.s32", None, "setp.le.s32"), "value", kernel="__nv_bfloat16, 64, 1", case=PADDED
    ),
    **short(2, "q", "k", "v"),
    **short(4, "ranges", "range_slice", "columns", "column_slice"),
}  # fmt: skip
CASES = cases()
SUBJECT = CudaSubject(
    op="sparse_attention",
    cases=CASES,
    warp_cases=["long", REFERENCE, "by_token", HEADS],
    check=against_oracle("sparse_attention"),
    reference_launch=REFERENCE,
    least_bytes=None,  # products bound it, not memory
    mutant_case=REFERENCE,
    mutants=MUTANTS,
    idle={"no queries": functools.partial(nothing, 1, 0), "no samples": functools.partial(nothing, 0, 70)},
    bad=BAD,
    shared={
        f"sparse_attention_kernel<{name}, {D}, {tiles}>": size
        for name in ("__half", "__nv_bfloat16")
        for (D, tiles), size in {(64, 1): 50176, (64, 2): 66560, (128, 1): 49792, (128, 2): 82560}.items()
    },
    tensor_kernels={"sparse_attention_kernel": 1},
)
