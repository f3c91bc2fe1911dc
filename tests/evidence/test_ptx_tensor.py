"""Tensor-core fragments of the PTX emulator, laid out by the tables of the PTX specification."""

from collections.abc import Callable

import numpy as np
import ptx
import pytest
import torch
from snippets import run

LANES = 32
Layout = Callable[[int, int], tuple[int, int]]  # lane, element index -> row, column


def a_f16_k16(lane: int, i: int) -> tuple[int, int]:
    g, t = lane >> 2, lane & 3
    return (g if i < 2 or 4 <= i < 6 else g + 8), t * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_f16_k16(lane: int, i: int) -> tuple[int, int]:
    g, t = lane >> 2, lane & 3
    return t * 2 + (i & 1) + (8 if i >= 2 else 0), g


def a_f16_k8(lane: int, i: int) -> tuple[int, int]:
    g, t = lane >> 2, lane & 3
    return (g if i < 2 else g + 8), t * 2 + (i & 1)


def b_f16_k8(lane: int, i: int) -> tuple[int, int]:
    return (lane & 3) * 2 + i, lane >> 2


def a_tf32_k8(lane: int, i: int) -> tuple[int, int]:
    g, t = lane >> 2, lane & 3
    return (g if i in (0, 2) else g + 8), (t if i < 2 else t + 4)


def b_tf32_k8(lane: int, i: int) -> tuple[int, int]:
    return (lane & 3) + 4 * i, lane >> 2


def a_s8_k32(lane: int, i: int) -> tuple[int, int]:
    g, t = lane >> 2, lane & 3
    return (g if i < 4 or 8 <= i < 12 else g + 8), t * 4 + (i & 3) + (16 if i >= 8 else 0)


def b_s8_k32(lane: int, i: int) -> tuple[int, int]:
    return (lane & 3) * 4 + (i & 3) + (16 if i >= 4 else 0), lane >> 2


def a_s8_k16(lane: int, i: int) -> tuple[int, int]:
    g, t = lane >> 2, lane & 3
    return (g if i < 4 else g + 8), t * 4 + (i & 3)


def b_s8_k16(lane: int, i: int) -> tuple[int, int]:
    return (lane & 3) * 4 + i, lane >> 2


def a_s4_k64(lane: int, i: int) -> tuple[int, int]:
    g, t = lane >> 2, lane & 3
    return (g if i < 8 or 16 <= i < 24 else g + 8), t * 8 + (i & 7) + (32 if i >= 16 else 0)


def b_s4_k64(lane: int, i: int) -> tuple[int, int]:
    return (lane & 3) * 8 + (i & 7) + (32 if i >= 8 else 0), lane >> 2


def c_layout(lane: int, i: int) -> tuple[int, int]:
    g, t = lane >> 2, lane & 3
    return (g if i < 2 else g + 8), t * 2 + (i & 1)


def fragment(matrix: np.ndarray, layout: Layout, bits: int = 0) -> list[np.ndarray]:
    """The 32-bit registers of every lane; elements of `bits` bits, lowest first."""
    bits = bits or 8 * matrix.itemsize
    per = 32 // bits
    elements = matrix.size // LANES
    raw = matrix if bits == 4 else matrix.view(f"u{matrix.itemsize}")
    registers = []
    for r in range(elements // per):
        words = np.zeros(LANES, np.uint64)
        for lane in range(LANES):
            for e in range(per):
                value = int(raw[layout(lane, r * per + e)]) & ((1 << bits) - 1)
                words[lane] |= np.uint64(value << (bits * e))
        registers.append(words.astype(np.uint32))
    return registers


def assemble(registers: list[np.ndarray], shape: tuple[int, int], layout: Layout) -> np.ndarray:
    result = np.zeros(shape, registers[0].dtype)
    for i, register in enumerate(registers):
        for lane in range(LANES):
            result[layout(lane, i)] = register[lane]
    return result


def names(letter: str, start: int, count: int) -> str:
    return "{" + ", ".join(f"%{letter}{k}" for k in range(start, start + count)) + "}"


def multiply(op: str, a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray], kind) -> list[np.ndarray]:
    first_c = len(a) + len(b)
    d = names("d", 0, len(c))
    body = f"{op} {d}, {names('a', 0, len(a))}, {names('a', len(a), len(b))}, {names('a', first_c, len(c))};"
    return list(run(body, [*a, *b, *c], [kind] * len(c)))


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize(("k", "a_layout", "b_layout"), [(16, a_f16_k16, b_f16_k16), (8, a_f16_k8, b_f16_k8)])
def test_half(name, dtype, k, a_layout, b_layout):
    a, b, c = torch.randn(16, k).to(dtype), torch.randn(k, 8).to(dtype), torch.randn(16, 8)
    op = f"mma.sync.aligned.m16n8k{k}.row.col.f32.{name}.{name}.f32"
    got = multiply(
        op, fragment(bits_of(a), a_layout), fragment(bits_of(b), b_layout), fragment(c.numpy(), c_layout), np.float32
    )
    expected = (a.double() @ b.double() + c.double()).float().numpy()
    np.testing.assert_allclose(assemble(got, (16, 8), c_layout), expected, rtol=2e-7, atol=1e-7)


