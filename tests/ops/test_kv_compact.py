"""kv_compact against its reference and its contract."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import scrimp
from scrimp._registry import OPS
from scrimp.testing import same_bits

OP = OPS["kv_compact"]
IMPLEMENTATIONS = scrimp.implementations("kv_compact")
ALL = IMPLEMENTATIONS | {"reference": OP.reference}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# L, B, G, C, D, T
SHAPES = [(1, 1, 1, 1, 1, 1), (4, 2, 3, 30, 16, 8), (60, 3, 3, 80, 19, 64), (2, 1, 8, 200, 128, 20)]


def inputs(L: int, B: int, G: int, C: int, D: int, T: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random ascending paths of all lengths from 0 to T, and starts that leave them room."""
    cache = torch.randn(L, B, G, C, D).to(dtype)
    path = torch.full((B, T), -1, dtype=torch.int32)
    for b in range(B):
        count = int(torch.randint(T + 1, ()))
        path[b, :count] = torch.randperm(T)[:count].sort().values
    start = torch.randint(C - T + 1, (B,), dtype=torch.int32)
    return [cache, start, path]


def moved(call: Any, cache: Tensor, start: Tensor, path: Tensor) -> Tensor:
    """The op on a copy of the cache."""
    cache = cache.clone()
    assert call(cache, start, path) is None
    return cache


