"""cvt of the PTX emulator: every rounding, saturation, packed forms, widths of registers."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from snippets import run

RNG = np.random.default_rng(1)
FLOATS = np.concatenate(
    [
        np.array([0.0, -0.0, 0.5, -0.5, 1.5, 2.5, -2.5, 1e9, 3e9, -3e9, 5e9, 1e20, -1e20]),
        np.array([math.inf, -math.inf, math.nan]),
        np.array([127.5, 128.0, 255.4, 256.0, -128.6, 65504.0, 65519.0, 65520.0, 6e-8, 2.9e-8, 3e-8, 1e-40, 3.39e38]),
        RNG.standard_normal(99) * 10.0 ** RNG.integers(-9, 9, 99),
    ]
).astype(np.float32)  # fmt: skip
N = len(FLOATS)
INTEGERS = np.array([0, 1, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 1, 0x8081, 0xFF7F, 255, 128], np.uint32)
MODES = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("to", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
def test_float_to_integer(mode, to):
    bits = int(to[1:])
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if to[0] == "s" else (0, (1 << bits) - 1)
    kind = np.uint64 if bits == 64 else np.uint32
    register = "%d0" if bits >= 32 else "%h0"
    body = f"cvt.{mode}.{to}.f32 {register}, %a0;" + (
        "" if bits >= 32 else f"cvt.u32.{'s' if to[0] == 's' else 'u'}16 %d0, %h0;"
    )
    got = run(body, [FLOATS], [kind], N)
    mask = (1 << 8 * np.dtype(kind).itemsize) - 1
    for value, source in zip(got, FLOATS, strict=True):
        if math.isnan(source):
            expected = 1 << 63 if bits == 64 else 0
        elif math.isinf(source):
            expected = high if source > 0 else low
        else:
            expected = min(max(int(MODES[mode](np.float64(source))), low), high)
        assert int(value) == expected & mask, (source, mode, to)


@pytest.mark.parametrize("mode", MODES)
def test_float_to_integral_float(mode):
    got = run(f"cvt.{mode}.f32.f32 %d0, %a0;", [FLOATS], [np.float32], N)
    np.testing.assert_array_equal(got, MODES[mode](FLOATS))


def rounded(value: Fraction, dtype: torch.dtype, mode: str) -> torch.Tensor:
    """Exact rounding by search around torch's nearest value (finite results only)."""
    near = torch.tensor(float(value), dtype=torch.float64).to(dtype)
    word = near.view(torch.int16) if near.element_size() == 2 else near.view(torch.int32)
    exact = Fraction(float(near))
    if exact == value:
        return near
    outward = abs(exact) > abs(value)  # nearest lies further from zero
    toward = (word - 1 if outward else word).view(dtype)
    away = (word if outward else word + 1).view(dtype)
    if mode == "rz":
        return toward
    return {"rm": away if value < 0 else toward, "rp": toward if value < 0 else away}[mode]


@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_float_to_half(name, dtype):
    nearest, zero, relu = run(
        f"cvt.rn.{name}.f32 %d0, %a0; cvt.rz.{name}.f32 %d1, %a0; cvt.rn.relu.{name}.f32 %d2, %a0;",
        [FLOATS], [np.uint16] * 3, N,
    )  # fmt: skip
    expected = torch.from_numpy(FLOATS).to(dtype)
    got = torch.from_numpy(nearest.view(np.int16)).view(dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    clipped = torch.where(expected < 0, torch.zeros((), dtype=dtype), expected)
    got = torch.from_numpy(relu.view(np.int16)).view(dtype)
    torch.testing.assert_close(got, clipped, rtol=0, atol=0, equal_nan=True)
    for value, source in zip(torch.from_numpy(zero.view(np.int16)).view(dtype), FLOATS, strict=True):
        if math.isfinite(source) and abs(source) > 1e-37 and abs(source) < torch.finfo(dtype).max:
            assert float(value) == float(rounded(Fraction(float(source)), dtype, "rz")), source
        elif math.isfinite(source) and abs(source) >= torch.finfo(dtype).max:
            assert abs(float(value)) == torch.finfo(dtype).max


@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_packed(name, dtype):
    other = np.roll(FLOATS, 3)
    plain, satfinite, toward_zero = run(
        f"cvt.rn.{name}x2.f32 %d0, %a0, %a1; cvt.rn.satfinite.{name}x2.f32 %d1, %a0, %a1;"
        f"cvt.rz.{name}x2.f32 %d2, %a0, %a1;", [FLOATS, other], [np.uint32] * 3, N,
    )  # fmt: skip
    pairs = torch.from_numpy(np.stack([other, FLOATS], 1)).to(dtype)  # the first operand is the upper half
    got = torch.from_numpy(plain.view(np.int16).reshape(-1, 2)).view(dtype)
    torch.testing.assert_close(got, pairs, rtol=0, atol=0, equal_nan=True)
    top = torch.finfo(dtype).max
    got = torch.from_numpy(satfinite.view(np.int16).reshape(-1, 2)).view(dtype)
    torch.testing.assert_close(got, pairs.clamp(-top, top), rtol=0, atol=0, equal_nan=True)
    truncated = run(f"cvt.rz.{name}.f32 %d0, %a0;", [FLOATS], [np.uint16], N)
    np.testing.assert_array_equal(toward_zero >> np.uint32(16), truncated)


def test_tensor_float():
    got = run("cvt.rna.tf32.f32 %d0, %a0;", [FLOATS], [np.uint32], N)
    finite = np.isfinite(FLOATS) & (np.abs(FLOATS) < 3e38)
    bits = FLOATS.view(np.uint32)
    expected = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)  # ties away from zero
    np.testing.assert_array_equal(got[finite], expected[finite])
    assert np.all(np.isnan(got.view(np.float32)) == np.isnan(FLOATS))


