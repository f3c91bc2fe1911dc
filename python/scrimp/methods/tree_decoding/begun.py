"""Begun: tree decoding of one batch, from before its prompts are read to its last step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..generation.cache import KVCache
from ..generation.choosing import Chooser
from ..generation.loop import Prompted, Text
from ..generation.model import DecoderModel
from ..generation.settings import Piece
from .decode import decode
from .knowledge import Knowledge, Running
from .lockstep import Lockstep
from .session import Session, learnt


class Begun:
    """What `TreeDecoding.begin` returns: sources at work, for one call (`scrimp.methods.generation.loop.Drafted`)."""

    def __init__(
        self, model: DecoderModel, cache: KVCache, running: Running, knowledge: Knowledge, guesses: int
    ) -> None:
        self.layers = running.layers()
        self._model, self._cache, self._running = model, cache, running
        self._knowledge, self._guesses = knowledge, guesses

    def wanted(self, largest: int) -> int:
        """How many of the largest logits after the prompts sources learn from."""
        return learnt(largest)

    def decode(self, texts: Sequence[Text], chooser: Chooser, prompted: Prompted) -> Iterator[Piece]:
        """Pieces of texts that have their first new token (for the decoding loop)."""
        session = self._session([text.prompt + text.new for text in texts], prompted)
        return decode(session, texts, chooser)

    def lockstep(self, prompts: Sequence[Sequence[int]], prompted: Prompted, largest: int = 0) -> Lockstep:
        """What stands for `step` of a loop that feeds one token of every sequence at a time.

        It chooses tokens by the `largest` largest logits; 0 for all.
        """
        return Lockstep(lambda texts: self._session(texts, prompted), self._cache, prompts, largest)

    def _session(self, texts: Sequence[Sequence[int]], prompted: Prompted) -> Session:
        session = Session(self._model, self._cache, texts, self._running, self._knowledge, self._guesses)
        session.begin(prompted)
        return session
