"""The report's pictures as inline SVG; colours come from the page's style sheet."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .picture import Picture, png_data_uri

PLAN_COLOUR = (43, 108, 219)
WIDTH = 720
TIMES = "\N{MULTIPLICATION SIGN}"
STEPS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 25.0, 100.0, 1e3, 1e5, 1e9)


def bar_chart(figures: Mapping[str, Any]) -> str:
    """Time to first token of every variant, split into attention and everything else."""
    rest = figures["ttft_removed_s"]
    bars = [("dense (SDPA)", figures["ttft_dense_s"], 1.0)]
    bars += [(one["name"], one["ttft_s"], one["ttft_ratio"]) for one in figures["frontier"]]
    bars.append(("attention removed", rest, figures["bound_ratio"]))
    left, right, row = 190, 150, 38
    scale = (WIDTH - left - right) / max(seconds for _, seconds, _ in bars)
    parts = []
    for place, (name, seconds, ratio) in enumerate(bars):
        y = place * row + 6
        other, attention = min(rest, seconds) * scale, max(0.0, seconds - rest) * scale
        parts.append(_text("label", left - 10, y + 17, _short(name), "end"))
        parts.append(_rect("other", left, y, other, 24))
        parts.append(_rect("accent", left + other + 1, y, attention, 24))
        end = left + other + attention + 12
        times = f"{seconds:.1f} s <tspan class=soft dx=6>{ratio:.2f}{TIMES}</tspan>"
        parts.append(f"<text class=value x={end:.1f} y={y + 17}>{times}</text>")
    y = len(bars) * row + 20
    for x, kind, word in ((left, "accent", "attention"), (left + 130, "other", "everything else")):
        parts += [_rect(kind, x, y - 10, 12, 12), _text("soft", x + 18, y, word)]
    return _svg(y + 10, "Time to first token of each variant", parts)


def frontier_chart(figures: Mapping[str, Any]) -> str:
    """Speed-up against change of perplexity, a point a budget, under the bound of no attention."""
    dense = ("dense", 0.0, 1.0)
    points = [dense] + [
        (one["name"], 100 * (one["perplexity_ratio"] - 1), one["ttft_ratio"]) for one in figures["frontier"]
    ]
    bound = figures["bound_ratio"]
    left, top, width, height = 72, 40, WIDTH - 110, 250
    xs = _ticks([x for _, x, _ in points])
    ys = _ticks([bound, *(y for _, _, y in points)])

    def at_x(value: float) -> float:
        return left + (value - xs[0]) / (xs[-1] - xs[0]) * width

    def at_y(value: float) -> float:
        return top + height - (value - ys[0]) / (ys[-1] - ys[0]) * height

    parts = [_text("soft", 0, 14, "speed-up")]
    for tick in ys:
        parts.append(_across("grid", left, left + width, at_y(tick)))
        word = f"{tick:.{_decimals(ys)}f}{TIMES}"
        parts.append(_text("soft", left - 10, at_y(tick) + 5, word, "end"))
    for tick in xs:
        word = f"{tick:+.{_decimals(xs)}f} %" if tick else "0 %"
        parts.append(_text("soft", at_x(tick), top + height + 24, word, "middle"))
    parts.append(_text("soft", left + width / 2, top + height + 48, "change of perplexity", "middle"))
    parts.append(_across("bound", left, left + width, at_y(bound)))
    parts.append(_text("soft", left + width, at_y(bound) - 7, "attention removed", "end"))
    path = sorted((at_x(x), at_y(y)) for _, x, y in points)
    path_points = " ".join(f"{x:.1f},{y:.1f}" for x, y in path)
    parts.append(f'<polyline class=path points="{path_points}" />')
    for point in points:
        name, x, y = point[0], at_x(point[1]), at_y(point[2])
        parts.append(f'<circle class="dot{" plain" * (point is dense)}" cx={x:.1f} cy={y:.1f} r=5 />')
        leftward = x > left + 0.8 * width
        below = y + (4 if point is dense else 20)
        parts.append(_text("label", x + (-12 if leftward else 12), below, _short(name), "end" if leftward else "start"))
    return _svg(top + height + 58, "Speed-up against change of perplexity", parts)


def plan_figure(one: Picture) -> str:
    """One head's plan: queries down, keys to the right, coloured where the head reads."""
    words = f"layer {one.layer}, head {one.head}"
    image = png_data_uri(one.cells, PLAN_COLOUR)
    return (
        f'<figure><svg viewBox="0 0 100 100" role=img aria-label="Attention plan of {words}">'
        '<path class=triangle d="M0 0V100H100Z" />'
        f'<image href="{image}" width=100 height=100 preserveAspectRatio=none />'
        f"</svg><figcaption>{words}<b>{100 * one.density:.0f} %</b></figcaption></figure>"
    )


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    view = f'viewBox="0 0 {WIDTH} {height:.0f}"'
    label = f'role=img aria-label="{escape(title)}"'
    return f"<svg class=chart {view} {label}>{''.join(parts)}</svg>"


def _text(kind: str, x: float, y: float, words: str, anchor: str = "start") -> str:
    return f"<text class={kind} x={x:.1f} y={y:.1f} text-anchor={anchor}>{escape(words)}</text>"


def _rect(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f"<rect class={kind} x={x:.1f} y={y:.1f} width={width:.1f} height={height:.1f} />"


def _across(kind: str, left: float, right: float, y: float) -> str:
    return f"<line class={kind} x1={left:.1f} x2={right:.1f} y1={y:.1f} y2={y:.1f} />"


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers that enclose the values, at most eight of them."""
    low, span = min(values), max(max(values) - min(values), 0.5)
    step = next(size for size in STEPS if span / size <= 6)
    first, last = int(low // step), int(-(-(low + span) // step))
    return [number * step for number in range(first, last + 1)]


def _decimals(ticks: Sequence[float]) -> int:
    return next(n for n in (0, 1, 2) if n == 2 or all(round(t, n) == t for t in ticks))


def _short(name: str) -> str:
    return name if len(name) <= 20 else name[:19] + "\N{HORIZONTAL ELLIPSIS}"
