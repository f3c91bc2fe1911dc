"""scrimp.quantize: a model's linear layers become 4-bit layers, one decoder layer after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from ...int4_weight import Int4Weight
from ...int4_weight.check import GROUP_SIZES
from ...ops._int4 import check_mode
from . import blocks as parts
from .awq import find_input_scales, find_limits
from .gptq import Order, gptq
from .grid import Grid, largest_group_size
from .hqq import half_quadratic
from .layout import describe_model
from .linear import Int4Linear
from .report import LayerReport, Report, divergence
from .rtn import round_to_nearest
from .statistics import InputStatistics

METHODS = ("rtn", "hqq", "gptq", "awq")
NEED_CALIBRATION = ("gptq", "awq")
UNCLIPPED = ("q_proj", "k_proj")  # a product of both follows, which a layer's own outputs do not show


@dataclass(frozen=True)
class _Job:
    """What all layers of a model share."""

    method: str
    group_size: int
    grid: Grid
    order: Order
    skip: tuple[str, ...]
    mode: str

    def skips(self, name: str) -> bool:
        return any(fnmatch(name, pattern) or fnmatch(name.split(".")[-1], pattern) for pattern in self.skip)

    def choose(self, name: str, weight: Tensor, inputs: InputStatistics | None) -> Int4Weight:
        """The 4-bit form of one matrix."""
        size = largest_group_size(weight.shape[1], self.group_size) if self.group_size != -1 else -1
        if self.method == "hqq":
            return half_quadratic(weight, size, dtype=self.grid.dtype)
        if self.method == "rtn" or inputs is None:
            return round_to_nearest(weight, size, self.grid)
        if self.method == "gptq":
            return gptq(weight, inputs.gram, size, self.grid, order=self.order)
        if name.split(".")[-1] in UNCLIPPED:
            return round_to_nearest(weight, size, self.grid)
        plain = replace(self.grid, steps=1)
        return round_to_nearest(weight, size, plain, find_limits(weight, inputs, size, plain))


def quantize(
    model: nn.Module,
    method: str = "gptq",
    group_size: int = 64,
    calibration: Tensor | Sequence[Tensor] | None = None,
    *,
    symmetric: bool = False,
    order: Order = "groups",
    skip: Sequence[str] = ("lm_head",),
    scale_dtype: torch.dtype = torch.float16,
    kl_tokens: int = 256,
    mode: str = "exact",
    progress: bool = True,
) -> Report:
    """Replaces a model's linear layers by `Int4Linear`, in place, and reports what each of them lost.

    The model is for inference afterwards: no parameter asks for a gradient any more.

    Decoder layers are taken one after the other: each sees the outputs of the quantized ones before it, and
    statistics of one layer at a time are in memory. A layer whose width the group size does not divide gets the
    largest allowed one that does; the report has it.

    Args:
        model: a Hugging Face decoder, or (rtn, hqq without calibration) any module with linear layers.
        method: "rtn" round to nearest with a range search; "hqq" floating zeros against outliers; "gptq" errors
            made up for by later columns; "awq" inputs scaled and groups clipped, folded into the layers before.
        group_size: 16, 32, 64, 128, or -1 for one scale a row.
        calibration: tokens int64 `[samples, n]`, or a list of `[1, n]`; gptq and awq need some, others report with it.
        symmetric: no zeros (not for hqq).
        order: of gptq; "activations" gives weights that permute their inputs.
        skip: names of layers to leave alone, whole or the last part, with wildcards.
        scale_dtype: type of the scales.
        kl_tokens: tokens of the first sample on which the divergence from the original model is reported after each
            decoder layer; 0 for none.
        mode: arithmetic of the new layers, "exact" or "int8".
        progress: show a progress bar.

    Raises:
        ValueError: an unknown method or mode, a missing or misshapen calibration, a model without decoder layers, or a
            weight that cannot be quantized.

    >>> model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 3))
    >>> report = quantize(model, "rtn", progress=False)
    >>> report.layers[0].name, report.layers[0].group_size, model[0].weight.zero_kind
    ('0', 64, 'uint8')
    """
    from tqdm.auto import tqdm

    if method not in METHODS:
        raise ValueError(f"quantize: method={method!r} must be one of {', '.join(METHODS)}")
    if group_size != -1 and group_size not in GROUP_SIZES:
        raise ValueError(f"quantize: group_size={group_size} must be 16, 32, 64, 128 or -1")
    if symmetric and method == "hqq":
        raise ValueError("quantize: hqq has floating zeros; symmetric=True is for rtn, gptq and awq")
    check_mode("quantize", mode)
    texts = _texts(method, calibration)
    job = _Job(method, group_size, Grid(symmetric, dtype=scale_dtype), order, tuple(skip), mode)
    report = Report(method, group_size)
    with torch.no_grad():
        if not texts:
            chosen = {name: m for name, m in parts.linears_of(model).items() if not job.skips(name)}
            for name in tqdm(chosen, desc=method, unit="layer", disable=not progress):
                _swap(model, name, job, None, report)
        else:
            with tqdm(total=len(parts.find_blocks(model)), desc=method, unit="layer", disable=not progress) as bar:
                _by_block(model, texts, job, report, kl_tokens, bar)
    model.requires_grad_(False)
    if hasattr(model, "config"):
        config: Any = model.config
        config.quantization_config = describe_model(model)  # for save_pretrained
    return report


def _texts(method: str, calibration: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    if calibration is None or len(calibration) == 0:
        if method in NEED_CALIBRATION:
            raise ValueError(f"quantize: {method} needs calibration tokens, int64 [samples, n]; rtn and hqq do not")
        return []
    texts = list(calibration.split(1)) if isinstance(calibration, Tensor) else list(calibration)
    for index, text in enumerate(texts):
        if text.dtype != torch.int64 or text.dim() != 2 or text.shape[0] != 1 or text.shape[1] == 0:
            raise ValueError(f"quantize: calibration[{index}] is {text.dtype} {list(text.shape)}, not int64 [1, n]")
    return texts


def _swap(root: nn.Module, name: str, job: _Job, inputs: InputStatistics | None, report: Report, at: str = "") -> None:
    """Quantizes one linear layer and puts the 4-bit layer in its place."""
    linear: Any = root.get_submodule(name)
    weight: Tensor = linear.weight.detach()
    try:
        rough = job.choose(name, weight, inputs)
    except ValueError as error:
        raise ValueError(f"quantize: {at}{name}: {error}") from error
    report.layers.append(LayerReport.of(at + name, weight, rough, inputs))
    parts.replace_module(root, name, Int4Linear(rough, linear.bias, job.mode))


def _by_block(model: nn.Module, texts: Sequence[Tensor], job: _Job, report: Report, kl_tokens: int, bar: Any) -> None:
    """Quantizes decoder layer after decoder layer, each on the outputs of the quantized ones before it."""
    named = parts.find_blocks(model)
    outside = [name for name in parts.linears_of(model) if not job.skips(name) and not _inside(name, named)]
    if outside:
        raise ValueError(f"quantize: {outside[0]} lies outside the decoder layers; name it in skip")
    short = texts[0][:, :kl_tokens]
    original = model(short, use_cache=False).logits if kl_tokens else None
    order = list(named.values())
    samples = [parts.enter(model, order, text) for text in texts]
    for index, (at, block) in enumerate(named.items()):
        chosen = [name for name in parts.linears_of(block) if not job.skips(f"{at}.{name}")]
        inputs = parts.observe(block, index, samples)
        if job.method == "awq":
            _scale_inputs(block, inputs, chosen, job, f"{at}.")
        for name in chosen:
            _swap(block, name, job, inputs[name], report, f"{at}.")
        for sample in samples:
            sample.hidden = parts.step(block, index, sample)
        if original is not None:
            report.divergence[at] = divergence(original, model(short, use_cache=False).logits)
            bar.set_postfix_str(f"KL {report.divergence[at]:.4f}")
        bar.update()


def _inside(name: str, named: dict[str, nn.Module]) -> bool:
    return any(name.startswith(f"{at}.") for at in named)


def _scale_inputs(
    block: nn.Module, inputs: dict[str, InputStatistics], chosen: Sequence[str], job: _Job, at: str
) -> None:
    """AWQ's first half: multiplies weights by the factors found and divides the layer before them."""
    found = parts.shared_inputs(block)
    if not found:
        raise ValueError(f"quantize: awq knows Llama-like decoder layers; {at[:-1]} is a {type(block).__name__}")
    for producer, consumers in found:
        if not set(consumers) <= set(chosen):
            continue
        linears: list[Any] = [block.get_submodule(name) for name in consumers]
        source: Any = block.get_submodule(producer)
        K = linears[0].in_features
        if isinstance(source, nn.Linear) and source.out_features != K:
            continue  # grouped-query attention: one output feeds several inputs
        size = largest_group_size(K, job.group_size) if job.group_size != -1 else -1
        s = find_input_scales([linear.weight for linear in linears], inputs[consumers[0]], size, job.grid)
        divide: Callable[[Any, Tensor], Any] = (
            parts.divide_linear if isinstance(source, nn.Linear) else parts.divide_norm
        )
        if divide(source, s) is False:
            continue
        for name, linear in zip(consumers, linears, strict=True):
            linear.weight.data.mul_(s)
            inputs[name] = inputs[name].divided(s)
        if isinstance(source, nn.Linear) and not math.isfinite(float(source.weight.abs().max())):
            raise ValueError(f"quantize: {at}{producer}: dividing it made it overflow")
