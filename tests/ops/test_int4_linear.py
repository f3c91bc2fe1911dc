"""int4_linear against its reference, its definition and its contract."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import scrimp
from scrimp import Int4Weight
from scrimp._registry import OPS
from scrimp.int4_weight.check import ZERO_KINDS
from scrimp.ops.int4_linear import MODES, quantize_rows
from scrimp.testing import assert_matches_oracle, random_int4_weight
from scrimp.testing.int4 import KINDS

OP = OPS["int4_linear"]
IMPLEMENTATIONS = scrimp.implementations("int4_linear") | {"dispatcher": OP.call}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# (rows, N, K, group_size): odd N, one and many groups, per channel with a short last block
SHAPES = [(1, 1, 16, 16), (3, 19, 64, 32), (5, 63, 192, 64), (2, 33, 384, 128), (7, 5, 300, 300), (65, 17, 96, 96)]
# One row has loops of its own: outputs shorter than a line, blocks that do not fill vectors, a second panel of outputs
SHAPES += [(1, 70, 48, 16), (1, 37, 544, 32), (1, 34, 576, 64), (1, 18, 1152, 128), (1, 2, 300, 300)]


def arguments(x: Tensor, weight: Int4Weight, bias: Tensor | None = None, mode: str = "exact") -> tuple[Any, ...]:
    kind = ZERO_KINDS.index(weight.zero_kind)
    return (x, *weight.tensors().values(), bias, weight.group_size, kind, MODES.index(mode))


def case(shape: tuple[int, ...], kind: str, mode: str, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    M, N, K, group_size = shape
    weight = random_int4_weight(N, K, group_size, kind, permuted=N % 2 == 1)
    return arguments(torch.randn(M, K).to(dtype), weight, torch.randn(N).to(dtype), mode)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_mode_matches_the_oracle(name: str, dtype: torch.dtype, kind: str, shape: tuple[int, ...]) -> None:
    args = case(shape, kind, "exact", dtype)
    assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [1, 72])
@pytest.mark.parametrize("group_size", [16, 32, 128])
def test_exact_mode_keeps_its_bound_at_any_magnitude(name: str, group_size: int, rows: int) -> None:
    """The inputs' error, and one rounding each of 128 additions, 8 blocks and the result, relative to their terms."""
    weight = random_int4_weight(24, 128, group_size, "none8", dtype=torch.float32)
    matrix = weight.dequantize(torch.float64)
    largest = torch.linspace(-148, 104, 72).double().view(-1, 1)
    x = (torch.randn(72, 128) * 2.0 ** (largest + torch.randint(-20, 20, (72, 128)))).float()
    y = torch.cat([IMPLEMENTATIONS[name](*arguments(part, weight)) for part in x.split(rows)])
    of_blocks = x.double().abs().view(72, -1, min(group_size, 32)).amax(-1).clamp(min=2.0**-104)
    terms = of_blocks @ matrix.abs().view(24, -1, min(group_size, 32)).sum(-1).T
    error = (y - x.double() @ matrix.T).abs()
    assert bool((error <= (1.01 * 2.0**-23 + 137 * 2.0**-24) * terms).all()), float((error / terms).max() * 2**23)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5])
def test_exact_mode_shows_what_is_not_finite(name: str, kind: str, rows: int) -> None:
    weight, x = random_int4_weight(9, 64, kind=kind, permuted=True), torch.randn(5, 64)
    x[1, 3], x[2, 40], x[4, 63] = torch.inf, torch.nan, -torch.inf
    y = torch.cat([IMPLEMENTATIONS[name](*arguments(part, weight)) for part in x.split(rows)])
    assert not y[[1, 2, 4]].isfinite().any()
    assert y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"codebook"}))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_mode_has_the_bits_of_its_definition(
    name: str, dtype: torch.dtype, kind: str, shape: tuple[int, ...]
) -> None:
    args = case(shape, kind, "int8", dtype)
    assert same_bits(IMPLEMENTATIONS[name](*args), OP.reference(*args))


