"""What is learnt while decoding: acceptance, the cost curve, and which costly sources are worth their time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..generation.cache import KVCache
from ..generation.model import DecoderModel
from .acceptance import Acceptance
from .cost import CostCurve
from .draft import Accepted, Candidates, Draft, DraftSource, RidingDraft
from .maps import DraftMaps

TRIAL = 6  # steps with a costly source before it is judged
AGAIN = 64  # steps without it after which it is tried anew
FADE = 0.1  # share of a new step


class Knowledge:
    """Acceptance, cost curves and totals, kept from one generation to the next.

    Attributes:
        steps: trees that were read, plain steps among them; those of each sequence of a batch count.
        tokens: that came of them.

    Args:
        cost: the curve to begin with; else each model's is measured once for each number of threads.
    """

    def __init__(self, cost: CostCurve | None = None) -> None:
        self.acceptance = Acceptance()
        self.steps = self.tokens = 0
        self._given = cost
        self._curves = WeakIdKeyDictionary()

    def curve(self, model: DecoderModel) -> CostCurve:
        """The cost curve of a model with the present number of threads."""
        if self._given is not None:
            return self._given
        curves: dict[int, CostCurve] = self._curves.setdefault(model.embedding, {})
        threads = torch.get_num_threads()
        if threads not in curves:
            curves[threads] = CostCurve.measure(model)
        return curves[threads]


class Worth:
    """Whether a costly source makes texts come faster: by what each step expects with its guesses and without.

    Attributes:
        on: whether the next step uses it.
        seconds: that proposing takes.
    """

    def __init__(self) -> None:
        self.on = True
        self.seconds = 0.0
        self._ratio = self._weight = 0.0  # a fading sum of speeds with the source over those without, and its weight
        self._steps = 0  # since it was switched on, or off

    def took(self, seconds: float) -> None:
        """Takes in the time of a proposal."""
        self.seconds += (seconds - self.seconds) * (FADE if self.seconds else 1)

    def judge(self, ratio: float) -> None:
        """Takes in a step with the source: its speed over the one expected without."""
        self._ratio, self._weight = (1 - FADE) * self._ratio + ratio, (1 - FADE) * self._weight + 1
        self._steps += 1
        if self._steps >= TRIAL and self._ratio < self._weight:
            self._switch(False)

    def rest(self) -> None:
        """Takes in a step without the source."""
        self._steps += 1
        if self._steps >= AGAIN:
            self._switch(True)

    def _switch(self, on: bool) -> None:
        self.on, self._steps = on, 0
        self._ratio = self._weight = 0.0


class Running:
    """Sources at work on one batch.

    Args:
        sources: whose drafts to run.
        worths: of the costly sources by name, kept from one generation to the next.
        model: the decoder.
        cache: of the batch.
    """

    def __init__(
        self, sources: Sequence[DraftSource], worths: dict[str, Worth], model: DecoderModel, cache: KVCache
    ) -> None:
        self._drafts: list[tuple[DraftSource, Draft]] = [(source, source.start(model, cache)) for source in sources]
        self._riding = [(source, draft) for source, draft in self._drafts if isinstance(draft, RidingDraft)]
        self._worths = worths
        for source in sources:
            if source.costly:
                worths.setdefault(source.name, Worth())

    def propose(
        self, texts: Sequence[Sequence[int] | None], depths: Sequence[int]
    ) -> list[tuple[str, list[Candidates]]]:
        """Guesses of every source that is worth its time, by its name."""
        found = []
        for source, draft in self._drafts:
            if not self._pays(source):
                self._worths[source.name].rest()
                continue
            begin = time.perf_counter()
            found.append((source.name, draft.propose(texts, depths)))
            if source.costly:
                self._worths[source.name].took(time.perf_counter() - begin)
        return found

    def worths(self, names: Iterable[str]) -> dict[str, Worth]:
        """What is known of the costly ones among these sources."""
        return {name: self._worths[name] for name in names if name in self._worths}

    def layers(self) -> list[int]:
        """Numbers of layers after which sources map states to pseudo rows."""
        return sorted({draft.riding.layer for _, draft in self._riding})

    def riding(self, but: str = "") -> DraftMaps | None:
        """What makes the pseudo rows of the next step; None unless a source that is worth its time has some.

        Args:
            but: name of a source that is left out.
        """
        usable = (draft.riding for source, draft in self._riding if self._pays(source) and source.name != but)
        return next(usable, None)

    def _pays(self, source: DraftSource) -> bool:
        return not source.costly or self._worths[source.name].on

    def update(self, accepted: Accepted) -> None:
        for _, draft in self._drafts:
            draft.update(accepted)
