"""The plot of docs/quality.md: KL divergence (logarithmic) against stored bits per weight, one mark per result, as SVG.

Written by hand instead of with a plotting library, so that the same results give the same bytes everywhere and a test can compare
them. A line joins the results of a family that no other of the family beats at fewer bits.
"""

from __future__ import annotations

import math
from html import escape

__all__ = ["FAMILIES", "draw_plot"]

#: Name in the legend, colour (distinct for colour-blind readers), mark.
FAMILIES = {
    "rtn": ("plain rounding", "#888888", "circle"),
    "gptq": ("GPTQ", "#0072b2", "square"),
    "awq": ("AWQ", "#56b4e9", "triangle"),
    "llama.cpp": ("llama.cpp types", "#009e73", "diamond"),
    "split": ("septet split", "#e69f00", "circle"),
    "trellis": ("septet trellis", "#d55e00", "square"),
}
WIDTH, HEIGHT = 760, 480
LEFT, RIGHT, TOP, BOTTOM = 70, 180, 20, 55
#: Results with more bits are left to the table.
MOST_BITS = 5.0
_SIZE = 4.5


class _Axes:
    """From bits and KL to places in the picture."""

    def __init__(self, results: list[dict]) -> None:
        bits = [result["effective_bits"] for result in results] or [3.0, 4.0]
        losses = [result["kld_mean"] for result in results] or [0.1, 1.0]
        self.bits = math.floor(min(bits) * 4 - 0.2) / 4, math.ceil(max(bits) * 4 + 0.2) / 4
        self.decades = math.floor(math.log10(min(losses)) - 0.05), math.ceil(math.log10(max(losses)) + 0.05)

    def x(self, bits: float) -> float:
        """Pixels from the left."""
        return LEFT + (bits - self.bits[0]) / (self.bits[1] - self.bits[0]) * (WIDTH - LEFT - RIGHT)

    def y(self, loss: float) -> float:
        """Pixels from the top; what is below the axis lies on it."""
        part = (math.log10(max(loss, 10.0 ** self.decades[0])) - self.decades[0]) / (self.decades[1] - self.decades[0])
        return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)


def draw_plot(results: list[dict]) -> str:
    """Draw results.

    Args:
        results: with name, title, family, effective_bits, kld_mean, kld_stderr.

    Returns:
        An SVG document.
    """
    shown = [result for result in results if result["effective_bits"] <= MOST_BITS and result["kld_mean"] > 0]
    axes = _Axes(shown)
    families = [family for family in FAMILIES if any(result["family"] == family for result in shown)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        *_grid(axes),
    ]
    for family in families:
        members = [result for result in shown if result["family"] == family]
        parts += [_line(axes, members, family), *(_point(axes, result) for result in members)]
    parts += [*_legend(families), "</svg>", ""]
    return "\n".join(parts)


def _grid(axes: _Axes) -> list[str]:
    """Lines and numbers of both axes."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for step in range(round(axes.bits[0] * 4), round(axes.bits[1] * 4) + 1):
        x = axes.x(step / 4)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" stroke="#e4e4e4"/>')
        if step % 2 == 0:
            parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{step / 4:g}</text>')
    for decade in range(axes.decades[0], axes.decades[1] + 1):
        for digit in (1, 2, 5) if decade < axes.decades[1] else (1,):
            y = axes.y(digit * 10.0**decade)
            parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="{"#c8c8c8" if digit == 1 else "#ededed"}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{digit * 10.0**decade:g}</text>')
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 12}" text-anchor="middle">stored bits per weight of the linear layers</text>')
    turned = f'transform="rotate(-90 18 {(TOP + bottom) / 2:.1f})"'
    parts.append(f'<text x="18" y="{(TOP + bottom) / 2:.1f}" text-anchor="middle" {turned}>KL divergence from the original, nats</text>')
    return parts


def _line(axes: _Axes, members: list[dict], family: str) -> str:
    """Through the results that no other of the family beats."""
    best: list[dict] = []
    for result in sorted(members, key=lambda one: (one["effective_bits"], one["kld_mean"])):
        if not best or result["kld_mean"] < best[-1]["kld_mean"]:
            best.append(result)
    points = " ".join(f"{axes.x(one['effective_bits']):.1f},{axes.y(one['kld_mean']):.1f}" for one in best)
    return f'<polyline points="{points}" fill="none" stroke="{FAMILIES[family][1]}" stroke-opacity="0.5"/>'


def _point(axes: _Axes, result: dict) -> str:
    """A mark with its standard error; its name shows when a mouse rests on it."""
    _, colour, mark = FAMILIES[result["family"]]
    x, y = axes.x(result["effective_bits"]), axes.y(result["kld_mean"])
    low, high = (axes.y(result["kld_mean"] + sign * result["kld_stderr"]) for sign in (-1, 1))
    label = escape(f"{result['title']}: {result['effective_bits']:.3f} bits, KL {result['kld_mean']:.4f} ± {result['kld_stderr']:.4f}")
    error = f'<line x1="{x:.1f}" y1="{low:.1f}" x2="{x:.1f}" y2="{high:.1f}" stroke="{colour}"/>'
    return f"<g>{error}{_mark(mark, x, y, colour)}<title>{label}</title></g>"


def _mark(mark: str, x: float, y: float, colour: str) -> str:
    if mark == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{_SIZE}" fill="{colour}"/>'
    corners = {
        "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "triangle": ((0, -1.2), (1.2, 1), (-1.2, 1)),
        "diamond": ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
    }[mark]
    points = " ".join(f"{x + _SIZE * across:.1f},{y + _SIZE * down:.1f}" for across, down in corners)
    return f'<polygon points="{points}" fill="{colour}"/>'


def _legend(families: list[str]) -> list[str]:
    """Marks and names, right of the axes."""
    parts = []
    for index, family in enumerate(families):
        label, colour, mark = FAMILIES[family]
        x, y = WIDTH - RIGHT + 22, TOP + 14 + 24 * index
        parts += [_mark(mark, x, y, colour), f'<text x="{x + 14}" y="{y + 4}">{escape(label)}</text>']
    return parts
