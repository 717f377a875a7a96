"""Whether the lines that a detector points at are those that the repair took out or changed.

The lines of a vulnerable function are read by what each adds to the detector's logit, as `shrew scan --explain` has it;
asked is whether one that the repair took out or changed is among the first. Beside it stands the expected share of a
random order, which is exact. The comparison favours chance: that order has nothing but lines of code, while the
detector may point at comments and docstrings, which are never wrong here; of lines that add as much, the clean ones are
read first; and a function too long for its lines to be told apart is a miss. Repairs that only add lines have no part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from shrew.code import canonical
from shrew.data.pairs import removed_lines
from shrew.measure.detection import grouped_interval
from shrew.record import Record
from shrew.tasks import detection

FIRST = (1, 3, 5)


@dataclass(frozen=True)
class Repair:
    """Of the lines of a vulnerable function, bool [lines] each: which are not blank, which of these are more than
    comments and docstrings, and which of these the repair took out or changed."""

    shown: np.ndarray
    code: np.ndarray
    wrong: np.ndarray


def repair(before: str, after: str, language: str) -> Repair:
    old, new = (canonical(text, language, comments=False) for text in (before, after))
    shown, code = (np.array([bool(line.strip()) for line in text.split("\n")]) for text in (before, old))
    return Repair(shown, code, np.isin(np.arange(len(code)), list(removed_lines(old, new))))


def by_chance(wrong: int, lines: int, k: int) -> float:
    """How likely a random order of `lines` has one of the `wrong` among its first k (hypergeometric)."""
    k = min(k, lines)
    return 1 - comb(lines - wrong, k) / comb(lines, k)


def figures(
    repairs: Sequence[Repair], effects: Sequence[Sequence[float]], projects: np.ndarray, task: str, samples: int
) -> list[Record]:
    """The share of functions with a wrong line among the first of FIRST by `effects` (a number a line, or none at all),
    that of a random order, and the difference."""
    kept = [place for place, item in enumerate(repairs) if item.wrong.any()]
    if not kept:
        return []
    sizes = [(int(repairs[place].wrong.sum()), int(repairs[place].code.sum())) for place in kept]
    detail = {"repairs_that_only_add": len(repairs) - len(kept), "too_long": sum(not effects[place] for place in kept),
              "median_lines_of_code": float(np.median([lines for _, lines in sizes])),
              "median_wrong_lines": float(np.median([wrong for wrong, _ in sizes])),
              "projects": len(set(projects[kept])), "interval": "bootstrap over projects"}  # fmt: skip
    found = []
    for k in FIRST:
        chance = np.array([by_chance(wrong, lines, k) for wrong, lines in sizes])
        hits = np.array([_hit(repairs[place], effects[place], k) for place in kept], float)
        for model, ending, values in (("random order", "", chance), ("our n-grams", "", hits),
                                      ("our n-grams", "_over_random", hits - chance)):  # fmt: skip
            value = grouped_interval(projects[kept], lambda places, values=values: float(values[places].mean()),
                                     samples)  # fmt: skip
            found.append(Record(run="scan lines", model=model, metric=f"line_top_{k}{ending}", value=value.value,
                                low=value.low, high=value.high, n=len(kept), task=task, detail=detail))  # fmt: skip
    return found


def _hit(item: Repair, effects: Sequence[float], k: int) -> bool:
    return bool(effects) and detection.top_lines(np.array(effects)[item.shown], item.wrong[item.shown], k)
