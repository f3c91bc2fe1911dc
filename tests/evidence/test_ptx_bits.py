"""Logic, shifts, fields, permutes, moves and predicates of the PTX emulator."""

import numpy as np
import pytest
from snippets import run

A = np.resize(np.array([0, 1, 0x80000000, 0xFFFFFFFF, 0x12345678, 0xCAFEBABE, 0x0F0F0F0F], np.uint32), 32)
B = np.resize(np.array([0xFFFFFFFF, 0x13579BDF, 0, 0xDEADBEEF, 0x80000001], np.uint32), 32)
C = np.resize(np.array([3, 0xAAAAAAAA, 0x0000FFFF], np.uint32), 32)
WIDE = A.astype(np.uint64) << np.uint64(32) | B


def test_logic():
    body = "and.b32 %d0, %a0, %a1; or.b32 %d1, %a0, %a1; xor.b32 %d2, %a0, %a1; not.b32 %d3, %a0; cnot.b32 %d4, %a0;"
    got = run(body, [A, B], [np.uint32] * 5)
    for value, expected in zip(got, [A & B, A | B, A ^ B, ~A, (A == 0).astype(np.uint32)], strict=True):
        np.testing.assert_array_equal(value, expected)
    body = "and.b64 %d0, %a0, 0xFF; not.b64 %d1, %a0; xor.b64 %d2, %a0, -1;"
    low, inverse, flipped = run(body, [WIDE], [np.uint64] * 3)
    np.testing.assert_array_equal(low, WIDE & np.uint64(255))
    np.testing.assert_array_equal(inverse, ~WIDE)
    np.testing.assert_array_equal(flipped, ~WIDE)
    halves = np.arange(32, dtype=np.uint16) * 2047
    np.testing.assert_array_equal(run("not.b16 %d0, %a0;", [halves], [np.uint16]), ~halves)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts(bits):
    kind = np.dtype(f"u{bits // 8}")
    value = WIDE.astype(kind)
    amount = np.resize(np.array([0, 1, bits - 1, bits, bits + 1, 255], np.uint32), 32)
    body = f"shl.b{bits} %d0, %a0, %a1; shr.u{bits} %d1, %a0, %a1; shr.s{bits} %d2, %a0, %a1;"
    left, right, arithmetic = run(body, [value, amount], [kind] * 3)
    mask = (1 << bits) - 1
    for k in range(32):
        v, n = int(value[k]), int(amount[k])
        signed = v - (1 << bits) if v >> (bits - 1) else v
        assert int(left[k]) == (v << n & mask if n < bits else 0)
        assert int(right[k]) == v >> n
        assert int(arithmetic[k]) == signed >> n & mask


def test_funnel_shift():
    amount = np.arange(0, 64, 2, dtype=np.uint32)
    body = """
    shf.l.wrap.b32 %d0, %a0, %a1, %a2; shf.l.clamp.b32 %d1, %a0, %a1, %a2;
    shf.r.wrap.b32 %d2, %a0, %a1, %a2; shf.r.clamp.b32 %d3, %a0, %a1, %a2;
    """
    got = run(body, [A, B, amount], [np.uint32] * 4)
    for k in range(32):
        joined, wrap, clamp = int(B[k]) << 32 | int(A[k]), int(amount[k]) & 31, min(int(amount[k]), 32)
        expected = [joined << wrap >> 32, joined << clamp >> 32, joined >> wrap, joined >> clamp]
        assert [int(value[k]) for value in got] == [value & 0xFFFFFFFF for value in expected]


def field(value: int, position: int, length: int, bits: int, signed: bool) -> int:
    """The specification's own loop for bfe."""
    sign = value >> min(position + length - 1, bits - 1) & 1 if signed and length else 0
    inside = [i < length and position + i < bits for i in range(bits)]
    return sum((value >> (position + i) & 1 if inside[i] else sign) << i for i in range(bits))


@pytest.mark.parametrize("name", ["u32", "s32", "u64", "s64"])
def test_extract_field(name):
    bits = int(name[1:])
    value = WIDE.astype(f"u{bits // 8}")
    position = np.resize(np.array([0, 4, bits - 1, bits, 255, 3], np.uint32), 32)
    length = np.resize(np.array([0, 1, 8, bits, 255], np.uint32), 32)
    got = run(f"bfe.{name} %d0, %a0, %a1, %a2;", [value, position, length], [value.dtype])
    expected = [field(*map(int, v), bits, name[0] == "s") for v in zip(value, position, length, strict=True)]
    assert got.tolist() == expected


