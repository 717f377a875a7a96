"""The frontier picture (size against quality) and small bars, as inline SVG with finite coordinates only."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from shrew.report import words
from shrew.report.view import CHOSEN, HEALED, ORIGINAL, View, trial_number

LARGEST, FURTHEST = 1e18, 1e3  # bytes and shares beyond these are mistakes that no axis could show

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Point:
    """One model on one split: its bytes, its share of the quality with the interval, and how it is drawn."""

    model: str
    label: str
    split: str  # "search" is drawn hollow, everything else filled
    kind: str  # original, healed, chosen, near, trial
    size: float
    share: float
    low: float | None
    high: float | None

    @property
    def words(self) -> str:
        interval = ""
        if self.low is not None and self.high is not None:
            interval = f" ({words.interval(words.percent(self.low), words.percent(self.high))})"
        split = f", {self.split} split" if self.split else ""
        return f"{self.label}{split}: {words.size(self.size)}, keeps {words.percent(self.share)}{interval}"


def points(view: View) -> list[Point]:
    """Every model whose size and share of the quality are both known, the ones that matter most last (on top)."""
    kinds = {ORIGINAL: "original", HEALED: "healed"}
    found: list[Point] = []
    for model in view.models:
        total = view.value(model, "bytes")
        if total is None or not 1 <= total <= LARGEST:
            continue
        kind = kinds.get(model, "trial")
        if model == view.best:
            kind = "chosen" if view.met else "near"
        for split in ("search", "final"):
            record = view.find(model, "retention", split)
            share = _share(record.value) if record else None
            doubled = (split != "final" and kind in kinds.values() and _known(view, model, "final")) or (
                # the chosen model is one of the trials: show its search measurement once, under its own name
                view.met and model == view.chosen_trial and (split == "final" or _known(view, CHOSEN, split))
            )
            if record is None or share is None or doubled:
                continue
            low, high = _share(record.low), _share(record.high)
            found.append(Point(model, view.name(model), split, kind, total, share, low, high))
    against = {words.text_in(record.detail.get("against")) for record in view.of("retention")}
    for model in sorted(against & kinds.keys()):
        total = view.value(model, "bytes")
        if total and 1 <= total <= LARGEST and not any(item.model == model for item in found):
            found.append(Point(model, view.name(model), "", kinds[model], total, 1.0, None, None))
    order = ["trial", "original", "healed", "near", "chosen"]
    return sorted(found, key=lambda item: (order.index(item.kind), item.split != "search"))


def _share(value: object) -> float | None:
    share = words.number_in(value)
    return share if share is not None and abs(share) <= FURTHEST else None


def _known(view: View, model: str, split: str) -> bool:
    return view.value(model, "retention", split) is not None


def frontier(view: View, shown: Sequence[Point], width: int, key: str) -> str:
    """The picture at one width (720 for pages, 340 for phones); `key` keeps its element ids apart from another's."""
    return _Picture(view, shown, width, key).draw()


