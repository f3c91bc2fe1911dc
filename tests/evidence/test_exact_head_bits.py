"""exact_head gives the bits of linear's kernels, in any company: Triton's and CUDA C++ are executed on the emulator."""

from collections.abc import Callable

import pytest
import torch
from cuda_device import call
from emulate import execute
from scrimp.kernels import exact_head, linear
from torch import Tensor

from scrimp.head_screen import HeadScreen

ROWS, K, V = 5, 1088, 2048  # more inputs than a chunk
Found = tuple[Tensor, Tensor, Tensor]


def triton(*args: object) -> Found:
    results, launches = exact_head.launches(*args)
    execute(launches)
    return results


def cuda(*args: object) -> Found:
    return call("exact_head", *args)[0]


# k: that of the compiled kernels of "a wide head", and one of CUDA C++ alone
@pytest.mark.parametrize("wide", [None, 5])
@pytest.mark.parametrize(("run", "k"), [(triton, 60), (cuda, 12)], ids=["Triton", "CUDA C++"])
def test_the_bits_are_those_of_linear(run: Callable[..., Found], k: int, wide: int | None) -> None:
    """Random numbers, whose sums depend on the order of additions; nine states are other kernels than few."""
    x, weight = torch.randn(ROWS, K).bfloat16(), torch.randn(V, K).bfloat16()
    logits, launches = linear.launches(x, [weight], [], None)
    execute(launches)
    truth, order = logits.sort(dim=-1, descending=True, stable=True)
    screen = HeadScreen.build(weight, wide=wide)

    def computed(x: Tensor) -> Found:
        return run(x, weight, *screen.tensors().values(), screen.slack, screen.wide, k)

    values, ids, scored = found = computed(x)
    assert torch.equal(values, truth[:, :k])
    assert torch.equal(ids, order[:, :k])
    assert bool(((scored >= k) & (scored < V + (wide is not None))).all())  # 4 bits without a basis leave all rows
    many = torch.cat([x[:4], torch.randn(4, K).bfloat16(), x[4:]])
    for mine, alone, among in zip(found, computed(x[3:4]), computed(many), strict=True):
        assert torch.equal(mine[3:4], alone)
        assert torch.equal(mine, among[[0, 1, 2, 3, 8]])
