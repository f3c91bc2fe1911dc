"""Rows of a JSON or CSV file to an SVG picture.

    python -m scrimp.benchmarks.plot ROWS OUT.svg --where peer=sdpa threads=2

Bars: one row each, the ratio with its 20th to 80th percentile. With `--x FIELD`: one line per value of `--by FIELD`
over a logarithmic x. The dashed line at 1 is equal speed; below it we lose. Conditions stand under the picture.
"""

import argparse
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .results import Row, read

WIDTH, RIGHT, TOP = 760, 90, 44
ROW_HEIGHT, PLOT_HEIGHT, CHARACTER = 24, 300, 7.5
TIMES = "\N{MULTIPLICATION SIGN}"
COLOURS = ("#2b6cdb", "#d9722e", "#2e9e62", "#8a4fc9", "#c03a5b", "#6b7280", "#0f9bb3", "#a07a12")
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1f2933}.small{font-size:11px;fill:#52606d}.title{font-weight:600}"
    ".grid{stroke:#e4e7eb}.even{stroke:#1f2933;stroke-dasharray:4 3}.spread{stroke:#1f2933}"
)


def select(rows: Sequence[Row], wishes: Sequence[str]) -> list[Row]:
    """The rows with a ratio whose fields are as wished ("peer=sdpa"; "case~blocks" for a part of the text)."""
    found = [row for row in rows if row.get("ratio") is not None]
    for wish in wishes:
        name, sign, value = wish.partition("~") if "~" in wish else wish.partition("=")
        if not sign:
            raise ValueError(f"--where {wish!r} must be FIELD=VALUE or FIELD~TEXT")
        texts = [(row, str(row.get(name))) for row in found]
        found = [row for row, text in texts if (value in text if sign == "~" else value == text)]
    if not found:
        raise ValueError(f"no row with a ratio has {' and '.join(wishes) or 'any field'}")
    return found


def bars(rows: Sequence[Row], title: str) -> str:
    """One bar per row: the ratio, its spread and its value."""
    ticks = _ticks(max(row["ratio_p80"] for row in rows))
    labels = _labels(rows)
    left = 20 + CHARACTER * max(map(len, labels))
    bottom = TOP + ROW_HEIGHT * len(rows)

    def at(ratio: float) -> float:
        return left + ratio / ticks[-1] * (WIDTH - left - RIGHT)

    parts = [line("grid", at(tick), TOP, at(tick), bottom) for tick in ticks]
    parts += [text(at(tick), bottom + 16, f"{tick:g}{TIMES}", "middle", "small") for tick in ticks]
    for place, row in enumerate(rows):
        y = TOP + ROW_HEIGHT * place
        width, colour = at(row["ratio"]) - left, COLOURS[0] if row["ratio"] >= 1 else COLOURS[1]
        parts.append(text(left - 8, y + 17, labels[place], "end"))
        parts.append(f'<rect x="{left}" y="{y + 4}" width="{width:.1f}" height="{ROW_HEIGHT - 8}" fill="{colour}"/>')
        parts.append(line("spread", at(row["ratio_p20"]), y + 12, at(row["ratio_p80"]), y + 12))
        parts.append(text(at(max(row["ratio"], row["ratio_p80"])) + 6, y + 17, f"{row['ratio']:.2f}{TIMES}"))
    parts.append(line("even", at(1), TOP, at(1), bottom))
    return svg(title, parts, bottom + 30, conditions(rows))


