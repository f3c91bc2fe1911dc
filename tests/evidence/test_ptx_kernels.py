"""PTX that Triton and nvcc emitted for sm_80, executed on the emulator against float64."""

import time
from pathlib import Path
from typing import Any

import kernels_for_tests as kernels
import numpy as np
import ptx
import pytest
import torch

ORDERS = ["lockstep", "warp"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
UNIT = {"bf16": 2.0**-9, "fp16": 2.0**-12, "fp32": 2.0**-25}  # half a unit in the last place of 1


def aligned(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, 16)


def attention_request(name: str) -> ptx.TritonRequest:
    signature = dict.fromkeys("qkvo", f"*{name}") | {"S": "i32", "scale": "fp32"}
    return ptx.triton_request(kernels.attention, signature, {"BM": 64, "BN": 32, "D": 64}, aligned(*"qkvo"))


def matmul_request(name: str, out: str, precision: str = "ieee") -> ptx.TritonRequest:
    signature = {"a": f"*{name}", "b": f"*{name}", "c": f"*{out}", "M": "i32", "N": "i32", "K": "i32"}
    constants = {"BM": 64, "BN": 64, "BK": 32, "PRECISION": precision}
    return ptx.triton_request(kernels.matmul, signature, constants, aligned(*"abcNK"), num_stages=3)


def softmax_request(name: str) -> ptx.TritonRequest:
    signature = {"x": f"*{name}", "y": f"*{name}", "stride": "i32", "n": "i32"}
    return ptx.triton_request(kernels.softmax, signature, {"BLOCK": 1024}, aligned("x", "y"))


REQUESTS = {
    **{f"attention-{name}": attention_request(name) for name in ("bf16", "fp16")},
    **{f"softmax-{name}": softmax_request(name) for name in ("bf16", "fp16")},
    **{f"matmul-{name}": matmul_request(name, name) for name in ("bf16", "fp16", "fp32")},
    "matmul-tf32": matmul_request("fp32", "fp32", "tf32"),
    "matmul_s8": ptx.triton_request(
        kernels.matmul_s8, {"a": "*i8", "b": "*i8", "c": "*i32", "N": "i32", "K": "i32"},
        {"BM": 64, "BN": 64, "BK": 64}, aligned(*"abcNK"), num_stages=3,
    ),
    "gather": ptx.triton_request(
        kernels.gather_attention,
        dict.fromkeys("qkvo", "*bf16") | {"columns": "*i32", "count": "i32", "S": "i32", "scale": "fp32"},
        {"BM": 64, "BN": 32, "D": 64}, aligned(*"qkvo", "columns"),
    ),
    "int4": ptx.triton_request(
        kernels.int4_linear, {"x": "*fp16", "w": "*u8", "scales": "*fp16", "y": "*fp16", "K": "i32", "N": "i32"},
        {"BM": 16, "BN": 64, "BK": 64}, aligned("x", "w", "scales", "y", "K", "N"),
    ),
    "gemv": ptx.triton_request(
        kernels.int8_gemv, {"x": "*bf16", "w": "*i8", "scales": "*fp32", "y": "*fp32", "K": "i32"},
        {"BN": 16, "BK": 256}, aligned("x", "w", "scales", "y", "K"),
    ),
    "scan_sort": ptx.triton_request(
        kernels.scan_sort, {"x": "*fp32", "total": "*fp32", "ordered": "*fp32", "best": "*i32", "n": "i32"},
        {"BLOCK": 256}, aligned("x", "total", "ordered"),
    ),
    "histogram": ptx.triton_request(
        kernels.histogram, {"x": "*i32", "counts": "*i32", "n": "i32"}, {"BLOCK": 256}, aligned("x", "counts")
    ),
    "elementwise": ptx.triton_request(
        kernels.elementwise, {"x": "*fp32", "y": "*i32", "out": "*fp32", "n": "i32"}, {"BLOCK": 256},
        aligned("x", "out"),
    ),
    "top_and_gather": ptx.triton_request(
        kernels.top_and_gather,
        {"x": "*fp32", "index": "*i32", "best": "*fp32", "counts": "*i32", "gathered": "*fp32", "n": "i32"},
        {"BLOCK": 256, "TOP": 16}, aligned("x", "index", "gathered"),
    ),
    **{
        f"half_chain-{name}": ptx.triton_request(
            kernels.half_chain, dict.fromkeys(("x", "y", "out"), f"*{name}") | {"n": "i32"}, {"BLOCK": 512},
            aligned("x", "y", "out"),
        )
        for name in ("bf16", "fp16")
    },
    "unpack_by_assembly": ptx.triton_request(
        kernels.unpack_by_assembly, {"x": "*i32", "out": "*i32"}, {"BLOCK": 256}, aligned("x", "out")
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def compiled() -> dict[str, ptx.Compiled]:
    return dict(zip(REQUESTS, ptx.compile_triton_all(REQUESTS.values()), strict=True))


@pytest.fixture(scope="session")
def cuda() -> ptx.Module:
    return ptx.load(cuda_text())


def cuda_text() -> str:
    """The PTX of the CUDA test kernels."""
    return ptx.compile_cuda(Path(__file__).with_name("kernels_for_tests.cu"), [Path(__file__).parents[2] / "csrc"])


def run(kernel: ptx.Compiled, grid: Any, args: dict[str, Any], order: str, **options: Any) -> ptx.Counters:
    module = ptx.load(kernel.ptx)
    return module.launch(kernel.name, grid, 32 * kernel.num_warps, args, kernel.shared, order, **options)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q.double() @ k.double().mT * 0.125
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v.double()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize(("heads", "n"), [(2, 100), (1, 1), (1, 63), (1, 65)])
def test_attention(compiled, name, heads, n, order):
    """Probabilities are rounded to the type before the second product, the output once more."""
    q, k, v = torch.randn(3, heads, n, 64).to(DTYPES[name])
    out = poisoned(heads, n, 64, dtype=DTYPES[name])
    args = {"q": q, "k": k, "v": v, "o": out, "S": n, "scale": 0.125}
    run(compiled[f"attention-{name}"], (-(-n // 64), heads), args, order)
    expected = attention_reference(q, k, v)
    bound = UNIT[name] * (v.double().abs().max() + expected.abs().max()) + 1e-5
    assert (out.double() - expected).abs().max() < bound


def test_speed(compiled, record_property):
    """The bar of the core: 50 million thread instructions a second of processor time, checks on."""
    q, k, v = torch.randn(3, 1, 256, 64).bfloat16()
    args = {"q": q, "k": k, "v": v, "o": torch.empty_like(q), "S": 256, "scale": 0.125}
    kernel = compiled["attention-bf16"]
    module = ptx.load(kernel.ptx)
    best = 0.0
    for _ in range(10):
        start = time.process_time()
        counters = module.launch(kernel.name, (4, 1), 128, args, kernel.shared, order="lockstep")
        best = max(best, counters.thread_instructions / (time.process_time() - start))
    record_property("thread_instructions_per_second", best)
    print(f"\n{best / 1e6:.0f} M thread instructions/s")
    assert best > 50e6


def test_attention_counters(compiled):
    q, k, v = torch.randn(3, 1, 128, 64).bfloat16()
    args = {"q": q, "k": k, "v": v, "o": torch.empty_like(q), "S": 128, "scale": 0.125}
    counters = run(compiled["attention-bf16"], (2, 1), args, "lockstep")
    tiles = 2 + 4  # of 64 x 32
    assert counters.by_class["tensor"] == tiles * 4 * 32  # 4 warps, 2 products, 4 x 4 of m16n8k16 each
    assert counters.sector_efficiency == 1
    assert counters.useful_bytes == 2 * (128 * 64 * 2) + 2 * (tiles * 32 * 64 * 2)  # q, o once; k, v by tile
    assert counters.bank_conflicts == 0
    assert counters.buffer_ranges == dict.fromkeys("qkvo", (0, 128 * 64 * 2))
    assert counters.unwaited_copies == 0
    assert any(wait.bytes_before > 0 for wait in counters.async_waits)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_softmax(compiled, name, order):
    x = torch.randn(3, 1000).to(DTYPES[name])
    y = poisoned(3, 1000, dtype=DTYPES[name])
    run(compiled[f"softmax-{name}"], 3, {"x": x, "y": y, "stride": 1000, "n": 1000}, order)
    expected = x.double().softmax(-1)
    smallest = torch.finfo(DTYPES[name]).smallest_normal * torch.finfo(DTYPES[name]).eps
    assert ((y.double() - expected).abs() <= 1.01 * 2 * UNIT[name] * expected + smallest).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32", "tf32"])
def test_matmul(compiled, name, order):
    """Three stages of asynchronous copies; tf32 inputs lose 13 bits, others are exact."""
    dtype = DTYPES.get(name, torch.float32)
    m, n, k = 128, 64, 160
    a, b, c = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), poisoned(m, n, dtype=dtype)
    run(compiled[f"matmul-{name}"], (m // 64, n // 64), {"a": a, "b": b, "c": c, "M": m, "N": n, "K": k}, order)
    expected = a.double() @ b.double()
    scale = a.double().abs() @ b.double().abs()
    accumulation = (2 * 2.0**-10 if name == "tf32" else k * 2.0**-24) * scale
    assert ((c.double() - expected).abs() <= 2 * UNIT.get(name, 0) * expected.abs() * 1.01 + accumulation).all()


@pytest.mark.parametrize("order", ORDERS)
def test_matmul_s8(compiled, order):
    a, b = torch.randint(-128, 128, (2, 64, 128), dtype=torch.int8)
    c = torch.zeros(64, 64, dtype=torch.int32)
    run(compiled["matmul_s8"], (1, 1), {"a": a, "b": b, "c": c, "N": 64, "K": 128}, order)
    assert torch.equal(c.long(), a.long() @ b.long().T)


@pytest.mark.parametrize("order", ORDERS)
def test_gather_attention(compiled, order):
    n = 100
    q, k, v = torch.randn(3, n, 64).bfloat16()
    columns = torch.randperm(n)[:45].sort().values.int()
    out = poisoned(n, 64, dtype=torch.bfloat16)
    args = {"q": q, "k": k, "v": v, "o": out, "columns": columns, "count": 45, "S": n, "scale": 0.125}
    run(compiled["gather"], 2, args, order)
    chosen = columns.long()
    expected = (q.double() @ k[chosen].double().T * 0.125).softmax(-1) @ v[chosen].double()
    bound = UNIT["bf16"] * (v.double().abs().max() + expected.abs().max()) + 1e-5
    assert (out.double() - expected).abs().max() < bound


@pytest.mark.parametrize("order", ORDERS)
def test_int4_linear(compiled, order):
    x, w = torch.randn(16, 128).half(), torch.randint(0, 256, (64, 64), dtype=torch.uint8)
    scales, y = torch.rand(64, 2).half(), poisoned(16, 64, dtype=torch.float16)
    run(compiled["int4"], 1, {"x": x, "w": w, "scales": scales, "y": y, "K": 128, "N": 64}, order)
    nibbles = torch.stack([w & 15, w >> 4], -1).view(64, 2, 64).float() - 8
    weights = (nibbles * scales.float()[:, :, None]).view(64, 128).half()
    expected = x.double() @ weights.double().T
    scale = x.double().abs() @ weights.double().abs().T
    assert ((y.double() - expected).abs() <= 2.02 * UNIT["fp16"] * expected.abs() + 128 * 2.0**-24 * scale).all()


@pytest.mark.parametrize("order", ORDERS)
def test_int8_gemv(compiled, order):
    x, w = torch.randn(512).bfloat16(), torch.randint(-128, 128, (32, 512), dtype=torch.int8)
    scales, y = torch.rand(32), poisoned(32)
    run(compiled["gemv"], 2, {"x": x, "w": w, "scales": scales, "y": y, "K": 512}, order)
    expected = w.double() @ x.double() * scales
    bound = 512 * 2.0**-24 * (w.double().abs() @ x.double().abs()) * scales
    assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("order", ORDERS)
def test_scan_and_sort(compiled, order):
    x = torch.randn(3, 200)
    total, ordered, best = poisoned(3, 200), poisoned(3, 256), torch.zeros(3, dtype=torch.int32)
    run(compiled["scan_sort"], 3, {"x": x, "total": total, "ordered": ordered, "best": best, "n": 200}, order)
    torch.testing.assert_close(total.double(), x.double().cumsum(-1), rtol=0, atol=200 * 2.0**-24 * 15)
    assert torch.equal(ordered[:, 56:], x.sort(-1).values)
    assert torch.equal(best.long(), x.argmax(-1))


@pytest.mark.parametrize("order", ORDERS)
def test_top_and_gather(compiled, order):
    """Replicated tensors: several warps store the same values to the same shared bytes."""
    x, index = torch.randn(256), torch.randint(0, 200, (256,), dtype=torch.int32)
    best, counts, gathered = poisoned(16), torch.zeros(16, dtype=torch.int32), poisoned(256)
    args = {"x": x, "index": index, "best": best, "counts": counts, "gathered": gathered, "n": 200}
    run(compiled["top_and_gather"], 1, args, order)
    assert torch.equal(best, x[:200].topk(16).values)
    assert torch.equal(counts.long(), torch.bincount(index % 16, minlength=16))
    assert torch.equal(gathered, x[index.long()])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_half_chain(compiled, name, order):
    x, y = torch.randn(2, 500).to(DTYPES[name])
    out = poisoned(500, dtype=DTYPES[name])
    run(compiled[f"half_chain-{name}"], 1, {"x": x, "y": y, "out": out, "n": 500}, order)
    fused = (x.double() * y.double() + x.double()).to(DTYPES[name])
    larger = torch.maximum(fused, y)
    assert torch.equal(out, torch.where(larger > x, larger, -x))


def test_inline_assembly(compiled):
    x, out = torch.randint(-(2**31), 2**31 - 1, (256,), dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    run(compiled["unpack_by_assembly"], 1, {"x": x, "out": out}, "lockstep")
    expected = torch.stack([x & 15, x >> 16 & 15], 1).half()
    assert torch.equal(out.view(torch.float16).view(256, 2), expected)


@pytest.mark.parametrize("order", ORDERS)
def test_histogram(compiled, order):
    x, counts = torch.randint(0, 50, (1000,), dtype=torch.int32), torch.zeros(50, dtype=torch.int32)
    run(compiled["histogram"], 4, {"x": x, "counts": counts, "n": 1000}, order)
    assert torch.equal(counts.long(), torch.bincount(x, minlength=50))


@pytest.mark.parametrize("order", ORDERS)
def test_elementwise(compiled, order):
    x, y, out = torch.randn(500) * 3, torch.randint(1, 9, (500,), dtype=torch.int32), poisoned(500)
    run(compiled["elementwise"], 2, {"x": x, "y": y, "out": out, "n": 500}, order)
    c, a = torch.arange(500), x.double()
    floats = a.sigmoid() + a.abs().sqrt() + (a.abs() + 1).log() + a.sin() * a.cos()
    floats += (a.abs() + 0.5).rsqrt() + a.floor() + a.erf()
    wrapped = (c * 2654435).to(torch.int32)
    integers = c // y % 7 + c % y - torch.div(wrapped, 1000, rounding_mode="trunc")
    expected = floats + integers
    assert ((out.double() - expected).abs() <= 2.0**-23 * expected.abs() + 3e-6).all()


@pytest.mark.parametrize("order", ORDERS)
def test_nvcc_reduction(cuda, order):
    x, out = torch.randn(3000), torch.zeros(1)
    cuda.launch("reduce_sum", 4, 256, {"x": x, "out": out, "n": 3000}, order=order)
    assert abs(out.item() - x.double().sum().item()) < 3000 * 2.0**-24 * x.abs().sum()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("name", "dtype"), [("gemmI6__half", torch.float16), ("gemmI13__nv_bf", torch.bfloat16)])
def test_nvcc_gemm(cuda, name, dtype, order):
    m, n, k = 100, 72, 104
    a, b, c = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), poisoned(m, n)
    cuda.launch(name, (2, 2), 128, {"a": a, "b": b, "c": c, "m": m, "n": n, "k": k}, shared_bytes=16384, order=order)
    bound = k * 2.0**-24 * (a.double().abs() @ b.double().abs())
    assert ((c.double() - a.double() @ b.double()).abs() <= bound).all()


def test_nvcc_half_arithmetic(cuda):
    x = torch.randn(200, 2).half()
    y = poisoned(200, 2, dtype=torch.float16)
    s, b = (torch.tensor(v).half().view(torch.int16).item() for v in (1.7, -0.3))
    cuda.launch("half_affine", 2, 128, [x, y, s, b, 200])
    scale, shift = torch.tensor(1.7).half().double(), torch.tensor(-0.3).half().double()
    assert torch.equal(y, (x.double() * scale + shift).half().clamp(-2, 2))
    x, y = x.bfloat16(), poisoned(200, 2, dtype=torch.bfloat16)
    cuda.launch("bfloat_affine", 2, 128, [x, y, torch.tensor(0.7).bfloat16().view(torch.int16).item(), 200])
    assert torch.equal(y, ((x.double() * 2).bfloat16().double() * torch.tensor(0.7).bfloat16().double()).bfloat16())


def scramble(x: list[int]) -> list[int]:
    low = 0xFFFFFFFF
    result = []
    for i, value in enumerate(x):
        table = {(value + k) & 7: x[(i + k) % len(x)] * 2654435761 & low for k in range(8)}
        v = table[value >> 29]
        joined = bytes([v & 255, v >> 8 & 255, v >> 16 & 255, v >> 24, *value.to_bytes(4, "little")])
        ffs = (v & -v).bit_length()
        v = [
            int(f"{v:032b}"[::-1], 2), bin(v).count("1") * 1000003 & low,
            int.from_bytes(bytes(joined[s] for s in (0, 4, 1, 5)), "little"), 32 - v.bit_length() + ffs,
            (value << 32 | v) << 11 >> 32 & low, v * value >> 32, ~v & low, ~v & low,
        ][value % 7]  # fmt: skip
        wide = (v << 20) * (value | 1) + 12345 & 2**64 - 1
        for k in range(value & 15):
            wide = wide * 6364136223846793005 + k & 2**64 - 1
        result.append(wide // (v | 1) ^ wide % (value | 1))
    return result


@pytest.mark.parametrize("order", ORDERS)
def test_nvcc_integers_and_control_flow(cuda, order):
    x = np.random.default_rng(0).integers(0, 1 << 32, 300, np.uint64).astype(np.uint32)
    y = np.zeros(300, np.uint64)
    cuda.launch("scramble", 3, 128, {"x": x, "y": y, "n": 300}, order=order)
    assert y.tolist() == scramble([int(v) for v in x])


@pytest.mark.parametrize("order", ORDERS)
def test_nvcc_compaction(cuda, order):
    x = torch.randn(300)
    indices, count = torch.full((300,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    cuda.launch("compact_positive", 3, 128, {"x": x, "indices": indices, "count": count, "n": 300}, order=order)
    expected = torch.nonzero(x > 0).flatten()
    assert count.item() == len(expected)
    assert torch.equal(indices[: len(expected)].long().sort().values, expected)


def test_nvcc_double(cuda):
    x, out = torch.randn(1000, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    cuda.launch("double_norm", 1, 256, {"x": x, "out": out, "n": 1000})
    torch.testing.assert_close(out[0], x.norm(), rtol=1e-14, atol=0)


def test_nvcc_math(cuda):
    x, y = torch.randn(256) * 4, poisoned(256)
    cuda.launch("math", 2, 128, {"x": x, "y": y, "n": 256})
    a = x.double()
    expected = a.exp() + (1 + a * a).log() + a.sin() * (1 + a.abs()).rsqrt() + a.tanh() + a / 3
    torch.testing.assert_close(y.double(), expected, rtol=2e-6, atol=2e-6)
