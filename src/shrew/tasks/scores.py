"""What a task's scoring gives: one row of numbers for each resampling unit, and the metric as a function of the rows.

Every metric is written over *weights* (how often each unit counts), so that a bootstrap of thousands of resamples is a
few matrix products, and has an *influence* (how far one unit moves the metric), so that standard errors need no
resampling at all.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from shrew.errors import DataError
from shrew.tasks.detection import auc_influence, weighted_auc

CELLS = 2**21  # weights drawn at once


@dataclass(frozen=True)
class Scores:
    """The scores of one model on one split of one task.

    `units` are the ids of what is resampled (documents or examples) and every column has one number for each of them:

    - bits_per_byte: "bits", "bytes" (and "tokens", deciles; with a reference "kl_bits", "agree": `shrew.tasks.text`);
    - macro_f1: "truth" and "guess", class numbers below len(classes), and "correct";
    - accuracy, exact_match: "correct", 0 or 1;
    - stereotype_share: "more", 1 where the more stereotyping text of a pair is likelier, 0.5 for a tie;
    - auc: "before" and "after", the logits of a pair's vulnerable and fixed member.

    Units with equal numbers in a column "cluster" are resampled together, as functions of one project are alike.

    `answers` are what the model answered each unit, in words, where there are answers. `chance` is the metric of a
    predictor that knows nothing of the text; bits per byte do not use it.
    """

    task: str
    split: str
    metric: str
    units: list[str]
    columns: dict[str, np.ndarray]
    chance: float = 0.0
    classes: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"unknown metric '{self.metric}'")
        wrong = [name for name, column in self.columns.items() if len(column) != len(self.units)]
        if wrong or not self.units:
            raise ValueError(f"columns {wrong} do not have one number for each of {len(self.units)} units")

    @property
    def n(self) -> int:
        return len(self.units)

    @property
    def higher_is_better(self) -> bool:
        return self.metric != "bits_per_byte"

    def value(self, index: np.ndarray | None = None) -> float:
        """The metric over all units, or over the units numbered by `index` (repeats count again)."""
        if index is None:
            return float(self.values(np.ones((1, self.n)))[0])
        return float(self.values(np.bincount(index, minlength=self.n)[None].astype(np.float64))[0])

    def values(self, weights: np.ndarray) -> np.ndarray:
        """[S, n] weights of the units -> [S] values of the metric."""
        return METRICS[self.metric].values(self, weights)

    def resamples(self, samples: int, seed: int) -> Iterator[np.ndarray]:
        """How often each unit counts in each of `samples` bootstrap resamples, some rows [S, n] at a time."""
        if "cluster" not in self.columns:
            return weights(self.n, samples, seed)
        _, home = np.unique(self.columns["cluster"], return_inverse=True)
        return (drawn[:, home] for drawn in weights(int(home.max()) + 1, samples, seed, self.n))

    def influence(self) -> np.ndarray:
        """[n] first-order effect of each unit on the metric (mean 0): its standard error is std(influence)/sqrt(n)."""
        return METRICS[self.metric].influence(self)

    def ratio(self, top: str, bottom: str) -> float:
        """Sum of one column over the sum of another; NaN when there is nothing below the line."""
        below = float(self.columns[bottom].sum())
        return float(self.columns[top].sum()) / below if below else float("nan")

    def accuracy(self) -> "Scores":
        """The same answers scored by accuracy; chance is then the share of the commonest class."""
        if self.metric == "accuracy":
            return self
        chance = float(np.bincount(self.columns["truth"]).max() / self.n)
        return dataclasses.replace(self, metric="accuracy", chance=chance)

    def dump(self) -> dict[str, Any]:
        """Plain values for JSON; `Scores.parse` gives the same scores back."""
        columns = {name: column.tolist() for name, column in self.columns.items()}
        return {**vars(self), "columns": columns, "classes": list(self.classes), "answers": list(self.answers)}

    @classmethod
    def parse(cls, plain: dict[str, Any]) -> "Scores":
        columns = {name: np.asarray(column) for name, column in plain["columns"].items()}
        words = {name: tuple(plain[name]) for name in ("classes", "answers")}
        return cls(**{**plain, "columns": columns, **words})

    def check_pair(self, other: "Scores") -> None:
        """Refuse to compare scores of different units, splits, tasks or metrics."""
        mine = (self.task, self.split, self.metric, self.units)
        if mine != (other.task, other.split, other.metric, other.units):
            raise DataError(
                f"{self.task}/{self.split} and {other.task}/{other.split} are not scores of the same units; "
                "score both models on the same task and split."
            )


@dataclass(frozen=True)
class Metric:
    values: Callable[[Scores, np.ndarray], np.ndarray]
    influence: Callable[[Scores], np.ndarray]


def _ratio_values(scores: Scores, weights: np.ndarray) -> np.ndarray:
    return (weights @ scores.columns["bits"]) / (weights @ scores.columns["bytes"])


def _ratio_influence(scores: Scores) -> np.ndarray:
    bits, size = scores.columns["bits"], scores.columns["bytes"]
    return (bits - bits.sum() / size.sum() * size) / size.mean()


def _mean(name: str) -> "Metric":
    """The mean of one column."""
    def influence(scores: Scores) -> np.ndarray:
        column = scores.columns[name].astype(np.float64)
        return column - column.mean()

    return Metric(lambda scores, weights: (weights @ scores.columns[name]) / weights.sum(1), influence)


def _one_hot(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """[n, K] true positives and [n, K] truth + guess of each unit: F1 of a class is 2 sum(tp) / sum(both)."""
    eye = np.eye(len(scores.classes))
    truth, guess = eye[scores.columns["truth"]], eye[scores.columns["guess"]]
    return truth * guess, truth + guess


def _f1_values(scores: Scores, weights: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that occur in the resample as truth or as guess (as scikit-learn's macro average)."""
    hits, both = _one_hot(scores)
    tp, seen = weights @ hits, weights @ both
    f1 = np.divide(2 * tp, seen, out=np.zeros_like(tp), where=seen > 0)
    return f1.sum(1) / np.maximum((seen > 0).sum(1), 1)


def _f1_influence(scores: Scores) -> np.ndarray:
    hits, both = _one_hot(scores)
    seen = both.mean(0)
    present = seen > 0
    f1 = 2 * hits.mean(0)[present] / seen[present]
    return ((2 * hits[:, present] - f1 * both[:, present]) / seen[present]).mean(1)


METRICS = {
    "bits_per_byte": Metric(_ratio_values, _ratio_influence),
    "macro_f1": Metric(_f1_values, _f1_influence),
    "accuracy": _mean("correct"),
    "exact_match": _mean("correct"),
    "stereotype_share": _mean("more"),
    "auc": Metric(
        lambda scores, rows: weighted_auc(scores.columns["before"], scores.columns["after"], rows),
        lambda scores: auc_influence(scores.columns["before"], scores.columns["after"]),
    ),
}


def weights(n: int, samples: int, seed: int, width: int = 0) -> Iterator[np.ndarray]:
    """How often each of n units counts in each of `samples` bootstrap resamples, some rows [S, n] at a time; so few
    that `width` numbers a row fit too."""
    rng = np.random.default_rng(seed)
    step = max(1, CELLS // max(n, width))
    for low in range(0, samples, step):
        size = min(step, samples - low)
        drawn = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)
