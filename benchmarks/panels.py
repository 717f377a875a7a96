"""Lines with intervals over a logarithmic axis, panels side by side, as one SVG that needs nothing else."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#7f7f7f",
           "#882255")  # Okabe and Ito 2008, and one of Tol's
STYLE = """svg{font:12px system-ui,sans-serif;--ink:#1d1f21;--line:#dfe2e5;--paper:#fff}
@media (prefers-color-scheme:dark){svg{--ink:#e6e7e9;--line:#34393e;--paper:#15171a}}
text{fill:var(--ink)}.grid{stroke:var(--line)}.paper{fill:var(--paper)}.curve{fill:none;stroke-width:1.6}"""
WIDE, HIGH, LEFT, TOP, BOTTOM = 330, 300, 48, 54, 42


@dataclass(frozen=True)
class Point:
    """A value at x with its interval, if it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Panel:
    """One picture: what its x axis says, and the points of each series; a series keeps its look in all panels."""

    label: str
    series: dict[str, list[Point]]


def draw(panels: Sequence[Panel], y: str, powers: bool = False) -> str:
    """All panels with one y axis in common and an x axis each (logarithmic). With `powers`, values of y are powers of
    ten."""
    points = [point for panel in panels for line in panel.series.values() for point in line]
    ends = [end for point in points for end in (point.y, point.low, point.high) if end is not None]
    span = max(max(ends) - min(ends), 1e-3)
    low, high = min(ends) - 0.05 * span, max(ends) + 0.05 * span
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    width = max(LEFT + WIDE * len(panels), sum(map(_key_width, names)))
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HIGH}" role="img">',
             f'<style>{STYLE}</style><rect class="paper" width="{width}" height="{HIGH}"/>',
             _key(names), f'<text x="6" y="{TOP - 12}">{escape(y)}</text>']  # fmt: skip
    parts += [_panel(panel, names, LEFT + WIDE * number, low, high, powers) for number, panel in enumerate(panels)]
    return "".join(parts) + "</svg>\n"


def _key(names: Sequence[str]) -> str:
    parts, x = [], 8.0
    for number, name in enumerate(names):
        parts.append(f'{_mark(number, x + 4, 16)}<text x="{x + 14:.0f}" y="20">{escape(name)}</text>')
        x += _key_width(name)
    return "".join(parts)


def _key_width(name: str) -> int:
    return 34 + 7 * len(name)


def _panel(panel: Panel, names: Sequence[str], left: float, low: float, high: float, powers: bool) -> str:
    right, bottom = left + WIDE - 24, HIGH - BOTTOM
    xs = [point.x for line in panel.series.values() for point in line]
    first, last = math.log10(min(xs)) - 0.08, math.log10(max(xs)) + 0.08

    def across(x: float) -> float:
        return left + (math.log10(x) - first) / (last - first) * (right - left)

    def down(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - TOP)

    parts = []
    step = 1.0 if powers else even_step(high - low)
    for number in range(math.ceil(low / step), math.floor(high / step) + 1):
        at, told = down(number * step), _short(10.0**number) if powers else f"{number * step:.3g}"
        parts.append(f'<path class="grid" d="M{left:.1f} {at:.1f}H{right:.1f}"/><text x="{left - 6:.1f}" '
                     f'y="{at + 4:.1f}" text-anchor="end">{told}</text>')  # fmt: skip
    for tick in _ticks(first, last):
        parts.append(f'<path class="grid" d="M{across(tick):.1f} {TOP}V{bottom}"/><text x="{across(tick):.1f}" '
                     f'y="{bottom + 16}" text-anchor="middle">{_short(tick)}</text>')  # fmt: skip
    middle = (left + right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{bottom + 34}" text-anchor="middle">{escape(panel.label)}</text>')
    for name, line in panel.series.items():
        number = names.index(name)
        colour = COLOURS[number % len(COLOURS)]
        path = "L".join(f"{across(point.x):.1f} {down(point.y):.1f}" for point in line)
        parts.append(f'<path class="curve" stroke="{colour}" d="M{path}"/>')
        for point in line:
            if point.low is not None and point.high is not None:
                parts.append(f'<path class="curve" stroke="{colour}" d="M{across(point.x):.1f} '
                             f'{down(point.low):.1f}V{down(point.high):.1f}"/>')  # fmt: skip
            told = escape(f"{name}: {10.0**point.y if powers else point.y:.4g} at {point.x:.3g}")
            parts.append(_mark(number, across(point.x), down(point.y), told))
    return "".join(parts)


def _mark(number: int, x: float, y: float, told: str = "") -> str:
    """Shape and colour of a series, so that colour is not alone in telling it."""
    shapes = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0", "M-4 -4h8v8h-8z", "M0 -5l5 8.5h-10z",
              "M0 -5.5l5 5.5l-5 5.5l-5 -5.5z", "M0 5l5 -8.5h-10z",
              "M-5 -1.5h3.5v-3.5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5z")  # fmt: skip
    title = f"<title>{told}</title>" if told else ""
    return (f'<path fill="{COLOURS[number % len(COLOURS)]}" transform="translate({x:.1f} {y:.1f})" '
            f'd="{shapes[number % len(shapes)]}">{title}</path>')  # fmt: skip


def even_step(span: float) -> float:
    power = 10.0 ** math.floor(math.log10(span / 5))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / 5)


def _ticks(first: float, last: float) -> list[float]:
    """Round numbers on a logarithmic axis, two at least where that can be."""
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        powers = range(math.floor(first), math.ceil(last) + 1)
        found = [factor * 10.0**power for power in powers for factor in factors]
        found = [tick for tick in found if first <= math.log10(tick) <= last]
        if len(found) >= 2:
            break
    return found


def _short(value: float) -> str:
    """1e+13 -> 1e13, 2000000 -> 2M."""
    for size, letter in ((1e6, "M"), (1e3, "k"), (1, "")):
        if size <= value < 1000 * size:
            return f"{value / size:g}{letter}"
    return f"{value:.0e}".replace("e+", "e")
