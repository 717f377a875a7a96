"""What to try next: structural cuts crossed with ways to store what is left, with a predicted quality that trials
correct."""

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from shrew.search.allocate import Group, allocate
from shrew.search.kinds import Kind, Palette

LADDER = 40  # byte budgets between the largest and the smallest way to store the weights
MOST, LEAST = 600, 100  # hundredths of a bit a weight: the ends of what is tried of coded weights
MEASURED_RATES = (1.0, 2.0, 3.0)  # bits a weight: the damage of two neighbouring ones is measured
BARE, BRIEF, FULL = range(3)  # how much a trial was healed
LEFT = (0.6, 0.8)  # shares of what is lost that full healing is supposed to leave, until trials say otherwise
STIFF = 0.05  # how much spread of log damages it takes to believe a measured power as much as a power of 1


@dataclass(frozen=True)
class Stored:
    """One way to store the weights of a family."""

    quantize: dict[str, Any]  # the move's table
    bits: float  # a weight, on average
    bytes: int
    damage: float


class Choices(Protocol):
    """All ways to store the weights of a family."""

    def ends(self) -> tuple[int, int]:
        """Bytes of the weights at their largest and at their smallest."""

    def within(self, budget: int) -> Stored | None:
        """The way of at most `budget` bytes that does the least damage; None if nothing fits."""

    def made(self) -> list[int]:
        """Bytes of the weights of wholes that were made for measuring."""


@dataclass(frozen=True)
class Widths:
    """A grid of a palette for each group of weights, chosen by measured damage."""

    groups: tuple[Group, ...]
    damages: tuple[dict[Kind, float], ...]  # of each group, on every grid that fits it
    palette: Palette

    def sizes(self) -> list[dict[Kind, int]]:
        return [{kind: item.bytes(kind, self.palette) for kind in damage}
                for item, damage in zip(self.groups, self.damages, strict=True)]  # fmt: skip

    def ends(self) -> tuple[int, int]:
        sizes = self.sizes()
        return sum(max(item.values()) for item in sizes), sum(min(item.values()) for item in sizes)

    def made(self) -> list[int]:
        return []

    def pick(self, budget: int) -> list[Kind] | None:
        return allocate(self.sizes(), self.damages, budget)

    def within(self, budget: int) -> Stored | None:
        picked = self.pick(budget)
        if picked is None:
            return None
        size = sum(table[kind] for table, kind in zip(self.sizes(), picked, strict=True))
        damage = sum(table[kind] for table, kind in zip(self.damages, picked, strict=True))
        count = sum(item.weights() for item in self.groups)
        return Stored(self.palette.move(self.named(picked)), 8 * size / count, size, damage)

    def named(self, picked: Sequence[Kind]) -> dict[str, Kind]:
        """The kind of every weight by its name."""
        return {name: kind for item, kind in zip(self.groups, picked, strict=True) for name, _, _ in item.tensors}


