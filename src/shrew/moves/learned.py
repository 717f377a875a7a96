"""Learned rounding: which way each weight of a layer is rounded, chosen by what the whole layer then gives.

SignRound (Cheng et al. 2023, arXiv:2309.05516): offsets within half a step and factors of the scales are moved by the
sign of their gradient. It starts from codes that are there already, and ends with the best it saw.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from shrew.folder.grids import Steps, dequantize, encode, spread
from shrew.folder.packed import Packed, from_rows, to_rows
from shrew.moves.calibrate import Block

WINDOWS = 4  # of calibration text in a step
LOOKS = 8  # times that the whole calibration text is tried
EDGE = 0.499  # of a step: how far from the middle of its code a weight may start


@dataclass
class Rounding:
    """A packed weight as a function of offsets [rows, cols] in steps, and of factors of the scales stored as floats.

    A low-rank correction stays as it is."""

    packed: Packed
    base: Tensor
    offsets: Tensor
    factors: dict[str, Tensor]

    @classmethod
    def of(cls, packed: Packed, original: Tensor) -> "Rounding":
        """Starts exactly at `packed`: an original weight that is not in the cell of its code begins at its edge."""
        now = dequantize(packed.codes, packed.steps, packed.grid)
        _, unit, _ = _levels(packed, packed.steps)
        reach = EDGE * unit
        wanted = to_rows(original, packed.transposed).float() - packed.correction()
        base = now + (wanted - now).clamp(-reach, reach)
        codes = encode(base, packed.steps, packed.grid)
        base = torch.where(codes == packed.codes, base, now)  # levels that are not evenly spaced
        factors = {name: torch.ones_like(value, dtype=torch.float32, requires_grad=True)
                   for name, value in packed.steps.parts().items()
                   if value.is_floating_point() and name not in packed.grid.widths}  # fmt: skip
        if "supers" in factors:  # the scales are multiples of them
            factors = {"supers": factors["supers"]}
        return cls(packed, base, torch.zeros_like(base, requires_grad=True), factors)

    def steps(self) -> Steps:
        """The steps with their factors, rounded as the file stores them."""
        return Steps(**{name: (value * self.factors[name]).to(value.dtype) if name in self.factors else value
                        for name, value in self.packed.steps.parts().items()})  # fmt: skip

    def value(self) -> Tensor:
        """The parameter on its grid, with straight-through gradients to offsets and factors."""
        steps, packed = self.steps(), self.packed
        scale, unit, (low, high) = _levels(packed, steps)
        wanted = self.base + self.offsets * unit
        with torch.no_grad():
            zero = spread(packed.grid.effective(steps)[1], packed.grid.group, self.base.shape[1])
            found = packed.grid.decode(packed.grid.encode(wanted, scale, zero), scale, zero)
            inside = (wanted >= low - unit / 2) & (wanted <= high + unit / 2)
            pull = torch.where(inside, found - wanted, found)
        # By value this is `found`: the other terms are zero and only carry gradients.
        rows = found + torch.where(inside, wanted - wanted.detach(), 0.0) + pull * (scale / scale.detach() - 1)
        return from_rows(rows if packed.low is None else rows + packed.correction(), packed.shape, packed.transposed)

    @torch.no_grad()
    def done(self) -> Packed:
        steps = self.steps()
        _, unit, _ = _levels(self.packed, steps)
        codes = encode(self.base + self.offsets * unit, steps, self.packed.grid)
        return replace(self.packed, codes=codes, steps=steps)

    @torch.no_grad()
    def descend(self, rate: float) -> None:
        for value, low, high, pace in [(self.offsets, -0.5, 0.5, rate)] + [
            (factor, 0.5, 1.5, rate / 4) for factor in self.factors.values()
        ]:
            if value.grad is not None:
                value.sub_(pace * value.grad.sign()).clamp_(low, high)
                value.grad = None


def _levels(packed: Packed, steps: Steps) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Of each column: its scale, which carries gradients; and without any, the mean distance of neighbouring values,
    and the lowest and highest value."""
    scale, zero = (spread(item, packed.grid.group, packed.codes.shape[1]) for item in packed.grid.effective(steps))
    with torch.no_grad():
        ends = []
        for far in (-1e30, 1e30):
            code = packed.grid.encode(torch.full_like(scale, far), scale, zero)
            ends.append((code, packed.grid.decode(code, scale, zero)))
        (first, one), (last, other) = ends
        unit = (other - one).abs() / (last - first).abs().clamp(min=1)
        return scale, unit, (torch.minimum(one, other), torch.maximum(one, other))


def learn(
    block: Block, packed: dict[str, Packed], originals: dict[str, Tensor], steps: int, seed: int
) -> tuple[dict[str, Packed], tuple[float, float]]:
    """Better codes for the packed weights of a layer, by parameter name, and the layer's mean squared error before and
    after on the whole calibration text. Never worse than before."""
    own = {name: Rounding.of(item, originals[name]) for name, item in packed.items()}
    draw = np.random.default_rng(seed)
    least = first = _error(block, {name: item.dense() for name, item in packed.items()})
    best = packed
    order: list[int] = []
    for step in range(steps):
        if len(order) < WINDOWS:
            order += draw.permutation(len(block.inputs)).tolist()
        now, order = order[:WINDOWS], order[WINDOWS:]
        with torch.enable_grad():
            values = {name.removeprefix(block.prefix): item.value() for name, item in own.items()}
            lost = [(block.run(at, block.inputs[at], values) - block.wanted[at]).square().sum() for at in now]
            torch.stack(lost).sum().backward()
        for item in own.values():
            item.descend((1 - step / steps) / steps)
        if (step + 1) % max(1, steps // LOOKS) == 0 or step + 1 == steps:
            made = {name: item.done() for name, item in own.items()}
            error = _error(block, {name: item.dense() for name, item in made.items()})
            if error < least:
                least, best = error, made
    return best, (first, least)


@torch.no_grad()
def _error(block: Block, values: dict[str, Tensor]) -> float:
    """Mean squared error of a layer's output with these parameters."""
    short = {name.removeprefix(block.prefix): value for name, value in values.items()}
    total, count = 0.0, 0
    for at, hidden in enumerate(block.inputs):
        change = block.run(at, hidden, short) - block.wanted[at]
        total += float(change.double().square().sum())
        count += change.numel()
    return total / max(count, 1)
