"""How good a detector's scores are: separation, pairs, recall at a false-positive rate, lines, calibration.

Pure functions of arrays. A higher score is more suspicious; something is flagged where its score is at least the
threshold. A pair is a vulnerable function and its fixed twin. Which of a pair's two scores is the higher is no measure
here: fixes add checks, so that the length of the text alone wins that; one threshold for all asks for more
(Ding et al. 2024, arXiv:2403.18624).
"""

from dataclasses import dataclass

import numpy as np


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The chance that a positive's score is above a negative's, a tie counting half."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right")
    return float(below.mean() / 2 / len(ordered))


def weighted_auc(before: np.ndarray, after: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[S] AUC of `before` [n] above `after` [n] where pair i counts `weights[s, i]` times."""
    order = np.argsort(after, kind="stable")
    reached = np.concatenate([np.zeros((len(weights), 1)), np.cumsum(weights[:, order], 1)], 1)
    ranks = [np.searchsorted(after[order], before, side) for side in ("left", "right")]
    below = (reached[:, ranks[0]] + reached[:, ranks[1]]) / 2
    found: np.ndarray = (weights * below).sum(1) / weights.sum(1) ** 2
    return found


def auc_influence(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """[n] first-order effect of each pair on the AUC, mean 0 (Hoeffding's projection of the U-statistic)."""
    def below(values: np.ndarray, limits: np.ndarray) -> np.ndarray:
        ordered = np.sort(values)
        return (np.searchsorted(ordered, limits, "left") + np.searchsorted(ordered, limits, "right")) / 2

    mine, others = below(after, before), len(before) - below(before, after)
    effect = (mine + others) / len(before)
    found: np.ndarray = effect - effect.mean()
    return found


@dataclass(frozen=True)
class Point:
    """An operating point: flag what scores `threshold` or more. `rate` is the false-positive rate that it has."""

    threshold: float
    recall: float
    rate: float


def at_rate(positive: np.ndarray, negative: np.ndarray, rate: float) -> Point:
    """The lowest threshold whose false-positive rate is at most `rate`; infinity flags nothing."""
    allowed = int(np.floor(rate * len(negative) + 1e-9))
    if allowed >= len(negative):
        return Point(-np.inf, 1.0, 1.0)
    highest = np.sort(negative)[::-1]
    above = np.concatenate([positive, negative])
    above = above[above > highest[allowed]]  # the first that must not be flagged, and all that tie with it
    threshold = float(above.min()) if len(above) else np.inf
    return Point(threshold, float((positive >= threshold).mean()), float((negative >= threshold).mean()))


@dataclass(frozen=True)
class Verdicts:
    """Shares of the pairs: only the vulnerable member flagged, only the fixed one, both, neither. `net` is what is
    left of the right ones when the reversed are taken off; it is 0 for anything that does not tell the two apart."""

    correct: float
    reversed: float
    both: float
    neither: float

    @property
    def net(self) -> float:
        return self.correct - self.reversed


def verdicts(before: np.ndarray, after: np.ndarray, threshold: float) -> Verdicts:
    old, new = before >= threshold, after >= threshold
    shares = [float(share.mean()) for share in (old & ~new, ~old & new, old & new, ~old & ~new)]
    return Verdicts(*shares)


def first_wrong(scores: np.ndarray, wrong: np.ndarray) -> int:
    """How many clean lines are read, by falling score, before the first wrong one (IFA); all of them where no line is
    wrong. Of equal scores the clean lines are read first, so that a constant score gains nothing."""
    if not wrong.any():
        return len(scores)
    return int((scores[~wrong] >= scores[wrong].max()).sum())


def top_lines(scores: np.ndarray, wrong: np.ndarray, k: int) -> bool:
    """Whether a wrong line is among the k first that are read."""
    return bool(wrong.any()) and first_wrong(scores, wrong) < k


@dataclass(frozen=True)
class Calibration:
    """`ece`: mean distance of the said from the seen, weighted by bin. `bins`: (mean probability, share, count)."""

    ece: float
    brier: float
    bins: tuple[tuple[float, float, int], ...]


def calibration(probability: np.ndarray, truth: np.ndarray, bins: int = 10) -> Calibration:
    """Of probabilities [n] and truth [n] (0 or 1), in bins of equal width; 1 belongs to the last bin, empty ones go."""
    place = np.minimum((probability * bins).astype(np.int64), bins - 1)
    count = np.bincount(place, minlength=bins)
    there = count > 0
    said = np.bincount(place, probability, bins)[there] / count[there]
    seen = np.bincount(place, truth, bins)[there] / count[there]
    ece = float((np.abs(said - seen) * count[there]).sum() / len(truth))
    table = tuple(zip(said.tolist(), seen.tolist(), count[there].tolist(), strict=True))
    return Calibration(ece, float(((probability - truth) ** 2).mean()), table)