def test_half_to_float():
    every = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    for start in range(0, 1 << 16, 8192):
        part = every[start : start + 8192]
        for name, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
            results = [
                run(f"cvt.f32.{name} %d0, %a0;", [part[k : k + 1024]], [np.float32], 1024) for k in range(0, 8192, 1024)
            ]
            expected = torch.from_numpy(part.view(np.int16)).view(dtype).float().numpy()
            np.testing.assert_array_equal(np.concatenate(results), expected)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("of", ["u32", "s32", "u64", "s64"])
def test_integer_to_float(mode, of):
    wide = INTEGERS.astype(np.uint64) << np.uint64(31) | INTEGERS
    kind = {"u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64}[of]
    source = (wide if of.endswith("64") else INTEGERS).view(kind)
    got = run(f"cvt.{mode}.f32.{of} %d0, %a0;", [source], [np.float32], len(source))
    if mode == "rn":
        np.testing.assert_array_equal(got, source.astype(np.float32))
        return
    for value, number in zip(got, source.tolist(), strict=True):
        assert float(value) == float(rounded(Fraction(number), torch.float32, mode))


def test_double():
    source = np.array([1 / 3, -1e300, 2.0**-130, 1e-46, math.nan, 16777217.0])
    narrow, back, whole = run(
        "cvt.rn.f32.f64 %d0, %a0; cvt.f64.f32 %d1, %d0; cvt.rzi.s32.f64 %d2, %a0;",
        [source], [np.float32, np.float64, np.int32], 6,
    )  # fmt: skip
    with np.errstate(over="ignore"):
        expected = source.astype(np.float32)
    np.testing.assert_array_equal(narrow, expected)
    np.testing.assert_array_equal(back, expected.astype(np.float64))
    assert whole.tolist() == [0, -(2**31), 0, 0, -(2**31), 16777217]


def test_integer_widths():
    body = """
    cvt.u16.u32 %d0, %a0; cvt.s32.s8 %d1, %a0; cvt.u32.u8 %d2, %a0; cvt.s64.s32 %d3, %a0; cvt.u64.u32 %d4, %a0;
    cvt.s16.s8 %h1, %d0; cvt.s32.s16 %d5, %h1; cvt.s8.s32 %h2, %a0; cvt.s32.s16 %d6, %h2; cvt.u8.u32 %h3, %a0;
    cvt.u32.u16 %d7, %h3; cvt.u32.u64 %d8, %d3; cvt.sat.s8.s32 %h4, %a0; cvt.s32.s16 %d9, %h4;
    cvt.sat.u8.s32 %h5, %a0; cvt.u32.u16 %d10, %h5; cvt.s64.s8 %d11, %a0; cvt.sat.s32.u32 %d12, %a0;
    """
    kinds = [np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.int32, np.int32, np.uint32, np.uint32]
    kinds += [np.int32, np.uint32, np.int64, np.int32]
    got = run(body, [INTEGERS], kinds, len(INTEGERS))
    low8, signed = INTEGERS.astype(np.uint8), INTEGERS.view(np.int32)
    expected = [
        INTEGERS.astype(np.uint16), low8.view(np.int8), low8, signed, INTEGERS, low8.view(np.int8), low8.view(np.int8),
        low8, INTEGERS, signed.clip(-128, 127), signed.clip(0, 255), low8.view(np.int8), INTEGERS.clip(0, 2**31 - 1),
    ]  # fmt: skip
    for value, want in zip(got, expected, strict=True):
        np.testing.assert_array_equal(value.astype(np.int64), want.astype(np.int64))


def test_half_and_integers():
    source = np.array([0, 1, 2049, 65519, 70000, 255], np.uint32)
    half, back = run("cvt.rn.f16.u32 %d0, %a0; cvt.rzi.u32.f16 %d1, %d0;", [source], [np.uint16, np.uint32], 6)
    with np.errstate(over="ignore"):
        expected = source.astype(np.float64).astype(np.float16)
    np.testing.assert_array_equal(half, expected.view(np.uint16))
    assert back.tolist() == [0, 1, 2048, 65504, 2**32 - 1, 255]
