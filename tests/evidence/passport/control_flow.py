"""Loops of machine code: the compiler moves blocks about, so that a jump backwards alone is no loop.

A loop is an edge to a block that dominates its source, with every block that reaches the source without passing the
target (Aho, Lam, Sethi and Ullman, Compilers, section 9.6).
"""

import re
from collections.abc import Sequence
from typing import Protocol


class Line(Protocol):
    @property
    def address(self) -> int: ...
    @property
    def guard(self) -> str: ...
    @property
    def opcode(self) -> str: ...
    @property
    def operands(self) -> str: ...


def natural_loops(lines: Sequence[Line]) -> list[frozenset[int]]:
    """Indices of the instructions of every loop, one loop for each head, in the order of their heads."""
    successors = _successors(lines)
    starts = sorted({0} | {t for k, to in enumerate(successors) for t in to if to != [k + 1]}
                    | {k + 1 for k, to in enumerate(successors) if to != [k + 1] and k + 1 < len(lines)})  # fmt: skip
    ends = [*starts[1:], len(lines)]
    number = {start: block for block, start in enumerate(starts)}
    edges = [[number[t] for t in successors[end - 1]] for end in ends]
    dominators = _dominators(edges)
    loops: dict[int, set[int]] = {}
    for source, targets in enumerate(edges):
        for head in targets:
            if head in dominators[source]:
                loops.setdefault(head, {head}).update(_reaching(edges, source, head))
    parts = [range(start, end) for start, end in zip(starts, ends, strict=True)]
    return [frozenset(k for block in blocks for k in parts[block]) for _, blocks in sorted(loops.items())]


def _successors(lines: Sequence[Line]) -> list[list[int]]:
    """Of every instruction, the indices of those that may follow.

    A function that is called returns, so that a CALL is followed by the next instruction. Under a guard ptxas writes
    it for a jump, too: out of a loop, over the BRA back to its head.
    """
    at = {line.address: k for k, line in enumerate(lines)}
    meeting: dict[str, str] = {}  # barrier register -> where BSSY lets its threads meet again
    found = []
    for k, line in enumerate(lines):
        base, following = line.opcode.split(".")[0], [k + 1] if k + 1 < len(lines) else []
        target = re.search(r"0x([0-9a-f]+)$", line.operands.strip())
        if base == "BSSY":
            meeting[line.operands.split(",")[0]] = line.operands
        elif base == "BSYNC":
            target = re.search(r"0x([0-9a-f]+)$", meeting.get(line.operands.strip(), ""))
        jumps = base in ("BRA", "BSYNC") or (base == "CALL" and line.guard)
        to = [at[int(target[1], 16)]] if target and jumps and int(target[1], 16) in at else []
        always = not line.guard and ("," not in line.operands or base == "BSSY")
        if base in ("EXIT", "RET", "BRX", "JMX") or to:
            found.append(sorted({*to, *([] if always else following)}))
        else:
            found.append(following)
    return found


def _dominators(edges: Sequence[Sequence[int]]) -> list[set[int]]:
    """Of every block, those that lie on every way to it; a block that is never reached has none."""
    before: dict[int, list[int]] = {0: []}  # of the blocks that are reached
    todo = [0]
    while todo:
        source = todo.pop()
        for target in edges[source]:
            if target not in before:
                before[target] = []
                todo.append(target)
            before[target].append(source)
    found = [set(before) if block in before else set() for block in range(len(edges))]
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in before.keys() - {0}:
            new = set.intersection(*(found[b] for b in before[block])) | {block}
            if new != found[block]:
                found[block], changed = new, True
    return found


def _reaching(edges: Sequence[Sequence[int]], source: int, head: int) -> set[int]:
    """The blocks from which `source` is reached without passing `head`."""
    found, todo = {source}, [] if source == head else [source]
    while todo:
        block = todo.pop()
        for other, targets in enumerate(edges):
            if block in targets and other != head and other not in found:
                found.add(other)
                todo.append(other)
    return found
