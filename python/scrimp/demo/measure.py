"""What the demo measures: time to first token, peak memory, and quality against dense attention."""

import hashlib
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..benchmarks import environment as where
from ..doctor import cpu_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .. import SparsePlan

LOGIT_ROWS = 512  # rows of the head's output in memory at a time
REMOVED = "scrimp_demo_removed"

Switch = Callable[["PreTrainedModel"], None]
PlanObserver = Callable[[int, "SparsePlan"], None]


@dataclass(frozen=True)
class Variant:
    """One way to run the model's attention.

    Args:
        name: shown to people, e.g. "dense" or the name of a budget.
        switch: makes the model run this way from now on.
        watch: for a sparse variant, a context manager during which a callback gets (layer, plan) of every prefill.
    """

    name: str
    switch: Switch
    watch: Callable[["PreTrainedModel", PlanObserver], Any] | None = None


@dataclass
class Timing:
    """First-token times of one variant, one entry a round, and its highest resident memory."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    answer: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Quality:
    """Per predicted token: negative log-likelihood in nats [windows, length - 1] fp32, and arg-max token (int32)."""

    nll: torch.Tensor
    top1: torch.Tensor

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return math.exp(self.nll.double().mean().item())

    def agreement(self, other: "Quality") -> float:
        """Share of positions where both predict the same token."""
        return (self.top1 == other.top1).double().mean().item()


def dense() -> Variant:
    """The model with torch's own attention (SDPA)."""
    return Variant("dense", lambda model: model.set_attn_implementation("sdpa"))


def removed() -> Variant:
    """The model with attention replaced by a copy of the values: its time bounds what any attention can reach."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(REMOVED, _values_only)
    AttentionMaskInterface.register(REMOVED, _no_mask)
    return Variant("attention removed", lambda model: model.set_attn_implementation(REMOVED))


def _values_only(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    own = value[:, :, -query.shape[2] :]  # [B, G, N, D]
    return own.repeat_interleave(query.shape[1] // own.shape[1], dim=1).transpose(1, 2).contiguous(), None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


@torch.inference_mode()
def time_first_token(
    model: "PreTrainedModel",
    variant: Variant,
    prompt: torch.Tensor,
    timing: Timing,
    answer_tokens: int = 0,
) -> None:
    """Read `prompt` [1, N] once and add the seconds until the arg-max of the last position is known to `timing`.

    With `answer_tokens`, also continue greedily (untimed) and keep the answer.
    """
    variant.switch(model)
    tracked = _forget_peak()
    start = time.perf_counter()
    out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    token = int(out.logits[0, -1].argmax())
    timing.seconds.append(time.perf_counter() - start)
    if tracked:
        timing.peak_bytes = max(timing.peak_bytes or 0, _peak_bytes())
    stop = model.generation_config.eos_token_id if model.generation_config else None
    stops = stop if isinstance(stop, list) else [stop]
    answer: list[int] = []
    while len(answer) < answer_tokens and token not in stops:
        answer.append(token)
        out = model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        token = int(out.logits[0, -1].argmax())
    timing.answer = answer or timing.answer


@torch.inference_mode()
def quality(model: "PreTrainedModel", variant: Variant, windows: torch.Tensor, step: Callable[[], object]) -> Quality:
    """Read every window [windows, N] on its own; `step` is called after each. Never holds N x V logits."""
    variant.switch(model)
    head = model.get_output_embeddings()
    nlls, top1s = [], []
    for window in windows:
        hidden = model.base_model(input_ids=window[None], use_cache=False).last_hidden_state[0, :-1]  # [N - 1, d]
        for rows, target in zip(hidden.split(LOGIT_ROWS), window[1:].split(LOGIT_ROWS), strict=True):
            logits = head(rows).float()
            nlls.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
            top1s.append(logits.argmax(-1).int())
        step()
    shape = (windows.shape[0], windows.shape[1] - 1)
    return Quality(torch.cat(nlls).view(shape), torch.cat(top1s).view(shape))


def cached_quality(folder: Path, key: str, make: Callable[[], Quality]) -> Quality:
    """The quality kept under `key` in `folder`, or `make()`, then kept there."""
    file = folder / f"{key}.safetensors"
    try:
        tensors = load_file(file)
        return Quality(tensors["nll"], tensors["top1"])
    except (OSError, KeyError, SafetensorError):
        made = make()
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.new")
    save_file({"nll": made.nll, "top1": made.top1}, partial)
    partial.replace(file)
    return made


def quality_key(model: "PreTrainedModel", windows: torch.Tensor) -> str:
    """A hash of all weights, the windows and the package versions: what dense quality depends on."""
    digest = hashlib.sha256(f"{where.versions('transformers')}".encode())
    for name, tensor in {**model.state_dict(), "windows": windows}.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def ratio(numerators: list[float], denominators: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of the ratios of paired measurements."""
    ratios = torch.tensor(
        [top / bottom for top, bottom in zip(numerators, denominators, strict=True)],
        dtype=torch.float64,
    )
    low, high = torch.quantile(ratios, torch.tensor([0.2, 0.8], dtype=torch.float64)).tolist()
    return median(ratios.tolist()), low, high


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Run torch on `count` threads inside the block; None keeps torch's own choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield count or before
    finally:
        torch.set_num_threads(before)


def environment() -> dict[str, str | int]:
    """Where a figure was measured: cpu, isa, threads, versions, commit."""
    return {
        "cpu": cpu_model(),
        "isa": where.isa(),
        "threads": torch.get_num_threads(),
        "versions": where.versions("transformers"),
        "commit": where.commit(),
    }


def _forget_peak() -> bool:
    """Reset the kernel's record of this process's highest resident memory; False where that is not possible."""
    if sys.platform != "linux":
        return False
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


def _peak_bytes() -> int:
    found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0
