"""Integer instructions of the PTX emulator against NumPy and hand-computed values."""

import numpy as np
import pytest
from snippets import run

EDGES = np.array([0, 1, 2, 7, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678], np.uint32)
LEFT = np.resize(EDGES, 32)
RIGHT = np.resize(np.roll(EDGES, 4), 32)
WIDE_LEFT = LEFT.astype(np.uint64) * np.uint64(0x1_0001_0003) ^ np.uint64(1 << 63)
WIDE_RIGHT = RIGHT.astype(np.uint64) * np.uint64(0x9_0000_0007)
TYPES = {"u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64}


def pair(name: str) -> tuple[np.ndarray, np.ndarray]:
    kind = np.dtype(TYPES[name])
    if kind.itemsize == 8:
        return WIDE_LEFT.view(kind), WIDE_RIGHT.view(kind)
    return LEFT.astype(f"u{kind.itemsize}").view(kind), RIGHT.astype(f"u{kind.itemsize}").view(kind)


def python(name: str, function) -> np.ndarray:
    """The function on Python's unbounded integers, cut to the type."""
    a, b = pair(name)
    mask = (1 << 8 * a.itemsize) - 1
    values = [function(int(x), int(y)) & mask for x, y in zip(a, b, strict=True)]
    return np.array(values, f"u{a.itemsize}").view(a.dtype)


def truncated(a: int, b: int) -> int:
    return -1 if b == 0 else (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(
    ("op", "function"),
    [
        ("add", lambda a, b: a + b),
        ("sub", lambda a, b: a - b),
        ("mul.lo", lambda a, b: a * b),
        ("min", min),
        ("max", max),
        ("div", truncated),
        ("rem", lambda a, b: a if b == 0 else a - b * truncated(a, b)),
    ],
)
def test_binary(op, function, name):
    a, b = pair(name)
    got = run(f"{op}.{name} %d0, %a0, %a1;", [a, b], [a.dtype])
    np.testing.assert_array_equal(got, python(name, function))


@pytest.mark.parametrize("name", TYPES)
def test_multiply_high(name):
    a, b = pair(name)
    bits = 8 * a.itemsize
    got = run(f"mul.hi.{name} %d0, %a0, %a1;", [a, b], [a.dtype])
    np.testing.assert_array_equal(got, python(name, lambda x, y: x * y >> bits))


@pytest.mark.parametrize("name", ["u16", "s16", "u32", "s32"])
def test_wide(name):
    a, b = pair(name)
    double = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}")
    product, total = run(
        f"mul.wide.{name} %d0, %a0, %a1; mad.wide.{name} %d1, %a0, %a1, %a2;",
        [a, b, np.array([5], double)], [double, double],
    )  # fmt: skip
    expected = a.astype(double) * b.astype(double)
    np.testing.assert_array_equal(product, expected)
    np.testing.assert_array_equal(total, expected + double.type(5))


@pytest.mark.parametrize("name", ["u32", "s32", "u64", "s64"])
def test_multiply_add(name):
    a, b = pair(name)
    bits = 8 * a.itemsize
    low, high = run(f"mad.lo.{name} %d0, %a0, %a1, %a0; mad.hi.{name} %d1, %a0, %a1, %a0;", [a, b], [a.dtype] * 2)
    np.testing.assert_array_equal(low, python(name, lambda x, y: x * y + x))
    np.testing.assert_array_equal(high, python(name, lambda x, y: (x * y >> bits) + x))


@pytest.mark.parametrize("name", ["s16", "s32", "s64"])
def test_sign(name):
    a, _ = pair(name)
    negated, absolute = run(f"neg.{name} %d0, %a0; abs.{name} %d1, %a0;", [a], [a.dtype] * 2)
    np.testing.assert_array_equal(negated, python(name, lambda x, _: -x))
    np.testing.assert_array_equal(absolute, python(name, lambda x, _: abs(x)))


def test_saturating():
    a = np.array([2**31 - 1, -(2**31), 5, -7], np.int32)
    b = np.array([1, -1, 6, 8], np.int32)
    added, subtracted = run("add.sat.s32 %d0, %a0, %a1; sub.sat.s32 %d1, %a0, %a1;", [a, b], [np.int32] * 2, threads=4)
    assert added.tolist() == [2**31 - 1, -(2**31), 11, 1]
    assert subtracted.tolist() == [2**31 - 2, -(2**31) + 1, -1, -15]


def test_carry_chain():
    """A 64-bit product and sum from 32-bit parts, as LLVM writes them."""
    body = """
    mov.b64 {%r0, %r1}, %a0; mov.b64 {%r2, %r3}, %a1;
    add.cc.u32 %r4, %r0, %r2; addc.u32 %r5, %r1, %r3; mov.b64 %d0, {%r4, %r5};
    sub.cc.u32 %r6, %r0, %r2; subc.u32 %r7, %r1, %r3; mov.b64 %d1, {%r6, %r7};
    mul.lo.u32 %r8, %r0, %r2;
    mul.lo.u32 %r10, %r0, %r3; mad.hi.u32 %r9, %r0, %r2, %r10; mad.lo.u32 %r9, %r1, %r2, %r9;
    mad.lo.cc.u32 %r8, %r0, %r2, %r2; madc.hi.u32 %r9, %r0, %r2, %r3; mov.b64 %d2, {%r8, %r9};
    """
    added, subtracted, product = run(body, [WIDE_LEFT, WIDE_RIGHT], [np.uint64] * 3)
    np.testing.assert_array_equal(added, WIDE_LEFT + WIDE_RIGHT)
    np.testing.assert_array_equal(subtracted, WIDE_LEFT - WIDE_RIGHT)
    low = np.uint64(0xFFFFFFFF)
    np.testing.assert_array_equal(product, (WIDE_LEFT & low) * (WIDE_RIGHT & low) + WIDE_RIGHT)


def test_small_products():
    a = np.array([0x01020304, 0xFF80017F], np.uint32)
    b = np.array([0x05060708, 0x02FF0380], np.uint32)
    body = "dp4a.u32.u32 %d0, %a0, %a1, 10; dp4a.s32.s32 %d1, %a0, %a1, 10; dp4a.s32.u32 %d2, %a0, %a1, 10;"
    unsigned, signed, mixed = run(body, [a, b], [np.int32] * 3, threads=2)
    assert unsigned.tolist() == [80, 10 + 255 * 2 + 128 * 255 + 3 + 127 * 128]
    assert signed.tolist() == [80, 10 - 2 + 128 + 3 - 127 * 128]
    assert mixed.tolist() == [80, 10 - 2 - 128 * 255 + 3 + 127 * 128]
    x, y = np.array([0xFF000003, 0x00800001], np.uint32), np.array([5, 0xFF], np.uint32)
    twenty_four = run("mul24.lo.s32 %d0, %a0, %a1;", [x, y], [np.int32], threads=2)
    assert twenty_four.tolist() == [15, (0x800001 - (1 << 24)) * 255]
    assert run("sad.s32 %d0, %a0, %a1, 100;", [x, y], [np.int32], threads=2)[1] == 100 + 0x800001 - 0xFF