class _Picture:
    def __init__(self, view: View, shown: Sequence[Point], width: int, key: str):
        self.view, self.shown, self.key = view, shown, key
        self.width, self.height = width, 420 if width > 500 else 360
        self.area: Box = (52.0, 26.0, width - 16.0, self.height - 46.0)
        sizes = [point.size for point in shown]
        self.log = max(sizes) / min(sizes) > 3
        self.x_ticks, self.left, self.right = _size_axis(min(sizes), max(sizes), self.log, 5 if width > 500 else 4)
        self.y_ticks, self.bottom, self.top = _share_axis(shown, view.floor)
        self.taken: list[Box] = []

    def x(self, size: float) -> float:
        left, _, right, _ = self.area
        scale: Callable[[float], float] = math.log if self.log else float
        share = (scale(size) - scale(self.left)) / (scale(self.right) - scale(self.left))
        return left + min(max(share, 0.0), 1.0) * (right - left)

    def y(self, share: float) -> float:
        _, top, _, bottom = self.area
        place = (share - self.bottom) / (self.top - self.bottom)
        return bottom - min(max(place, 0.0), 1.0) * (bottom - top)

    def center(self, point: Point) -> tuple[float, float]:
        both = sum(other.model == point.model for other in self.shown) > 1
        dodge = (-5 if point.split == "search" else 5) if both else 0
        left, _, right, _ = self.area
        return min(max(self.x(point.size) + dodge, left), right), self.y(point.share)

    def draw(self) -> str:
        told = "; ".join(point.words for point in reversed(self.shown[-12:]))
        floor = f" The floor is {words.percent_exact(self.view.floor)}." if self.view.floor is not None else ""
        more = " The table of trials has every number." if len(self.shown) > 12 else ""
        return (
            f'<svg class="frontier" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-labelledby="{self.key}-title {self.key}-desc">'
            f'<title id="{self.key}-title">Size on disk against quality kept</title>'
            f'<desc id="{self.key}-desc">{words.escape(told)}.{words.escape(floor)}{more}</desc>'
            + self._axes() + self._floor() + self._staircase()
            + "".join(self._whisker(point) for point in self.shown)
            + "".join(self._mark(point) for point in self.shown)
            + self._labels() + "</svg>\n"
        )  # fmt: skip

    def _axes(self) -> str:
        left, top, right, bottom = self.area
        parts = []
        for share in self.y_ticks:
            y = self.y(share)
            parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
            told = words.percent_exact(round(share, 6))
            parts.append(f'<text x="{left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{told}</text>')
        parts.append(f'<path class="axis" d="M{left:.1f} {bottom:.1f}H{right:.1f}"/>')
        for size in self.x_ticks:
            x = self.x(size)
            parts.append(f'<path class="axis" d="M{x:.1f} {bottom:.1f}v5"/>')
            told = words.size_exact(size)
            parts.append(f'<text x="{x:.1f}" y="{bottom + 19:.1f}" text-anchor="middle">{told}</text>')
        scale = ", logarithmic" if self.log else ""
        middle = (left + right) / 2
        parts.append(f'<text class="soft" x="{left - 44:.1f}" y="{top - 12:.1f}">quality kept</text>')
        label = f'<text class="soft" x="{middle:.1f}" y="{bottom + 38:.1f}" text-anchor="middle">'
        parts.append(f"{label}weights on disk{scale}</text>")
        return "".join(parts)

    def _floor(self) -> str:
        if self.view.floor is None:
            return ""
        left, _, right, _ = self.area
        y = self.y(self.view.floor)
        told = f"floor {words.percent_exact(self.view.floor)}"
        wide = 6.6 * len(told)
        crowd = [self.center(point)[0] for point in self.shown if abs(self.center(point)[1] - y) < 30]
        at_left = sum(x < (left + right) / 2 for x in crowd) <= len(crowd) / 2
        start = left + 4 if at_left else right - wide
        self.taken.append((start, y + 3, start + wide, y + 16))
        return (
            f'<path class="floor" d="M{left:.1f} {y:.1f}H{right:.1f}"/>'
            f'<text class="soft" x="{start:.1f}" y="{y + 14:.1f}">{told}</text>'
        )

    def _staircase(self) -> str:
        """The frontier of the search: the best quality at each size or below."""
        trials = [point for point in self.shown if point.split == "search" and point.kind not in ("original", "healed")]
        steps, best = [], -math.inf
        for point in sorted(trials, key=lambda item: (item.size, -item.share)):
            if point.share > best and point.share >= self.bottom:
                best = point.share
                steps.append((self.center(point)[0], self.y(point.share)))
        if len(steps) < 2:
            return ""
        for (left, low), (right, high) in pairwise(steps):
            self.taken += [(left, low - 1, right, low + 1), (right - 1, high, right + 1, low)]
        path = f"M{steps[0][0]:.1f} {steps[0][1]:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in steps[1:])
        return f'<path class="stairs" d="{path}"/>'

    def _whisker(self, point: Point) -> str:
        x, y = self.center(point)
        self.taken.append((x - 6, y - 6, x + 6, y + 6))
        if point.low is None or point.high is None or point.high < self.bottom:
            return ""
        high, low = sorted((self.y(point.low), self.y(point.high)))
        self.taken.append((x - 2, high, x + 2, low))
        caps = "" if point.low < self.bottom else f"M{x - 3:.1f} {low:.1f}h6"
        caps += f"M{x - 3:.1f} {high:.1f}h6"
        return f'<path class="whisker {point.kind}" d="M{x:.1f} {high:.1f}V{low:.1f}{caps}"/>'

    def _mark(self, point: Point) -> str:
        x, y = self.center(point)
        below = point.share < self.bottom
        kind = f"{point.kind} {'hollow' if point.split == 'search' else 'filled'}"
        ring = f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="11"/>' if kind == "chosen filled" else ""
        shape = _shape("below" if below else point.kind, x, y)
        return f'<g class="mark {kind}">{ring}{shape}<title>{words.escape(point.words)}</title></g>'

    def _labels(self) -> str:
        """Names beside the marks; a trial's number is left out where it would cover something."""
        told, parts = set(), []
        for point in reversed(self.shown):
            if point.model in told:
                continue
            must = point.kind != "trial"
            trial = trial_number(point.model)
            text = point.label if must or trial is None else str(trial)
            text = words.plain(text if len(text) <= 24 else text[:23] + "…")
            place = self._place(point, 6.6 * len(text) + 2, must)
            if place is None:
                continue
            told.add(point.model)
            strong = f"label {point.kind}"
            parts.append(f'<text class="{strong}" x="{place[0]:.1f}" y="{place[1]:.1f}">{words.escape(text)}</text>')
        return "".join(parts)

    def _place(self, point: Point, wide: float, must: bool) -> tuple[float, float] | None:
        x, y = self.center(point)
        left, top, right, bottom = self.area
        gap = 15 if point.kind == "chosen" else 9
        spots = [(x + gap, y - 6), (x - gap - wide, y - 6), (x - wide / 2, y - gap - 13), (x - wide / 2, y + gap + 1)]
        spots += [(x + gap, y - 22), (x - gap - wide, y - 22), (x + gap, y + 10), (x - gap - wide, y + 10)]
        if must:  # only a name that has to stand may stand away from its mark
            spots += [(right + 10 - wide, y - gap - 13), (right + 10 - wide, y + gap + 1)]
        best: tuple[int, float, float] | None = None
        for across, down in spots:
            box = (across, down, across + wide, down + 13)
            if box[0] < left - 4 or box[2] > right + 12 or box[1] < top - 8 or box[3] > bottom:
                continue
            clashes = sum(_overlap(box, other) for other in self.taken)
            if best is None or clashes < best[0]:
                best = (clashes, across, down)
        if best is None or (best[0] and not must):
            return None
        self.taken.append((best[1], best[2], best[1] + wide, best[2] + 13))
        return best[1], best[2] + 10


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _shape(kind: str, x: float, y: float) -> str:
    """Shape tells what a mark is, so that colour is never alone in saying it."""
    match kind:
        case "original":
            return f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10"/>'
        case "healed":
            return f'<path d="M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z"/>'
        case "below":
            return f'<path d="M{x - 5:.1f} {y - 9:.1f}h10l-5 8z"/>'
        case _:
            return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if kind in ("chosen", "near") else 4.5}"/>'


