"""What is learnt while decoding: acceptance, the cost curve, and which costly sources are worth their time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..generation.cache import KVCache
from ..generation.model import DecoderModel
from .acceptance import Acceptance
from .cost import CostCurve
from .draft import Accepted, Candidates, Draft, DraftSource, RidingDraft
from .maps import DraftMaps

TRIAL = 6  # steps with and steps without a costly source before they are compared
AGAIN = 64  # steps after which the slower way is tried anew
FADE = 0.1


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
    """Whether a costly source makes texts come faster: tokens per second with it and without, tried in turns."""

    def __init__(self) -> None:
        self.on = True
        self._speeds: dict[bool, list[float]] = {True: [0.0, 0.0], False: [0.0, 0.0]}  # tokens, seconds; fading
        self._steps = {True: 0, False: 0}
        self._since = 0

    def settle(self, tokens: int, seconds: float) -> None:
        """Takes in a step and decides about the next one."""
        speed = self._speeds[self.on]
        speed[:] = (1 - FADE) * speed[0] + tokens, (1 - FADE) * speed[1] + seconds
        self._steps[self.on] += 1
        self._since += 1
        young = next((way for way in (True, False) if self._steps[way] < TRIAL), None)
        if young is not None:
            self.on = young
            return
        better = self._rate(True) >= self._rate(False)
        if self.on != better:
            self.on, self._since = better, 0
        elif self._since >= AGAIN:
            self.on, self._since = not better, 0
            self._steps[self.on] = 0

    def _rate(self, way: bool) -> float:
        tokens, seconds = self._speeds[way]
        return tokens / max(seconds, 1e-9)


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
        self._worths = worths
        for source in sources:
            if source.costly:
                worths.setdefault(source.name, Worth())

    def propose(
        self, texts: Sequence[Sequence[int] | None], depths: Sequence[int]
    ) -> list[tuple[str, list[Candidates]]]:
        """Guesses of every source that is worth its time, by its name."""
        return [(source.name, draft.propose(texts, depths)) for source, draft in self._used()]

    def layers(self) -> list[int]:
        """Numbers of layers after which sources map states to pseudo rows."""
        return sorted({draft.riding.layer for _, draft in self._drafts if isinstance(draft, RidingDraft)})

    def riding(self) -> DraftMaps | None:
        """What makes the pseudo rows of the next step; None unless a source that is worth its time has some."""
        return next((draft.riding for _, draft in self._used() if isinstance(draft, RidingDraft)), None)

    def _used(self) -> list[tuple[DraftSource, Draft]]:
        return [pair for pair in self._drafts if not pair[0].costly or self._worths[pair[0].name].on]

    def update(self, accepted: Accepted) -> None:
        for _, draft in self._drafts:
            draft.update(accepted)

    def settle(self, tokens: int, seconds: float) -> None:
        """Takes in the tokens and seconds of a step."""
        for source, _ in self._drafts:
            if source.costly:
                self._worths[source.name].settle(tokens, seconds)
