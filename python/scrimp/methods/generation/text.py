"""Tokens to text as they come, and stop strings, of which no part is ever shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT = 6  # tokens of the prompt that the first new ones are decoded with: spaces depend on neighbours
UNFINISHED = "\ufffd"  # what a tokenizer gives for the first bytes of a character
LONGEST = 8  # tokens that may wait for the rest of a character; more of them are no character


class TextStream:
    """The text of one sequence.

    Args:
        tokenizer: of transformers, or anything with its `decode`.
        prompt: tokens before the first new one.
        stops: strings that end the text.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-CONTEXT:])
        self._shown = len(self._tokens)  # tokens whose text is out (or held for a stop string)
        self._from = 0
        self._stops = list(stops)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain once `token` has come; sets `stopped` where a stop string is complete."""
        self._tokens.append(token)
        text = self._new_text()
        if text.endswith(UNFINISHED) and len(self._tokens) - self._shown < LONGEST:
            return ""
        self._from, self._shown = self._shown, len(self._tokens)
        return self._release(text)

    def finish(self) -> str:
        """What was held back, when no further token comes."""
        if self.stopped:
            return ""
        text, self._held = self._release(self._new_text()) + self._held, ""
        self._from = self._shown = len(self._tokens)
        return text

    def _new_text(self) -> str:
        before = self._decode(self._tokens[self._from : self._shown])
        return self._decode(self._tokens[self._from :])[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _release(self, text: str) -> str:
        """Adds text; gives what cannot be part of a stop string, or all before a complete one."""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
            return out
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                out, self._held = self._held[:-size], self._held[-size:]
                return out
        out, self._held = self._held, ""
        return out
