"""Which bits for which weights: an exact multiple-choice knapsack over measured damage. Pure arithmetic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

BITS = (2, 3, 4, 5, 6, 8)
CELLS = 4096  # the byte budget is cut into so many cells; sizes are rounded up, so the budget is never exceeded


@dataclass(frozen=True)
class Group:
    """Weights that share one choice of bits: their shapes as [rows, cols] (experts folded into rows)."""

    name: str
    tensors: tuple[tuple[str, int, int], ...]  # (name, rows, cols)

    def weights(self) -> int:
        return sum(rows * cols for _, rows, cols in self.tensors)

    def bytes(self, bits: int, group: int, symmetric: bool) -> int:
        """Bytes in the file at a width: codes padded to whole bytes a row, bf16 scales, packed zero points."""
        total = 0
        for _, rows, cols in self.tensors:
            scales = -(-cols // group) if 0 < group < cols else 1
            zeros = 0 if symmetric else -(-scales * bits // 8)
            total += rows * (-(-cols * bits // 8) + 2 * scales + zeros)
        return total


def extend(damage: Mapping[int, float]) -> dict[int, float]:
    """Damage at every width of BITS from that measured at some: a bit more halves the step, so it quarters the
    damage, which is second-order in the step."""
    known = {bits: max(value, 1e-9) for bits, value in damage.items()}
    top = max(known)
    return {bits: known.get(bits, known[top] * 4.0 ** (top - bits)) for bits in BITS}


def allocate(
    sizes: Sequence[Mapping[int, int]], damages: Sequence[Mapping[int, float]], budget: int
) -> list[int] | None:
    """The width of each group that minimises the sum of damages within `budget` bytes; None if nothing fits.

    Exact dynamic programming over `CELLS` cells of bytes (up to rounding sizes up to whole cells).
    """
    least = sum(min(item.values()) for item in sizes)
    if least > budget:
        return None
    ideal = [min(size, key=damage.__getitem__) for size, damage in zip(sizes, damages, strict=True)]
    if sum(size[bits] for size, bits in zip(sizes, ideal, strict=True)) <= budget:
        return ideal
    cell = max(budget / CELLS, 1.0)
    room = int(budget / cell)
    best = np.zeros(room + 1)
    choices: list[np.ndarray] = []
    for size, damage in zip(sizes, damages, strict=True):
        new = np.full(room + 1, np.inf)
        choice = np.zeros(room + 1, dtype=np.int64)
        for bits in size:
            need = int(np.ceil(size[bits] / cell))
            if need <= room:
                total = np.full(room + 1, np.inf)
                total[need:] = best[: room + 1 - need] + damage[bits]
                choice = np.where(total < new, bits, choice)
                new = np.minimum(new, total)
        best = new
        choices.append(choice)
    if not np.isfinite(best[room]):  # only the rounding of cells stands in the way: the smallest of each
        return [min(size, key=lambda bits: size[bits]) for size in sizes]
    picked, left = [], room
    for size, choice in zip(reversed(sizes), reversed(choices), strict=True):
        bits = int(choice[left])
        picked.append(bits)
        left -= int(np.ceil(size[bits] / cell))
    return picked[::-1]
