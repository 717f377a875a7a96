"""What paired scores can prove: intervals, a lower bound for the gate, exact tests, and what is too small to see.

Two models are always compared on the same units (documents or examples), and units are resampled jointly: the spread of
the units themselves cancels, only the difference between the models counts.
"""

import math
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Literal

import numpy as np

from shrew.errors import DataError
from shrew.tasks import Scores


@dataclass(frozen=True)
class Interval:
    """A value with its two-sided interval; `n` units were resampled."""

    value: float
    low: float
    high: float
    n: int


def retention(original: Scores, new: Scores) -> float:
    """How much of the original's quality is left; 1 is all of it, and above 1 the new model is better.

    Bits per byte: original / new. Other metrics: (new - chance) / (original - chance).
    """
    _check(original, new)
    ones = np.ones((1, original.n))
    return float(_retentions(original, new, ones)[0])


def difference(original: Scores, new: Scores) -> float:
    """New minus original, in the metric's own unit."""
    original.check_pair(new)
    return new.value() - original.value()


def paired_bootstrap(
    original: Scores,
    new: Scores,
    statistic: Literal["retention", "difference"] = "retention",
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of retention or difference over joint resamples of the units (Efron, 1979)."""
    if statistic == "retention":
        value, drawn = retention(original, new), _resample(original, new, samples, seed)
    else:
        value = difference(original, new)
        parts = [new.values(w) - original.values(w) for w in original.resamples(samples, seed)]
        drawn = np.concatenate(parts)
    tail = (1 - level) / 2
    low, high = _quantile(drawn, tail), -_quantile(-drawn, tail)
    return Interval(value, low, high, original.n)


def interval(scores: Scores, samples: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """Percentile bootstrap interval of one model's metric."""
    drawn = np.concatenate([scores.values(w) for w in scores.resamples(samples, seed)])
    tail = (1 - level) / 2
    return Interval(scores.value(), float(np.quantile(drawn, tail)), float(np.quantile(drawn, 1 - tail)), scores.n)


def ratio_interval(
    scores: Scores, top: str, bottom: str, samples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Interval of the ratio of two columns' sums, for example KL per token."""
    above, below = scores.columns[top], scores.columns[bottom]
    drawn = np.concatenate([(w @ above) / np.maximum(w @ below, 1e-300) for w in scores.resamples(samples, seed)])
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(scores.ratio(top, bottom), float(low), float(high), scores.n)


def ratio_difference(original: Scores, new: Scores, top: str, bottom: str, samples: int = 2000, seed: int = 0,
                     level: float = 0.95) -> Interval:  # fmt: skip
    """Interval of how far the ratio of two columns' sums moved, over joint resamples of the units; resamples that
    have nothing below the line of the ratio say nothing and are left out."""
    original.check_pair(new)

    def ratio(scores: Scores, rows: np.ndarray) -> np.ndarray:
        below = rows @ scores.columns[bottom]
        return np.divide(rows @ scores.columns[top], below, out=np.full(len(rows), np.nan), where=below > 0)

    drawn = np.concatenate([ratio(new, w) - ratio(original, w) for w in original.resamples(samples, seed)])
    return Interval(new.ratio(top, bottom) - original.ratio(top, bottom), *limits(drawn, level), original.n)


def limits(drawn: np.ndarray, level: float) -> tuple[float, float]:
    """The percentile interval of resamples, those left out that say nothing; NaN where none says anything."""
    known = drawn[~np.isnan(drawn)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_share(gaps: np.ndarray, level: float = 0.95) -> Interval:
    """Mean of [n] paired differences of answers (-1, 0 or 1; halves for ties) with Agresti and Min's interval (2005).

    Two pairs are added to the n: half a gain, half a loss and one tie. So the interval has a width even where no
    answer changed, which a resample of the same answers would not have.
    """
    n, total = len(gaps), float(gaps.sum())
    middle = total / (n + 2)
    error = float(np.sqrt(max((gaps**2).sum() + 1 - total * middle, 0.0))) / (n + 2)
    reach = NormalDist().inv_cdf((1 + level) / 2) * error
    return Interval(total / max(n, 1), max(-1.0, middle - reach), min(1.0, middle + reach), n)


def share_interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """Mean of [n] numbers from 0 to 1 with Agresti and Coull's interval (1998), which has a width at 0 and at 1 too."""
    n, z = len(values), NormalDist().inv_cdf((1 + level) / 2)
    wide = n + z * z
    middle = (float(values.sum()) + z * z / 2) / wide
    reach = z * float(np.sqrt(middle * (1 - middle) / wide))
    return Interval(float(values.mean()), max(0.0, middle - reach), min(1.0, middle + reach), n)


def lower_bound(original: Scores, new: Scores, alpha: float = 0.05, samples: int = 2000, seed: int = 0) -> float:
    """One-sided lower confidence bound of retention at level 1 - alpha: the number the gate compares with its floor.

    The smaller of two bounds. The percentile bootstrap follows the shape of the ratio; on its own it is too narrow for
    few units, because a sample seldom holds the worst that can happen. The second is a delta-method t bound that is
    completed for what was not seen, see `unseen`: it keeps its level for heavy-tailed documents from about 20 units
    on, and turns into the rule of three when no answer changed at all. With less than 2 units nothing is proven and
    the bound is minus infinity. No bound can see damage that lies wholly in documents rarer than 1 in n.
    """
    value = retention(original, new)
    if original.n < 2:
        return float("-inf")
    by_resampling = _quantile(_resample(original, new, samples, seed), alpha)
    return min(value - margin(original, new, alpha), by_resampling)


def margin(original: Scores, new: Scores, alpha: float = 0.05) -> float:
    """How far below the measured retention the completed t bound lies."""
    effect, share = _influence(original, new)
    n = original.n
    # The jackknife's form of the influence: units that weigh much, as long documents do, pull the estimate their way.
    left_out = effect / (1 - share)
    error = float(np.sqrt(((left_out - left_out.mean()) ** 2).sum() / (n - 1) / n))
    freedom = max(1.0, 1 / float((share**2).sum()) - 1)
    count, size = unseen(original, effect, alpha)
    spread = float(np.hypot(error, np.sqrt(count) * size / n))
    return float(count * size / n + student_quantile(1 - alpha, freedom) * spread)


def unseen(original: Scores, effect: np.ndarray, alpha: float) -> tuple[float, float]:
    """How many bad units to suppose beyond the sample, and how bad each of them is (in units of influence).

    The count is z**2 / 2 (with which a sample without a single loss gives slightly more than the exact bound
    -ln(alpha) / n) times 1 + 10 / n, as small samples miss more of a tail. For bits per byte each is worse than the
    worst seen by as much as that is worse than the second worst, so light tails cost little and heavy ones much; for
    scores it is one lost answer, or the worst seen if that is worse.
    """
    n = len(effect)
    z = NormalDist().inv_cdf(1 - min(alpha, 0.05))
    count = z * z / 2 * (1 + 10 / n)
    worst, second = np.partition(effect, 1)[:2]
    if original.metric == "bits_per_byte":
        return count, max(0.0, float(second - 2 * worst))
    return z * z / 2, max(-float(worst), 1 / (original.value() - original.chance))


def exact_test(original: Scores, new: Scores) -> tuple[str, float]:
    """Name and two-sided p-value of an exact test that the two models are equally good, unit by unit.

    Right or wrong answers: McNemar's test on the units where just one model is right (its exact binomial form).
    Bits per byte: the sign test over documents; equal ones are left out.
    """
    original.check_pair(new)
    if original.metric == "bits_per_byte":
        gap = new.columns["bits"] - original.columns["bits"]
        return "sign", binomial_two_sided(int((gap < 0).sum()), int((gap > 0).sum()))
    gap = new.columns["correct"] - original.columns["correct"]
    return "mcnemar", binomial_two_sided(int((gap > 0).sum()), int((gap < 0).sum()))


def binomial_two_sided(a: int, b: int) -> float:
    """p-value of a split as uneven as a : b when each side is equally likely, in exact integers."""
    n, term, below = a + b, 1, 0
    for k in range(min(a, b) + 1):
        below += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * below / 2**n)


def smallest_difference(original: Scores, new: Scores | None = None, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest true difference, in the metric's unit, that this much data finds with this power (two-sided).

    With `new`, from the paired noise of the two; without, for two models whose errors have nothing in common, which
    is the worst case.
    """
    if original.n < 2:
        return float("inf")
    effect = original.influence() * np.sqrt(2) if new is None else new.influence() - original.influence()
    error = float(effect.std(ddof=1)) / np.sqrt(original.n)
    if original.metric != "bits_per_byte":  # no changed answer among n does not mean that none ever changes
        error = max(error, 1 / original.n)
    normal = NormalDist()
    return float(error * (normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(power)))


def highest_keep(original: Scores, new: Scores | None = None, alpha: float = 0.05, power: float = 0.8) -> float:
    """The highest --keep that a model of unchanged quality would be shown to meet, with this power.

    The noise between the two models is taken from `new`, best a lightly changed model (as one rounded to 8 bits);
    without it there is none, and the answer is the most that this number of units could ever prove.
    """
    new = original if new is None else new
    _check(original, new)
    if original.n < 2:
        return 0.0
    effect, _ = _influence(original, new)
    error = float(effect.std(ddof=1)) / np.sqrt(original.n)
    return max(0.0, float(1 - margin(original, new, alpha) - NormalDist().inv_cdf(power) * error))


@cache
def student_quantile(p: float, freedom: float) -> float:
    """Quantile of Student's t for p >= 0.5: with x = sqrt(freedom) tan(angle) the density is cos(angle)^(freedom-1)."""
    angle = np.linspace(0, np.pi / 2, 20_001)[:-1]
    density = np.cos(angle) ** (freedom - 1)
    area = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.sqrt(freedom) * np.tan(np.interp((2 * p - 1) * area[-1], area, angle)))


def _check(original: Scores, new: Scores) -> None:
    original.check_pair(new)
    if original.higher_is_better and original.value() <= original.chance:
        raise DataError(
            f"{original.task}/{original.split}: the original's {original.metric} is {original.value():.3f} and chance "
            f"is {original.chance:.3f}, so there is no quality to keep; use a task that the original can do."
        )


def _retentions(original: Scores, new: Scores, rows: np.ndarray) -> np.ndarray:
    old, now = original.values(rows), new.values(rows)
    if not original.higher_is_better:
        return np.divide(old, now, out=np.full_like(old, np.inf), where=now > 0)
    above = old - original.chance
    # A resample in which the original is no better than chance says nothing; it counts as the worst.
    found: np.ndarray = np.divide(now - new.chance, above, out=np.full_like(old, -np.inf), where=above > 0)
    return found


def _resample(original: Scores, new: Scores, samples: int, seed: int) -> np.ndarray:
    return np.concatenate([_retentions(original, new, rows) for rows in original.resamples(samples, seed)])


def _quantile(drawn: np.ndarray, p: float) -> float:
    """Lower empirical quantile: an element of the sample, so infinities stay what they are."""
    return float(np.sort(drawn)[max(0, int(np.floor(p * len(drawn))) - 1)])


def _influence(original: Scores, new: Scores) -> tuple[np.ndarray, np.ndarray]:
    """[n] effect of each unit on retention (mean 0), and [n] share that each unit has in the estimate."""
    value = retention(original, new)
    if original.metric == "bits_per_byte":
        old, now = original.columns["bits"], new.columns["bits"]
        return (old - value * now) / now.mean(), now / now.sum()
    above = original.value() - original.chance
    return (new.influence() - value * original.influence()) / above, np.full(original.n, 1 / original.n)
