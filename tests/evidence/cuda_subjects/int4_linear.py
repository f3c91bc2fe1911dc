"""Evidence of int4_linear in CUDA C++."""

import functools

import torch
from cuda_device import ROOT
from mutations import BARRIER, COMMIT, Change, at_line, nth
from scrimp.benchmarks.int4_linear_cost import count_cuda
from subjects.int4_linear import check
from subjects.subject import Case, Flat, Mutant, pairwise

from scrimp.int4_weight.check import ZERO_KINDS
from scrimp.testing import random_int4_weight

from .subject import CudaSubject

HALF, BRAIN = torch.float16, torch.bfloat16
# (inputs, group size): blocks of 128 that leave some warps none, part of a block, one group a row
FORMS = [(352, 32), (576, 64), (640, 128), (160, 160)]
ALONE, SIXTEEN, LONG, BOOK = "alone", "sixteen rows", "scales that come in parts", "codebook"
BYTES, APART, OFFSET = "sixteen rows, zeros of 8 bits", "columns apart", "three dimensions"


def make(rows: int, outputs: int, form: tuple[int, int], kind: str, dtype: torch.dtype, scales: torch.dtype,
         biased: bool) -> Flat:  # fmt: skip
    inputs, group_size = form
    weight = random_int4_weight(outputs, inputs, group_size, kind, dtype=scales)
    bias = torch.randn(outputs).to(dtype) if biased else None
    x = torch.randn(rows, inputs).to(dtype)
    return (x, *weight.tensors().values(), bias, group_size, ZERO_KINDS.index(weight.zero_kind), 0)


def cases() -> dict[str, Case]:
    rows = pairwise(
        rows=[1, 5, 17, 70], outputs=[16, 33, 70], form=FORMS,
        kind=["none8", "uint8", "float", "offset", "codebook8"], dtype=[HALF, BRAIN],
        scales=[HALF, BRAIN, torch.float32], biased=[False, True],
    )  # fmt: skip
    found: dict[str, Case] = {
        "-".join(str(value).replace("torch.", "") for value in row.values()): functools.partial(make, **row)
        for row in rows
    }
    plain = functools.partial(make, form=(256, 64), dtype=HALF, scales=HALF, biased=False)
    return found | {
        ALONE: functools.partial(make, 1, 64, (2048, 128), "none8", BRAIN, HALF, False),
        SIXTEEN: functools.partial(make, 16, 64, (1024, 128), "none8", HALF, HALF, False),
        BYTES: functools.partial(make, 16, 64, (1024, 128), "uint8", BRAIN, HALF, False),
        LONG: functools.partial(make, 9, 40, (2208, 32), "float", BRAIN, HALF, True),
        BOOK: functools.partial(make, 9, 40, (512, 64), "codebook8", BRAIN, HALF, False),
        "parts, few rows": functools.partial(make, 2, 24, (4224, 32), "none8", HALF, BRAIN, False),
        "parts, many rows": functools.partial(make, 33, 24, (2208, 32), "none8", BRAIN, HALF, True),
        **{f"all tiles, {kind} {dtype}".replace("torch.", ""): functools.partial(wide, kind, dtype)
           for kind in ("none8", "offset") for dtype in (HALF, BRAIN)},
        "rows far apart": lambda: changed(plain(5, 19, kind="none8"), lambda x: torch.cat((x, x), 1)[:, :256]),
        "rows off the grid": lambda: changed(plain(5, 19, kind="none8"), lambda x: torch.cat((x, x), 1)[:, 1:257]),
        APART: lambda: changed(plain(5, 19, kind="uint8"), lambda x: x.T.contiguous().T),
        OFFSET: lambda: changed(plain(6, 19, kind="offset"), lambda x: x.view(2, 3, 256)),
        "permuted": functools.partial(permuted, 3),
        "one dimension": lambda: changed(make(1, 19, (256, 64), "codebook8", BRAIN, HALF, False), lambda x: x[0]),
    }  # fmt: skip


def wide(kind: str, dtype: torch.dtype) -> Flat:
    """More rows than the large tile has, few inputs."""
    return make(33, 17, (64, 64), kind, dtype, HALF, False)


