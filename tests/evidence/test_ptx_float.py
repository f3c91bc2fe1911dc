"""Float and half arithmetic of the PTX emulator: rounding modes, NaN, flushing, comparisons."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from snippets import run

NAN, INF = np.float32("nan"), np.float32("inf")
EDGES = np.array(
    [0.0, -0.0, 1.0, -1.5, 3.0000002, 1e-40, -1e-40, 3.4e38, -3.4e38, INF, -INF, NAN, 0.1, 1 / 3, 1e-20, 16777217.0],
    np.float32,
)
RNG = np.random.default_rng(0)
A = np.concatenate([np.repeat(EDGES, 16), RNG.standard_normal(256).astype(np.float32)])
B = np.concatenate([np.tile(EDGES, 16), RNG.standard_normal(256).astype(np.float32)])
C = np.roll(A, 77)
THREADS = 512


def same(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal bits, except that every NaN equals every other."""
    kind = f"u{got.dtype.itemsize}"
    nan = np.isnan(got) & np.isnan(expected)
    np.testing.assert_array_equal(np.where(nan, 0, got.view(kind)), np.where(nan, 0, expected.view(kind)))


@pytest.mark.parametrize("name", ["f32", "f64"])
def test_nearest(name):
    kind = np.float32 if name == "f32" else np.float64
    a, b = A.astype(kind), B.astype(kind)
    body = (
        "add.rn.%s %%d0, %%a0, %%a1; sub.%s %%d1, %%a0, %%a1; mul.rn.%s %%d2, %%a0, %%a1; div.rn.%s %%d3, %%a0, %%a1;"
    )
    got = run(body % ((name,) * 4), [a, b], [kind] * 4, THREADS)
    with np.errstate(all="ignore"):
        for value, expected in zip(got, [a + b, a - b, a * b, a / b], strict=True):
            same(value, expected)


def directed(value: Fraction, mode: str) -> np.float32:
    """A rational number rounded to float32 by search around the nearest float."""
    near = np.float32(float(value))
    below = near if Fraction(float(near)) <= value else np.nextafter(near, -INF)
    above = near if Fraction(float(near)) >= value else np.nextafter(near, INF)
    return {"rm": below, "rp": above, "rz": below if value > 0 else above}[mode]


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding(mode):
    a, b, c = A[256:], B[256:], C[256:]
    body = f"""
    add.{mode}.f32 %d0, %a0, %a1; sub.{mode}.f32 %d1, %a0, %a1; mul.{mode}.f32 %d2, %a0, %a1;
    div.{mode}.f32 %d3, %a0, %a1; fma.{mode}.f32 %d4, %a0, %a1, %a2;
    """
    got = run(body, [a, b, c], [np.float32] * 5, 256)
    for k in range(0, 256, 7):
        if not all(math.isfinite(v[k]) for v in (a, b, c)):
            continue
        x, y, z = (Fraction(float(v[k])) for v in (a, b, c))
        expected = [directed(v, mode) for v in (x + y, x - y, x * y, x / y, x * y + z)]
        assert [float(v[k]) for v in got] == [float(v) for v in expected]


def test_fused_multiply_add_rounds_once():
    a = np.array([1 + 2**-12, 1 + 2**-23], np.float32)
    got = run("fma.rn.f32 %d0, %a0, %a0, %a1;", [a, -(a * a)], [np.float32], 2)
    exact = [Fraction(float(v)) ** 2 - Fraction(float(v * v)) for v in a]
    assert [Fraction(float(v)) for v in got] == exact
    assert run("fma.rn.f64 %d0, %a0, %a0, %a0;", [np.array([3.0])], [np.float64], 1) == 12


def test_flush_and_saturate():
    a = np.array([1e-40, -1e-40, 2.0, -2.0, 0.5, NAN], np.float32)
    body = "add.ftz.f32 %d0, %a0, %a1; mul.sat.f32 %d1, %a0, 0f3F800000; add.f32 %d2, %a0, %a1; neg.ftz.f32 %d3, %a0;"
    flushed, clamped, kept, negated = run(body, [a, np.float32([-0.0])], [np.float32] * 4, 6)
    same(flushed, np.array([0, -0.0, 2, -2, 0.5, NAN], np.float32))
    same(clamped, np.array([1e-40, 0, 1, 0, 0.5, 0], np.float32))
    same(kept, a)
    same(negated, np.array([-0.0, 0, -2, 2, -0.5, NAN], np.float32))


