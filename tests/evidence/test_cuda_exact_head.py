"""exact_head in CUDA C++: the bits of linear's kernels, in any company, and the calls it takes."""

import pytest
import torch
from cuda_device import call
from emulate import execute
from scrimp.kernels import linear
from subjects.exact_head import make
from torch import Tensor

from scrimp.head_screen import HeadScreen
from scrimp.ops.exact_head import _cuda_takes

ROWS, K, V, TOP = 5, 1088, 2048, 12  # more inputs than a chunk


def computed(x: Tensor, weight: Tensor, screen: HeadScreen) -> tuple[Tensor, Tensor, Tensor]:
    found, _ = call("exact_head", x, weight, *screen.tensors().values(), screen.slack, screen.wide, TOP)
    return found


@pytest.mark.parametrize("wide", [None, 5])
def test_the_bits_are_those_of_linear(wide: int | None) -> None:
    """Random numbers, whose sums depend on the order of additions; nine states are other kernels than few."""
    x, weight = torch.randn(ROWS, K).bfloat16(), torch.randn(V, K).bfloat16()
    logits, launches = linear.launches(x, [weight], [], None)
    execute(launches)
    truth, order = logits.sort(dim=-1, descending=True, stable=True)
    screen = HeadScreen.build(weight, wide=wide)
    values, ids, scored = computed(x, weight, screen)
    assert torch.equal(values, truth[:, :TOP])
    assert torch.equal(ids, order[:, :TOP])
    assert bool(((scored >= TOP) & (scored < V + (wide is not None))).all())  # 4 bits without a basis leave all rows
    many = torch.cat([x[:4], torch.randn(4, K).bfloat16(), x[4:]])
    for mine, alone, among in zip(
        (values, ids, scored), computed(x[3:4], weight, screen), computed(many, weight, screen), strict=True
    ):
        assert torch.equal(mine[3:4], alone)
        assert torch.equal(mine, among[[0, 1, 2, 3, 8]])


def test_what_it_takes() -> None:
    """16-bit heads whose vectors of 16 bytes are whole."""
    x, weight, *rest = make(3, 64, 70, 2, torch.float16)
    assert _cuda_takes(x, weight, *rest)
    assert _cuda_takes(x[:0], weight, *rest)
    assert not _cuda_takes(x.float(), weight.float(), *rest)
    assert not _cuda_takes(x[:, :60], weight[:, :60], *rest)
    assert not _cuda_takes(x, torch.cat([weight, weight], 1)[:, 4:68], *rest)
    assert not _cuda_takes(x, torch.cat([weight, weight[:, :4]], 1)[:, :64], *rest)
    assert not _cuda_takes(x[:, :0], weight[:, :0], *rest)