@pytest.mark.parametrize("bits", [32, 64])
def test_insert_field(bits):
    kind = f"u{bits // 8}"
    source, target = WIDE.astype(kind), (~np.roll(WIDE, 3)).astype(kind)
    position = np.resize(np.array([0, 4, bits - 1, bits, 255], np.uint32), 32)
    length = np.resize(np.array([0, 1, 8, bits, 255, 12], np.uint32), 32)
    got = run(f"bfi.b{bits} %d0, %a0, %a1, %a2, %a3;", [source, target, position, length], [kind])
    for k in range(32):
        expected = int(target[k])
        for i in range(int(length[k])):
            at = int(position[k]) + i
            if at < bits and i < bits:
                expected = expected & ~(1 << at) | (int(source[k]) >> i & 1) << at
        assert int(got[k]) == expected


def test_permute():
    a, b = np.array([0x33221100], np.uint32), np.array([0x77665584], np.uint32)
    selectors = np.array([0x3210, 0x7654, 0x0123, 0x4444, 0xC8F9], np.uint32)
    got = run("prmt.b32 %d0, %a0, %a1, %a2;", [a, b, selectors], threads=5)
    assert [hex(v) for v in got] == ["0x33221100", "0x77665584", "0x112233", "0x84848484", "0xff000000"]
    modes = {
        "f4e": [0x33221100, 0x84332211, 0x55843322, 0x66558433],
        "b4e": [0x55667700, 0x66770011, 0x77001122, 0x00112233],
        "rc8": [0, 0x11111111, 0x22222222, 0x33333333],
        "ecl": [0x33221100, 0x33221111, 0x33222222, 0x33333333],
        "ecr": [0x00000000, 0x11111100, 0x22221100, 0x33221100],
        "rc16": [0x11001100, 0x33223322, 0x11001100, 0x33223322],
    }
    for mode, expected in modes.items():
        got = run(f"prmt.b32.{mode} %d0, %a0, %a1, %a2;", [a, b, np.arange(4, dtype=np.uint32)], threads=4)
        assert got.tolist() == expected, mode


@pytest.mark.parametrize("table", [0x00, 0x80, 0xE8, 0x96, 0xCA, 0xFF, 0x6A])
def test_lop3(table):
    got = run(f"lop3.b32 %d0, %a0, %a1, %a2, {table};", [A, B, C])
    expected = np.zeros(32, np.uint32)
    for bit in range(32):
        index = (A >> bit & 1) << 2 | (B >> bit & 1) << 1 | (C >> bit & 1)
        expected |= (table >> index & 1).astype(np.uint32) << np.uint32(bit)
    np.testing.assert_array_equal(got, expected)


def test_counts():
    body = """
    popc.b32 %d0, %a0; clz.b32 %d1, %a0; brev.b32 %d2, %a0; bfind.u32 %d3, %a0; bfind.s32 %d4, %a0;
    bfind.shiftamt.u32 %d5, %a0; popc.b64 %d6, %a1; clz.b64 %d7, %a1; bfind.u64 %d8, %a1; brev.b64 %d9, %a1;
    """
    got = run(body, [A, WIDE], [np.uint32] * 9 + [np.uint64])
    for k in range(32):
        v, w = int(A[k]), int(WIDE[k])
        signed = v if v < 1 << 31 else ~v & 0xFFFFFFFF
        expected = [
            bin(v).count("1"), 32 - v.bit_length(), int(f"{v:032b}"[::-1], 2), v.bit_length() - 1,
            signed.bit_length() - 1, 32 - v.bit_length() if v else -1, bin(w).count("1"), 64 - w.bit_length(),
            w.bit_length() - 1, int(f"{w:064b}"[::-1], 2),
        ]  # fmt: skip
        masks = [0xFFFFFFFF] * 9 + [2**64 - 1]
        assert [int(value[k]) for value in got] == [e & m for e, m in zip(expected, masks, strict=True)]