@dataclass(frozen=True)
class Rates:
    """One number for all weights: bits a weight in the file, coded; the move itself shares them out."""

    weights: int
    damages: dict[float, float]  # at the rates of MEASURED_RATES

    def ends(self) -> tuple[int, int]:
        return self._bytes(MOST), self._bytes(LEAST)

    def within(self, budget: int) -> Stored | None:
        hundredths = min(800 * budget // self.weights, MOST)
        if hundredths < LEAST:
            return None
        rate = hundredths / 100
        return Stored(coded(rate), rate, self._bytes(hundredths), self.damage(rate))

    def made(self) -> list[int]:
        return [self._bytes(round(100 * rate)) for rate in self.damages]

    def damage(self, rate: float) -> float:
        """Between two measured rates each bit divides the damage by the same factor, and beyond them by the nearest
        two's: 4 in theory, more where most codes are 0."""
        pairs = list(itertools.pairwise(sorted(self.damages.items())))
        (low, more), (high, less) = next((pair for pair in pairs if rate <= pair[1][0]), pairs[-1])
        fall = (max(more, 1e-9) / max(less, 1e-9)) ** (1 / (high - low))
        return max(more, 1e-9) * min(max(fall, 2.0), 16.0) ** (low - rate)

    def _bytes(self, hundredths: int) -> int:
        return -(-hundredths * self.weights // 800)


def coded(rate: float) -> dict[str, Any]:
    """The table of the move that stores all weights at a rate."""
    return {"name": "quantize", "rate": rate, "embeddings": True}


@dataclass(frozen=True)
class Family:
    """Candidates with the same structural cuts."""

    name: str
    moves: tuple[dict[str, Any], ...]
    choices: Choices
    cut: float  # damage of the cuts alone, before healing
    rest: int  # bytes that no quantization touches: norms, headers
    flops: float  # of a token, as a share of the original's

    def candidate(self, budget: int) -> "Candidate | None":
        """The best way to store it in at most `budget` bytes of weights file."""
        found = self.choices.within(budget - self.rest)
        if found is None:
            return None
        return Candidate(self, found.quantize, found.bits, self.rest + found.bytes, self.cut + found.damage)

    def ladder(self) -> list["Candidate"]:
        """Candidates from large to small, each different from the one before."""
        top, low = (self.rest + size for size in self.choices.ends())
        found: list[Candidate] = []
        for step in range(LADDER + 1):
            item = self.candidate(math.ceil(top * (low / top) ** (step / LADDER)))
            if item is not None and (not found or item.quantize != found[-1].quantize):
                found.append(item)
        return found


@dataclass(frozen=True)
class Candidate:
    family: Family
    quantize: dict[str, Any]  # the move's table
    bits: float  # a weight, on average
    bytes: int  # predicted size of the weights file
    damage: float  # predicted KL to the original before healing, nats a prediction


def inherited(groups: Sequence[Group], damages: dict[str, dict[Kind, float]], weights: dict[str, int],
              dropped: Sequence[int], prefix: str, palette: Palette) -> tuple[dict[Kind, float], ...]:  # fmt: skip
    """Damages of the groups of a cut model on every grid that fits: those of the same parts before the layers `dropped`
    were left out; of parts that have another name since, the mean by their number of `weights`."""
    before = {_renumber(name, prefix, dropped): damage for name, damage in damages.items()}
    total = max(sum(weights.values()), 1)
    mean = {kind: sum(damage.get(kind, 0.0) for damage in damages.values()) / total for kind in palette.bits}

    def known(item: Group) -> dict[Kind, float]:
        found = before.get(item.name) or {kind: each * item.weights() for kind, each in mean.items()}
        return {kind: found[kind] for kind in item.kinds(palette)}

    return tuple(map(known, groups))


def _renumber(name: str, prefix: str, dropped: Sequence[int]) -> str | None:
    if not name.startswith(prefix + "."):
        return name
    number, _, rest = name.removeprefix(prefix + ".").partition(".")
    if int(number) in dropped:
        return None
    return f"{prefix}.{int(number) - sum(item < int(number) for item in dropped)}.{rest}"


@dataclass
class Curve:
    """What predicted damage comes to, learnt from trials of the whole model: excess = a * damage ^ p, where `a` is a
    family's own for each amount of healing, and `p` is what all families show together.

    `loss` is the original's loss in nats a prediction; retention = loss / (loss + excess), which for bits per byte is
    exact when the excess is, and for other metrics a shape that trials scale.
    """

    loss: float
    # (family, how much it was healed) -> {damage: excess}
    seen: dict[tuple[str, int], dict[float, float]] = field(default_factory=lambda: defaultdict(dict))

    def learn(self, candidate: Candidate, retention: float, healed: int = FULL) -> None:
        """Note a trial. Whatever was lost with less healing need not be lost with more: the better one is taken."""
        name, damage, excess = candidate.family.name, candidate.damage, self.loss * (1 / max(retention, 1e-3) - 1)
        lower = [self.seen[name, level].get(damage, math.inf) for level in range(healed + 1)]
        self.seen[name, healed][damage] = excess = max(min(excess, *lower), 1e-5)
        for level in range(healed + 1, FULL + 1):
            if damage in self.seen[name, level]:
                self.seen[name, level][damage] = min(self.seen[name, level][damage], excess)

    def predict(self, candidate: Candidate) -> float:
        """Predicted retention after full healing."""
        return self.loss / (self.loss + self._excess(candidate))

    def bare(self, candidate: Candidate) -> float | None:
        """Excess without healing: as its trial had it, or by its damage at the rate of other trials; None without."""
        points = {name: points for (name, level), points in self.seen.items() if level == BARE and points}
        own = points.get(candidate.family.name, {})
        rates = [excess / damage for each in points.values() for damage, excess in each.items()]
        return own.get(candidate.damage, _middle(rates, 1.0) * candidate.damage) if rates else None

    def _excess(self, candidate: Candidate) -> float:
        own = [level for level in (FULL, BRIEF, BARE) if self.seen.get((candidate.family.name, level))]
        if not own:
            found = [excess / damage * self._left(level) for (_, level), points in self.seen.items()
                     for damage, excess in points.items()]  # fmt: skip
            return _middle(found, LEFT[BARE]) * candidate.damage
        points = sorted(self.seen[candidate.family.name, own[0]].items())
        damage, excess = min(points, key=lambda point: abs(math.log(point[0] / candidate.damage)))
        # Between two trials the power is theirs, beyond them what all trials show.
        below = [point for point in points if point[0] <= candidate.damage]
        above = [point for point in points if point[0] > candidate.damage]
        power = self._power(candidate.family.name)
        if below and above and math.log(above[0][0] / below[-1][0]) > 0.02:
            power = math.log(above[0][1] / below[-1][1]) / math.log(above[0][0] / below[-1][0])
        return self._left(own[0]) * excess * (candidate.damage / damage) ** min(max(power, 0.3), 3.0)

    def _left(self, level: int) -> float:
        """What full healing leaves of the excess at a lower level, by trials of the same candidates."""
        if level == FULL:
            return 1.0
        found = [points[damage] / excess for (name, other), points in self.seen.items() if other == FULL
                 for damage, excess in self.seen.get((name, level), {}).items() if damage in points]  # fmt: skip
        return min(_middle(found, LEFT[level]), 1.0)

    def _power(self, name: str) -> float:
        """The slope of log excess over log damage: one line for each family and amount of healing, all parallel, with
        a few thought points on a power of 1. A family's own trials count ten times."""
        up, across = STIFF, STIFF
        for (family, _), points in self.seen.items():
            if not points:
                continue
            logs = [(math.log(damage), math.log(excess)) for damage, excess in points.items()]
            x, y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
            trust = 1.0 if family == name else 0.1
            up += trust * sum((a - x) * (b - y) for a, b in logs)
            across += trust * sum((a - x) ** 2 for a, _ in logs)
        return up / across


def _middle(found: Sequence[float], otherwise: float) -> float:
    return sorted(found)[len(found) // 2] if found else otherwise
