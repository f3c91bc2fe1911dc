"""tree_attention's compiled kernels: a row has the bits of its path decoded token by token, whatever is beside it."""

from collections.abc import Callable

import pytest
import torch
from cuda_device import call
from emulate import compile_launches, execute
from scrimp.kernels.tree_attention import launches
from subjects.tree_attention import tree
from torch import Tensor

from scrimp.testing import same_bits

State = tuple[Tensor, Tensor]


def prepared(q: Tensor, k: Tensor, v: Tensor, prefix: list[int], words: Tensor | None, window: int = 0) -> tuple:
    return launches(q, k, v, torch.tensor(prefix, dtype=torch.int32), words, window, 0.125)


def by_triton(q: Tensor, k: Tensor, v: Tensor, prefix: list[int], words: Tensor | None, window: int = 0) -> State:
    result, made = prepared(q, k, v, prefix, words, window)
    execute(made)
    return result


def by_cuda(q: Tensor, k: Tensor, v: Tensor, prefix: list[int], words: Tensor | None) -> State:
    return call("tree_attention", q, k, v, torch.tensor(prefix, dtype=torch.int32), words, 0, 0.125)[0]


@pytest.fixture(params=[by_triton, by_cuda])
def run(request: pytest.FixtureRequest) -> Callable[..., State]:
    return request.param


def assert_same(got: State, expected: State) -> None:
    assert all(same_bits(a.contiguous(), b.contiguous()) for a, b in zip(got, expected, strict=True))


def inputs(H: int, G: int, T: int, slots: int, D: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(1, H, T, D).half(), torch.randn(1, G, slots, D).half(), torch.randn(1, G, slots, D).half()


def test_a_tree_has_the_bits_of_its_paths(run) -> None:
    """On both sides of a block and of a split; rows and keys off a path are poison."""
    T = 12
    words = tree(T)
    for prefix in (3, 60, 124, 508):
        q, k, v = inputs(3, 1, T, prefix + T)
        whole = run(q, k, v, [prefix], words[None])
        for leaf in (T - 1, T - 3):
            path = [t for t in range(T) if int(words[leaf]) >> t & 1]
            slots = [prefix + t for t in path]
            some_k, some_v = (torch.cat((x[:, :, :prefix], x[:, :, slots]), 2) for x in (k, v))
            assert_same(
                run(q[:, :, path], some_k, some_v, [prefix], None), (whole[0][:, :, path], whole[1][:, :, path])
            )
            others = [t for t in range(T) if t not in path]
            spoiled = [x.clone() for x in (q, k, v)]
            for x, first in zip(spoiled, (0, prefix, prefix), strict=True):
                x[:, :, [first + t for t in others]] = torch.nan
            got = run(*spoiled, [prefix], words[None])
            assert_same((got[0][:, :, path], got[1][:, :, path]), (whole[0][:, :, path], whole[1][:, :, path]))


def assert_chain(run: Callable[..., State], prefix: int, *window: int) -> None:
    q, k, v = inputs(6, 2, 8, prefix + 8)
    whole = run(q, k, v, [prefix], None, *window)
    for t in range(8):
        alone = run(q[:, :, t : t + 1], k, v, [prefix + t], None, *window)
        assert_same(alone, (whole[0][:, :, t : t + 1], whole[1][:, :, t : t + 1]))


@pytest.mark.parametrize("prefix", [60, 252, 508])
def test_a_chain_has_the_bits_of_its_tokens(run, prefix: int) -> None:
    """Also where it crosses a block, a unit or a split."""
    assert_chain(run, prefix)


def test_a_chain_under_a_window() -> None:
    """One that ends between blocks."""
    assert_chain(by_triton, 508, 70)


def test_a_sequence_does_not_depend_on_the_others(run) -> None:
    q, k, v = inputs(2, 1, 3, 600)
    beside = tuple(torch.cat((torch.full_like(x, torch.nan), x)) for x in (q, k, v))
    got, expected = run(*beside, [17, 530], None), run(q, k, v, [530], None)
    assert_same((got[0][1:], got[1][1:]), expected)


def test_values_out_of_range_are_clamped(run) -> None:
    q, k, v = inputs(2, 1, 3, 70)
    for prefix, clamped in ((68, 67), (2**31 - 1, 67), (-5, 0)):
        assert_same(run(q, k, v, [prefix], None), run(q, k, v, [clamped], None))
    words = torch.tensor([[1, -1, 1 | 1 << 40]])
    assert_same(run(q, k, v, [20], words), run(q, k, v, [20], words & 0b111))


def test_heads_of_one_number_do_not_lie_transposed() -> None:
    q, k, v = inputs(2, 1, 3, 20, 1)
    _, made = prepared(q, k, v, [9], None)
    assert {made[0].args[name] for name in ("k_n", "v_n", "q_t")} == {2}
    assert compile_launches(made)
