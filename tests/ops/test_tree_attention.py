"""tree_attention against its reference, token-by-token decoding to the bit, and its contract."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import scrimp
from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle, same_bits

OP = OPS["tree_attention"]
IMPLEMENTATIONS = scrimp.implementations("tree_attention")
ALL = IMPLEMENTATIONS | {"reference": OP.reference}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = ("out", "lse")
Call = Callable[..., tuple[Tensor, Tensor]]
# B, H, G, T, D, prefix
SHAPES = [
    (1, 1, 1, 1, 1, [0]),
    (2, 6, 2, 5, 40, [70, 3]),
    (1, 9, 3, 64, 64, [600]),
    (3, 4, 1, 17, 19, [63, 64, 65]),
    (1, 8, 1, 1, 128, [1100]),
    (1, 2, 2, 33, 256, [500]),
]
# H, G, T, D, prefix: both sides of a block (64 keys) and of a split (512), more rows than a strip, odd head sizes
EXACT = [(3, 1, 20, 64, 0), (2, 2, 64, 19, 63), (6, 2, 9, 40, 500), (3, 1, 64, 64, 460), (8, 1, 5, 128, 511)]


def random_tree(T: int) -> tuple[list[int], Tensor]:
    """Parents (-1 for a root), chains likelier than brooms, and ancestor words int64 `[1, T]`."""
    parents, words = [-1], [1]
    for t in range(1, T):
        parents.append(max(-1, t - 1 - int(torch.empty(()).exponential_(0.5))))
        words.append((words[parents[t]] if parents[t] >= 0 else 0) | 1 << t)
    return parents, torch.tensor([[word - (1 << 64) if word >> 63 else word for word in words]])


def path_to(node: int, parents: list[int]) -> list[int]:
    return [] if node < 0 else [*path_to(parents[node], parents), node]


def inputs(
    B: int, H: int, G: int, T: int, D: int, prefix: list[int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slots that no row sees are poison."""
    C = max(prefix) + T + 3
    q, k, v = (torch.randn(B, heads, n, D).to(dtype) for heads, n in ((H, T), (G, C), (G, C)))
    for b, first in enumerate(prefix):
        k[b, :, first + T :] = v[b, :, first + T :] = torch.nan
    return q, k, v, torch.tensor(prefix, dtype=torch.int32)


def chain(call: Call, q: Tensor, k: Tensor, v: Tensor, prefix: int, window: int = 0) -> tuple[Tensor, Tensor]:
    return call(q, k, v, torch.tensor([prefix], dtype=torch.int32), None, window, q.shape[3] ** -0.5)


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: object) -> None:
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert same_bits(a, b), f"{name} of {what} has other bits"


def test_implementations_exist() -> None:
    assert IMPLEMENTATIONS, scrimp.which("tree_attention")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["chain", "tree", "window"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oracle(name: str, dtype: str, mask: str, shape: Any) -> None:
    q, k, v, prefix = inputs(*shape, DTYPES[dtype])
    words = random_tree(q.shape[2])[1] if mask == "tree" else None
    args = (q, k.nan_to_num(), v, prefix, words, 50 if mask == "window" else 0, q.shape[3] ** -0.5)
    got = IMPLEMENTATIONS[name](q, k, *args[2:])
    assert got[0].transpose(1, 2).is_contiguous()
    assert_matches_oracle(got, OP.reference, *args, names=NAMES)


def test_reference_is_softmax_attention() -> None:
    q, k, v, _ = inputs(1, 4, 2, 5, 16, [9])
    out, lse = chain(OP.reference, q, k.nan_to_num(), v, 9)
    mask = torch.ones(5, 14, dtype=torch.bool).tril(9)
    k, v = k[:, :, :14].repeat_interleave(2, 1), v[:, :, :14].repeat_interleave(2, 1)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, mask))
    torch.testing.assert_close(lse, (q @ k.mT / 4).masked_fill(~mask, -torch.inf).logsumexp(3))


@pytest.mark.parametrize("name", ALL)
def test_by_hand(name: str) -> None:
    """One cached key and a root with two children, all scores 0: means of the values that a row sees."""
    q, k = torch.zeros(1, 1, 3, 1), torch.zeros(1, 1, 4, 1)
    v = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 1, 4, 1)
    words = torch.tensor([[0b001, 0b011, 0b101]])
    out, lse = ALL[name](q, k, v, torch.tensor([1], dtype=torch.int32), words, 0, 1.0)
    torch.testing.assert_close(out.flatten(), torch.tensor([3 / 2, 7 / 3, 11 / 3]))
    torch.testing.assert_close(lse.flatten(), torch.tensor([2.0, 3.0, 3.0]).log())


