"""Argument checks shared by the ops: every message names the op, the argument and the value."""

from typing import Any

import torch
from torch import Tensor


def check_dtype(op: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raises ValueError unless `tensor` has one of the allowed dtypes."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"{op}: {name} is {str(tensor.dtype).removeprefix('torch.')}; it must be {names}")


def check_same(op: str, what: str, **values: Any) -> None:
    """Raises ValueError unless all values (shapes, dtypes, devices by argument name) are equal."""
    (first_name, first), *rest = values.items()
    for name, value in rest:
        if value != first:
            raise ValueError(f"{op}: {what} of {name} is {value}, but that of {first_name} is {first}")
