"""What the detector, the n-grams and the findings of rules and tools say of a function, as one probability.

A logistic regression over a few numbers: both logits; for each weakness that rules speak of, whether one did; how
severe the worst finding is; and whether another tool spoke. Its coefficients are data, in `scan.json`. A function that
the detector was not asked about (the n-grams alone were enough) has coefficients of its own, since a logit that is not
there is no logit of 0.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shrew.errors import DataError
from shrew.scan import config
from shrew.scan.cwe import SEVERITIES

if TYPE_CHECKING:
    import numpy as np

    from shrew.scan.rules import Finding

LOGITS = ("grams", "detector")
LIMIT = 30.0  # logits beyond say no more
POINTS = dict(zip(config.POINTS, (5.0, 20.0, 80.0), strict=True))  # alerts per 1,000 ordinary functions
COST = 1.0


def features(logit: float | None, gram: float, findings: "Sequence[Finding]") -> dict[str, float]:
    """Named numbers of one function; what is not named is 0."""
    found = {"grams": max(-LIMIT, min(LIMIT, gram))}
    if logit is not None:
        found["detector"] = max(-LIMIT, min(LIMIT, logit))
    for item in findings:
        whose = "rule" if item.tool == "shrew" else "tool"
        found[f"{whose} {item.cwe or 'unknown'}"] = 1.0
        if item.severity in SEVERITIES:  # each step of severity adds its own weight
            for name in SEVERITIES[: SEVERITIES.index(item.severity) + 1]:
                found[f"{whose} {name}"] = 1.0
    return found


def combined(
    combine: Mapping[str, Any],
    logits: Sequence[float | None],
    grams: Sequence[float],
    findings: "Sequence[Sequence[Finding]]",
) -> "np.ndarray":
    """float64 [n] probabilities. `logits` has None for what the detector was not asked about."""
    import numpy as np

    return np.array([chance(combine, *row) for row in zip(logits, grams, findings, strict=True)], np.float64)


def chance(combine: Mapping[str, Any], logit: float | None, gram: float, findings: "Sequence[Finding]") -> float:
    """The probability of one function. (Without numpy, which takes longer to load than a scan that knows it all.)"""
    table = combine["without" if logit is None else "with"]
    values = features(logit, gram, findings)
    total = table["bias"] + math.fsum(table["weights"].get(name, 0.0) * value for name, value in values.items())
    return (1 + math.tanh(total / 2)) / 2


def fit(
    logits: Sequence[float],
    grams: Sequence[float],
    findings: "Sequence[Sequence[Finding]]",
    labels: "Sequence[int] | np.ndarray",
    importance: "np.ndarray | None" = None,
    cost: float = COST,
) -> dict[str, Any]:
    """The coefficients, from scores of texts that neither the detector nor the n-grams were trained on.

    They minimise |w|**2 / 2 + cost * (sum of logistic losses, each times its `importance`), both logits being divided
    by their spread first, and no weight of a finding below 0: rules rightly speak of what was repaired too, where they
    see no repair, and with few of each weakness that would make a finding an excuse. A probability is right where texts
    come as they did here: give ordinary functions the importance that makes them as frequent as they are.
    """
    import numpy as np

    truth = np.asarray(labels, np.float64)
    if len(set(truth.tolist())) < 2:
        raise DataError("what is combined needs scores of both kinds of functions, vulnerable and not.")
    each = np.full(len(truth), cost) if importance is None else cost * np.asarray(importance, np.float64)
    made: dict[str, Any] = {}
    for name, asked in (("with", list(logits)), ("without", [None] * len(logits))):
        rows = [features(logit, gram, found) for logit, gram, found in zip(asked, grams, findings, strict=True)]
        names = sorted({key for row in rows for key in row})
        table = np.array([[row.get(key, 0.0) for key in names] for row in rows])
        # Logits alone: a rule that hardly ever speaks would else be all but free of the penalty.
        spread = np.array([table[:, at].std() or 1.0 if key in LOGITS else 1.0 for at, key in enumerate(names)])
        weights, bias = _newton(table / spread, truth, each, np.array([key not in LOGITS for key in names]))
        made[name] = {"bias": round(bias, 6), "weights": {
            key: round(float(weight), 6) for key, weight in zip(names, weights / spread, strict=True)}}  # fmt: skip
    return made


def _newton(
    table: "np.ndarray", truth: "np.ndarray", cost: "np.ndarray", bounded: "np.ndarray"
) -> "tuple[np.ndarray, float]":
    """[k] weights, those that are `bounded` [k] at least 0, and the free bias with the least
    |w|**2 / 2 + sum(cost * logistic loss), by damped Newton steps, projected (Bertsekas 1982)."""
    import numpy as np

    wide = np.hstack([table, np.ones((len(table), 1))])
    kept, floor = np.append(np.ones(table.shape[1]), 0.0), np.where(np.append(bounded, False), 0.0, -np.inf)
    point = np.zeros(wide.shape[1])

    def loss(point: "np.ndarray") -> float:
        logits = wide @ point
        return float((kept * point**2).sum() / 2 + cost @ (np.logaddexp(0, logits) - truth * logits))

    for _ in range(100):
        share = (1 + np.tanh(wide @ point / 2)) / 2
        slope = kept * point + wide.T @ (cost * (share - truth))
        curve = np.diag(kept) + (wide * (cost * share * (1 - share))[:, None]).T @ wide
        curve[-1, -1] += 1e-9
        held = (point <= floor) & (slope > 0)  # at their bound, and would go below it
        curve[held] = curve[:, held] = 0.0
        curve[held, held] = 1.0
        step = np.linalg.solve(curve, np.where(held, 0.0, -slope))
        length, now = 1.0, loss(point)
        while True:
            new = np.maximum(point + length * step, floor)
            if length <= 1e-8 or loss(new) <= now + 1e-4 * float(slope @ (new - point)):
                break
            length /= 2
        moved, point = np.abs(new - point).max(), new
        if moved < 1e-9 or length <= 1e-8:
            break
    return point[:-1], float(point[-1])


def points(ordinary: "np.ndarray", wanted: Mapping[str, float] = POINTS) -> dict[str, dict[str, float]]:
    """The operating points: for each name the lowest threshold with at most so many alerts per 1,000 of the [n]
    probabilities of ordinary functions, which nothing was trained or fitted on, and the alerts that it then has."""
    import numpy as np

    found = {}
    for name, alerts in wanted.items():
        allowed = math.floor(alerts / 1000 * len(ordinary) + 1e-9)
        if len(ordinary) < 1000 / alerts:
            raise DataError(f"{len(ordinary)} ordinary functions are too few for {alerts:g} alerts per 1,000.")
        highest = np.sort(ordinary)[::-1]
        edge = float(highest[allowed]) if allowed < len(highest) else 0.0  # the first that must not be told
        above = highest[highest > edge]
        # halfway between, so that rounding does not move what is told
        threshold = (edge + float(above.min())) / 2 if len(above) else math.nextafter(edge, 2.0)
        found[name] = {"threshold": threshold, "alerts_per_1000": float((ordinary >= threshold).mean() * 1000)}
    return found