@pytest.mark.parametrize("name", ALL)
def test_rows_without_keys(name: str) -> None:
    q, k, v, prefix = inputs(2, 2, 1, 3, 8, [0, 0])
    words = torch.tensor([[0, 0b010, 0], [0, 0, 0]])
    out, lse = ALL[name](q, k.nan_to_num(), v, prefix, words, 0, 1.0)
    assert not out[0, :, [0, 2]].any()
    assert not out[1].any()
    assert torch.equal(lse.isneginf(), words.eq(0).unsqueeze(1).expand(2, 2, 3))
    torch.testing.assert_close(out[0, :, 1], v[0, :, 1].expand(2, 8))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided(name: str, dtype: str) -> None:
    """Queries of one linear's output, caches [B, C, G, D], gaps in the last dimension, a word per sequence."""
    q = torch.randn(2, 5, 6, 40).to(DTYPES[dtype]).transpose(1, 2)
    k, v = torch.randn(2, 2, 90, 3, 40).to(DTYPES[dtype]).transpose(2, 3)
    words = torch.cat([random_tree(5)[1] for _ in range(4)])[::2]
    prefix = torch.tensor([70, 0, 81, 0], dtype=torch.int32)[::2]
    for some in ((q, k, v), (q[..., ::2], k[..., ::2], v[..., 1::2])):
        args = (*some, prefix, words, 0, 0.2)
        assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args, names=NAMES)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 8, []), (1, 0, 0, 3, 8, [5]), (2, 2, 1, 0, 8, [0, 5])], ids=str)
def test_zero_size(name: str, shape: Any) -> None:
    B, H, G, T, D, prefix = shape
    q, k = torch.zeros(B, H, T, D), torch.zeros(B, G, 9, D)
    out, lse = ALL[name](q, k, k, torch.tensor(prefix, dtype=torch.int32), None, 0, 1.0)
    assert out.shape == (B, H, T, D)
    assert lse.shape == (B, H, T)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_without_dimensions(name: str) -> None:
    q, k = torch.zeros(1, 2, 3, 0), torch.zeros(1, 2, 700, 0)
    out, lse = IMPLEMENTATIONS[name](q, k, k, torch.tensor([600], dtype=torch.int32), None, 0, 1.0)
    assert out.shape == (1, 2, 3, 0)
    torch.testing.assert_close(lse, torch.tensor([601.0, 602.0, 603.0]).log().expand(1, 2, 3))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", EXACT, ids=str)
def test_a_tree_has_the_bits_of_its_paths(name: str, dtype: str, shape: Any) -> None:
    """Every root-to-node path, decoded as a plain chain behind the same prefix, beside nothing but poison."""
    H, G, T, D, prefix = shape
    call = IMPLEMENTATIONS[name]
    q, k, v, start = inputs(1, H, G, T, D, [prefix], DTYPES[dtype])
    parents, words = random_tree(T)
    tree = call(q, k, v, start, words, 0, D**-0.5)
    for leaf in set(range(T)) - set(parents):
        path = path_to(leaf, parents)
        slots, poison = [prefix + node for node in path], k.new_full((1, G, 2, D), torch.nan)
        path_k, path_v = (torch.cat((x[:, :, :prefix], x[:, :, slots], poison), 2) for x in (k, v))
        got = chain(call, q[:, :, path], path_k, path_v, prefix)
        assert_same(got, tuple(x[:, :, path] for x in tree), f"the path {path} at once")
        if leaf == T - 1:
            for i, node in enumerate(path):
                alone = chain(call, q[:, :, node : node + 1], path_k, path_v, prefix + i)
                assert_same(alone, tuple(x[:, :, node : node + 1] for x in tree), f"row {i} of the path {path}")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 10, 64, 100, 600])
