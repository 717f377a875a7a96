"""Repair where damages add up badly. Pure but for the measurements that it is given.

The knapsack adds up what each group does alone. Where errors of several groups pull the same way the whole is worse
than that sum, and by more for some groups than for others. What a group costs *within* the whole is measured too: how
much better the whole is without it. Damages scaled by that are right to first order around the chosen whole, so the
knapsack is solved again with them; a choice stays only where the whole, measured, is better.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from shrew.search.kinds import Kind
from shrew.search.propose import Widths

BADLY = 1.2  # times the sum of the parts: what is repaired
TIMES = 3
LEAST, MOST = 0.25, 16.0  # how far a damage alone may be off

# Of each given choice {weight: its grid}, weights left out being as they were: KL to the original.
Measure = Callable[[Sequence[Mapping[str, Kind]]], list[float]]


@dataclass(frozen=True)
class Repaired:
    """`widths`, scaled or as they were; what the whole does, and did at first, where the parts' sum said `expected`."""

    widths: Widths
    expected: float
    first: float
    whole: float
    scale: dict[str, float]  # by group, of its damages


def repaired(widths: Widths, budget: int, measure: Measure) -> Repaired | None:
    """Check the best choice within `budget`, and mend it; None if nothing fits."""
    picked = widths.pick(budget)
    if picked is None:
        return None
    expected = sum(table[kind] for table, kind in zip(widths.damages, picked, strict=True))
    (first,) = measure([widths.named(picked)])
    best = Repaired(widths, expected, first, first, {})
    tried, now, whole = [picked], widths, first
    while whole > BADLY * expected and len(tried) <= TIMES:
        scale = _within(widths, picked, whole, measure)
        damages = [{kind: value * scale[item.name] for kind, value in table.items()}
                   for item, table in zip(widths.groups, widths.damages, strict=True)]  # fmt: skip
        now = replace(widths, damages=tuple(damages))
        picked = now.pick(budget)
        assert picked is not None  # sizes have not changed
        if picked in tried:
            break
        tried.append(picked)
        (whole,) = measure([now.named(picked)])
        if whole < best.whole:
            best = Repaired(now, expected, first, whole, scale)
    return best


def _within(widths: Widths, picked: Sequence[Kind], whole: float, measure: Measure) -> dict[str, float]:
    """Of each group: the damage that the whole is rid of without it, as a multiple of what the group does alone."""
    named = widths.named(picked)
    without = [{name: kind for name, kind in named.items() if name not in {name for name, _, _ in item.tensors}}
               for item in widths.groups]  # fmt: skip
    return {
        item.name: min(max((whole - left) / table[kind], LEAST), MOST)
        for item, table, kind, left in zip(widths.groups, widths.damages, picked, measure(without), strict=True)
    }