def permuted(rows: int) -> Flat:
    """Columns in another order, some inputs in two of them."""
    x, *weight, _, bias, group_size, zero_kind, mode = make(rows, 19, (256, 64), "float", HALF, HALF, True)
    order = torch.cat((torch.randperm(192), torch.arange(64))).int()
    return (x[:, :192].contiguous(), *weight, order, bias, group_size, zero_kind, mode)


def changed(args: Flat, change: Change) -> Flat:
    return change(args[0]), *args[1:]  # type: ignore[arg-type]


def least_bytes(args: Flat) -> int:
    return count_cuda(*args).bytes


def nothing(rows: int, outputs: int) -> Flat:
    return make(rows, outputs, (64, 32), "none8", HALF, HALF, False)


BAD = {
    "dtype": (lambda a: (a[0].float(), *a[1:6], None, *a[7:]), "x must be float16 or bfloat16 in CUDA C.."),
    "mixed dtype": (lambda a: (a[0].half(), *a[1:]), "bias must be of the dtype of x"),
    "int8 mode": (lambda a: (*a[:9], 1), "there is no int8 mode in CUDA C.."),
    "permutation": (
        lambda a: (*a[:5], torch.zeros(9, dtype=torch.int32), *a[6:]),
        r"permutation has shape \[9\], expected \[2208\]",
    ),
    "group size": (
        lambda a: (a[0], a[1], *(t.repeat_interleave(2, 1) for t in a[2:4]), *a[4:7], 16, *a[8:]),
        "K=2208 and group_size=16 must be multiples of 32 in CUDA C..",
    ),
    "off the grid": (
        lambda a: (a[0], torch.cat((a[1].flatten(), a[1][0, :1]))[1:].view_as(a[1]), *a[2:]),
        "qweight must start at a multiple of 16 bytes in CUDA C..",
    ),
    "codebook": (
        lambda a: (*a[:3], None, torch.zeros(16), *a[5:8], 0, 0),
        "a codebook must be int8 in CUDA C..",
    ),
    "inputs": (lambda a: (a[0][:, 1:], *a[1:]), "x has 2207 inputs, but the weight 2208"),
    "scales": (lambda a: (*a[:2], a[2][1:], *a[3:]), r"scales has shape \[39, 69\], expected \[40, 69\]"),
    "zeros": (lambda a: (*a[:3], None, *a[4:]), "zeros do not fit zero_kind"),
    "zero kind": (lambda a: (*a[:8], 4, 0), "zero_kind=4 must be 0 to 3"),
    "device": (lambda a: (*a[:6], a[6].to("meta"), *a[7:]), "the tensors must be on one CUDA device"),
}
NAME = "int4_linear_kernel<{}, scrimp::cuda::int4_linear::{}, scrimp::cuda::int4_linear::{}>"
BYTE_KERNEL = NAME.format("__nv_bfloat16", "ByteZeros", "Some")
line = functools.partial(at_line, ROOT / "csrc" / "cuda" / "int4_linear.cuh")
RACE, OUT = ("race", "async_race", "uninitialised", "value"), "out_of_bounds"
OPERAND_A = r"(mma\.sync\S+ \{[^}]*\}, \{)(%r\d+),(%r\d+)"
TWO_SHUFFLES = r"(shfl\.sync\.idx\S+\s+\S+ (%r\d+),(?:(?!shfl)[\s\S])*shfl\.sync\.idx\S+\s+\S+ )%r\d+"
OPERAND_B = r"(mma\.sync\S+ \{[^}]*\}, \{[^}]*\}, \{)(%r\d+),(%r\d+)"


def planted(change: Change, *caught_by: str, case: str = "", form: str = "Zeros") -> Mutant:
    return Mutant(NAME.format("__nv_bfloat16", form, "Some"), change, frozenset(caught_by), case=case)


def of_bytes(change: Change, *caught_by: str) -> Mutant:
    return Mutant(BYTE_KERNEL, change, frozenset(caught_by), case=BYTES)


def halves(change: Change, *caught_by: str) -> Mutant:
    return Mutant(NAME.format("__half", "ByteZeros", "Some"), change, frozenset(caught_by), case=APART)


def short(argument: str, size: int) -> Mutant:
    return Mutant(NAME.format("__nv_bfloat16", "Zeros", "Some"), caught_by=frozenset({OUT}), short={argument: size})


