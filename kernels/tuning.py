"""Tuned configurations: `configs/<op>/<device>.json`, chosen by the nearest shape.

A file is a list of entries, each the shape it was tuned for and the configuration:

    [{"shape": {"head_dim": 64, "rows": 64}, "config": {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3}}]

The file is the device's own (`nvidia-a100-sxm4-80gb.json`), else that of its architecture (`sm_80.json`), else
`default.json`. Of its entries the one with the least sum of |log2(wanted / tuned)| over the shape's fields is used,
the first of equals.
"""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path

import torch

CONFIGS = Path(__file__).parent / "configs"


@functools.cache
def device_names(device: torch.device) -> tuple[str, ...]:
    """Names under which configurations of a device may be filed, the most exact first."""
    if device.type != "cuda":
        return ("default",)
    properties = torch.cuda.get_device_properties(device)
    name = re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-")
    if torch.version.hip:
        return (name, properties.gcnArchName.split(":")[0], "default")
    return (name, f"sm_{properties.major}{properties.minor}", "default")


@functools.cache
def _entries(op: str, names: tuple[str, ...]) -> list[tuple[dict[str, int], dict[str, int]]]:
    for name in names:
        path = CONFIGS / op / f"{name}.json"
        if path.exists():
            return [(entry["shape"], entry["config"]) for entry in json.loads(path.read_text())]
    raise FileNotFoundError(f"{op}: no configuration among {', '.join(names)} in {CONFIGS / op}")


def distance(wanted: dict[str, int], tuned: dict[str, int]) -> float:
    """Sum of |log2(wanted / tuned)| over the fields that both shapes name."""
    return sum(abs(math.log2(wanted[field] / tuned[field])) for field in tuned if field in wanted)


def config(op: str, device: torch.device | str, **shape: int) -> dict[str, int]:
    """The configuration of `op` for the device and the nearest tuned shape.

    Args:
        op: the op's name.
        device: where it runs; a device without files of its own uses its architecture's, then the default.
        **shape: positive sizes; fields that a tuned shape does not name are ignored.
    """
    names = device_names(torch.device(device)) if isinstance(device, torch.device) else (device, "default")
    return dict(min(_entries(op, names), key=lambda entry: distance(shape, entry[0]))[1])
