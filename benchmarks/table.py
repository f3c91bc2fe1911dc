"""The printed table: aligned although its rows come one by one."""

from collections.abc import Sequence
from dataclasses import dataclass

from .registry import Case, is_self
from .results import Row

EXTRA = ("density", "efficiency", "share")  # fields of single ops, shown beside our own peers


@dataclass(frozen=True)
class Widths:
    """Columns whose width depends on the cases."""

    case: int
    peer: int

    @classmethod
    def of(cls, cases: Sequence[Case]) -> "Widths":
        """Wide enough for every case and peer."""
        names = [len(f"{case.op} {case.name}") for case in cases]
        return cls(max(names), max(len(peer) for case in cases for peer in case.peers))


def head(widths: Widths) -> str:
    """The line above the rows."""
    return (
        f"{'case':<{widths.case}}  dtype thr  {'peer':<{widths.peer}}  {'ours ms':>9}  {'peer ms':>9}  "
        f"{'ratio':>6}  {'p20-p80':>12}  {'limit':>6}"
    )


def line(widths: Widths, row: Row) -> str:
    """One row; a row we lose is marked, a row without numbers says why."""
    place = f"{row['op']} {row['case']}"
    start = f"{place:<{widths.case}}  {row['dtype']:<5} {row['threads']:>3}  {row['peer']:<{widths.peer}}"
    if row["ratio"] is None:
        return f"{start}  {row['note']}"
    spread = f"{row['ratio_p20']:.2f}-{row['ratio_p80']:.2f}"
    words = [f"{name} {row[name]:.2f}" for name in EXTRA if is_self(row["peer"]) and row.get(name) is not None]
    if row["ratio"] < 1:
        words.insert(0, "we lose")
    if row["note"]:
        words.append(row["note"])
    return (
        f"{start}  {row['ours_ms']:>9.3f}  {row['peer_ms']:>9.3f}  {row['ratio']:>6.2f}  {spread:>12}  "
        f"{row['limit_fraction']:>6.1%}  {', '.join(words)}"
    ).rstrip()
