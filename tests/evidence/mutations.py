"""Small changes of PTX text that plant faults."""

import bisect
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[str], str]

BARRIER, WAIT, COMMIT = r"bar\.sync\s+0;", r"cp\.async\.wait_group\s+\w+;", r"cp\.async\.commit_group;"
# Groups 2 and 3 are the first two registers of operand A, or of operand B; the replacement r"\1\3, \2" swaps them.
MMA_A = r"(mma\.sync\S+ \{[^}]*\}, \{ )(%r\d+), (%r\d+)"
MMA_B = r"(mma\.sync\S+ \{[^}]*\}, \{[^}]*\}, \{ )(%r\d+), (%r\d+)"
SWAPPED = r"\1\3, \2"


def nth(pattern: str, index: int, replacement: str) -> Change:
    """Replaces the occurrence number `index` of a pattern; the text must change."""

    def apply(text: str) -> str:
        matches = list(re.finditer(pattern, text))
        if not -len(matches) <= index < len(matches):
            raise AssertionError(f"{pattern!r} occurs {len(matches)} times, number {index} is to be replaced")
        match = matches[index]
        changed = text[: match.start()] + match.expand(replacement) + text[match.end() :]
        if changed == text:
            raise AssertionError(f"replacing number {index} of {pattern!r} changes nothing")
        return changed

    return apply


def weaker(*indices: int) -> Change:
    """The cp.async waits of these numbers leave one more group in flight."""

    def apply(text: str) -> str:
        for k in indices:
            groups = int(re.findall(r"cp\.async\.wait_group\s+(\w+);", text)[k], 0)
            text = nth(WAIT, k, f"cp.async.wait_group {groups + 1};")(text)
        return text

    return apply


def shuffle(index: int, old: int, new: int) -> Change:
    """Of the butterfly shuffles over distance `old`, number `index` goes over `new`."""
    return nth(rf"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+,) {old},", index, rf"\1 {new},")


def in_entry(name: str, change: Change) -> Change:
    """The change, applied to one entry of a module with several."""

    def apply(text: str) -> str:
        start = text.index(f".entry {name}")
        end = text.find(".entry ", start + 1) % (len(text) + 1)
        return text[:start] + change(text[start:end]) + text[end:]

    return apply


def at_line(kernel: Any, words: str, pattern: str, index: int | None, replacement: str) -> Change:
    """Replaces the occurrence number `index` (None: each) of a pattern in what was compiled from some source lines.

    These are the lines that contain `words` in the file of the Triton function `kernel`, or in the CUDA file of that
    path; PTX names them in `.loc`.
    """
    path = kernel if isinstance(kernel, Path) else Path(inspect.getsourcefile(getattr(kernel, "fn", kernel)) or "")
    lines = {number for number, line in enumerate(path.read_text().splitlines(), 1) if words in line}

    def apply(text: str) -> str:
        # Triton's file is the first; what its functions call lies in others and counts to the line that calls.
        cuda = re.findall(rf'\.file\s+(\d+)\s+"[^"]*{re.escape(path.name)}"', text)
        listed, known = (cuda, r"\d+") if path.suffix != ".py" else (["1"], "1")
        places = [(m.start(), m[1] in listed and int(m[2])) for m in re.finditer(rf"\.loc\s+({known})\s+(\d+)", text)]
        starts = [start for start, _ in places]
        found = []
        for match in re.finditer(pattern, text):
            before = bisect.bisect(starts, match.start()) - 1
            if before >= 0 and places[before][1] in lines:
                found.append(match)
        chosen = found if index is None else found[index : index + 1 or None]
        if not chosen:
            raise AssertionError(f"{words!r} has {len(found)} of {pattern!r}, number {index} is to be replaced")
        for match in reversed(chosen):
            text = text[: match.start()] + match.expand(replacement) + text[match.end() :]
        return text

    return apply