def lines(rows: Sequence[Row], x: str, by: str, title: str) -> str:
    """One line per value of field `by`: the ratio over field `x`, which is drawn logarithmically."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row[x]):
        groups.setdefault(str(row.get(by)), []).append(row)
    for name, group in groups.items():
        if len({row[x] for row in group}) < len(group):
            raise ValueError(f"several rows of {by}={name} have the same {x}; narrow them with --where")
    places = sorted({row[x] for row in rows})
    ticks = _ticks(max(row["ratio"] for row in rows))
    left, bottom = 60, TOP + PLOT_HEIGHT
    span = math.log(places[-1] / places[0]) or 1.0

    def at(value: float) -> float:
        return left + 20 + math.log(value / places[0]) / span * (WIDTH - left - 200)

    def height(ratio: float) -> float:
        return bottom - ratio / ticks[-1] * PLOT_HEIGHT

    parts = [line("grid", left, height(tick), WIDTH - 160, height(tick)) for tick in ticks]
    parts += [text(left - 8, height(tick) + 4, f"{tick:g}{TIMES}", "end", "small") for tick in ticks]
    parts += [text(at(place), bottom + 18, f"{place:g}", "middle", "small") for place in places]
    parts.append(text((left + WIDTH - 160) / 2, bottom + 36, x, "middle", "small"))
    parts.append(line("even", left, height(1), WIDTH - 160, height(1)))
    for number, (name, group) in enumerate(groups.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = [(at(row[x]), height(row["ratio"])) for row in group]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{colour}"/>' for px, py in points]
        y = TOP + 20 * number + 8
        parts.append(f'<rect x="{WIDTH - 145}" y="{y - 9}" width="12" height="12" fill="{colour}"/>')
        parts.append(text(WIDTH - 127, y + 2, name))
    return svg(title, parts, bottom + 50, conditions(rows))


def conditions(rows: Sequence[Row]) -> list[str]:
    """What holds for all rows, or the values that occur."""

    def values(name: str) -> str:
        return " / ".join(dict.fromkeys(str(row[name]) for row in rows))

    return [
        "time of the peer over ours, paired in one process: median, 20th to 80th percentile; dashed: equal speed",
        f"{values('cpu')}, {values('isa')}, {values('threads')} threads, {values('dtype')}, against {values('peer')}",
        f"{values('versions')}, commit {values('commit')}",
    ]


def _labels(rows: Sequence[Row]) -> list[str]:
    """The case of each row with those fields that differ between the rows."""
    varying = [name for name in ("op", "dtype", "threads", "peer") if len({row[name] for row in rows}) > 1]
    suffix = {"threads": " threads"}
    return [", ".join([row["case"], *(f"{row[name]}{suffix.get(name, '')}" for name in varying)]) for row in rows]


def _ticks(high: float) -> list[float]:
    """Round numbers from 0 to at or above `high` and 1, at most nine of them."""
    high = max(high, 1.0)
    step = next(s * 10.0**power for power in range(-1, 9) for s in (1, 2, 2.5, 5) if high / (s * 10.0**power) <= 7)
    return [step * number for number in range(math.ceil(high / step - 1e-9) + 1)]


def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """A line of a kind of STYLE."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    """Words at a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def svg(title: str, parts: Sequence[str], bottom: float, notes: Sequence[str]) -> str:
    """A picture with a title above and notes below its parts."""
    small = [text(12, bottom + 16 * i + 12, words, kind="small") for i, words in enumerate(notes)]
    height = bottom + 16 * len(small) + 12
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img">',
            f"<title>{escape(title)}</title><style>{STYLE}</style>",
            f'<rect width="{WIDTH}" height="{height:.0f}" fill="#fff"/>',
            text(12, 26, title, kind="title"),
            *parts,
            *small,
            "</svg>\n",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Reads rows, writes one picture."""
    parser = argparse.ArgumentParser(prog="python -m scrimp.benchmarks.plot", description="benchmark rows to an SVG")
    parser.add_argument("rows", type=Path, help="JSON or CSV file of `scrimp bench`")
    parser.add_argument("out", type=Path, help="SVG file to write")
    parser.add_argument("--where", nargs="+", default=[], metavar="FIELD=VALUE", help="FIELD~TEXT: contains TEXT")
    parser.add_argument("--x", metavar="FIELD", help="draw lines over this field instead of bars")
    parser.add_argument("--by", metavar="FIELD", default="case", help="field that tells the lines apart")
    parser.add_argument("--title", default="speed-up")
    args = parser.parse_args(argv)
    try:
        rows = select(read(args.rows), args.where)
        args.out.write_text(lines(rows, args.x, args.by, args.title) if args.x else bars(rows, args.title))
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"no field {error}" if isinstance(error, KeyError) else str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