def test_half_accumulator():
    a, b, c = (torch.randn(*shape).half() for shape in ((16, 16), (16, 8), (16, 8)))
    op = "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16"
    registers = [fragment(bits_of(m), layout) for m, layout in ((a, a_f16_k16), (b, b_f16_k16), (c, c_layout))]
    got = multiply(op, *registers, np.uint32)
    halves = [half for word in got for half in (word.astype(np.uint16), (word >> np.uint32(16)).astype(np.uint16))]
    expected = (a.double() @ b.double() + c.double()).half()
    result = torch.from_numpy(assemble(halves, (16, 8), c_layout).view(np.int16)).view(torch.float16)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("k", [8, 4])
def test_tensor_float(k):
    """The low 13 bits of the inputs are ignored."""
    a, b, c = (
        np.random.default_rng(0).standard_normal(shape).astype(np.float32) for shape in ((16, k), (k, 8), (16, 8))
    )
    op = f"mma.sync.aligned.m16n8k{k}.row.col.f32.tf32.tf32.f32"
    got = multiply(op, fragment(a, a_tf32_k8), fragment(b, b_tf32_k8), fragment(c, c_layout), np.float32)
    cut = [(m.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64) for m in (a, b)]
    np.testing.assert_allclose(assemble(got, (16, 8), c_layout), cut[0] @ cut[1] + c, rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("types", ["s8.s8", "u8.s8", "s8.u8", "u8.u8"])
@pytest.mark.parametrize(("k", "a_layout", "b_layout"), [(32, a_s8_k32, b_s8_k32), (16, a_s8_k16, b_s8_k16)])
def test_int8(types, k, a_layout, b_layout):
    rng = np.random.default_rng(0)
    kinds = [np.int8 if name == "s8" else np.uint8 for name in types.split(".")]
    a, b = rng.integers(0, 256, (16, k)).astype(kinds[0]), rng.integers(0, 256, (k, 8)).astype(kinds[1])
    c = rng.integers(-1000, 1000, (16, 8)).astype(np.int32)
    op = f"mma.sync.aligned.m16n8k{k}.row.col.satfinite.s32.{types}.s32"
    got = multiply(op, fragment(a, a_layout), fragment(b, b_layout), fragment(c, c_layout), np.int32)
    expected = a.astype(np.int64) @ b.astype(np.int64) + c
    np.testing.assert_array_equal(assemble(got, (16, 8), c_layout), expected)


def test_int8_saturation():
    a, b = np.full((16, 32), 127, np.int8), np.full((32, 8), 127, np.int8)
    c = np.full((16, 8), 2**31 - 5, np.int32)
    inputs = fragment(a, a_s8_k32), fragment(b, b_s8_k32), fragment(c, c_layout)
    held = multiply("mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32", *inputs, np.int32)
    wrapped = multiply("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", *inputs, np.int32)
    assert held[0][0] == 2**31 - 1
    assert wrapped[0][0] == 2**31 - 5 + 32 * 127 * 127 - 2**32


def test_int4():
    rng = np.random.default_rng(0)
    a, b = rng.integers(-8, 8, (16, 64)), rng.integers(0, 16, (64, 8))
    c = np.zeros((16, 8), np.int32)
    op = "mma.sync.aligned.m16n8k64.row.col.s32.s4.u4.s32"
    got = multiply(op, fragment(a, a_s4_k64, 4), fragment(b, b_s4_k64, 4), fragment(c, c_layout), np.int32)
    np.testing.assert_array_equal(assemble(got, (16, 8), c_layout), a @ b)


def test_double():
    a, b, c = (np.random.default_rng(0).standard_normal(shape) for shape in ((8, 4), (4, 8), (8, 8)))
    lanes = np.arange(32)
    g, t = lanes >> 2, lanes & 3
    inputs = [a[g, t], b[t, g], c[g, 2 * t], c[g, 2 * t + 1]]
    body = "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%d0, %d1}, {%a0}, {%a1}, {%a2, %a3};"
    even, odd = run(body, inputs, [np.float64] * 2)
    expected = a @ b + c
    np.testing.assert_allclose(even, expected[g, 2 * t], rtol=1e-13)
    np.testing.assert_allclose(odd, expected[g, 2 * t + 1], rtol=1e-13)


def test_mma_needs_the_whole_warp():
    zeros = [np.zeros(32, np.uint32)] * 4
    body = "setp.lt.u32 %p1, %tid, 31; @%p1 mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32"
    body += "{%d0, %d1, %d2, %d3}, {%a0, %a1}, {%a2}, {%a0, %a1, %a2, %a3};"
    with pytest.raises(ptx.EmulatorError, match="inactive_lane"):
        run(body, zeros, [np.float32] * 4)


SHARED = ".shared .align 128 .b8 tile[1024];"
FILL = "mov.u32 %r1, tile; mad.lo.u32 %r2, %tid, 16, %r1; st.shared.v4.b32 [%r2], {%a0, %a1, %a2, %a3}; bar.sync 0;"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(transposed, count):
    """Matrix m has its rows where lanes 8m to 8m+7 point; here the rows are shuffled."""
    values = np.arange(256, dtype=np.uint16).reshape(32, 8)  # 32 rows of 8 halves
    columns = np.ascontiguousarray(values.view(np.uint32).T)
    order = ((np.arange(32) * 5 + 3) % 32).astype(np.uint32)
    trans = ".trans" if transposed else ""
    body = FILL + "mad.lo.u32 %r3, %a4, 16, %r1;"
    body += f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {names('d', 0, count)}, [%r3];"
    got = run(body, [*columns, order], [np.uint32] * count, declarations=SHARED)
    got = [got] if count == 1 else got
    for m in range(count):
        matrix = values[order[8 * m : 8 * m + 8]]
        matrix = matrix.T if transposed else matrix
        for lane in range(32):
            row, column = lane // 4, lane % 4 * 2
            assert got[m][lane] == int(matrix[row, column + 1]) << 16 | int(matrix[row, column])


@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix_is_the_inverse(transposed):
    words = np.random.default_rng(0).integers(0, 1 << 32, (4, 32), np.uint64).astype(np.uint32)
    trans = ".trans" if transposed else ""
    body = "mov.u32 %r1, tile; mad.lo.u32 %r2, %tid, 16, %r1;"
    body += f"stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r2], {names('a', 0, 4)}; bar.warp.sync -1;"
    body += f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {names('d', 0, 4)}, [%r2];"
    got = run(body, list(words), [np.uint32] * 4, declarations=SHARED)
    np.testing.assert_array_equal(np.stack(got), words)


def test_movmatrix_transposes():
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)
    source, target = (np.ascontiguousarray(m).reshape(-1).view(np.uint32) for m in (matrix, matrix.T))
    got = run("movmatrix.sync.aligned.m8n8.trans.b16 %d0, %a0;", [source])
    np.testing.assert_array_equal(got, target)


def test_ldmatrix_alignment():
    body = FILL + "add.u32 %r2, %r2, 8; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%d0}, [%r2];"
    with pytest.raises(ptx.EmulatorError) as caught:
        run(body, [np.zeros(32, np.uint32)] * 4, declarations=SHARED)
    assert caught.value.kind == "misaligned"
