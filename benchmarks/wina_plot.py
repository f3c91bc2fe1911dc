"""The picture of `wina_quality`: the change of the perplexity over the share of skipped weights, a line a variant.

python -m scrimp.benchmarks.wina_plot ROWS OUT.svg
"""

import sys
from collections.abc import Sequence
from math import log10
from pathlib import Path

from .plot import COLOURS, PLOT_HEIGHT, TOP, WIDTH, line, svg, text
from .results import Row, read

LEFT, RIGHT = 80, 210
LOWEST = 1e-3  # changes below it, and negative ones, lie on the bottom


def picture(rows: Sequence[Row]) -> str:
    """An SVG of rows of `wina_quality`; the bars are standard errors over the windows."""
    variants = list(dict.fromkeys((row["method"], row["allocation"]) for row in rows))
    shares = sorted({row["sparsity"] for row in rows})
    highest = 10.0
    bottom, span = TOP + PLOT_HEIGHT, (shares[-1] - shares[0]) or 1.0

    def at(share: float) -> float:
        return LEFT + 20 + (share - shares[0]) / span * (WIDTH - LEFT - RIGHT - 40)

    def height(change: float) -> float:
        inside = min(max(change, LOWEST), highest)
        return bottom - log10(inside / LOWEST) / log10(highest / LOWEST) * PLOT_HEIGHT

    parts = []
    for tick in (0.001, 0.01, 0.1, 1.0, 10.0):
        parts.append(line("grid", LEFT, height(tick), WIDTH - RIGHT, height(tick)))
        parts.append(text(LEFT - 8, height(tick) + 4, f"+{100 * tick:g} %", "end", "small"))
    parts += [text(at(share), bottom + 18, f"{100 * share:g} %", "middle", "small") for share in shares]
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, bottom + 36, "weights skipped", "middle", "small"))
    for number, variant in enumerate(variants):
        colour = COLOURS[number % len(COLOURS)]
        own = [row for row in rows if (row["method"], row["allocation"]) == variant]
        points = []
        for row in sorted(own, key=lambda row: row["sparsity"]):
            x, change = at(row["sparsity"]) + 3 * number, row["perplexity_ratio"] - 1
            ends = (height(change + row["ratio_error"]), height(change - row["ratio_error"]))
            parts.append(f'<path d="M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}" stroke="{colour}"/>')
            parts.append(f'<circle cx="{x:.1f}" cy="{height(change):.1f}" r="4" fill="{colour}"/>')
            points.append(f"{x:.1f},{height(change):.1f}")
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        y = TOP + 20 * number + 8
        parts.append(f'<rect x="{WIDTH - RIGHT + 20}" y="{y - 9}" width="12" height="12" fill="{colour}"/>')
        parts.append(text(WIDTH - RIGHT + 38, y + 2, ", ".join(variant), kind="small"))
    first = rows[0]
    notes = [
        f"perplexity beside the dense model's {first['reference_perplexity']:g}; bars: standard errors over "
        f"{first['windows']} windows of {first['window_tokens']} tokens",
        f"{first['cpu']}, {first['dtype']}, {first['versions']}, commit {first['commit']}",
    ]
    return svg("change of the perplexity", parts, bottom + 50, notes)


def main(words: Sequence[str] | None = None) -> int:
    """Reads rows of a JSON or CSV file, writes the picture."""
    source, target = sys.argv[1:] if words is None else words
    rows = [row for row in read(Path(source)) if row["op"] == "wina_quality"]
    Path(target).write_text(picture(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