def test_a_chain_has_the_bits_of_its_tokens(name: str, dtype: str, window: int) -> None:
    """Token by token over a growing prefix, for every number of tokens at once; keys left of a window are poison."""
    call, rows = IMPLEMENTATIONS[name], 64
    q, k, v, _ = inputs(1, 3, 1, rows, 40, [470], DTYPES[dtype])
    if window:
        k[:, :, : max(0, 471 - window)] = v[:, :, : max(0, 471 - window)] = torch.nan
    alone = [chain(call, q[:, :, t : t + 1], k, v, 470 + t, window) for t in range(rows)]
    every = tuple(torch.cat(parts, 2) for parts in zip(*alone, strict=True))
    assert not every[0].isnan().any()
    for count in (1, 2, 3, 5, 6, 7, 16, 31, 40, 63, 64):
        first = (11 * count) % (rows + 1 - count)
        some = slice(first, first + count)
        got = chain(call, q[:, :, some], k, v, 470 + first, window)
        assert_same(got, tuple(x[:, :, some] for x in every), f"{count} tokens from {first} on")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sequence_does_not_depend_on_the_others(name: str, threads: int) -> None:
    """Ragged batches, whole and in parts, and groups of heads alone; enough work for two threads."""
    call, before, prefix = IMPLEMENTATIONS[name], torch.get_num_threads(), [1500, 0, 63, 900]
    q, k, v, start = inputs(4, 6, 2, 8, 64, prefix)
    words = torch.cat([random_tree(8)[1] for _ in range(4)])
    torch.set_num_threads(threads)
    try:
        whole = call(q, k, v, start, words, 0, 0.125)
        again = call(q, k, v, start, words, 0, 0.125)
    finally:
        torch.set_num_threads(before)
    assert_same(again, whole, "a second call")
    for some in (slice(0, 1), slice(1, 2), slice(2, 4), slice(1, 4)):
        got = call(q[some], k[some], v[some], start[some], words[some], 0, 0.125)
        assert_same(got, tuple(x[some] for x in whole), f"sequences {some}")
    got = call(q[:, 3:], k[:, 1:], v[:, 1:], start, words, 0, 0.125)
    assert_same(got, tuple(x[:, 3:] for x in whole), "the second group")
    spoiled = [x.clone() for x in (q, k, v)]
    for x in spoiled:
        x[1::2] = torch.nan
    assert_same(tuple(x[::2] for x in call(*spoiled, start, words, 0, 0.125)), tuple(x[::2] for x in whole), "poison")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e30])
def test_a_row_does_not_see_hidden_rows(name: str, dtype: str, poison: float) -> None:
    """The rows off one path, their queries, keys and values, are poison."""
    q, k, v, start = inputs(1, 6, 2, 40, 64, [50], DTYPES[dtype])
    parents, words = random_tree(40)
    clean = IMPLEMENTATIONS[name](q, k, v, start, words, 0, 0.125)
    path = path_to(39, parents)
    others = [t for t in range(40) if t not in path]
    for x, first in ((q, 0), (k, 50), (v, 50)):
        x[:, :, [first + t for t in others]] = poison
    spoiled = IMPLEMENTATIONS[name](q, k, v, start, words, 0, 0.125)
    assert_same(tuple(x[:, :, path] for x in spoiled), tuple(x[:, :, path] for x in clean), "the path beside poison")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_what_a_row_sees_may_be_extreme(name: str) -> None:
    """Scores far beyond exp's range; a NaN or an infinite score makes NaN of its rows and of no other."""
    q, k, v, start = inputs(1, 1, 1, 4, 8, [600])
    args = (1e3 * q, k.nan_to_num(), v, start, None, 0, 1.0)
    assert_matches_oracle(IMPLEMENTATIONS[name](*args), OP.reference, *args, names=NAMES)
    k[:, :, 602, 0], q[:, :, 3] = torch.inf, torch.nan
    out, _ = IMPLEMENTATIONS[name](q, k, v, start, None, 0, 1.0)
    assert out[0, 0, :2].isfinite().all()
    assert out[0, 0, 3].isnan().all()


def test_python_threads_do_not_disturb_each_other() -> None:
    args = inputs(2, 4, 2, 5, 64, [1300, 800])
    expected = scrimp.ops.tree_attention(*args)
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: scrimp.ops.tree_attention(*args), range(50)):
            assert_same(got, expected, "a call among others")


def test_opcheck() -> None:
    for shape in SHAPES[:4]:
        q, k, v, prefix = inputs(*shape)  # type: ignore[arg-type]
        for words in (None, random_tree(q.shape[2])[1]):
            opcheck(OP.call, (q, k.nan_to_num(), v.nan_to_num(), prefix, words, 0, 0.1))


def test_compiles_and_exports_as_one_node() -> None:
    args, graphs = (*inputs(*SHAPES[1]), random_tree(5)[1]), []  # type: ignore[arg-type]

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    class Layer(torch.nn.Module):
        def forward(self, *args: Tensor) -> tuple[Tensor, Tensor]:
            return scrimp.ops.tree_attention(*args)

    expected = scrimp.ops.tree_attention(*args)
    assert_same(torch.compile(scrimp.ops.tree_attention, backend=record, fullgraph=True)(*args), expected, "compiled")
    exported = torch.export.export(Layer(), args).module()
    assert_same(exported(*args), expected, "exported")
    for graph in (*graphs, exported):
        assert [str(node.target) for node in graph.graph.nodes].count("scrimp.tree_attention.default") == 1