# The reference's exact mode is a product of torch's, which promises no row invariance; every kernel must.
HAS_KERNEL = len(IMPLEMENTATIONS) > 1
INVARIANT = [(name, mode) for name in IMPLEMENTATIONS for mode in MODES if HAS_KERNEL or mode == "int8"]


@pytest.mark.parametrize(("name", "mode"), INVARIANT)
@pytest.mark.parametrize("kind", ["none8", "uint8", "offset"])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 640])
def test_a_row_has_the_same_bits_among_any_rows(name: str, mode: str, kind: str, group_size: int) -> None:
    weight, x = random_int4_weight(37, 640, group_size, kind), torch.randn(64, 640)
    run = IMPLEMENTATIONS[name]
    alone = torch.cat([run(*arguments(x[i : i + 1], weight, None, mode)) for i in range(64)])
    for rows in (2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 48, 63, 64):
        assert torch.equal(run(*arguments(x[:rows], weight, None, mode)), alone[:rows]), rows
    wild = x[:9].clone()
    wild[::2] = torch.nan
    assert torch.equal(run(*arguments(wild, weight, None, mode))[1::2], alone[1:9:2])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_same_bits_for_any_thread_count(name: str, mode: str) -> None:
    args, threads = case((5, 301, 256, 64), "uint8", mode), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(IMPLEMENTATIONS[name](*args))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_strided_and_batched(name: str, mode: str) -> None:
    weight = random_int4_weight(6, 64)
    x = torch.randn(64, 3, 4, 2)[..., 0].permute(2, 1, 0)
    assert x.shape == (4, 3, 64)
    got = IMPLEMENTATIONS[name](*arguments(x, weight, None, mode))
    assert got.is_contiguous()
    assert torch.equal(got, IMPLEMENTATIONS[name](*arguments(x.contiguous(), weight, None, mode)))
    vector = IMPLEMENTATIONS[name](*arguments(x[1, 2], weight, None, mode))
    assert vector.shape == (6,)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("rows", "n", "k"), [((0,), 3, 32), ((2, 0), 3, 32), ((2,), 0, 32), ((2,), 3, 0)], ids=str)
