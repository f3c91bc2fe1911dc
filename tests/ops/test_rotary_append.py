"""rotary_append against its reference, Hugging Face's rotation and its contract."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import scrimp
from scrimp._registry import OPS
from scrimp.testing import assert_matches_oracle, same_bits

OP = OPS["rotary_append"]
IMPLEMENTATIONS = scrimp.implementations("rotary_append")
ALL = IMPLEMENTATIONS | {"reference": OP.reference}
ON_HOST = [name for name in ALL if not name.startswith("cuda")]  # those that look at values before they write
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = ("q", "k_cache", "v_cache")
# B, T, H, G, D, R
SHAPES = [(1, 1, 1, 1, 2, 2), (2, 5, 6, 2, 64, 64), (1, 64, 3, 3, 40, 20), (3, 2, 4, 1, 19, 6), (1, 3, 2, 1, 8, 0)]
P = 100  # rows of cos and sin


def inputs(B: int, T: int, H: int, G: int, D: int, R: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k and v are views of one linear's output; each sequence starts at its own slot."""
    q, k, v = torch.randn(B, T, H + 2 * G, D).to(dtype).split((H, G, G), 2)
    angle = 6 * torch.rand(P, R)
    positions = torch.randint(P, (B, T), dtype=torch.int32)
    start = torch.randint(7, (B,), dtype=torch.int32)
    caches = [torch.randn(B, G, T + 6, D).to(dtype) for _ in range(2)]
    return [q, k, v, angle.cos(), angle.sin(), positions, start, *caches]


