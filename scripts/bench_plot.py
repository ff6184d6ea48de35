"""Plots as SVG, one panel for each quantity: named points on a logarithmic axis, or curves over steps."""

from __future__ import annotations

import math
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 620, 360, 60, 90, 36, 44
Points = list[tuple[str, float, float]]


Curve = tuple[list[int], list[float]]
STROKES = (("#1f77b4", ""), ("#d62728", "6 3"), ("#2ca02c", "2 2"), ("#9467bd", "8 3 2 3"))
"""Colour and dash of a panel's curves: they differ in both."""


def scatter(panels: list[tuple[str, Points]], across: str) -> str:
    """`panels` are titles with points (name, x above 0, y); two panels in a row."""
    return _page([_panel(title, points, across) for title, points in panels])


def curves(panels: list[tuple[str, dict[str, Curve]]], across: str) -> str:
    """`panels` are titles with named curves (x, y); two panels in a row, the names under each title."""
    return _page([_curves(title, named, across) for title, named in panels])


def _page(panels: list[list[str]]) -> str:
    rows = math.ceil(len(panels) / 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {rows * HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{2 * WIDTH}" height="{rows * HEIGHT}" fill="white"/>',
    ]
    for number, panel in enumerate(panels):
        parts.append(f'<g transform="translate({number % 2 * WIDTH},{number // 2 * HEIGHT})">')
        parts += panel
        parts.append("</g>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def _frame(title: str, across: str) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    return [
        f'<text x="{LEFT}" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
        f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#444"/>',
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(across)}</text>',
    ]


def _curves(title: str, named: dict[str, Curve], across: str) -> list[str]:
    low, high = (bound(x for xs, _ in named.values() for x in xs) for bound in (min, max))
    least, most = (bound(y for _, ys in named.values() for y in ys) for bound in (min, max))
    margin = 0.05 * (most - least or 1.0)
    least, most = least - margin, most + margin
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - low) / ((high - low) or 1) * (right - LEFT),
            bottom - (y - least) / (most - least) * (bottom - TOP),
        )

    found = _frame(title, across)
    for step in range(5):
        value = least + (most - least) * step / 4
        y = place(low, value)[1]
        found.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#eee"/>')
        found.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
        across_value = low + (high - low) * step / 4
        x = place(across_value, least)[0]
        found.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{across_value:.0f}</text>')
    for number, (name, (xs, ys)) in enumerate(named.items()):
        colour, dash = STROKES[number % len(STROKES)]
        stroke = f'stroke="{colour}" stroke-width="1.6" stroke-dasharray="{dash}" fill="none"'
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in zip(xs, ys, strict=True)))
        left = right - 90 * (len(named) - number)
        found.append(f'<polyline points="{points}" {stroke}/>')
        found.append(f'<path d="M{left} 16h24" {stroke}/>')
        found.append(f'<text x="{left + 28}" y="20">{escape(name)}</text>')
    return found


def _panel(title: str, points: Points, across: str) -> list[str]:
    low, high = (bound(math.log10(x) for _, x, _ in points) for bound in (min, max))
    least, most = (bound(y for *_, y in points) for bound in (min, max))
    low, high = math.floor(low), math.ceil(high) if high > math.floor(low) else math.floor(low) + 1
    margin = 0.08 * (most - least or 1.0)
    least, most = least - margin, most + margin
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (math.log10(x) - low) / (high - low) * (right - LEFT),
            bottom - (y - least) / (most - least) * (bottom - TOP),
        )

    found = _frame(title, across)
    for power in range(int(low), int(high) + 1):
        x, _ = place(10.0**power, least)
        found.append(f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="#ddd"/>')
        found.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{10**power:,}</text>')
    for step in range(5):
        value = least + (most - least) * step / 4
        _, y = place(10.0**low, value)
        found.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    taken: list[tuple[float, float]] = []
    for name, count, quality in sorted(points, key=lambda point: (point[1], point[2])):
        x, y = place(count, quality)
        label = _free(x, y + 4, taken, bottom)
        taken.append((x, label))
        found.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#1f77b4"/>')
        found.append(f'<path d="M{x + 3:.1f} {y:.1f}L{x + 8:.1f} {label - 4:.1f}" stroke="#999" stroke-width="0.6"/>')
        found.append(f'<text x="{x + 9:.1f}" y="{label:.1f}">{escape(name)}</text>')
    return found


def _free(x: float, y: float, taken: list[tuple[float, float]], bottom: float) -> float:
    """The height nearest to `y` at which a name covers no other."""
    for step in range(40):
        label = y + 11 * ((step + 1) // 2) * (1 if step % 2 else -1)
        inside = TOP < label < bottom
        if inside and not any(abs(label - other) < 11 and abs(x - place) < 95 for place, other in taken):
            return label
    return y