def test_zero_size(name: str, mode: str, rows: tuple[int, ...], n: int, k: int) -> None:
    bias = torch.arange(float(n))
    y = IMPLEMENTATIONS[name](*arguments(torch.randn(*rows, k), random_int4_weight(n, k), bias, mode))
    assert y.shape == (*rows, n)
    if k == 0:
        assert torch.equal(y, bias.expand_as(y))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_an_input_named_twice_adds_up(name: str, mode: str) -> None:
    """Two nibbles of one input make 8 bits: q = 16 high + low."""
    K = 64
    q = torch.randint(-128, 128, (5, K))
    halves = torch.stack((q.view(5, 2, 32) // 16 + 8, q.view(5, 2, 32) % 16), 2).view(5, 2 * K)
    scales, zeros = torch.tensor([16.0, 1.0, 16.0, 1.0]).expand(5, 4), torch.tensor([8, 0, 8, 0], dtype=torch.uint8)
    order = torch.arange(K, dtype=torch.int32).view(2, 1, 32).expand(2, 2, 32).reshape(-1)
    weight = Int4Weight.from_codes(halves, scales, zeros.expand(5, 4), permutation=order, in_features=K)
    assert torch.equal(weight.dequantize(), q.float())
    x = torch.randint(-127, 128, (3, K)).float()
    x[:, ::32] = 127
    assert torch.equal(IMPLEMENTATIONS[name](*arguments(x, weight, None, mode)), x @ q.float().T)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_int8_corner_cases(name: str) -> None:
    weight, x = random_int4_weight(9, 64), torch.randn(6, 64)
    x[1, 3], x[2, 40], x[3], x[4, :32], x[5] = torch.inf, torch.nan, 0, 2.0**-110, 1e37
    args = arguments(x, weight, None, "int8")
    y = IMPLEMENTATIONS[name](*args)
    assert same_bits(y, OP.reference(*args))
    assert y[1:3].isnan().all()
    assert torch.equal(y[3], torch.zeros(9))
    assert y[[0, 4, 5]].isfinite().all()


def test_rows_are_quantized_by_hand() -> None:
    """Ties go to even, -1 becomes -127, tiny blocks count as zero; the last block may be short."""
    x = torch.tensor([[1.0, -1.0, 0.5 / 127, 1.5 / 127, 2.0**-101, 0.0]])
    integers, scale = quantize_rows(x, 4)
    assert integers[0].tolist() == [[127, -127, 0, 2]]
    assert integers[1].tolist() == [[0, 0, 0, 0]]
    torch.testing.assert_close(scale, torch.tensor([[1 / 127], [0.0]]), rtol=0, atol=0)


def test_reference_by_hand() -> None:
    """Codes 3 and 10 in turn, x = 1 on the first and 2 on the second, 16 pairs a group."""
    x = torch.tensor([1.0, 2.0]).repeat(16)
    qweight, s = torch.full((1, 16), 0xA3, dtype=torch.uint8), torch.tensor([[0.5]])
    expected = {
        "none8": 16 * 0.5 * (1 * (3 - 8) + 2 * (10 - 8)),
        "uint8": 16 * 0.5 * (1 * (3 - 4) + 2 * (10 - 4)),
        "float": 16 * 0.5 * (1 * (3 - 2.5) + 2 * (10 - 2.5)),
        "offset": 16 * (1 * (1.5 - 2.5) + 2 * (5 - 2.5)),
        "codebook": 16 * 0.5 * (1 * -7 + 2 * 30),
    }
    zeros = {"uint8": torch.tensor([[4]], dtype=torch.uint8), "float": torch.tensor([[2.5]])}
    zeros["offset"] = -zeros["float"]
    codebook = torch.zeros(16, dtype=torch.int8)
    codebook[3], codebook[10] = -7, 30
    for kind, mode in itertools.product(expected, MODES):
        book = codebook if kind == "codebook" else None
        number = ZERO_KINDS.index("none8" if book is not None else kind)
        args = (x, qweight, s, zeros.get(kind), book, None, torch.tensor([1.0]), 32, number, MODES.index(mode))
        exact = torch.tensor([expected[kind] + 1])
        # int8: 1 becomes 64 steps of 2/127 (63.5, ties to even): off by half a step on 16 inputs of at most 15 x 0.5
        torch.testing.assert_close(OP.reference(*args), exact, rtol=0, atol=1e-5 if mode == "exact" else 16 / 127 * 7.5)


def test_int8_mode_is_close_to_exact() -> None:
    """Rounding to 127 steps: an error of about amax / 127 / sqrt(12) an input."""
    for group_size in (32, 128, 512):
        weight, x = random_int4_weight(64, 512, group_size, "uint8"), torch.randn(16, 512)
        exact = OP.reference(*arguments(x, weight))
        error = OP.reference(*arguments(x, weight, None, "int8")) - exact
        assert float(error.norm() / exact.norm()) < 0.012


@pytest.mark.parametrize("mode", MODES)
def test_public_function_follows_the_weight(mode: str) -> None:
    for kind in KINDS[:4]:
        weight = random_int4_weight(7, 96, kind=kind, dtype=torch.bfloat16, permuted=True)
        x, bias = torch.randn(2, 3, 96), torch.randn(7)
        y = scrimp.ops.int4_linear(x, weight, bias, mode=mode)
        torch.testing.assert_close(
            y, x @ weight.dequantize().T + bias, atol=1e-5 if mode == "exact" else 0.1, rtol=1e-5
        )


def test_opcheck() -> None:
    for kind, mode in itertools.product(("none8", "uint8", "codebook8"), MODES):
        opcheck(OP.call, case(SHAPES[1], kind, mode))
    opcheck(OP.call, arguments(torch.randn(2, 3, 32), random_int4_weight(4, 32)))


def test_compiles_as_one_node() -> None:
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    weight = random_int4_weight(5, 64)
    compiled = torch.compile(lambda x: scrimp.ops.int4_linear(x, weight, mode="int8"), backend=record, fullgraph=True)
    x = torch.randn(3, 64)
    assert torch.equal(compiled(x), scrimp.ops.int4_linear(x, weight, mode="int8"))
    assert [str(n.target) for n in graphs[0].graph.nodes].count("scrimp.int4_linear.default") == 1


W = random_int4_weight(3, 64, kind="uint8")
X, Q, S, Z = torch.zeros(2, 64), W.qweight, W.scales, W.zeros
BOOK, ORDER = torch.zeros(16), torch.zeros(64, dtype=torch.int32)
BAD = {
    "inputs": ((X[:, :60], Q, S, None, None, None, None, 32, 0, 0), "x has 60 inputs, but the weight 64"),
    "permuted inputs": (
        (X.repeat(1, 2), Q, S, None, None, ORDER, None, 32, 0, 0),
        "x has 128 inputs, but the weight p",
    ),
    "scalar": ((X[0, 0], Q, S, None, None, None, None, 32, 0, 0), "x must be .*, got a scalar"),
    "integer x": ((X.int(), Q, S, None, None, None, None, 32, 0, 0), "x is int32; it must be float32"),
    "rank of qweight": ((X, Q[0], S, None, None, None, None, 32, 0, 0), r"qweight must be .*, got shape \[32\]"),
    "dtype of qweight": ((X, Q.int(), S, None, None, None, None, 32, 0, 0), "qweight is int32; it must be uint8"),
    "group size": ((X, Q, S, None, None, None, None, 20, 0, 0), "group_size=20 must be 16, 32, 64, 128 or K=64"),
    "ragged": ((X, Q, S, None, None, None, None, 128, 0, 0), "K=64 is not a multiple of group_size=128"),
    "scales": ((X, Q, S, None, None, None, None, 16, 0, 0), r"scales has shape \[3, 2\], expected \[3, 4\]"),
    "zero kind": ((X, Q, S, None, None, None, None, 32, 4, 0), "zero_kind=4 must be an index"),
    "mode": ((X, Q, S, None, None, None, None, 32, 0, 2), "mode=2 must be an index"),
    "no zeros": ((X, Q, S, None, None, None, None, 32, 1, 0), "zero_kind='uint8' needs zeros"),
    "zeros too many": ((X, Q, S, Z, None, None, None, 32, 0, 0), "zero_kind='none8' takes no zeros"),
    "dtype of zeros": ((X, Q, S, Z, None, None, None, 32, 2, 0), "zeros is uint8; it must be float16"),
    "codebook and zeros": ((X, Q, S, Z, BOOK, None, None, 32, 1, 0), "a codebook has zero_kind='none8', got 'uint8'"),
    "float codebook": (
        (X, Q, S, None, BOOK, None, None, 32, 0, 1),
        "mode='int8' needs a codebook of int8, got torch.f",
    ),
    "codebook": ((X, Q, S, None, BOOK[:8], None, None, 32, 0, 0), r"codebook has shape \[8\], expected \[16\]"),
    "permutation": ((X, Q, S, None, None, ORDER[1:], None, 32, 0, 0), r"permutation has shape \[63\], expected \[64\]"),
    "dtype of bias": ((X, Q, S, None, None, None, BOOK[:3].half(), 32, 0, 0), "dtype of bias is torch.float16, but"),
    "bias": (
        (X, Q, S, None, None, None, BOOK, 32, 0, 0),
        r"shape of outputs_of_the_weight is \(3,\), but that of bias is",
    ),
    "device": ((X, Q, S.to("meta"), None, None, None, None, 32, 0, 0), "scales is on meta, but qweight on cpu"),
    "device of x": ((X.to("meta"), Q, S, None, None, None, None, 32, 0, 0), "device of qweight is cpu, but that of x"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    args, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        OP.reference(*args)
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        OP.call(*args)


def test_bad_input_of_the_public_function() -> None:
    with pytest.raises(ValueError, match="mode='fast' must be one of exact, int8"):
        scrimp.ops.int4_linear(X, W, mode="fast")
    with pytest.raises(ValueError, match="x has 32 inputs, but the weight 64"):
        scrimp.ops.int4_linear(X[:, :32], W)


def test_gradients_are_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match="scrimp::int4_linear has no backward"):
        scrimp.ops.int4_linear(X.clone().requires_grad_(), W)