def test_minimum_and_maximum():
    body = "min.f32 %d0, %a0, %a1; max.f32 %d1, %a0, %a1; min.NaN.f32 %d2, %a0, %a1; max.NaN.f32 %d3, %a0, %a1;"
    low, high, strict_low, strict_high = run(body, [A, B], [np.float32] * 4, THREADS)
    both = np.isnan(A) | np.isnan(B)
    for got, function, zero in ((low, np.fmin, -0.0), (high, np.fmax, 0.0)):
        expected = function(A, B)
        zeros = (A == 0) & (B == 0)
        mixed = zeros & (np.signbit(A) != np.signbit(B))
        same(got, np.where(mixed, np.float32(zero), expected).astype(np.float32))
    same(strict_low, np.where(both, NAN, low))
    same(strict_high, np.where(both, NAN, high))


def test_sign_functions():
    body = "neg.f32 %d0, %a0; abs.f32 %d1, %a0; copysign.f32 %d2, %a0, %a1;"
    negated, absolute, copied = run(body, [A, B], [np.float32] * 3, THREADS)
    same(negated, -A)
    same(absolute, np.abs(A))
    same(copied, np.copysign(B, A))  # PTX copies the sign of the first operand


@pytest.mark.parametrize(
    ("op", "function"),
    [
        ("ex2.approx.ftz.f32", np.exp2), ("lg2.approx.f32", np.log2), ("sin.approx.f32", np.sin),
        ("cos.approx.f32", np.cos), ("tanh.approx.f32", np.tanh), ("sqrt.rn.f32", np.sqrt),
        ("sqrt.approx.ftz.f32", np.sqrt), ("rsqrt.approx.f32", lambda v: 1 / np.sqrt(v)),
        ("rcp.rn.f32", lambda v: 1 / v), ("rcp.approx.ftz.f32", lambda v: 1 / v),
    ],
)  # fmt: skip
def test_functions(op, function):
    a = np.abs(A[256:]) + np.float32(0.01)
    got = run(f"{op} %d0, %a0;", [a], [np.float32], 256)
    same(got, function(a.astype(np.float64)).astype(np.float32))


def test_double_functions():
    a = np.array([2.0, 0.3])
    root, inverse = run("sqrt.rn.f64 %d0, %a0; rcp.rn.f64 %d1, %a0;", [a], [np.float64] * 2, 2)
    assert root.tolist() == np.sqrt(a).tolist()
    assert inverse.tolist() == (1 / a).tolist()


ORDERED = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}


@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16"])
def test_comparisons(kind):
    nan = np.isnan(A) | np.isnan(B)
    expected = {name: f(A, B) for name, f in ORDERED.items()}
    expected["ne"] = (A != B) & ~nan
    expected |= {f"{name}u": value | nan for name, value in list(expected.items())}
    expected |= {"num": ~nan, "nan": nan}
    if kind in ("f16", "bf16"):
        dtype = torch.float16 if kind == "f16" else torch.bfloat16
        rounded = [torch.from_numpy(v.clip(-6e4, 6e4)).to(dtype) for v in (A, B)]
        inputs = [v.view(torch.int16).numpy().view(np.uint16) for v in rounded]
        x, y = (v.float().numpy() for v in rounded)
        expected = {name: f(x, y) for name, f in ORDERED.items()} | {"ne": (x != y) & ~nan, "nan": nan}
    else:
        inputs = [v.astype(np.float32 if kind == "f32" else np.float64) for v in (A, B)]
    for name, want in expected.items():
        got = run(f"setp.{name}.{kind} %p1, %a0, %a1; selp.u32 %d0, 1, 0, %p1;", inputs, [np.uint32], THREADS)
        np.testing.assert_array_equal(got.astype(bool), want, name)


def test_set_and_testp():
    body = """
    set.gt.f32.f32 %d0, %a0, %a1; set.leu.u32.f32 %d1, %a0, %a1;
    testp.notanumber.f32 %p1, %a0; testp.subnormal.f32 %p2, %a0; selp.u32 %d2, 1, 0, %p1; selp.u32 %d3, 1, 0, %p2;
    """
    one, word, nan, small = run(body, [A, B], [np.float32, np.uint32, np.uint32, np.uint32], THREADS)
    np.testing.assert_array_equal(one, (A > B).astype(np.float32))
    np.testing.assert_array_equal(word, np.where(A > B, 0, 0xFFFFFFFF))
    np.testing.assert_array_equal(nan.astype(bool), np.isnan(A))
    np.testing.assert_array_equal(small.astype(bool), (A != 0) & (np.abs(A) < 2.0**-126))


