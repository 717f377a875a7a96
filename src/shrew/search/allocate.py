"""Which grid for which weights: a multiple-choice knapsack over measured damage. Pure arithmetic."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from shrew.search.kinds import Kind, Palette

CELLS, EACH = 4096, 256  # at least so many cells of bytes in all, and for each group


@dataclass(frozen=True)
class Group:
    """Weights that share one choice of a grid: their shapes as [rows, cols] (experts folded into rows)."""

    name: str
    tensors: tuple[tuple[str, int, int], ...]  # (name, rows, cols)

    def weights(self) -> int:
        return sum(rows * cols for _, rows, cols in self.tensors)

    def bytes(self, kind: Kind, palette: Palette) -> int:
        """Bytes in the file on a grid of the palette."""
        return sum(palette.bytes(kind, rows, cols) for _, rows, cols in self.tensors)

    def kinds(self, palette: Palette) -> tuple[Kind, ...]:
        """The grids that all of its rows fit."""
        fit = [palette.fitting(cols) for _, _, cols in self.tensors]
        return tuple(kind for kind in palette.bits if all(kind in each for each in fit))


def extend(damage: Mapping[Kind, float], errors: Mapping[Kind, float]) -> dict[Kind, float]:
    """Damage on every grid of `errors`, the squared errors of rounding to them, from that measured on some: damage is
    proportional to the error, and between two measured grids to the power of it that they show."""
    errors = {kind: max(error, 1e-30) for kind, error in errors.items()}
    known = sorted((errors[kind], max(value, 1e-9)) for kind, value in damage.items())

    def at(error: float) -> float:
        (low, less), (high, more) = known[0], known[-1]
        for one, other in pairwise(known):
            if one[0] < error < other[0]:
                (low, less), (high, more) = one, other
                return less * (more / less) ** (math.log(error / low) / math.log(high / low))
        return less * error / low if error <= low else more * error / high

    return {kind: max(damage[kind], 1e-9) if kind in damage else at(error) for kind, error in errors.items()}


def allocate(
    sizes: Sequence[Mapping[Kind, int]], damages: Sequence[Mapping[Kind, float]], budget: int
) -> list[Kind] | None:
    """The grid of each group that minimises the sum of damages within `budget` bytes; None if nothing fits.

    Dynamic programming over cells of bytes. What the budget leaves above the smallest size of every group is cut into
    `CELLS` of them, or `EACH` a group; sizes are rounded up, so that it is never exceeded, and at most a cell of each
    group, together a 256th of what is dealt out, stays unused.
    """
    least = [min(size.values()) for size in sizes]
    spare = budget - sum(least)
    if spare < 0:
        return None
    ideal = [min(size, key=damage.__getitem__) for size, damage in zip(sizes, damages, strict=True)]
    if sum(size[kind] for size, kind in zip(sizes, ideal, strict=True)) <= budget:
        return ideal
    cell = max(-(-spare // max(CELLS, EACH * len(sizes))), 1)
    room = spare // cell
    needs = [{kind: -(-(length - low) // cell) for kind, length in size.items()}
             for size, low in zip(sizes, least, strict=True)]  # fmt: skip
    best = np.zeros(room + 1)  # the least damage of the groups so far within so many cells
    choices: list[np.ndarray] = []
    for need, damage in zip(needs, damages, strict=True):
        new, choice = np.full(room + 1, np.inf), np.zeros(room + 1, np.uint8)
        for number, (kind, cells) in enumerate(need.items()):
            if cells <= room:
                total = best[: room + 1 - cells] + damage[kind]
                np.putmask(choice[cells:], total < new[cells:], number)
                np.minimum(new[cells:], total, out=new[cells:])
        best = new
        choices.append(choice)
    picked, left = [], room
    for need, choice in zip(reversed(needs), reversed(choices), strict=True):
        kind = list(need)[int(choice[left])]
        picked.append(kind)
        left -= need[kind]
    return picked[::-1]
