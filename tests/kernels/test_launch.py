"""Launches as values, and the arithmetic beside them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scrimp.kernels.launch import Launch, cdiv, power_of_two, unit_last_stride


class Kernel:
    """Stands for a jitted kernel: remembers how it was launched."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, int, int], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda **arguments: self.calls.append((grid, arguments))


def test_run() -> None:
    kernel, x = Kernel(), torch.zeros(2)
    Launch(kernel, (3, 2, 1), {"x": x, "n": 5}, {"BLOCK": 64}, num_warps=4, num_stages=2).run()
    assert kernel.calls == [((3, 2, 1), {"x": x, "n": 5, "BLOCK": 64, "num_warps": 4, "num_stages": 2})]


@pytest.mark.parametrize("grid", [(0, 1, 1), (1, 0, 1), (4, 2, 0)])
def test_an_empty_grid_does_nothing(grid: tuple[int, int, int]) -> None:
    kernel = Kernel()
    Launch(kernel, grid, {"x": torch.zeros(1)}, {}, num_warps=1).run()
    assert not kernel.calls


def test_run_on_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor on the second GPU is worked on there, whichever is current."""
    entered = []

    class Tensor(torch.Tensor):
        device = torch.device("cuda", 1)

    @contextlib.contextmanager
    def device(which: torch.device) -> Iterator[None]:
        entered.append(which)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    kernel = Kernel()
    Launch(kernel, (1, 1, 1), {"n": 3, "x": torch.zeros(1).as_subclass(Tensor)}, {}, num_warps=1).run()
    assert len(kernel.calls) == 1
    assert entered == [torch.device("cuda", 1)]


def test_unit_last_stride() -> None:
    x = torch.arange(24.0).view(2, 3, 4)
    for same in (x, x.transpose(0, 1), x[..., 1:3], x[..., :1], x[..., :0]):
        assert unit_last_stride(same) is same
    turned = x.transpose(1, 2)
    copied = unit_last_stride(turned)
    assert copied.stride(-1) == 1
    assert torch.equal(copied, turned)


@pytest.mark.parametrize(("a", "b", "expected"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (2**40, 3, 366503875926)])
def test_cdiv(a: int, b: int, expected: int) -> None:
    assert cdiv(a, b) == expected


@pytest.mark.parametrize(
    ("n", "least", "expected"),
    [(0, 1, 1), (1, 1, 1), (2, 1, 2), (3, 1, 4), (64, 1, 64), (65, 1, 128), (3, 16, 16), (96, 16, 128)],
)
def test_power_of_two(n: int, least: int, expected: int) -> None:
    assert power_of_two(n, least) == expected
