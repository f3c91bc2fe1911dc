"""Small Triton kernels that the tests of the PTX emulator compile and execute.

They are test material only: plain, and chosen so that their PTX covers what the shipped kernels
use (pipelined copies, tensor cores, reductions, scans, gathers, integer unpacking).
"""

import triton
import triton.language as tl


@triton.jit
def softmax(x, y, stride, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < n
    v = tl.load(x + row * stride + cols, mask=mask, other=-float("inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, 0))
    tl.store(y + row * stride + cols, (e / tl.sum(e, 0)).to(y.dtype.element_ty), mask=mask)


@triton.jit
def matmul(
    a, b, c, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        x = tl.load(a + rm[:, None] * K + (k + rk)[None, :])
        y = tl.load(b + (k + rk)[:, None] * N + rn[None, :])
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    tl.store(c + rm[:, None] * N + rn[None, :], acc.to(c.dtype.element_ty))


@triton.jit
def matmul_s8(a, b, c, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.int32)
    for k in range(0, K, BK):
        x = tl.load(a + rm[:, None] * K + (k + rk)[None, :])
        y = tl.load(b + rn[None, :] * K + (k + rk)[:, None])
        acc = tl.dot(x, y, acc)
    tl.store(c + rm[:, None] * N + rn[None, :], acc)


@triton.jit
def attention(
    q, k, v, o, S, scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Causal attention, one head a program of axis 1, tiles in the last dimension contiguous."""
    tile = tl.program_id(0)
    base = tl.program_id(1) * S * D
    rm = tile * BM + tl.arange(0, BM)
    rd = tl.arange(0, D)
    qt = tl.load(q + base + rm[:, None] * D + rd[None, :], mask=rm[:, None] < S, other=0.0)
    m = tl.full((BM,), -1e30, tl.float32)
    norm = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for n in range(0, tl.minimum((tile + 1) * BM, S), BN):
        rn = n + tl.arange(0, BN)
        kt = tl.load(k + base + rn[None, :] * D + rd[:, None], mask=rn[None, :] < S, other=0.0)
        vt = tl.load(v + base + rn[:, None] * D + rd[None, :], mask=rn[:, None] < S, other=0.0)
        s = tl.dot(qt, kt) * scale
        s = tl.where((rn[None, :] < S) & (rm[:, None] >= rn[None, :]), s, -1e30)
        top = tl.maximum(m, tl.max(s, 1))
        p = tl.exp(s - top[:, None])
        alpha = tl.exp(m - top)
        norm = norm * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype.element_ty), vt, acc * alpha[:, None])
        m = top
    out = (acc / norm[:, None]).to(o.dtype.element_ty)
    tl.store(o + base + rm[:, None] * D + rd[None, :], out, mask=rm[:, None] < S)


@triton.jit
def gather_attention(
    q, k, v, o, columns, count, S, scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Attention of BM rows over a list of columns."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rd = tl.arange(0, D)
    qt = tl.load(q + rm[:, None] * D + rd[None, :], mask=rm[:, None] < S, other=0.0)
    m = tl.full((BM,), -1e30, tl.float32)
    norm = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for n in range(0, count, BN):
        rn = n + tl.arange(0, BN)
        col = tl.load(columns + rn, mask=rn < count, other=0)
        kt = tl.load(k + col[None, :] * D + rd[:, None], mask=rn[None, :] < count, other=0.0)
        vt = tl.load(v + col[:, None] * D + rd[None, :], mask=rn[:, None] < count, other=0.0)
        s = tl.where(rn[None, :] < count, tl.dot(qt, kt) * scale, -1e30)
        top = tl.maximum(m, tl.max(s, 1))
        p = tl.exp(s - top[:, None])
        alpha = tl.exp(m - top)
        norm = norm * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype.element_ty), vt, acc * alpha[:, None])
        m = top
    out = (acc / norm[:, None]).to(o.dtype.element_ty)
    tl.store(o + rm[:, None] * D + rd[None, :], out, mask=rm[:, None] < S)


@triton.jit
def int4_linear(x, w, scales, y, K, N, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """y = x @ dequantised(w).T with w uint8 [N, K/2] (low nibble first), one scale a BK group."""
    rm = tl.arange(0, BM)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        xt = tl.load(x + rm[:, None] * K + (k + rk)[None, :])
        packed = tl.load(w + rn[None, :] * (K // 2) + ((k + rk) // 2)[:, None])
        nibble = (packed >> ((rk % 2) * 4)[:, None].to(tl.uint8)) & 15
        scale = tl.load(scales + rn * (K // BK) + k // BK)
        wt = ((nibble.to(tl.float32) - 8.0) * scale[None, :]).to(x.dtype.element_ty)
        acc = tl.dot(xt, wt, acc)
    tl.store(y + rm[:, None] * N + rn[None, :], acc.to(y.dtype.element_ty))


@triton.jit
def int8_gemv(x, w, scales, y, K, BN: tl.constexpr, BK: tl.constexpr):
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros((BN,), tl.float32)
    for k in range(0, K, BK):
        rk = k + tl.arange(0, BK)
        xt = tl.load(x + rk).to(tl.float32)
        wt = tl.load(w + rn[:, None] * K + rk[None, :]).to(tl.float32)
        acc += tl.sum(xt[None, :] * wt, 1)
    tl.store(y + rn, acc * tl.load(scales + rn))


@triton.jit
def scan_sort(x, total, ordered, best, n, BLOCK: tl.constexpr):
    """Prefix sums, a full sort and the index of the maximum of a row."""
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    v = tl.load(x + row * n + cols, mask=cols < n, other=-float("inf"))
    sums = tl.cumsum(tl.where(cols < n, v, 0.0), 0)
    tl.store(total + row * n + cols, sums, mask=cols < n)
    tl.store(ordered + row * BLOCK + cols, tl.sort(v))
    tl.store(best + row, tl.argmax(v, 0))


@triton.jit
def histogram(x, counts, n, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + cols, mask=cols < n, other=0)
    tl.atomic_add(counts + v, 1, mask=cols < n)


@triton.jit
def elementwise(x, y, out, n, BLOCK: tl.constexpr):
    """A chain of float functions and integer divisions."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n
    a = tl.load(x + cols, mask=mask, other=0.0)
    b = tl.load(y + cols, mask=mask, other=1)
    f = tl.sigmoid(a) + tl.sqrt(tl.abs(a)) + tl.log(tl.abs(a) + 1.0) + tl.sin(a) * tl.cos(a)
    f += tl.rsqrt(tl.abs(a) + 0.5) + tl.floor(a) + tl.erf(a)
    g = (cols // b) % 7 + (cols % b) - (cols * 2654435) // 1000
    tl.store(out + cols, f + g.to(tl.float32), mask=mask)


@triton.jit
def top_and_gather(x, index, best, counts, gathered, n, BLOCK: tl.constexpr, TOP: tl.constexpr):
    """The largest TOP values of a row, a histogram of the indices, and a gather by them."""
    cols = tl.arange(0, BLOCK)
    v = tl.load(x + cols, mask=cols < n, other=-float("inf"))
    i = tl.load(index + cols)
    tl.store(best + tl.arange(0, TOP), tl.topk(v, TOP))
    tl.store(counts + tl.arange(0, TOP), tl.histogram(i % TOP, TOP))
    tl.store(gathered + cols, tl.gather(v, i, 0))


@triton.jit
def half_chain(x, y, out, n, BLOCK: tl.constexpr):
    """Arithmetic that stays in 16 bits."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n
    a = tl.load(x + cols, mask=mask)
    b = tl.load(y + cols, mask=mask)
    r = tl.maximum(a * b + a, b)
    tl.store(out + cols, tl.where(r > a, r, -a), mask=mask)


@triton.jit
def unpack_by_assembly(x, out, BLOCK: tl.constexpr):
    """Inline assembly with a scope of its own: the exponent trick of int4 kernels."""
    cols = tl.arange(0, BLOCK)
    v = tl.load(x + cols)
    asm: tl.constexpr = """{
        .reg .b32 t, bias;
        mov.b32 bias, 0x64006400;
        lop3.b32 t, $1, 0x000f000f, bias, 0xea;
        sub.f16x2 $0, t, bias;
    }"""
    r = tl.inline_asm_elementwise(asm, "=r,r", [v], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(out + cols, r)
