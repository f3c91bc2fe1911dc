"""Small safetensors files of ours: tensors, and a header that says what they are and for which weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


def write(path: str | Path, name: str, version: int, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a file of a format named `scrimp.*`; `header` must have a string `weight_hash`."""
    from safetensors.torch import save_file

    text = json.dumps({"format": name, "version": version, **header})
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata={name: text})


def read(path: str | Path, name: str, version: int, limit: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a file of `write`.

    Args:
        limit: bytes that such a file has at most.

    Raises:
        ValueError: not such a file, too large, damaged, or of another version.
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path, words = Path(path), name.removeprefix("scrimp.").replace("_", " ")
    if path.stat().st_size > limit:
        raise ValueError(f"{path}: {path.stat().st_size} bytes are too many for {words}")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get(name, "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not a file of {words}, or damaged: {error}") from error
    if not isinstance(header, dict) or header.get("format") != name:
        raise ValueError(f"{path}: not a file of {words}")
    if header.get("version") != version:
        raise ValueError(f"{path}: version {header.get('version')} of {words}; this scrimp reads {version}")
    if not isinstance(header.get("weight_hash"), str):
        raise ValueError(f"{path}: the header of the {words} has no weight hash")
    return header, tensors
