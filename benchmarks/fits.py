"""Numbers behind the comparisons: scores of several seeds, intervals over documents and seeds, power laws."""

import math
import statistics as middle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shrew.measure import Interval
from shrew.measure.statistics import student_quantile
from shrew.tasks import Scores
from shrew.tasks.scores import weights


def mean(items: Sequence[Scores]) -> Scores:
    """Scores of several seeds as one: every document's mean bits."""
    bits = np.mean([item.columns["bits"] for item in items], axis=0)
    return replace(items[0], columns={"bits": bits, "bytes": items[0].columns["bytes"]})


def at(curve: Sequence[tuple[float, Scores]], x: float) -> Scores:
    """Scores at x between the points of a curve, each document's bits on log-log axes; x must be inside."""
    curve = sorted(curve, key=lambda point: point[0])
    if not curve[0][0] <= x <= curve[-1][0]:
        raise ValueError(f"{x:g} is outside {curve[0][0]:g} to {curve[-1][0]:g}")
    rows = np.log([item.columns["bits"] for _, item in curve])
    where = np.log([place for place, _ in curve])
    bits = [np.exp(np.interp(np.log(x), where, column)) for column in rows.T]
    return replace(curve[0][1], columns={"bits": np.array(bits), "bytes": curve[0][1].columns["bytes"]})


def few(n: int) -> float:
    """How much wider a 95 % bootstrap of n units must be, as it is too narrow for few: Student's t over the normal
    quantile, times sqrt(n / (n - 1))."""
    return student_quantile(0.975, n - 1) / 1.96 * math.sqrt(n / (n - 1))


@dataclass(frozen=True)
class Noise:
    """Standard deviation between seeds, from `freedom` degrees of freedom (none: unknown, and taken as zero)."""

    sd: float
    freedom: int

    @classmethod
    def pooled(cls, groups: Iterable[Sequence[float]]) -> "Noise":
        groups = [group for group in groups if len(group) > 1]
        freedom = sum(len(group) - 1 for group in groups)
        squares = sum((len(group) - 1) * middle.variance(group) for group in groups)
        return cls(math.sqrt(squares / freedom) if freedom else 0.0, freedom)

    def around(self, found: Interval, *seeds: int) -> Interval:
        """A 95 % interval over documents, made one over documents and seeds: each side is the root of the sum of the
        squares of both. The bootstrap is widened as `few` says."""
        wider = few(found.n)
        lucky = self.sd * math.sqrt(sum(1 / count for count in seeds))
        lucky *= student_quantile(0.975, self.freedom) if self.freedom else 0.0
        low = found.value - math.hypot(wider * (found.value - found.low), lucky)
        return replace(found, low=low, high=found.value + math.hypot(wider * (found.high - found.value), lucky))


def median_ratio(ratios: Sequence[float]) -> tuple[float, float, float]:
    """The median of alternated rounds and its distribution-free interval (order statistics, about 95 %)."""
    ordered = sorted(ratios)
    reach = max(0, math.floor((len(ordered) - 1.96 * len(ordered) ** 0.5) / 2))
    return middle.median(ordered), ordered[reach], ordered[-1 - reach]


@dataclass(frozen=True)
class Law:
    """Power laws y = exp(level) x^slope: the fit itself in row 0, then those of resamples. Both are [S]."""

    level: np.ndarray
    slope: np.ndarray

    def at(self, x: float) -> np.ndarray:
        return np.exp(self.level + self.slope * math.log(x))


Curve = Sequence[tuple[float, Sequence[Scores]]]


def laws(curves: dict[str, Curve], sd: float, samples: int = 2000, seed: int = 0) -> dict[str, Law]:
    """The law of each arm, fitted in logs to the scores of its seeds at each x. Documents are resampled, the same for
    all arms, and the mean of k seeds is shaken by sd / sqrt(k), the standard deviation between seeds."""
    units = next(iter(curves.values()))[0][1][0].n
    drawn = np.concatenate([np.ones((1, units)), *weights(units, samples, seed)])
    shake = np.random.default_rng([seed, 1])
    found = {}
    for name, curve in curves.items():
        x = np.log([place for place, _ in curve])
        columns = []
        for _, items in curve:
            luck = shake.normal(0, sd / math.sqrt(len(items)), len(drawn))
            luck[0] = 0
            columns.append(np.log(mean(items).values(drawn) + luck))
        y, apart = np.stack(columns, 1), x - x.mean()
        slope = y @ apart / (apart @ apart)
        found[name] = Law(y.mean(1) - slope * x.mean(), slope)
    return found


def spread(values: np.ndarray, n: int) -> Interval:
    """Row 0 with the 95 % interval of the others, that of n units. It is widened as `Noise.around` does."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Noise(0.0, 0).around(Interval(float(values[0]), float(low), float(high), n))


def crossing(one: Law, other: Law) -> tuple[float | None, float | None, float | None]:
    """Where two laws meet, and its 95 % interval: None where they are parallel, and for the ends where it cannot be
    told which of them is the steeper."""
    gap, apart = one.slope - other.slope, other.level - one.level
    if gap[0] == 0:
        return None, None, None
    same = np.sign(gap[1:]) == np.sign(gap[0])
    at = apart / np.where(gap == 0, np.nan, gap)
    place = _power(float(at[0]))
    if same.mean() < 0.975:
        return place, None, None
    low, high = np.quantile(at[1:][same], [0.025, 0.975])
    return place, _power(float(low)), _power(float(high))


def _power(x: float) -> float:
    """e^x; beyond what a float holds the largest or zero."""
    return math.exp(min(max(x, -700.0), 700.0))
