"""What a detector's scores of pairs say beyond the AUC, and differences whose units of resampling are groups."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from shrew.measure.statistics import Interval, limits, ratio_interval
from shrew.record import Record
from shrew.tasks import Scores
from shrew.tasks.detection import at_rate
from shrew.tasks.scores import weights

RATES = {0.005: 5000, 0.05: 200}  # false alarms, and how many functions it takes to say that there are no more


def detection_records(scores: Scores, common: dict[str, Any]) -> list[Record]:
    """Shares of the pairs at logit 0 and their net, and the recall at fixed rates of false alarms (on the fixed
    functions), where there are enough of them. Intervals are of a bootstrap over projects."""
    before, after = scores.columns["before"], scores.columns["after"]
    found = []
    old, new = before > 0, after > 0
    shares = {"pair_correct": old & ~new, "pair_reversed": ~old & new, "net": old.astype(int) - new,
              "recall": old, "false_positive_rate": new}  # fmt: skip
    detail: dict[str, Any] = {"units": "pairs", "threshold": 0.0, "interval": "bootstrap over projects"}
    for rate, enough in RATES.items():
        if scores.n >= enough:
            shares[f"recall_at_{rate:g}"] = before >= at_rate(before, after, rate).threshold
    ones = np.ones(scores.n)
    for name, column in shares.items():
        table = scores.columns | {"value": column.astype(np.float64), "one": ones}
        share = ratio_interval(dataclasses.replace(scores, columns=table), "value", "one", seed=common["seed"])
        found.append(Record(metric=name, value=share.value, low=share.low, high=share.high, n=scores.n,
                            detail=detail, **common))  # fmt: skip
    return found


def grouped_interval(
    groups: Sequence[str] | np.ndarray, statistic: Callable[[np.ndarray], float], samples: int = 2000, seed: int = 0,
    level: float = 0.95,
) -> Interval:  # fmt: skip
    """Percentile interval of a statistic of [n] places of units, over resamples of whole groups (projects, commits).

    A difference between two systems is one statistic of the same places, so that the resampling is paired."""
    names, home = np.unique(np.asarray(groups), return_inverse=True)
    members = [np.flatnonzero(home == number) for number in range(len(names))]
    drawn = np.array([
        statistic(np.concatenate([members[number] for number in np.repeat(np.arange(len(names)), row.astype(int))]))
        for rows in weights(len(names), samples, seed) for row in rows
    ])  # fmt: skip
    return Interval(statistic(np.arange(len(home))), *limits(drawn, level), len(names))
