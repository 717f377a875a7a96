"""The gate: which of a few named candidates are proven to meet the floor on text that the search never saw."""

from collections.abc import Iterable
from dataclasses import dataclass

from shrew.measure import statistics
from shrew.tasks import Scores

ALPHA = 0.05


@dataclass(frozen=True)
class Verdict:
    """Retention of one candidate on the final split against the stronger of its references."""

    against: str
    interval: statistics.Interval
    lower_bound: float  # one-sided, at 1 - ALPHA
    passed: bool


def judge(references: dict[str, Scores], candidate: Scores, floor: float, seed: int = 0) -> Verdict:
    """Compare with every reference (the original; the original trained on the healing text). The verdict is that of
    the comparison that comes out worst, so nothing is won by choosing the reference."""
    found = []
    for name, reference in references.items():
        bound = statistics.lower_bound(reference, candidate, ALPHA, seed=seed)
        found.append((bound, name, statistics.paired_bootstrap(reference, candidate, seed=seed)))
    bound, name, interval = min(found, key=lambda item: item[0])
    return Verdict(name, interval, bound, bound >= floor)


def fixed_sequence(verdicts: Iterable[tuple[str, Verdict]]) -> tuple[str | None, list[tuple[str, Verdict]]]:
    """The last candidate that passes before the first failure, and the verdicts that were opened.

    The candidates come in an order fixed beforehand, from the safest downward. Each is tested at the full level and
    the first failure ends the sequence, so the chance that any model below the floor is named stays at ALPHA however
    many candidates there are (Maurer, Hothorn and Lehmacher 1995). The iterable is consumed lazily: what comes after
    a failure is never scored.
    """
    chosen, opened = None, []
    for name, verdict in verdicts:
        opened.append((name, verdict))
        if not verdict.passed:
            break
        chosen = name
    return chosen, opened