def legend(shown: Sequence[Point], view: View) -> list[tuple[str, str]]:
    """The marks that the picture really has, each a small SVG and its meaning."""
    kinds, splits = {point.kind for point in shown}, {point.split for point in shown}
    names = {"chosen": "chosen", "near": "nearest miss", "healed": "healed original", "original": "original"}
    entries = []
    for kind, name in names.items():
        if kind in kinds:
            entries.append((f'<g class="mark {kind} filled">{_shape(kind, 8, 8)}</g>', name))
    for split, look in (("search", "hollow"), ("final", "filled")):
        if split in splits:
            entries.append((f'<g class="mark trial {look}">{_shape("trial", 8, 8)}</g>', f"{look}: {split} split"))
    if any(point.low is not None and point.high is not None for point in shown):
        entries.append(('<path class="whisker" d="M8 2V14M5 2h6M5 14h6"/>', "95 % interval"))
    if any(point.share < _share_axis(shown, view.floor)[1] for point in shown):
        entries.append((f'<g class="mark trial">{_shape("below", 8, 13)}</g>', "below the picture"))
    return [(f'<svg class="key" viewBox="0 0 16 16" aria-hidden="true">{mark}</svg>', text) for mark, text in entries]


def _nice(span: float, parts: int) -> float:
    """A round step that cuts `span` into about `parts`."""
    raw = max(span, 1e-12) / parts
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10, 20) if factor * power >= raw)


def _size_axis(low: float, high: float, log: bool, parts: int) -> tuple[list[float], float, float]:
    """Ticks and ends of the axis of bytes."""
    if log:
        left, right = low / 1.25, high * 1.25
        powers = range(math.floor(math.log10(left)), math.ceil(math.log10(right)) + 1)
        every: Sequence[int] = (1, 2, 5) if math.log10(right / left) < 2.5 else (1,)
        ticks = [factor * 10.0**power for power in powers for factor in every]
        ticks = [tick for tick in ticks if left <= tick <= right]
        return ticks[:: max(1, math.ceil(len(ticks) / (parts + 3)))], left, right
    margin = max(0.08 * (high - low), 0.04 * high)
    left, right = max(0.0, low - margin), high + margin
    step = _nice(right - left, parts)
    first = math.ceil(left / step)
    return [step * (first + index) for index in range(math.floor(right / step) - first + 1)], left, right


def _share_axis(shown: Sequence[Point], floor: float | None) -> tuple[list[float], float, float]:
    """Ticks and ends of the axis of quality: room around the floor comes before room for hopeless trials."""
    values = [point.share for point in shown] + ([floor] if floor is not None else [])
    ends = [end for point in shown for end in (point.low, point.high) if end is not None]
    top, low = max(values + ends), min(values + ends)
    if floor is not None:
        cut = floor - max(0.06, 3 * (1 - floor))
        low, top = min(value for value in [*values, *ends] if value >= cut), min(top, max(1.2, *values))
    margin = max(0.06 * (top - low), 0.002)
    bottom, top = low - margin, top + margin
    step = _nice(top - bottom, 6)
    first = math.ceil(bottom / step)
    return [step * (first + index) for index in range(math.floor(top / step) - first + 1)], bottom, top


def bars(rows: Iterable[tuple[float, str]]) -> str:
    """Horizontal bars, each a share of the full width and a class; decoration beside numbers that say the same."""
    drawn, y = [], 0
    for share, kind in rows:
        width = 1000 * min(max(share, 0.0), 1.0)
        drawn.append(f'<rect class="{kind}" x="0" y="{y}" width="{width:.1f}" height="9"/>')
        y += 12
    box = f"0 0 1000 {max(y - 3, 9)}"
    return (
        f'<svg class="bars" viewBox="{box}" preserveAspectRatio="none" style="height:{max(y - 3, 9)}px" '
        f'aria-hidden="true">{"".join(drawn)}</svg>'
    )
