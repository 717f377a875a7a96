"""What to try next: structural cuts crossed with bit allocations, with a predicted quality that trials correct."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shrew.search.allocate import BITS, Group, allocate, extend

LADDER = 40  # byte budgets between everything at 8 bits and everything at 2
PRIOR = 0.6  # healing is supposed to leave this share of the damage until a trial says otherwise


@dataclass(frozen=True)
class Family:
    """Candidates with the same structural cuts. `kept` maps weight names after the cuts to names before."""

    name: str
    moves: tuple[dict[str, Any], ...]
    groups: tuple[Group, ...]
    damages: tuple[dict[int, float], ...]  # of each group, at every width
    cut: float  # damage of the cuts alone, before healing
    rest: int  # bytes that no quantization touches: norms, headers
    flops: float  # of a token, as a share of the original's

    def candidate(self, budget: int, group: int, symmetric: bool) -> "Candidate | None":
        """The best allocation of at most `budget` bytes in the weights file."""
        sizes = [{bits: item.bytes(bits, group, symmetric) for bits in BITS} for item in self.groups]
        picked = allocate(sizes, self.damages, budget - self.rest)
        if picked is None:
            return None
        size = self.rest + sum(table[bits] for table, bits in zip(sizes, picked, strict=True))
        damage = self.cut + sum(table[bits] for table, bits in zip(self.damages, picked, strict=True))
        return Candidate(self, tuple(picked), size, damage)

    def ladder(self, group: int, symmetric: bool) -> list["Candidate"]:
        """Candidates from large to small, each different from the one before."""
        top, low = (self.rest + sum(item.bytes(bits, group, symmetric) for item in self.groups) for bits in (8, 2))
        found: list[Candidate] = []
        for step in range(LADDER + 1):
            item = self.candidate(math.ceil(top * (low / top) ** (step / LADDER)), group, symmetric)
            if item is not None and (not found or item.bits != found[-1].bits):
                found.append(item)
        return found


@dataclass(frozen=True)
class Candidate:
    family: Family
    bits: tuple[int, ...]  # of each group
    bytes: int  # predicted size of the weights file
    damage: float  # predicted KL to the original before healing, nats a prediction

    def moves(self, heal: dict[str, Any] | None, group: int, symmetric: bool) -> list[dict[str, Any]]:
        """The recipe tables: cuts, quantization, healing."""
        widths = {name: bits for item, bits in zip(self.family.groups, self.bits, strict=True)
                  for name, _, _ in item.tensors}  # fmt: skip
        common = max(set(widths.values()), key=lambda bits: sum(value == bits for value in widths.values()))
        others = {name: bits for name, bits in widths.items() if bits != common}
        quantize = {"name": "quantize", "bits": common, "group": group, "symmetric": symmetric, "embeddings": True,
                    "tensors": others}  # fmt: skip
        return [*self.family.moves, quantize, *([heal] if heal else [])]

    def mean_bits(self) -> float:
        weights = [sum(rows * cols for _, rows, cols in item.tensors) for item in self.family.groups]
        return sum(bits * n for bits, n in zip(self.bits, weights, strict=True)) / sum(weights)


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
