"""Grids by a table of levels: NF4, ternary, MXFP4, and the block types of GGUF.

A weight is level * scale - zero, in float32 and in that order, which is bit for bit what gguf's own arithmetic gives
for its types. K types have a small code for the scale (and the minimum, our zero) of 16 or 32 weights, and for 256 of
them two floats that those are multiples of.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from shrew.folder.grids import Steps

TRITS = Fraction(8, 5)  # bits of a code that has three values: five of them in a byte
# The 16 levels of NF4 (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, appendix E): quantiles of a normal distribution.
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled; a scale is half of what its exponent says
CELLS = 64  # of the range of levels that are not evenly spaced
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Table:
    """One kind of grid: the `levels` that codes stand for, and how the steps of a group are stored.

    `groups` are the sizes it comes in. `scale` is the type of a scale that stands alone: a float, or a power of two by
    its exponent (OCP MX's E8M0). `per` groups make a super-block, where a scale is a code of `scale_bits`, less
    `middle`, times an fp16. `mins`: a group has a minimum as well, of the same form as its scale. `ragged`: a row may
    end in a shorter group.
    """

    bits: int
    levels: tuple[float, ...]
    groups: tuple[int, ...]
    scale: Literal["bf16", "fp16", "e8m0"] = "fp16"
    mins: bool = False
    per: int = 0
    scale_bits: int = 0
    middle: int = 0
    ragged: bool = False


def _span(first: int, count: int) -> tuple[int, ...]:
    return tuple(range(first, first + count))


TYPES = {
    "nf4": Table(4, NF4, (32, 64, 128), "bf16", ragged=True),
    "ternary": Table(2, (-1, 0, 1), (32, 64, 128, 256), "bf16", ragged=True),
    "mxfp4": Table(4, E2M1, (32,), "e8m0"),
    "iq4_nl": Table(4, IQ4, (32,)),
    "q4_0": Table(4, _span(-8, 16), (32,)),
    "q4_1": Table(4, _span(0, 16), (32,), mins=True),
    "q5_0": Table(5, _span(-16, 32), (32,)),
    "q5_1": Table(5, _span(0, 32), (32,), mins=True),
    "q8_0": Table(8, _span(-128, 256), (32,)),
    "q2_k": Table(2, _span(0, 4), (16,), mins=True, per=16, scale_bits=4),
    "q3_k": Table(3, _span(-4, 8), (16,), per=16, scale_bits=6, middle=32),
    "q4_k": Table(4, _span(0, 16), (32,), mins=True, per=8, scale_bits=6),
    "q5_k": Table(5, _span(0, 32), (32,), mins=True, per=8, scale_bits=6),
    "q6_k": Table(6, _span(-32, 64), (16,), per=16, scale_bits=8, middle=128),
    "iq4_xs": Table(4, IQ4, (32,), per=8, scale_bits=6, middle=32),
}


@dataclass(frozen=True)
class Levels:
    """A grid of TYPES, by its kind and group."""

    kind: str
    group: int

    def __post_init__(self) -> None:
        if self.kind not in TYPES or self.group not in TYPES[self.kind].groups:
            raise ValueError(f"no grid is called {self.kind} and has groups of {self.group}")

    @property
    def table(self) -> Table:
        return TYPES[self.kind]

    @property
    def bits(self) -> int:
        return self.table.bits

    @property
    def span(self) -> int:
        return self.group * max(self.table.per, 1)

    @property
    def widths(self) -> dict[str, int | Fraction]:
        table, found = self.table, {"codes": TRITS if len(self.table.levels) == 3 else self.bits}
        if table.scale == "e8m0":
            found["scales"] = 8
        if table.per:
            found |= dict.fromkeys(("scales", "zeros") if table.mins else ("scales",), table.scale_bits)
        return found

    def label(self) -> str:
        return f"{self.kind} g{self.group}" if len(self.table.groups) > 1 else self.kind

    def fits(self, cols: int) -> bool:
        """Whether rows of so many weights can be on this grid."""
        return self.table.ragged or cols % self.span == 0

    def shapes(self, rows: int, cols: int) -> dict[str, tuple[int, ...]]:
        """Of every part, before its bits are packed. Raises ValueError for rows that are no whole blocks."""
        if not self.fits(cols):
            raise ValueError(f"rows of {cols} weights are no whole blocks of {self.span}")
        each = (rows, -(-cols // self.group))
        found: dict[str, tuple[int, ...]] = {"codes": (rows, cols), "scales": each}
        if self.table.mins:
            found["zeros"] = each
        if self.table.per:
            found["supers"] = (rows, cols // self.span, 1 + self.table.mins)
        return found

    def effective(self, steps: "Steps") -> tuple[Tensor, Tensor]:
        """Scale and zero of every group, float32 [rows, groups]."""
        table, zeros, supers = self.table, steps.zeros, steps.supers
        if table.scale == "e8m0":
            scale = power(steps.scales)
        elif supers is None:
            scale = steps.scales.float()
        else:
            scale = self._multiples(supers[..., 0], steps.scales)
        if zeros is None:
            return scale, torch.zeros_like(scale)
        return scale, -zeros.float() if supers is None else self._multiples(supers[..., 1], zeros)

    def _multiples(self, supers: Tensor, codes: Tensor) -> Tensor:
        return supers.float().repeat_interleave(self.table.per, 1) * (codes.float() - self.table.middle)

    def encode(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest code, as a float. A scale of zero gives any: all its codes stand for the same."""
        place = (values + zero) / torch.where(scale == 0, torch.ones_like(scale), scale)
        if (first := evenly(self.kind)) is not None:
            return (place.round_() - first).clamp_(0, len(self.table.levels) - 1)
        lowest, cells, between, below, above = _cells(self.kind)
        cell = ((place - lowest) * cells).clamp_(0, CELLS - 1).long().clamp_(min=0)  # NaN has no cell
        return torch.where(place > torch.take(between, cell), torch.take(above, cell), torch.take(below, cell))

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        first = evenly(self.kind)
        level = codes + first if first is not None else torch.take(_levels(self.kind), codes.long())
        return level * scale - zero


def power(exponents: Tensor) -> Tensor:
    """2 ** (e - 128) of uint8 exponents, by its bits: below 2 a float32 has no leading one any more."""
    wide = exponents.to(torch.int32)
    return torch.where(wide < 2, 0x00200000 << wide.clamp(max=1), (wide - 1) << 23).view(torch.float32)


@cache
def evenly(kind: str) -> int | None:
    """The level of code 0 where levels are neighbouring whole numbers, in order; None where they are not."""
    levels = TYPES[kind].levels
    first = int(levels[0])
    return first if levels == _span(first, len(levels)) else None


@cache
def _levels(kind: str) -> Tensor:
    return torch.tensor(TYPES[kind].levels, dtype=torch.float32)


@cache
def _cells(kind: str) -> tuple[float, float, Tensor, Tensor, Tensor]:
    """The range of the levels cut into CELLS, so small that at most one border between two levels lies in each: where
    it begins, cells in a unit, and of every cell the border and the codes below and above it. Looking a value up so is
    several times as fast as a binary search."""
    codes = {level: float(code) for code, level in reversed(list(enumerate(TYPES[kind].levels)))}
    upward = sorted(codes)
    lowest, size = upward[0], (upward[-1] - upward[0]) / CELLS
    borders = [(one + other) / 2 for one, other in pairwise(upward)]
    between, below, above = [], [], []
    for cell in range(CELLS):
        passed = sum(border < lowest + cell * size for border in borders)
        between.append(borders[passed] if passed < len(borders) else math.inf)
        below.append(codes[upward[passed]])
        above.append(codes[upward[min(passed + 1, len(borders))]])
    return lowest, 1 / size, torch.tensor(between), torch.tensor(below), torch.tensor(above)