def on_copies(call: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The op on copies of the caches, which it returns too."""

    def run(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        caches = [cache.clone() for cache in args[7:]]
        return call(*args[:7], *caches), *caches  # type: ignore[return-value]

    return run


def test_implementations_exist() -> None:
    assert IMPLEMENTATIONS, scrimp.which("rotary_append")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oracle(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    args = inputs(*shape, DTYPES[dtype])
    got = on_copies(IMPLEMENTATIONS[name])(*args)
    assert_matches_oracle(got, on_copies(OP.reference), *args, names=NAMES)


@pytest.mark.parametrize("name", ALL)
def test_is_hugging_faces_rotation(name: str) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, v, cos, sin, positions, start, k_cache, v_cache = inputs(1, 5, 4, 2, 16, 16)
    got = ALL[name](q, k, v, cos, sin, positions, start, k_cache, v_cache)
    rows, slots = positions.long(), slice(int(start), int(start) + 5)
    expected = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos[rows], sin[rows])
    torch.testing.assert_close(got, expected[0], atol=3e-7, rtol=0)
    torch.testing.assert_close(k_cache[:, :, slots], expected[1], atol=3e-7, rtol=0)
    assert torch.equal(v_cache[:, :, slots], v.transpose(1, 2))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_its_slots_and_nothing_else(name: str, dtype: str) -> None:
    args = inputs(3, 4, 4, 2, 19, 8, DTYPES[dtype])
    for cache in args[7:]:
        cache.fill_(torch.nan)
    ALL[name](*args)
    for cache in args[7:]:
        for b, first in enumerate(args[6].tolist()):
            slots = torch.arange(cache.shape[2])
            new = (slots >= first) & (slots < first + 4)
            assert cache[b].isnan().all(-1).equal(~new.expand(2, -1))
            assert not cache[b, :, new].isnan().any()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided(name: str, dtype: str) -> None:
    """Caches in another order and inside a larger one; k and v with gaps; positions and start with gaps."""
    q, k, v, cos, sin, positions, start, *_ = inputs(2, 5, 6, 2, 24, 16, DTYPES[dtype])
    k, v = (torch.stack((x, x), 4).flatten(3)[..., ::2] for x in (k, v))
    positions, start = positions.repeat_interleave(3, 1)[:, ::3], start.repeat_interleave(2)[::2]
    cos, sin = cos.T.contiguous().T, torch.cat((sin, sin), 1)[:, :16]
    large = torch.randn(2, 20, 5, 2, 32).to(q.dtype)  # B, C, _, G, D
    k_cache, v_cache = large[:, :, 1, :, :24].transpose(1, 2), large[:, 3:, 4, :, 4:28].transpose(1, 2)
    args = (q, k, v, cos, sin, positions, start, k_cache[:, :, :17], v_cache)
    expected = on_copies(OP.reference)(*args)
    before = large.clone()
    got = IMPLEMENTATIONS[name](*args)
    assert_matches_oracle((got, *args[7:]), lambda *_: expected, names=NAMES)
    untouched = [large[:, :, 0], large[:, :, 2:4], large[:, :, 1, :, 24:], large[:, :, 4, :, :4]]
    for now, then in zip(
        untouched, [before[:, :, 0], before[:, :, 2:4], before[:, :, 1, :, 24:], before[:, :, 4, :, :4]], strict=True
    ):
        assert torch.equal(now, then)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "shape",
    [(0, 2, 3, 1, 8, 8), (2, 0, 3, 1, 8, 8), (2, 3, 0, 0, 8, 8), (2, 3, 0, 1, 8, 4), (2, 3, 4, 2, 0, 0)],
    ids=str,
)
def test_zero_size(name: str, shape: tuple[int, ...]) -> None:
    args = inputs(*shape)
    for got, expected in zip(on_copies(IMPLEMENTATIONS[name])(*args), on_copies(OP.reference)(*args), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_token_does_not_depend_on_the_others(name: str, dtype: str, threads: int) -> None:
    """Bitwise, for every number of tokens and beside poison; 64 tokens of 18 heads are shared by the threads."""
    run, before = on_copies(IMPLEMENTATIONS[name]), torch.get_num_threads()
    q, k, v, cos, sin, positions, start, k_cache, v_cache = inputs(1, 64, 12, 3, 70, 40, DTYPES[dtype])

    def tokens(some: slice) -> list[Tensor]:
        first = start + some.start
        args = (q[:, some], k[:, some], v[:, some], cos, sin, positions[:, some], first, k_cache, v_cache)
        new_q, *caches = run(*args)
        slots = slice(int(first), int(first) + new_q.shape[2])
        return [new_q, *(cache[:, :, slots] for cache in caches)]

    torch.set_num_threads(threads)
    try:
        alone = [torch.cat(parts, 2) for parts in zip(*(tokens(slice(t, t + 1)) for t in range(64)), strict=True)]
        for count in range(1, 65):
            begin = (7 * count) % (65 - count)
            some = slice(begin, begin + count)
            assert all(same_bits(a, b[:, :, some]) for a, b in zip(tokens(some), alone, strict=True)), count
        for x in (q, k, v):
            x[:, ::2] = torch.nan
        assert all(same_bits(a[:, :, 1::2], b[:, :, 1::2]) for a, b in zip(tokens(slice(0, 64)), alone, strict=True))
    finally:
        torch.set_num_threads(before)


def test_opcheck() -> None:
    for shape in SHAPES[1:4]:
        opcheck(OP.call, inputs(*shape))


def test_compiles_and_exports_as_one_node() -> None:
    args, graphs = inputs(*SHAPES[1]), []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    class Layer(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return scrimp.ops.rotary_append(*args)

    expected = on_copies(scrimp.ops.rotary_append)(*args)
    compiled = torch.compile(scrimp.ops.rotary_append, backend=record, fullgraph=True)
    exported = torch.export.export(Layer(), tuple(args)).module()
    for call in (compiled, exported):
        assert all(same_bits(a, b) for a, b in zip(on_copies(call)(*args), expected, strict=True))
    for graph in (*graphs, exported):
        assert [str(node.target) for node in graph.graph.nodes].count("scrimp.rotary_append.default") == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_writes_survive_functionalization(backend: str) -> None:
    """A compiled function sees the cache as it was before the op, and as it is after it."""

    def step(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before = args[7] * 2
        q = scrimp.ops.rotary_append(*args)
        return q, before, args[7] * 2

    args = inputs(*SHAPES[1])
    ours, theirs = ([*args[:7], args[7].clone(), args[8].clone()] for _ in range(2))
    for got, expected in zip(torch.compile(step, backend=backend, fullgraph=True)(*ours), step(*theirs), strict=True):
        assert torch.equal(got, expected)
    for got, expected, old in zip(ours[7:], theirs[7:], args[7:], strict=True):
        assert torch.equal(got, expected)
        assert not torch.equal(got, old)


def replaced(**values: Tensor) -> list[Tensor]:
    names = ("q", "k", "v", "cos", "sin", "positions", "start", "k_cache", "v_cache")
    zeros = (torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 2, 8), torch.zeros(2, 3, 2, 8), torch.zeros(P, 6))
    integers = (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    every = (*zeros, zeros[3], *integers, torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 8))
    return list((dict(zip(names, every, strict=True)) | values).values())


BAD = {
    "rank of q": (replaced(q=torch.zeros(2, 3, 8)), r"q and k must be \[B, T, heads, D\], got shapes \[2, 3, 8\]"),
    "shape of v": (replaced(v=torch.zeros(2, 3, 1, 8)), r"shape of v is \(2, 3, 1, 8\)"),
    "tokens of k": (replaced(k=torch.zeros(2, 4, 2, 8)), r"shape of k is \(2, 4, 2, 8\)"),
    "integer q": (replaced(q=torch.zeros(2, 3, 4, 8).int()), "q is int32; it must be float32"),
    "dtype of k": (replaced(k=torch.zeros(2, 3, 2, 8).bfloat16()), "dtype of k is torch.bfloat16"),
    "dtype of v_cache": (replaced(v_cache=torch.zeros(2, 2, 5, 8).half()), "dtype of v_cache is torch.float16"),
    "dtype of cos": (replaced(cos=torch.zeros(P, 6).bfloat16()), "cos is bfloat16; it must be float32"),
    "dtype of sin": (replaced(sin=torch.zeros(P, 6).double()), "dtype of sin is torch.float64"),
    "dtype of positions": (replaced(positions=torch.zeros(2, 3).long()), "positions is int64; it must be int32"),
    "dtype of start": (replaced(start=torch.zeros(2)), "start is float32; it must be int32"),
    "shape of positions": (replaced(positions=torch.zeros(3, 3).int()), r"shape of positions is \(3, 3\)"),
    "shape of start": (replaced(start=torch.zeros(3).int()), r"shape of start is \(3,\)"),
    "rank of k_cache": (
        replaced(k_cache=torch.zeros(2, 5, 8), v_cache=torch.zeros(2, 5, 8)),
        r"k_cache has shape \[2, 5, 8\], expected \[2, 2, capacity, 8\]",
    ),
    "heads of the cache": (
        replaced(k_cache=torch.zeros(2, 3, 5, 8), v_cache=torch.zeros(2, 3, 5, 8)),
        r"k_cache has shape \[2, 3, 5, 8\]",
    ),
    "capacity of v_cache": (replaced(v_cache=torch.zeros(2, 2, 4, 8)), r"shape of v_cache is \(2, 2, 4, 8\)"),
    "shape of sin": (replaced(sin=torch.zeros(P, 4)), r"shape of sin is \(100, 4\)"),
    "odd rotary": (replaced(cos=torch.zeros(P, 5), sin=torch.zeros(P, 5)), r"cos has shape \[100, 5\], expected"),
    "wide rotary": (replaced(cos=torch.zeros(P, 10), sin=torch.zeros(P, 10)), "even number up to D=8"),
    "device": (replaced(start=torch.zeros(2, device="meta").int()), "device of start is meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    args, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        scrimp.ops.rotary_append(*args)
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        OP.call(*args)


OUTSIDE = {
    "position": ({"positions": torch.tensor([[0, 1, 2], [3, 4, P]], dtype=torch.int32)}, "position 100 is outside"),
    "negative position": ({"positions": torch.full((2, 3), -1, dtype=torch.int32)}, "position -1 is outside the 100"),
    "slot": ({"start": torch.tensor([0, 3], dtype=torch.int32)}, r"start\[1\]=3 and 3 new rows leave .* 5 slots"),
    "negative slot": ({"start": torch.tensor([-1, 0], dtype=torch.int32)}, r"start\[0\]=-1 and 3 new rows"),
    "far slot": ({"start": torch.tensor([0, 2**31 - 1], dtype=torch.int32)}, r"start\[1\]=2147483647"),
}


@pytest.mark.parametrize("name", ON_HOST)
@pytest.mark.parametrize("case", OUTSIDE)
def test_values_out_of_range_raise_before_anything_is_written(name: str, case: str) -> None:
    change, words = OUTSIDE[case]
    args = replaced(**change)
    for x in args[:3]:
        x.fill_(7)
    with pytest.raises((ValueError, RuntimeError), match=words):
        ALL[name](*args)
    assert not any(cache.any() for cache in args[7:])


@pytest.mark.parametrize("name", [name for name in ON_HOST if name in IMPLEMENTATIONS])
@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
def test_caches_that_cannot_be_written(name: str, cache: str) -> None:
    for shape in (torch.zeros(2, 2, 5, 1).expand(-1, -1, -1, 8), torch.zeros(1, 2, 5, 8).expand(2, -1, -1, -1)):
        with pytest.raises(RuntimeError, match=f"{cache} must have a contiguous last dimension and no expanded one"):
            IMPLEMENTATIONS[name](*replaced(**{cache: shape}))


def test_gradients_are_refused_by_name() -> None:
    args = replaced()
    args[0].requires_grad_()
    with pytest.raises(RuntimeError, match="scrimp::rotary_append has no backward"):
        scrimp.ops.rotary_append(*args)
