"""int4_sparse_linear against its reference, the dense op, its definition and its contract."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import scrimp
from scrimp import Int4Weight
from scrimp._registry import OPS
from scrimp.int4_weight import Int4Channels
from scrimp.int4_weight.check import ZERO_KINDS
from scrimp.ops.int4_linear import MODES
from scrimp.testing import assert_matches_oracle, assert_rows_independent, random_int4_weight, same_bits
from scrimp.testing.int4 import KINDS

OP = OPS["int4_sparse_linear"]
IMPLEMENTATIONS = scrimp.implementations("int4_sparse_linear")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# leading dimensions of x, N, K, group size, channels listed: odd N, several tiles, one and many groups, per channel
SHAPES = [
    ((1,), 1, 16, 16, 1),
    ((3,), 19, 64, 32, 64),
    ((), 300, 192, 64, 90),
    ((2, 2), 130, 384, 128, 200),
    ((7,), 5, 300, 300, 150),
    ((65,), 17, 96, 96, 0),
    ((1,), 257, 544, 32, 300),
]
EMPTY = [((0,), 3, 32, 32, 4), ((2, 0), 3, 32, 32, 4), ((2,), 0, 32, 32, 4), ((2,), 3, 0, 32, 0)]


def channel_list(inputs: int, listed: int) -> tuple[Tensor, Tensor]:
    index = torch.full((inputs,), -1, dtype=torch.int32)
    index[:listed] = torch.randperm(inputs)[:listed].sort().values
    return index, torch.tensor([listed], dtype=torch.int32)


def arguments(
    x: Tensor, weight: Int4Channels, index: Tensor, count: Tensor, bias: Tensor | None = None, mode: str = "exact"
) -> tuple[Any, ...]:
    return (x, *weight.tensors().values(), index, count, bias, *weight.numbers(), MODES.index(mode))


def case(
    shape: tuple[Any, ...], kind: str, mode: str, dtype: torch.dtype = torch.float32
) -> tuple[tuple[Any, ...], Int4Weight]:
    """Arguments, x poisoned in what the list leaves out; and the weight."""
    lead, N, K, group_size, listed = shape
    weight = random_int4_weight(N, K, group_size, kind, permuted=N % 2 == 1)
    index, count = channel_list(K, listed)
    x = torch.full((*lead, K), torch.nan)
    x[..., index[:listed].long()] = torch.randn(*lead, listed)
    bias = torch.randn(N).to(dtype)
    return arguments(x.to(dtype), Int4Channels.of(weight), index, count, bias, mode), weight


def masked(args: tuple[Any, ...]) -> Tensor:
    """x with zeros in what the list leaves out."""
    x, index, count = args[0], args[6], args[7]
    listed = index[: int(count)].long()
    return torch.zeros_like(x).index_copy_(-1, listed, x[..., listed])


def test_implementations_exist() -> None:
    assert IMPLEMENTATIONS, scrimp.which("int4_sparse_linear")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_mode_matches_the_oracle(name: str, dtype: str, kind: str) -> None:
    for shape in SHAPES:
        args, _ = case(shape, kind, "exact", DTYPES[dtype])
        assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"codebook"}))
def test_int8_mode_has_the_bits_of_the_dense_op(name: str, dtype: str, kind: str) -> None:
    for shape in SHAPES:
        args, weight = case(shape, kind, "int8", DTYPES[dtype])
        got = IMPLEMENTATIONS[name](*args)
        assert same_bits(got, scrimp.ops.int4_linear(masked(args), weight, args[8], mode="int8"))
        assert same_bits(got, OP.reference(*args))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["none8", "uint8", "offset"])
def test_a_row_does_not_depend_on_the_others(name: str, mode: str, kind: str) -> None:
    """Bitwise, each row with a selection of its own: alone it has a shorter list than in company."""
    weight = Int4Channels.of(random_int4_weight(131, 192, 32, kind, permuted=kind == "uint8"))
    select, run = scrimp.implementations("channel_select")[name.replace("vnni", "")], IMPLEMENTATIONS[name]

    def call(x: Tensor) -> Tensor:
        kept, index, count, _ = select(x, torch.tensor([0.7]), None, None, None, 0, False)
        return run(*arguments(kept, weight, index, count, None, mode))

    assert_rows_independent(call, torch.randn(64, 192))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_listed_zeros_change_no_bit(name: str, mode: str) -> None:
    """Also where sums underflow, and whole groups are listed for nothing."""
    weight, (index, count) = Int4Channels.of(random_int4_weight(70, 256, 16, "float")), channel_list(256, 20)
    x = torch.zeros(5, 256).index_copy_(1, index[:20].long(), torch.randn(5, 20))
    x[2:] *= 1e-30
    everything = torch.arange(256, dtype=torch.int32), torch.tensor([256], dtype=torch.int32)
    short = IMPLEMENTATIONS[name](*arguments(x, weight, index, count, None, mode))
    assert same_bits(short, IMPLEMENTATIONS[name](*arguments(x, weight, *everything, None, mode)))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_strided(name: str, mode: str) -> None:
    """Transposed and every second input; codes, scales and zeros that are parts of wider ones."""
    whole = Int4Channels.of(random_int4_weight(300, 64, kind="uint8"))
    assert whole.zeros is not None
    part = replace(whole, codes=whole.codes[:, 64:], scales=whole.scales[:, 128:], zeros=whole.zeros[:, 128:])
    index, count = channel_list(64, 40)
    bias = torch.randn(172, 3)[:, 1]
    for x in (torch.randn(64, 6).T, torch.randn(3, 128)[:, ::2], torch.randn(64, 3, 4, 2)[..., 0].permute(2, 1, 0)):
        args = arguments(x, part, index, count, bias, mode)
        got = IMPLEMENTATIONS[name](*args)
        assert got.is_contiguous()
        assert_matches_oracle(got, OP.reference, *args)
        wide = IMPLEMENTATIONS[name](*arguments(x, whole, index, count, None, mode))[..., 128:]
        assert same_bits(IMPLEMENTATIONS[name](*arguments(x, part, index, count, None, mode)), wide.contiguous())


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_zero_size(name: str, mode: str, shape: tuple[Any, ...]) -> None:
    args, _ = case(shape, "none8", mode)
    y = IMPLEMENTATIONS[name](*args)
    assert y.shape == (*shape[0], shape[1])
    if shape[2] == 0:
        assert torch.equal(y, args[8].expand_as(y))


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
    x = torch.randint(-127, 128, (3, K)).float()
    x[:, ::32] = 127
    index = torch.arange(0, K, 2, dtype=torch.int32)
    args = arguments(x, Int4Channels.of(weight), index, torch.tensor([K // 2], dtype=torch.int32), None, mode)
    assert torch.equal(IMPLEMENTATIONS[name](*args), x[:, ::2] @ q[:, ::2].float().T)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_not_a_number_comes_out(name: str, mode: str) -> None:
    weight, (index, count) = Int4Channels.of(random_int4_weight(9, 64)), channel_list(64, 33)
    x = torch.randn(4, 64)
    x[1, index[3]], x[2, index[30]], x[3] = torch.inf, torch.nan, 0
    y = IMPLEMENTATIONS[name](*arguments(x, weight, index, count, None, mode))
    assert y[0].isfinite().all()
    assert not y[1:3].isfinite().any()
    assert torch.equal(y[3], torch.zeros(9))


@pytest.mark.parametrize("run", [OP.reference, *IMPLEMENTATIONS.values()], ids=["reference", *IMPLEMENTATIONS])
def test_by_hand(run: Any) -> None:
    """Codes 3 and 10 in turn, x = 1 on the first and 2 on the second; one of each is listed in each of two groups."""
    x = torch.tensor([1.0, 2.0]).repeat(16)
    codes = torch.tensor([3, 10]).repeat(1, 16)
    index, count = torch.tensor([0, 5, 16, 31, -7], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    scales, zeros = torch.tensor([[0.5, 2.0]]), torch.tensor([[2.5, 1.0]])
    expected = {
        "none8": 2.5 * (1 * (3 - 8) + 2 * (10 - 8)),
        "float": 0.5 * (1 * (3 - 2.5) + 2 * (10 - 2.5)) + 2 * (1 * (3 - 1) + 2 * (10 - 1)),
        "offset": 2.5 * (1 * 3 + 2 * 10) + 2.5 * 3 + 1 * 3,
    }
    for kind, total in expected.items():
        shifts = None if kind == "none8" else zeros
        weight = Int4Channels.of(Int4Weight.from_codes(codes, scales, shifts, zero_kind=kind))  # type: ignore[arg-type]
        got = run(*arguments(x, weight, index, count, torch.tensor([1.0])))
        torch.testing.assert_close(got, torch.tensor([total + 1]))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_same_bits_for_any_thread_count(name: str, mode: str) -> None:
    weight, before = Int4Channels.of(random_int4_weight(700, 512, 64, "uint8")), torch.get_num_threads()
    args = arguments(torch.randn(64, 512), weight, *channel_list(512, 300), torch.randn(700), mode)
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(IMPLEMENTATIONS[name](*args))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_python_threads_do_not_disturb_each_other() -> None:
    args, _ = case(((3,), 300, 256, 32, 100), "uint8", "int8")
    expected = OP.call(*args)
    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(got, expected) for got in pool.map(lambda _: OP.call(*args), range(50)))


@pytest.mark.parametrize("mode", MODES)
def test_public_function_follows_the_weight(mode: str) -> None:
    for kind in KINDS[:4]:
        weight = random_int4_weight(7, 96, kind=kind, dtype=torch.bfloat16, permuted=True)
        x, bias, (index, count) = torch.randn(2, 3, 96), torch.randn(7), channel_list(96, 50)
        kept = torch.zeros_like(x).index_copy_(-1, index[:50].long(), x[..., index[:50].long()])
        y = scrimp.ops.int4_sparse_linear(x, Int4Channels.of(weight), index, count, bias, mode=mode)
        torch.testing.assert_close(
            y, kept @ weight.dequantize().T + bias, atol=1e-5 if mode == "exact" else 0.1, rtol=1e-5
        )


def test_opcheck() -> None:
    for kind in ("none8", "uint8", "codebook8"):
        for mode in MODES:
            opcheck(OP.call, case(SHAPES[1], kind, mode)[0])


def test_compiles_as_one_node() -> None:
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    weight, (index, count) = Int4Channels.of(random_int4_weight(5, 64)), channel_list(64, 9)
    compiled = torch.compile(
        lambda x: scrimp.ops.int4_sparse_linear(x, weight, index, count, mode="int8"), backend=record, fullgraph=True
    )
    x = torch.randn(3, 64)
    assert torch.equal(compiled(x), scrimp.ops.int4_sparse_linear(x, weight, index, count, mode="int8"))
    assert [str(n.target) for n in graphs[0].graph.nodes].count("scrimp.int4_sparse_linear.default") == 1


W = Int4Channels.of(random_int4_weight(3, 64, kind="uint8"))
X, Q, S, Z = torch.zeros(2, 64), W.codes, W.scales, W.zeros
BOOK, ORDER = torch.zeros(16), torch.zeros(64, dtype=torch.int32)
I, C = torch.arange(64, dtype=torch.int32), torch.tensor([64], dtype=torch.int32)  # noqa: E741
GOOD: dict[str, Any] = {
    "x": X, "codes": Q, "scales": S, "zeros": None, "codebook": None, "permutation": None, "index": I, "count": C,
    "bias": None, "group_size": 32, "zero_kind": 0, "mode": 0,
}  # fmt: skip
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "inputs": ({"x": X[:, :60], "index": I[:60]}, "x has 60 inputs, but the weight 64"),
    "permuted inputs": ({"x": X.repeat(1, 2), "permutation": ORDER}, "x has 128 inputs, but the weight permutes 64"),
    "scalar": ({"x": X[0, 0]}, "x must be .*, got a scalar"),
    "integer x": ({"x": X.int()}, "x is int32; it must be float32"),
    "rank of codes": ({"codes": Q[0]}, r"codes must have two dimensions, got shape \[64\]"),
    "dtype of codes": ({"codes": Q.int()}, "codes is int32; it must be uint8"),
    "width of codes": ({"codes": Q[:, :2]}, r"codes has shape \[64, 2\], expected \[64, 64\]"),
    "rank of scales": ({"scales": S[0]}, r"scales must have two dimensions, got shape \[3\]"),
    "scales": ({"group_size": 16}, r"scales has shape \[2, 3\], expected \[4, 3\]"),
    "dtype of scales": ({"scales": S.int()}, "scales is int32; it must be float32"),
    "group size": ({"group_size": 20}, "group_size=20 must be 16, 32, 64, 128 or K=64"),
    "ragged": ({"group_size": 128}, "K=64 is not a multiple of group_size=128"),
    "zero kind": ({"zero_kind": 4}, "zero_kind=4 must be an index"),
    "mode": ({"mode": 2}, "mode=2 must be an index"),
    "no zeros": ({"zero_kind": 1}, "zero_kind='uint8' needs zeros"),
    "zeros too many": ({"zeros": Z}, "zero_kind='none8' takes no zeros"),
    "dtype of zeros": ({"zeros": Z, "zero_kind": 2}, "zeros is uint8; it must be float16"),
    "shape of zeros": ({"zeros": Z[:, :2], "zero_kind": 1}, r"zeros has shape \[2, 2\], expected \[2, 3\]"),
    "codebook and zeros": ({"zeros": Z, "codebook": BOOK, "zero_kind": 1}, "a codebook has zero_kind='none8'"),
    "float codebook": ({"codebook": BOOK, "mode": 1}, "mode='int8' needs a codebook of int8, got torch.float32"),
    "codebook": ({"codebook": BOOK[:8]}, r"codebook has shape \[8\], expected \[16\]"),
    "permutation": ({"permutation": ORDER[1:]}, r"permutation has shape \[63\], expected \[64\]"),
    "long list": ({"index": I.repeat(2)}, r"index has shape \[128\], expected \[at most 64\]"),
    "dtype of index": ({"index": I.long()}, "index is int64; it must be int32"),
    "counts": ({"count": C.repeat(2)}, r"count must be one number, \[1\], got shape \[2\]"),
    "dtype of count": ({"count": C.long()}, "count is int64; it must be int32"),
    "dtype of bias": ({"bias": BOOK[:3].half()}, "dtype of bias is torch.float16, but"),
    "bias": ({"bias": BOOK}, r"shape of outputs_of_the_weight is \(3,\), but that of bias is"),
    "device": ({"scales": S.to("meta")}, "scales is on meta, but codes on cpu"),
    "device of x": ({"x": X.to("meta")}, "device of codes is cpu, but that of x"),
    "device of index": ({"index": I.to("meta")}, "device of index is meta, but that of x"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    changes, words = BAD[name]
    args = tuple((GOOD | changes).values())
    OP.reference(*GOOD.values())
    with pytest.raises(ValueError, match=words):
        OP.reference(*args)
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        OP.call(*args)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bad_lists(name: str) -> None:
    for listed, count, words in (
        ([0, 2, 2], 3, r"does not ascend within \[0, 64\)"),
        ([0, 64, 1], 2, r"does not ascend within \[0, 64\)"),
        ([-1, 1, 2], 2, r"does not ascend within \[0, 64\)"),
        ([0, 1, 2], 4, "count=4 is not within a list of 3"),
        ([0, 1, 2], -1, "count=-1 is not within a list of 3"),
    ):
        index, number = torch.tensor(listed, dtype=torch.int32), torch.tensor([count], dtype=torch.int32)
        with pytest.raises(RuntimeError, match=f"int4_sparse_linear: .*{words}"):
            IMPLEMENTATIONS[name](*(GOOD | {"index": index, "count": number}).values())


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_permutation_outside_the_inputs(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"permutation\[0\] is 70, outside the 64 inputs"):
        IMPLEMENTATIONS[name](*(GOOD | {"permutation": ORDER + 70}).values())


def test_bad_input_of_the_public_function() -> None:
    with pytest.raises(ValueError, match="mode='fast' must be one of exact, int8"):
        scrimp.ops.int4_sparse_linear(X, W, I, C, mode="fast")
    with pytest.raises(ValueError, match="x has 32 inputs, but the weight 64"):
        scrimp.ops.int4_sparse_linear(X[:, :32], W, I, C)
    with pytest.raises(ValueError, match=r"dtype of bias is torch\.float16, but that of x"):
        scrimp.ops.int4_sparse_linear(X, W, I, C, torch.zeros(3).half())
    with pytest.raises(RuntimeError, match="does not ascend"):
        scrimp.ops.int4_sparse_linear(X, W, I.flip(0).contiguous(), C)


def test_gradients_are_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match="scrimp::int4_sparse_linear has no backward"):
        scrimp.ops.int4_sparse_linear(X.clone().requires_grad_(), W, I, C)


def test_kinds_are_the_canonical_ones() -> None:
    assert [Int4Channels.of(random_int4_weight(2, 32, kind=kind)).numbers()[1] for kind in ZERO_KINDS] == [0, 1, 2, 3]
