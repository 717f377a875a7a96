"""What to try next: structural cuts crossed with ways to store what is left, with a predicted quality that trials
correct."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from shrew.search.allocate import BITS, Group, allocate, extend

LADDER = 40  # byte budgets between the largest and the smallest way to store the weights
MOST, LEAST = 600, 100  # hundredths of a bit a weight: the ends of what is tried of coded weights
MEASURED_RATES = (1.0, 2.0, 3.0)  # bits a weight whose damage is measured
PRIOR = 0.6  # healing is supposed to leave this share of the damage until a trial says otherwise


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


@dataclass(frozen=True)
class Widths:
    """A whole number of bits for each group of weights, chosen by measured damage."""

    groups: tuple[Group, ...]
    damages: tuple[dict[int, float], ...]  # of each group, at every width
    group: int
    symmetric: bool

    def ends(self) -> tuple[int, int]:
        top, low = (sum(item.bytes(bits, self.group, self.symmetric) for item in self.groups) for bits in (8, 2))
        return top, low

    def within(self, budget: int) -> Stored | None:
        sizes = [{bits: item.bytes(bits, self.group, self.symmetric) for bits in BITS} for item in self.groups]
        picked = allocate(sizes, self.damages, budget)
        if picked is None:
            return None
        size = sum(table[bits] for table, bits in zip(sizes, picked, strict=True))
        damage = sum(table[bits] for table, bits in zip(self.damages, picked, strict=True))
        counts = [item.weights() for item in self.groups]
        mean = sum(bits * count for bits, count in zip(picked, counts, strict=True)) / sum(counts)
        return Stored(self._move(picked), mean, size, damage)

    def _move(self, picked: Sequence[int]) -> dict[str, Any]:
        widths = {name: bits for item, bits in zip(self.groups, picked, strict=True) for name, _, _ in item.tensors}
        common = max(set(widths.values()), key=lambda bits: sum(value == bits for value in widths.values()))
        others = {name: bits for name, bits in widths.items() if bits != common}
        return {"name": "quantize", "bits": common, "group": self.group, "symmetric": self.symmetric,
                "embeddings": True, "tensors": others}  # fmt: skip


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

    def moves(self, heal: dict[str, Any] | None) -> list[dict[str, Any]]:
        """The recipe tables: cuts, quantization, healing."""
        return [*self.family.moves, self.quantize, *([heal] if heal else [])]


def inherited(groups: Sequence[Group], damages: dict[str, dict[int, float]], dropped: Sequence[int],
              prefix: str) -> tuple[dict[int, float], ...]:  # fmt: skip
    """Damages of the groups of a cut model: those of the same parts before the layers `dropped` were left out."""
    before = {_renumber(name, prefix, dropped): extend(damage) for name, damage in damages.items()}
    return tuple(before[item.name] for item in groups)


def _renumber(name: str, prefix: str, dropped: Sequence[int]) -> str | None:
    if not name.startswith(prefix + "."):
        return name
    number, _, rest = name.removeprefix(prefix + ".").partition(".")
    if int(number) in dropped:
        return None
    return f"{prefix}.{int(number) - sum(item < int(number) for item in dropped)}.{rest}"


@dataclass
class Curve:
    """How much of a predicted damage is left after healing, learnt from trials: excess = a * damage ^ p in a family.

    `loss` is the original's loss in nats a prediction; retention = loss / (loss + excess), which for bits per byte is
    exact when the excess is, and for other metrics a shape that trials scale.
    """

    loss: float
    seen: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # family -> (damage, excess)

    def learn(self, candidate: Candidate, retention: float) -> None:
        """Note a trial; of two at the same damage (healed and not) the better one stays."""
        excess = max(self.loss * (1 / max(retention, 1e-3) - 1), 1e-5)
        known = dict(self.seen.get(candidate.family.name, []))
        known[candidate.damage] = min(excess, known.get(candidate.damage, excess))
        self.seen[candidate.family.name] = list(known.items())

    def forget(self, family: Family) -> None:
        self.seen.pop(family.name, None)

    def predict(self, candidate: Candidate) -> float:
        """Predicted retention."""
        points = sorted(self.seen.get(candidate.family.name, []))
        if not points:
            shares = sorted(excess / damage for found in self.seen.values() for damage, excess in found)
            share = shares[len(shares) // 2] if shares else PRIOR
            return self.loss / (self.loss + share * candidate.damage)
        near = sorted(points, key=lambda point: abs(math.log(point[0] / candidate.damage)))[:2]
        (damage, excess), power = near[0], 1.0
        if len(near) == 2 and abs(math.log(near[0][0] / near[1][0])) > 0.05:
            power = math.log(near[0][1] / near[1][1]) / math.log(near[0][0] / near[1][0])
        return self.loss / (self.loss + excess * (candidate.damage / damage) ** min(max(power, 0.5), 2.0))
