"""The 4-bit layers of a model in words, as a quantization_config; and a model made ready to be filled from one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...int4_weight import Int4Weight
from ...int4_weight.check import GROUP_SIZES
from .blocks import replace_module
from .linear import Int4Linear, int4_layers

VERSION = 1
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32)}
_BOOKS = {None: None, "int8": torch.int8, "float32": torch.float32}


def layout_of(weight: Int4Weight, bias: bool) -> dict[str, Any]:
    """What must be known of a weight to make room for it, beside its size."""
    if weight.columns % weight.in_features:
        raise ValueError(f"{weight.columns} columns are no multiple of {weight.in_features} inputs")
    return {
        "group_size": weight.group_size if weight.group_size in GROUP_SIZES else -1,
        "zero_kind": weight.zero_kind,
        "scale_dtype": str(weight.scales.dtype).removeprefix("torch."),
        "codebook": None if weight.codebook is None else str(weight.codebook.dtype).removeprefix("torch."),
        "permuted": weight.permutation is not None,
        "columns_per_input": weight.columns // weight.in_features,
        "bias": bias,
    }


def describe(weights: Mapping[str, tuple[Int4Weight, bool]], mode: str = "exact") -> dict[str, Any]:
    """The quantization_config of layers: name -> (weight, whether it has a bias). Layers alike share an entry."""
    groups: dict[str, dict[str, Any]] = {}
    for name, (weight, bias) in weights.items():
        layout = layout_of(weight, bias)
        groups.setdefault(json.dumps(layout), {**layout, "layers": []})["layers"].append(name)
    return {"quant_method": "scrimp", "version": VERSION, "mode": mode, "layouts": list(groups.values())}


def describe_model(model: nn.Module) -> dict[str, Any]:
    """The quantization_config of a model with `Int4Linear` layers."""
    layers = dict(int4_layers(model))
    modes = {layer.mode for layer in layers.values()}
    mode = modes.pop() if len(modes) == 1 else "exact"
    return describe({name: (layer.weight, layer.bias is not None) for name, layer in layers.items()}, mode)


def empty_weight(N: int, inputs: int, layout: Mapping[str, Any]) -> Int4Weight:
    """A weight without data (on the meta device) of the layout."""
    K = inputs * layout["columns_per_input"]
    size = K if layout["group_size"] == -1 else layout["group_size"]
    dtype, book = _DTYPES[layout["scale_dtype"]], _BOOKS[layout["codebook"]]
    with torch.device("meta"):
        scales = torch.empty(N, K // max(1, size), dtype=dtype)
        zeros = None if layout["zero_kind"] == "none8" else torch.empty_like(scales)
        if layout["zero_kind"] == "uint8":
            zeros = torch.empty(scales.shape, dtype=torch.uint8)
        return Int4Weight(
            torch.empty(N, K // 2, dtype=torch.uint8),
            scales,
            zeros,
            None if book is None else torch.empty(16, dtype=book),
            torch.empty(K, dtype=torch.int32) if layout["permuted"] else None,
            group_size=size,
            zero_kind=layout["zero_kind"],
            in_features=inputs,
        )


def make_room(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Puts empty `Int4Linear` layers where a quantization_config says that the model has them.

    Raises: ValueError for another version, a layer that the model lacks, or a layout that makes no sense.
    """
    if config.get("version") != VERSION:
        raise ValueError(f"quantization_config: version {config.get('version')!r}; this scrimp reads {VERSION}")
    try:
        for layout in config["layouts"]:
            for name in layout["layers"]:
                linear = model.get_submodule(name)
                if not isinstance(linear, nn.Linear):
                    raise ValueError(f"{name} is a {type(linear).__name__}")
                weight = empty_weight(linear.out_features, linear.in_features, layout)
                bias = torch.empty(linear.out_features, device="meta") if layout["bias"] else None
                bias = bias if bias is None or linear.bias is None else linear.bias
                replace_module(model, name, Int4Linear(weight, bias, config["mode"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"quantization_config: does not fit {type(model).__name__}: {error}") from error
