"""Which grid for which weights: an exact multiple-choice knapsack over measured damage. Pure arithmetic."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from shrew.search.kinds import Kind, Palette

CELLS = 4096  # the byte budget is cut into so many cells; sizes are rounded up, so the budget is never exceeded


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

    Exact dynamic programming over `CELLS` cells of bytes (up to rounding sizes up to whole cells).
    """
    least = sum(min(item.values()) for item in sizes)
    if least > budget:
        return None
    ideal = [min(size, key=damage.__getitem__) for size, damage in zip(sizes, damages, strict=True)]
    if sum(size[kind] for size, kind in zip(sizes, ideal, strict=True)) <= budget:
        return ideal
    cell = max(budget / CELLS, 1.0)
    room = int(budget / cell)
    best = np.zeros(room + 1)
    choices: list[np.ndarray] = []
    for size, damage in zip(sizes, damages, strict=True):
        new = np.full(room + 1, np.inf)
        choice = np.zeros(room + 1, dtype=np.int64)
        for number, (kind, length) in enumerate(size.items()):
            need = int(np.ceil(length / cell))
            if need <= room:
                total = np.full(room + 1, np.inf)
                total[need:] = best[: room + 1 - need] + damage[kind]
                choice = np.where(total < new, number, choice)
                new = np.minimum(new, total)
        best = new
        choices.append(choice)
    if not np.isfinite(best[room]):  # only the rounding of cells stands in the way: the smallest of each
        return [min(size, key=size.__getitem__) for size in sizes]
    picked, left = [], room
    for size, choice in zip(reversed(sizes), reversed(choices), strict=True):
        kind = list(size)[int(choice[left])]
        picked.append(kind)
        left -= int(np.ceil(size[kind] / cell))
    return picked[::-1]
