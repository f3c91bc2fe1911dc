"""A Triton launch as a value: the GPU, the interpreter and the evidence suite all run the same one."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One kernel over one grid.

    `args` are the tensors and numbers in the kernel's own order, `constants` its `tl.constexpr` parameters.
    """

    kernel: Any
    grid: tuple[int, int, int]
    args: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1

    def run(self) -> None:
        """Launches on the current stream of the tensors' device; an empty grid does nothing."""
        if 0 in self.grid:
            return
        device = next(value.device for value in self.args.values() if isinstance(value, Tensor))
        here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        with here:
            self.kernel[self.grid](**self.args, **self.constants, **options)


def unit_last_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied only where its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] < 2 else tensor.contiguous()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and at least `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())
