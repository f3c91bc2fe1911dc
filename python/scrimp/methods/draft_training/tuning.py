"""The rest of training: maps are tuned, through the frozen layers, to give the logits of the true rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from .. import tensor_file
from .frozen import FrozenModel, Reading

FORMAT = "scrimp.draft_training"
FORMAT_VERSION = 1
MAX_FILE_BYTES = 16 << 30
SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Tuning:
    """How maps are tuned.

    Attributes:
        steps: texts to read at most.
        minutes: of processor time of a thread at most; None for no limit.
        rows: of a text that are looked ahead from in a step.
        rate: learning rate, which falls to zero by the end, linearly in what is used up of steps or minutes.
    """

    steps: int
    minutes: float | None = None
    rows: int = 128
    rate: float = 3e-4

    def __post_init__(self) -> None:
        if self.steps < 0 or self.rows < 1 or self.rate <= 0 or (self.minutes is not None and self.minutes <= 0):
            raise ValueError(f"{self}: steps must not be negative, the others must be positive")

    def progress(self, step: int, seconds: float) -> float:
        """What is used up, from 0 to 1."""
        by_time = 0.0 if self.minutes is None else seconds / (60 * self.minutes)
        return min(1.0, max(step / self.steps if self.steps else 1.0, by_time))


class Tuner:
    """Maps on their way; what it is at can be written to a file and taken up again.

    Args:
        model: whose drafts they are.
        layer: layers after which states are mapped; the model's depth for Medusa heads.
        maps: weight `[k, d, d]` and bias `[k, d]` to begin with.
        tuning: how.
        identity: of the run, to refuse another run's file.
    """

    def __init__(
        self, model: FrozenModel, layer: int, maps: tuple[Tensor, Tensor], tuning: Tuning, identity: str
    ) -> None:
        self.maps = tuple(tensor.detach().clone().requires_grad_() for tensor in maps)
        self.step, self.seconds, self.loss = 0, 0.0, float("nan")
        self._model, self._layer, self._tuning, self._identity = model, layer, tuning, identity
        self._optimizer = torch.optim.AdamW(self.maps, lr=tuning.rate, weight_decay=0.0)

    def run(self, texts: Sequence[Tensor], file: Path | None, tick: Callable[[Tuner], object]) -> None:
        """Tunes to the end of steps or minutes; `file` is written now and then, and when the run is interrupted."""
        saved = time.monotonic()
        try:
            while (progress := self._tuning.progress(self.step, self.seconds)) < 1:
                begin = time.process_time()
                self._advance(texts, progress)
                self.seconds += (time.process_time() - begin) / torch.get_num_threads()
                tick(self)
                if file is not None and time.monotonic() - saved > SAVE_SECONDS:
                    self.save(file)
                    saved = time.monotonic()
        except KeyboardInterrupt:
            if file is not None:
                self.save(file)
            raise

    def _advance(self, texts: Sequence[Tensor], progress: float) -> None:
        """One text, chosen by the number of the step alone, and so its rows."""
        random = torch.Generator().manual_seed(self.step)
        tokens = texts[int(torch.randint(len(texts), (), generator=random))]
        count = len(tokens) - len(self.maps[1])
        rows = torch.randperm(count, generator=random)[: self._tuning.rows].sort().values.to(tokens.device)
        for group in self._optimizer.param_groups:
            group["lr"] = self._tuning.rate * (1 - progress)
        loss = divergence(self._model, self._model.read(tokens), self._layer, rows, self.maps)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self.step += 1
        self.loss = loss.item()

    def save(self, file: Path) -> None:
        """Writes maps, moments and counters; the old file is there until the new one is whole."""
        tensors = dict(zip(("weight", "bias"), (each.detach() for each in self.maps), strict=True))
        for name, each in zip(("weight", "bias"), self.maps, strict=True):
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{name}.{moment}"] = self._optimizer.state[each].get(moment, torch.zeros_like(each))
        header = {"weight_hash": self._identity, "step": self.step, "seconds": self.seconds}
        new = file.with_name(f"{file.name}.new")
        tensor_file.write(new, FORMAT, FORMAT_VERSION, header, tensors)
        new.replace(file)

    def resume(self, file: Path) -> None:
        """Goes on from a file of `save`.

        Raises:
            ValueError: not such a file, damaged, or of another run.
        """
        header, tensors = tensor_file.read(file, FORMAT, FORMAT_VERSION, MAX_FILE_BYTES)
        if header["weight_hash"] != self._identity:
            raise ValueError(f"{file}: a training with other settings, texts or weights; remove it to begin anew")
        try:
            step, seconds = int(header["step"]), float(header["seconds"])
            for name, each in zip(("weight", "bias"), self.maps, strict=True):
                state = {"step": torch.tensor(float(step))}
                with torch.no_grad():
                    each.copy_(tensors[name])
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[moment] = torch.zeros_like(each).copy_(tensors[f"{name}.{moment}"])
                self._optimizer.state[each] = state
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ValueError(f"{file}: the header and the tensors of the training do not fit: {error}") from error
        self.step, self.seconds = step, seconds


def divergence(model: FrozenModel, text: Reading, layer: int, rows: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """Mean KL(model || draft) in nats over rows `[A]` and the positions ahead of each."""
    weight, bias = maps
    ahead = model.ahead(text, layer, rows, (weight, bias), upper=layer < model.depth)
    at = rows[:, None] + torch.arange(1, len(bias) + 1, device=rows.device)
    with torch.no_grad():
        wanted = model.logits(text.states[-1][at]).log_softmax(-1)
    found = model.logits(ahead).log_softmax(-1)
    return kl_div(found, wanted, reduction="sum", log_target=True) / at.numel()