Q, K, PREFIX, WORDS = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 20, 8), torch.zeros(2).int(), torch.zeros(1, 3).long()
BAD = {
    "rank of q": ((Q[0], K, K, PREFIX), r"q must be \[batch, heads, tokens, D\], got shape \[4, 3, 8\]"),
    "rows": ((Q.repeat(1, 1, 22, 1), K.repeat(1, 1, 9, 1), K.repeat(1, 1, 9, 1), PREFIX), "T=66 new rows are more"),
    "heads": ((Q[:, :3], K, K, PREFIX), "3 query heads are not a multiple of 2 key/value heads"),
    "head size": ((Q, K[..., :4], K[..., :4], PREFIX), "batch or head size differ"),
    "batch": ((Q, K[:1], K[:1], PREFIX), "batch or head size differ"),
    "large head": ((Q.repeat(1, 1, 1, 33), *[K.repeat(1, 1, 1, 33)] * 2, PREFIX), "head size D=264 is above 256"),
    "shape of v": ((Q, K, K[:, :, :9], PREFIX), r"shape of v is \(2, 2, 9, 8\)"),
    "dtype of k": ((Q, K.bfloat16(), K, PREFIX), "dtype of k is torch.bfloat16"),
    "integers": ((Q.int(), K.int(), K.int(), PREFIX), "q is int32; it must be float32"),
    "dtype of prefix": ((Q, K, K, PREFIX.long()), "prefix is int64; it must be int32"),
    "shape of prefix": ((Q, K, K, PREFIX[:1]), r"prefix has shape \[1\], expected \[2\]"),
    "dtype of ancestors": ((Q, K, K, PREFIX, WORDS.int()), "ancestors is int32; it must be int64"),
    "rank of ancestors": ((Q, K, K, PREFIX, WORDS[0]), r"ancestors has shape \[3\], expected \[1 or 2, 3\]"),
    "rows of ancestors": ((Q, K, K, PREFIX, WORDS[:, :2]), r"ancestors has shape \[1, 2\], expected \[1 or 2, 3\]"),
    "batch of ancestors": ((Q, K, K, PREFIX, WORDS.expand(3, 3)), r"ancestors has shape \[3, 3\]"),
    "negative window": ((Q, K, K, PREFIX, None, -1), "window=-1 must not be negative"),
    "window of a tree": ((Q, K, K, PREFIX, WORDS, 5), "window=5 goes with the chain only"),
    "scale": ((Q, K, K, PREFIX, None, 0, torch.inf), "scale=inf must be finite"),
    "device": ((Q, K, K.to("meta"), PREFIX), "device of v is meta"),
    "device of prefix": ((Q, K, K, PREFIX.to("meta")), "device of prefix is meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    args, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        scrimp.ops.tree_attention(*args)
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        OP.call(*args, *(None, 0, 1.0)[len(args) - 4 :])


@pytest.mark.parametrize("name", ALL)
def test_values_out_of_range(name: str) -> None:
    """Refused by name; kernels of a GPU clamp them, for to look at values would be to wait for the device."""
    if name.startswith("cuda"):
        assert_clamped(ALL[name])
        return
    for prefix, words in (
        ([0, 18], r"prefix\[1\]=18 and 3 new rows leave the cache's 20 slots"),
        ([-1, 0], "=-1 and 3"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=words):
            ALL[name](Q, K, K, torch.tensor(prefix, dtype=torch.int32), None, 0, 1.0)
    for word in (1 << 3, -1, -(1 << 63)):
        with pytest.raises((ValueError, RuntimeError), match="ancestors has bits set beyond its T=3 new rows"):
            ALL[name](Q, K, K, PREFIX, torch.tensor([[1, word, 1]]), 0, 1.0)


def assert_clamped(call: Call) -> None:
    for prefix, clamped in (([0, 18], [0, 17]), ([-1, 5], [0, 5])):
        got, expected = (
            call(Q, K, K, torch.tensor(some, dtype=torch.int32), None, 0, 1.0) for some in (prefix, clamped)
        )
        assert_same(got, expected, f"prefix {prefix}")
    words = torch.tensor([[1, -1, 1 | 1 << 3]])
    got, expected = (call(Q, K, K, PREFIX, some, 0, 1.0) for some in (words, words & 0b111))
    assert_same(got, expected, "words with bits beyond the rows")


def test_gradients_are_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match="scrimp::tree_attention has no backward"):
        scrimp.ops.tree_attention(Q, K.clone().requires_grad_(), K, PREFIX)
