"""The demo's table as text, and its report: one HTML file with pictures, nothing loaded from elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from .charts import bar_chart, frontier_chart, plan_figure
from .page import PAGE
from .picture import Picture

HEADINGS = (
    "attention",
    "first token",
    "speed-up",
    "p20 - p80",
    "density",
    "perplexity",
    "vs dense",
    "same top-1",
    "peak memory",
)


@dataclass(frozen=True)
class Answer:
    """What one variant answered to the question."""

    question: str
    variant: str
    words: str


def table_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """The demo's table as cells, one row a variant: dense, every budget, attention removed."""
    dense = ["dense (SDPA)", f"{figures['ttft_dense_s']:.2f} s", "1.00x", "", "100 %"]
    dense += [
        f"{figures['perplexity_dense']:.3f}",
        "",
        "",
        _memory(figures["peak_memory_dense_bytes"]),
    ]
    rows = [dense]
    for point in figures["frontier"]:
        rows.append(
            [
                f"sparse, {point['name']}",
                f"{point['ttft_s']:.2f} s",
                f"{point['ttft_ratio']:.2f}x",
                f"{point['ttft_ratio_p20']:.2f} - {point['ttft_ratio_p80']:.2f}",
                f"{100 * point['density']:.0f} %",
                f"{point['perplexity']:.3f}",
                percent_change(point["perplexity_ratio"]),
                f"{100 * point['top1_agreement']:.1f} %",
                _memory(point["peak_memory_bytes"]),
            ]
        )
    spread = f"{figures['bound_ratio_p20']:.2f} - {figures['bound_ratio_p80']:.2f}"
    removed = [
        "removed (bound)",
        f"{figures['ttft_removed_s']:.2f} s",
        f"{figures['bound_ratio']:.2f}x",
        spread,
    ]
    return [*rows, [*removed, "0 %", "", "", "", ""]]


def table_text(figures: Mapping[str, Any]) -> str:
    """The same table for a terminal, with the conditions under it."""
    rows = [list(HEADINGS), *table_rows(figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", *conditions(figures)])


def conditions(figures: Mapping[str, Any]) -> list[str]:
    """How the figures were taken, in plain sentences."""
    windows, rounds = _count(figures["windows"], "held-out window"), _count(figures["rounds"], "paired round")
    return [
        f"{figures['model']} reads {figures['prompt_tokens']:,} tokens of {figures['text']}; attention takes "
        f"{100 * figures['attention_share']:.0f} % of the dense time.",
        f"Times: medians of {rounds} in which the variants alternate. Quality: {windows} of "
        f"{figures['window_tokens']:,} tokens, with the timed plan active.",
        f"{figures['cpu']}, {figures['isa']}, {_count(figures['threads'], 'thread')}, "
        f"{figures['versions']}, commit {figures['commit']}.",
    ]


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def percent_change(ratio: float) -> str:
    """A ratio as a signed change: 1.0123 -> '+1.2 %'."""
    return f"{100 * (ratio - 1):+.1f} %"


def write_report(
    file: Path, figures: Mapping[str, Any], pictures: Sequence[Picture], answers: Sequence[Answer]
) -> None:
    """Write the report. Everything that a user or a model may have written is escaped."""
    file.write_text(report_html(figures, pictures, answers), encoding="utf-8")


def report_html(figures: Mapping[str, Any], pictures: Sequence[Picture], answers: Sequence[Answer]) -> str:
    """The report as one HTML page."""
    ratio = figures["ttft_ratio"]
    verdict = (
        f"{ratio:.2f}\N{MULTIPLICATION SIGN} sooner" if ratio >= 1 else f"{1 / ratio:.2f}\N{MULTIPLICATION SIGN} later"
    )
    tiles = [
        (
            "first token",
            f"{figures['ttft_sparse_s']:.1f} s",
            f"dense {figures['ttft_dense_s']:.1f} s",
        ),
        ("attention read", f"{100 * figures['density']:.0f} %", "of all query-key pairs"),
        (
            "perplexity",
            percent_change(figures["perplexity_ratio"]),
            f"dense {figures['perplexity_dense']:.2f}",
        ),
        ("same next token", f"{100 * figures['top1_agreement']:.1f} %", "of held-out positions"),
    ]
    return PAGE.substitute(
        title=escape(f"{figures['model']}: the first token after {figures['prompt_tokens']:,} tokens, {verdict}"),
        model=escape(str(figures["model"])),
        tokens=f"{figures['prompt_tokens']:,}",
        verdict=escape(verdict),
        text=escape(str(figures["text"])),
        budget=escape(str(figures["budget"])),
        tiles="".join(_tile(*tile) for tile in tiles),
        bars=bar_chart(figures),
        frontier=frontier_chart(figures),
        plans="".join(plan_figure(one) for one in pictures),
        head="".join(f"<th>{escape(word)}</th>" for word in HEADINGS),
        body="".join(_row(row) for row in table_rows(figures)),
        answers=_answers(answers),
        conditions="".join(f"<p>{escape(sentence)}</p>" for sentence in conditions(figures)),
    )


def _tile(label: str, value: str, note: str) -> str:
    return f"<div class=tile><span>{escape(label)}</span><b>{escape(value)}</b><span>{escape(note)}</span></div>"


def _row(cells: Sequence[str]) -> str:
    first, *rest = (escape(cell) for cell in cells)
    return f"<tr><th scope=row>{first}</th>" + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"


def _answers(answers: Sequence[Answer]) -> str:
    if not answers:
        return ""
    quoted = "".join(f"<dt>{escape(one.variant)}</dt><dd>{escape(one.words.strip())}</dd>" for one in answers)
    return f"<h2>What it answered</h2><p class=question>{escape(answers[0].question)}</p><dl>{quoted}</dl>"


def _memory(size: int | None) -> str:
    return "n/a" if size is None else f"{size / 2**30:.2f} GiB"
