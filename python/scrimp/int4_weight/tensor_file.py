"""Reading files that nobody vouches for: every error is a ValueError that names file, tensor and value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_JSON_BYTES = 64 << 20
LARGEST_EMPTY = 1 << 24  # extents of an empty tensor take no bytes of the file, so the file does not bound them
_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def read_json(path: Path) -> Any:
    """The JSON of a file of bounded size; ValueError naming the file where it is none."""
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: {size} bytes are too many for JSON (at most {MAX_JSON_BYTES})")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


class TensorFiles:
    """Tensors in one or several safetensors files: shapes and types from the headers, a tensor read when asked for.

    Headers are checked against the lengths of the files when they are opened, so no size in them can make a reader
    allocate more than the files hold.
    """

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        self.path = path
        self.layout: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.metadata: dict[str, str] = {}
        self._files: dict[str, tuple[Path, Any]] = {}
        for file in files:
            self._open(file)

    def _open(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise ValueError(f"{path}: there is no such file")
        try:
            file = safe_open(path, "pt")
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            layout = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            self.metadata |= file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a safetensors file, or damaged: {error}") from error
        for name, (_, shape) in layout.items():
            if name in self.layout:
                raise ValueError(f"{path}: tensor {name!r}: it is also in {self._files[name][0].name}")
            self._files[name] = path, file
            if 0 in shape and max(shape) > LARGEST_EMPTY:
                raise self.fail(name, f"shape {list(shape)} is empty and too long")
        self.layout |= layout

    def fail(self, name: str, text: str) -> ValueError:
        """The error to raise about tensor `name`."""
        path = self._files[name][0] if name in self._files else self.path
        return ValueError(f"{path}: tensor {name!r}: {text}")

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """Shape of a tensor that must be there with so many dimensions, none of them 0."""
        if name not in self.layout:
            raise self.fail(name, "missing")
        shape = self.layout[name][1]
        if len(shape) != dims or 0 in shape:
            raise self.fail(name, f"shape {list(shape)}, expected {dims} dimensions and none of size 0")
        return shape

    def read(
        self, name: str, dtypes: tuple[torch.dtype, ...] | None = None, shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """The tensor, after its header entry was found to be of one of `dtypes` and of `shape`."""
        if name not in self.layout:
            raise self.fail(name, "missing")
        stored, found = self.layout[name]
        allowed = tuple(_DTYPES.values()) if dtypes is None else dtypes
        if _DTYPES.get(stored) not in allowed:
            words = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise self.fail(name, f"type {stored}; it must be {words}")
        if shape is not None and found != shape:
            raise self.fail(name, f"shape {list(found)}, expected {list(shape)}")
        tensor: Tensor = self._files[name][1].get_tensor(name)
        # A header may put numbers at any byte; kernels need them at multiples of their size.
        return tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()

    def read_finite(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A floating tensor of `shape` without NaN and infinities."""
        tensor = self.read(name, FLOATS, shape)
        bad = ~torch.isfinite(tensor)
        if bool(bad.any()):
            at = [int(i) for i in bad.nonzero()[0]]
            raise self.fail(name, f"element {at} is {tensor[tuple(at)].item()}; it must be finite")
        return tensor
