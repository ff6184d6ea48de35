"""A scatter plot as SVG: named points on a logarithmic axis, one panel for each quantity."""

from __future__ import annotations

import math
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 620, 360, 60, 90, 36, 44
Points = list[tuple[str, float, float]]


def scatter(panels: list[tuple[str, Points]], across: str) -> str:
    """`panels` are titles with points (name, x above 0, y); two panels in a row."""
    rows = math.ceil(len(panels) / 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {rows * HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{2 * WIDTH}" height="{rows * HEIGHT}" fill="white"/>',
    ]
    for number, (title, points) in enumerate(panels):
        parts.append(f'<g transform="translate({number % 2 * WIDTH},{number // 2 * HEIGHT})">')
        parts += _panel(title, points, across)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>"]) + "\n"


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

    found = [
        f'<text x="{LEFT}" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
        f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#444"/>',
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(across)}</text>',
    ]
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