def test_select():
    body = """
    setp.ne.u32 %p1, %a0, 0; selp.b32 %d0, %a1, %a2, %p1; selp.b64 %d1, %a3, 7, !%p1;
    slct.u32.s32 %d2, %a1, %a2, %a0; neg.f32 %r1, 0f00000000; slct.f32.f32 %d3, %a1, %a2, %r1;
    """
    body = body.replace("selp.b64 %d1, %a3, 7, !%p1;", "not.pred %p2, %p1; selp.b64 %d1, %a3, 7, %p2;")
    got = run(body, [A, B, C, WIDE], [np.uint32, np.uint64, np.uint32, np.uint32])
    np.testing.assert_array_equal(got[0], np.where(A != 0, B, C))
    np.testing.assert_array_equal(got[1], np.where(A == 0, WIDE, np.uint64(7)))
    np.testing.assert_array_equal(got[2], np.where(A.view(np.int32) >= 0, B, C))
    np.testing.assert_array_equal(got[3], B)  # -0.0 >= 0


def test_pack_and_unpack():
    body = """
    mov.b32 {%h0, %h1}, %a0; mov.b32 %d0, {%h1, %h0};
    mov.b64 {%r0, %r1}, %a1; mov.b64 %d1, {%r1, %r0};
    mov.b64 {%h2, %h3, %h4, %h5}, %a1; mov.b64 %d2, {%h5, %h4, %h3, %h2};
    mov.b64 {%r2, _}, %a1; mov.u32 %d3, %r2;
    """
    got = run(body, [A, WIDE], [np.uint32, np.uint64, np.uint64, np.uint32])
    np.testing.assert_array_equal(got[0], A << np.uint32(16) | A >> np.uint32(16))
    np.testing.assert_array_equal(
        got[1], np.roll(WIDE.view(np.uint32).reshape(-1, 2), 1, 1).reshape(-1).view(np.uint64)
    )
    reverse = np.ascontiguousarray(WIDE.view(np.uint16).reshape(-1, 4)[:, ::-1]).reshape(-1).view(np.uint64)
    np.testing.assert_array_equal(got[2], reverse)
    np.testing.assert_array_equal(got[3], B)


def test_predicates():
    body = """
    setp.lt.s32 %p1, %a0, 0; setp.gt.u32 %p2|%p3, %a1, 5;
    and.pred %p4, %p1, %p2; or.pred %p5, %p1, !%p2; xor.pred %p6, %p1, %p3; not.pred %p7, %p6; mov.pred %p8, %p7;
    selp.u32 %d0, 1, 0, %p4; selp.u32 %d1, 1, 0, %p5; selp.u32 %d2, 1, 0, %p6; selp.u32 %d3, 1, 0, %p8;
    setp.eq.and.u32 %p9|%p10, %a0, %a0, !%p1; selp.u32 %d4, 1, 0, %p9; selp.u32 %d5, 1, 0, %p10;
    setp.ne.xor.u32 %p11, %a0, 0, %p1; selp.u32 %d6, 1, 0, %p11;
    mov.u32 %d7, 0; @%p1 mov.u32 %d7, 1; @!%p1 mov.u32 %d7, 2;
    """
    got = [value.astype(int) for value in run(body, [A, B], [np.uint32] * 8)]
    p1, p2 = A.view(np.int32) < 0, B > 5
    p6 = p1 ^ ~p2
    expected = [p1 & p2, p1 | ~p2, p6, ~p6, ~p1, np.zeros(32), (A != 0) ^ p1, np.where(p1, 1, 2)]
    for value, want in zip(got, expected, strict=True):
        np.testing.assert_array_equal(value, np.asarray(want).astype(int))


def test_special_registers():
    got = run(
        "mov.u32 %d0, %laneid; mov.u32 %d1, %ntid.x; mov.u32 %d2, %lanemask_lt; mov.u32 %d3, %warpid;",
        outputs=[np.uint32] * 4, threads=64,
    )  # fmt: skip
    lanes = np.arange(64) % 32
    np.testing.assert_array_equal(got[0], lanes)
    np.testing.assert_array_equal(got[1], 64)
    np.testing.assert_array_equal(got[2], (1 << lanes) - 1)
    np.testing.assert_array_equal(got[3], np.arange(64) // 32)