MUTANTS = {
    **{f"barrier {k} removed": planted(nth(BARRIER, k, ""), *RACE) for k in range(4)},
    "a block is used before it is there": planted(nth(r"wait_group 4", 0, "wait_group 5"), *RACE),
    "copies are not waited for": planted(nth(r"cp\.async\.wait_group 0;", 0, ""), *RACE),
    **{f"commit {k} removed": planted(nth(COMMIT, k, ""), *RACE) for k in (0, 4, 5)},
    "codes of rows behind the last": planted(line("8 * i < lines", r"setp\.gt\.s32", None, "setp.ge.s32"), OUT),
    "codes of columns behind the last": planted(nth(r"setp\.gt(\.s32\s+%p\d+, %r\d+, 2048;)", 0, r"setp.ge\1"), OUT),
    "pieces of codes stay where they are": planted(
        nth(r"xor\.b32(\s+%r\d+), %r\d+, (%r\d+);", 0, r"mov.b32\1, \2;"), "value"
    ),
    "rows of x behind the last": planted(line("row + 8 * i < tokens", r"setp\.ge", 1, "setp.gt"), OUT),
    "columns of x behind the last": planted(nth(r"(setp\.lt\.s32\s+%p\d+, %r\d+), 545;", 0, r"\1, 544;"), OUT),
    "base of the codes": planted(nth(" 1125073679;", 0, " 1125073678;"), "value"),
    "mask of the codes": planted(nth(", 983055;", 0, ", 983054;"), "value"),
    "codes from elsewhere": planted(nth(r"(shr\.u32\s+%r\d+, %r\d+), 8;", 0, r"\1, 7;"), "value"),
    "inputs beside the wrong codes": planted(nth(r"(mov\.u32\s+%r\d+), 21520;", 0, r"\1, 30258;"), "value"),
    "operand A exchanged": planted(nth(OPERAND_A, 0, r"\1\3,\2"), "value"),
    "operand B exchanged": planted(nth(OPERAND_B, 0, r"\1\3,\2"), "value"),
    "scale of the next group": planted(nth(r"(ld\.shared\.v2\.f32[^;]*%r\d+)\];", 0, r"\1+8];"), "value"),
    "sign of a zero": planted(
        line("to = {s, p.kind", r"sub\.f32(\s+%f\d+), (%f\d+), (%f\d+);", None, r"sub.f32\1, \3, \2;"), "value"
    ),
    "ones are twos": planted(nth(r"-1717986919", 0, "-1431655766"), "value"),
    "ones in another row": planted(nth(r"(setp\.eq\.s32\s+%p\d+, %r\d+), 28;", 0, r"\1, 24;"), "value"),
    "sums from another row": planted(nth(r"(or\.b32\s+%r\d+, %r\d+), 28;", 0, r"\1, 24;"), "value"),
    "sums of other rows of x": planted(nth(r"or\.b32(\s+%r\d+), %r\d+, 28;", 0, r"mov.b32\1, 28;"), "value"),
    "sum of the row of x before": planted(nth(TWO_SHUFFLES, 0, r"\1\2"), "value"),
    "zeros times themselves": planted(
        line("fmaf(sum_x[k], scale.y, sum)", r"fma\.rn\.f32(\s+%f\d+), %f\d+, (%f\d+)", 0, r"fma.rn.f32\1, \2, \2"),
        "value",
    ),
    "a sum without its zero": planted(
        line("fmaf(sum_x[k], scale.y, sum)", r"fma\.rn\.f32(\s+%f\d+), [^;]*, (%f\d+);", 1, r"mov.f32\1, \2;"), "value"
    ),
    "tiles with ones for an output": planted(nth(r"(mul\.lo\.s32\s+%r\d+, %r\d+), 31;", 0, r"\1, 32;"), "value"),
    "tiles of an output less": planted(
        line("const int end_n = min", r"(add\.s32\s+%r\d+, %r\d+), 31;", 0, r"\1, 30;"), "value"
    ),
    "9 less a zero": planted(line("to = {s, p.kind", r"0f41000000(;\s+sub)", None, r"0f41100000\1"), "value"),
    "byte of the next group": of_bytes(
        line("shift_of<T>(static_cast", r"(ld\.global\.u8[^;]*)\];", None, r"\1+1];"), "value", OUT
    ),
    "one less a byte": of_bytes(line("__float_as_uint(143.0f", "0f430F0000", None, "0f430E0000"), "value"),
    "a byte for one code of two": of_bytes(
        line("return bits << 16 | bits", r"or\.b32(\s+%r\d+), (%r\d+), %r\d+;", None, r"mov.b32\1, \2;"), "value"
    ),
    "codes not inverted": of_bytes(nth("0x6a;", 0, "0xea;"), "value"),
    "base of inverted codes": of_bytes(nth(" 1125073679;", 0, " 1125073678;"), "value"),
    "byte of another row": of_bytes(nth(r"(ld\.shared\.u32[^;]*\+)4164\]", 0, r"\g<1>4]"), "value"),
    "byte of the next group in shared memory": of_bytes(
        nth(r"(ld\.shared\.u32[^;]*\+)4\]", 0, r"\g<1>12]"), "value", "uninitialised"
    ),
    "a scale for a byte": of_bytes(nth(r"(ld\.shared\.u32[^;]*\+)4\]", 0, r"\g<1>0]"), "value"),
    "scale of another row": of_bytes(nth(r"(ld\.shared\.f32[^;]*\+)4160\]", -1, r"\g<1>0]"), "value"),
    "bytes short": Mutant(BYTE_KERNEL, caught_by=frozenset({OUT}), short={"zeros": 1}, case=BYTES),
    "base of even codes": halves(line("return bits << 16 | bits", "1677747200", None, "1677812736"), "value"),
    "base of odd codes": halves(nth("1669358464", 0, "1669358465"), "value"),
    "offset of 7": Mutant(
        NAME.format("__half", "Zeros", "Some"),
        line("to = {s, p.kind", r"0f41000000(;\s+fma)", None, r"0f40E00000\1"),
        frozenset({"value"}),
        case=OFFSET,
    ),
    "a warp's sum twice": planted(
        line("float y = (sum[0]", r"add\.f32(\s+%f\d+), (%f\d+), %f\d+;", 0, r"add.f32\1, \2, \2;"), "value"
    ),
    "no bias": planted(line("if (p.bias) y +=", r"add\.f32(\s+%f\d+), (%f\d+), %f\d+;", 0, r"mov.f32\1, \2;"), "value"),
    "results behind the last": planted(line("if (first_n + n >= end_n)", r"setp\.ge", 0, "setp.gt"), "value", OUT),
    "rows behind the last": planted(line("i < tokens * Tile::kLines", r"setp\.lt", -1, "setp.le"), OUT),
    "entry of another code": planted(
        nth(r"(shr\.u32\s+%r\d+, %r\d+), 16;", 0, r"\1, 12;"), "value", case=BOOK, form="Codebook"
    ),
    "codebook short": Mutant(
        NAME.format("__nv_bfloat16", "Codebook", "Some"), caught_by=frozenset({OUT}), short={"codebook": 1}, case=BOOK
    ),
    **{
        f"{name} short": short(name, size)
        for name, size in {"x": 16, "qweight": 16, "scales": 2, "zeros": 2, "bias": 2}.items()
    },
    # The lanes of a warp take every instruction together here.
    "no wait for the other lanes": planted(nth(r"bar\.warp\.sync\s+\S+;", 0, "")),
}
CASES = cases()
# The ring, and scales of so many outputs by so many groups.
SHARED = {"Few": (32 << 10, 16 * 129), "Some": (48 << 10, 32 * 65), "Many": (48 << 10, 64 * 65)}
SUBJECT = CudaSubject(
    op="int4_linear",
    cases=CASES,
    warp_cases=[ALONE, SIXTEEN, LONG, "all tiles, offset float16"],
    check=check,
    reference_launch=ALONE,
    least_bytes=least_bytes,
    mutant_case=LONG,
    mutants=MUTANTS,
    shared={
        NAME.format(dtype, form, tile): ring + (8 if "Zeros" in form else 4) * scales
        for tile, (ring, scales) in SHARED.items()
        for form in ("Plain", "ByteZeros", "Zeros", "Codebook")
        for dtype in ("__half", "__nv_bfloat16")
    },
    tensor_kernels={"int4_linear_kernel": 0},
    idle={"no rows": functools.partial(nothing, 0, 5), "no outputs": functools.partial(nothing, 3, 0)},
    bad=BAD,
)