def test_implementations_exist() -> None:
    assert IMPLEMENTATIONS, scrimp.which("kv_compact")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_reference(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    for _ in range(4):
        args = inputs(*shape, DTYPES[dtype])
        assert same_bits(moved(IMPLEMENTATIONS[name], *args), moved(OP.reference, *args))


@pytest.mark.parametrize("name", ALL)
def test_by_hand(name: str) -> None:
    """Rows 0, 2, 3, 6 of slots 10 and on; the second sequence keeps its first three and is not touched."""
    cache = torch.arange(2 * 40.0).view(1, 2, 1, 40, 1)
    path = torch.tensor([[0, 2, 3, 6], [0, 1, 2, -1]], dtype=torch.int32)
    got = moved(ALL[name], cache, torch.tensor([10, 3], dtype=torch.int32), path)
    assert got[0, 0, 0, 10:14, 0].tolist() == [10, 12, 13, 16]
    got[0, 0, 0, 10:14] = cache[0, 0, 0, 10:14]
    assert torch.equal(got, cache)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("threads", [1, 2])
def test_strided_and_threads(name: str, threads: int) -> None:
    """The engine's memory with layers and keys/values as one dimension, and slots before heads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _, start, path = inputs(1, 2, 1, 300, 1, 60)
        memory = torch.randn(30, 2, 2, 3, 300, 64)
        expected = moved(OP.reference, memory.flatten(0, 1), start, path)
        IMPLEMENTATIONS[name](memory.flatten(0, 1), start, path)
        assert torch.equal(memory.flatten(0, 1), expected)
        turned = torch.randn(5, 2, 300, 3, 40)
        view = turned[..., 4:20].transpose(2, 3)
        expected, rest = moved(OP.reference, view, start, path), turned[..., 20:].clone()
        numbers = (torch.stack([x, x], -1)[..., 0] for x in (start, path))
        IMPLEMENTATIONS[name](view, *numbers)
        assert torch.equal(view, expected)
        assert torch.equal(turned[..., 20:], rest)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "shape",
    [(0, 1, 1, 4, 2, 2), (2, 0, 1, 4, 2, 2), (2, 1, 0, 4, 2, 2), (2, 1, 1, 4, 0, 2), (2, 1, 1, 4, 2, 0)],
    ids=str,
)
def test_zero_size(name: str, shape: tuple[int, ...]) -> None:
    args = inputs(*shape)
    assert same_bits(moved(ALL[name], *args), moved(OP.reference, *args))


def test_opcheck() -> None:
    for shape in SHAPES[:2]:
        opcheck(OP.call, inputs(*shape))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_writes_survive_functionalization(backend: str) -> None:
    def step(cache: Tensor, start: Tensor, path: Tensor) -> tuple[Tensor, Tensor]:
        before = cache * 2
        scrimp.ops.kv_compact(cache, start, path)
        return before, cache * 2

    args = [torch.randn(2, 1, 1, 9, 4), torch.tensor([1]).int(), torch.tensor([[0, 3, 5]]).int()]
    ours, theirs = ([args[0].clone(), *args[1:]] for _ in range(2))
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for got, expected in zip(compiled(*ours), step(*theirs), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(ours[0], theirs[0])
    assert not torch.equal(ours[0], args[0])


def test_exports_as_one_node() -> None:
    class Layer(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            scrimp.ops.kv_compact(*args)
            return args[0]

    args = inputs(*SHAPES[1])
    graph = torch.export.export(Layer(), tuple(args))
    assert [str(node.target) for node in graph.graph.nodes].count("scrimp.kv_compact.default") == 1
    expected = moved(OP.reference, *args)
    assert torch.equal(graph.module()(*args), expected)


CACHE, START, PATH = torch.zeros(2, 2, 1, 9, 4), torch.zeros(2).int(), torch.tensor([[0, 2, -1]] * 2).int()
BAD = {
    "rank": ((CACHE[0], START, PATH), r"cache must be \[L, B, G, C, D\], got shape \[2, 1, 9, 4\]"),
    "integers": ((CACHE.int(), START, PATH), "cache is int32; it must be float32"),
    "dtype of start": ((CACHE, START.long(), PATH), "start is int64; it must be int32"),
    "dtype of path": ((CACHE, START, PATH.long()), "path is int64; it must be int32"),
    "shape of start": ((CACHE, START[:1], PATH), r"start has shape \[1\], expected \[2\]"),
    "shape of path": ((CACHE, START, PATH[:1]), r"path has shape \[1, 3\], expected \[2, T\]"),
    "rank of path": ((CACHE, START, PATH[0]), r"path has shape \[3\], expected \[2, T\]"),
    "device": ((CACHE, START, PATH.to("meta")), "device of path is meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    args, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        scrimp.ops.kv_compact(*args)
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        OP.call(*args)


OUTSIDE = {
    "order": ([0, 0], [[0, 2, 3], [0, 3, 2]], r"path\[1, 2\]=2 does not come after 3"),
    "twice": ([0, 0], [[0, 2, 2], [0, -1, -1]], r"path\[0, 2\]=2 does not come after 2"),
    "negative": ([0, 0], [[0, -2, 3], [0, -1, -1]], r"path\[0, 1\]=-2 does not come after 0"),
    "end": ([0, 6], [[0, 1, 2], [0, 1, 3]], r"start\[1\]=6 and row 3 leave the cache's 9 slots"),
    "far": ([0, 2**31 - 1], [[0, 1, 2], [0, 1, 3]], r"start\[1\]=2147483647 and row 3"),
    "before": ([-1, 0], [[0, 1, 2], [0, 1, 3]], r"start\[0\]=-1 and row 2"),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("case", OUTSIDE)
def test_values_out_of_range_raise_before_anything_moves(name: str, case: str) -> None:
    start, path, words = OUTSIDE[case]
    cache = torch.randn(2, 2, 1, 9, 4)
    before = cache.clone()
    with pytest.raises((ValueError, RuntimeError), match=words):
        ALL[name](cache, torch.tensor(start).int(), torch.tensor(path).int())
    assert torch.equal(cache, before)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_caches_that_cannot_be_written(name: str) -> None:
    for cache in (torch.zeros(2, 2, 1, 9, 8)[..., ::2], torch.zeros(1, 2, 1, 9, 4).expand(2, -1, -1, -1, -1)):
        with pytest.raises(RuntimeError, match="cache must have a contiguous last dimension and no expanded one"):
            IMPLEMENTATIONS[name](cache, START, PATH)


def test_gradients_are_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match="scrimp::kv_compact has no backward"):
        scrimp.ops.kv_compact(CACHE.clone().requires_grad_(), START, PATH)