def halves(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(3, 512, generator=generator) * torch.tensor([1.0, 1e-3, 300.0]).repeat(171)[:512]
    edges = torch.tensor([0.0, -0.0, 1.0, 65504.0, 6e-8, -6e-5, float("inf"), float("nan")])
    base[:, :64] = torch.stack([edges.repeat(8), edges.repeat_interleave(8), edges.roll(3).repeat(8)])
    return tuple(base.to(dtype))


def words(*values: torch.Tensor) -> list[np.ndarray]:
    return [value.view(torch.int16).numpy().view(np.uint16) for value in values]


def same_half(got: np.ndarray, expected: torch.Tensor) -> None:
    back = torch.from_numpy(got.view(np.int16)).view(expected.dtype)
    same(back.float().numpy(), expected.float().numpy())


@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_half(name, dtype):
    a, b, c = halves(dtype)
    body = "".join(f"{op}.{name} %d{k}, %a0, %a1;" for k, op in enumerate(["add", "sub", "mul", "min", "max"]))
    body += f"fma.rn.{name} %d5, %a0, %a1, %a2; neg.{name} %d6, %a0; abs.{name} %d7, %a0;"
    got = run(body, words(a, b, c), [np.uint16] * 8, 512)
    x, y, z = a.double(), b.double(), c.double()
    results = [x + y, x - y, x * y, torch.fmin(x, y), torch.fmax(x, y), x * y + z, -x, x.abs()]
    for k, (value, expected) in enumerate(zip(got, results, strict=True)):
        skip = (x == 0) & (y == 0) if k in (3, 4) else torch.zeros(512, dtype=torch.bool)
        keep = (~skip).numpy()
        same_half(value[keep], expected[~skip].to(dtype))


@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_packed_half(name, dtype):
    a, b, c = (torch.stack([v, v.roll(5)], 1).contiguous() for v in halves(dtype))
    packed = [v.reshape(-1).view(np.uint32) for v in words(a, b, c)]
    body = f"fma.rn.{name}x2 %d0, %a0, %a1, %a2; mul.{name}x2 %d1, %a0, %a1; fma.rn.relu.{name}x2 %d2, %a0, %a1, %a2;"
    fused, product, relu = run(body, packed, [np.uint32] * 3, 512)
    x, y, z = a.double(), b.double(), c.double()
    exact = (x * y + z).reshape(-1)
    same_half(fused.view(np.uint16), exact.to(dtype))
    same_half(product.view(np.uint16), (x * y).to(dtype).reshape(-1))
    same_half(relu.view(np.uint16), torch.where(exact < 0, 0.0, exact).to(dtype))


def test_half_rounds_once():
    """Sums on a tie, and above it by less than f64 can hold beside the bf16 number."""
    one, step = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([2.0**-8], dtype=torch.bfloat16)
    tie = run("fma.rn.bf16 %d0, %a0, %a1, %a2;", words(step, one, one), [np.uint16], 1)
    assert tie[0] == 0x3F80
    # 1 + 2^-8 is the tie; the factors give 2^-8 + 2^-15, then 2^-8 + 2^-70 as the sum of two terms.
    above = run("fma.rn.bf16 %d0, %a0, %a1, %a2;", words(step, one + 2.0**-7, one), [np.uint16], 1)
    assert above[0] == 0x3F81
    small = torch.tensor([2.0**-100], dtype=torch.bfloat16)
    odd = torch.tensor([1 + 2.0**-7], dtype=torch.bfloat16)
    exact = run("fma.rn.bf16 %d0, %a0, %a0, %a1;", words(odd * 16, small), [np.uint16], 1)  # (16.125)^2 = 260.015625
    assert exact[0] == 0x4382


def test_half_comparison_pairs():
    a = np.array([0x3C00_BC00, 0x7E00_0000], np.uint32)  # (1, -1), (NaN, 0) high, low
    b = np.array([0x0000_0000, 0x3C00_8000], np.uint32)
    body = "set.gt.f16x2.f16x2 %d0, %a0, %a1; setp.leu.f16x2 %p1|%p2, %a0, %a1; selp.u32 %d1, 1, 0, %p1; selp.u32 %d2, 1, 0, %p2;"  # noqa: E501
    ones, low, high = run(body, [a, b], [np.uint32] * 3, 2)
    assert ones.tolist() == [0x3C00_0000, 0]
    assert low.tolist() == [1, 1]
    assert high.tolist() == [0, 1]
