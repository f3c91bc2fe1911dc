"""exact_head gives the bits of linear's kernels, in any company: both are executed on the emulator."""

import pytest
import torch
from emulate import execute
from scrimp.kernels import exact_head, linear
from torch import Tensor

from scrimp.head_screen import HeadScreen

ROWS, K, V, TOP = 5, 1088, 2048, 60  # more inputs than a chunk; the kernels of "a wide head"


def computed(x: Tensor, weight: Tensor, screen: HeadScreen) -> tuple[Tensor, Tensor, Tensor]:
    results, launches = exact_head.launches(x, weight, *screen.tensors().values(), screen.slack, screen.wide, TOP)
    execute(launches)
    return results


@pytest.mark.parametrize("wide", [None, 5])
def test_the_bits_are_those_of_linear(wide: int | None) -> None:
    """Random numbers, whose sums depend on the order of additions."""
    x, weight = torch.randn(ROWS, K).bfloat16(), torch.randn(V, K).bfloat16()
    logits, launches = linear.launches(x, [weight], [], None)
    execute(launches)
    truth, order = logits.sort(dim=-1, descending=True, stable=True)
    screen = HeadScreen.build(weight, wide=wide)
    values, ids, scored = computed(x, weight, screen)
    assert torch.equal(values, truth[:, :TOP])
    assert torch.equal(ids, order[:, :TOP])
    assert bool(((scored >= TOP) & (scored < V + (wide is not None))).all())  # 4 bits without a basis leave all rows
    for mine, alone in zip((values, ids, scored), computed(x[3:4], weight, screen), strict=True):
        assert torch.equal(mine[3:4], alone)
