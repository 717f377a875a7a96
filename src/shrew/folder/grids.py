"""Grids: which values a weight may take, and what is stored of it.

A weight is seen as rows of inputs, cut into groups along the row. What a code stands for depends on two numbers of its
group, a scale and a zero: a grid says how both come out of what is stored (`effective`), and what a code then means
(`decode`) or which one is nearest (`encode`). The rest of Shrew, rounding with error feedback included, uses those
three and never asks which grid it has.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from shrew.folder.blocktypes import TYPES, Levels

FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Steps:
    """What a grid stores of each group beside the codes: scales [rows, groups], zeros [rows, groups] or None, and
    supers [rows, blocks, n] or None, which scales and zeros of several groups are themselves multiples of. What all
    rows share: columns [1, cols] or None."""

    scales: Tensor
    zeros: Tensor | None = None
    supers: Tensor | None = None
    columns: Tensor | None = None

    def parts(self) -> dict[str, Tensor]:
        """By name, those that are there."""
        named = {"scales": self.scales, "zeros": self.zeros, "supers": self.supers, "columns": self.columns}
        return {name: value for name, value in named.items() if value is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> "Steps":
        """The same change of every part that rows have of their own."""
        return Steps(**{name: value if name == "columns" else change(value) for name, value in self.parts().items()})

    def rows(self, which: Any) -> "Steps":
        """Those of some rows: a slice, or numbers."""
        return self.map(lambda value: value[which])


class Grid(Protocol):
    """What every grid offers. Frozen dataclasses; `span`: columns whose steps are chosen together, 0 for a whole row.

    `widths` gives the parts (codes, scales, zeros) that lie in a file as a stream of so many bits; the other parts lie
    there as they are, in a float type. `shapes` raises ValueError for rows that the grid cannot have.
    """

    @property
    def bits(self) -> int: ...
    @property
    def group(self) -> int: ...
    @property
    def span(self) -> int: ...
    @property
    def widths(self) -> Mapping[str, int | Fraction]: ...
    def label(self) -> str: ...
    def shapes(self, rows: int, cols: int) -> dict[str, tuple[int, ...]]: ...
    def effective(self, steps: Steps) -> tuple[Tensor, Tensor]: ...
    def encode(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor: ...
    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor: ...


def groups(cols: int, group: int) -> int:
    """Groups in a row of `cols` weights; the last one may be shorter; a group of 0 is the whole row."""
    return 1 if group == 0 or cols == 0 else -(-cols // group)


class Even:
    """Evenly spaced values: (code - zero) * scale for codes from 0 to 2^bits - 1."""

    bits: int

    def encode(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest code, as a float; half-way cases to even. The three shapes must broadcast."""
        return ((values / scale).round_() + zero).clamp_(0, 2**self.bits - 1)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (codes - zero) * scale


@dataclass(frozen=True)
class Uniform(Even):
    """2^bits evenly spaced values: (code - zero) * scale, scales bf16, zero = 2^(bits-1) where symmetric.

    Products are exact in float32: codes have at most 9 significant bits and scales 8, so a float32 or bf16 reader gets
    the same numbers whichever order it multiplies in. `group` 0 means one group a row.
    """

    bits: int
    group: int
    symmetric: bool = True
    kind: ClassVar[str] = "int"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or self.group < 0:
            raise ValueError(f"no grid has {self.bits} bits and groups of {self.group}")

    @property
    def span(self) -> int:
        return self.group

    @property
    def widths(self) -> dict[str, int]:
        return {"codes": self.bits} if self.symmetric else {"codes": self.bits, "zeros": self.bits}

    def label(self) -> str:
        return f"int{self.bits} g{self.group or 'row'} {'sym' if self.symmetric else 'asym'}"

    def shapes(self, rows: int, cols: int) -> dict[str, tuple[int, ...]]:
        """Of every part, before its bits are packed."""
        each = (rows, groups(cols, self.group))
        found: dict[str, tuple[int, ...]] = {"codes": (rows, cols), "scales": each}
        return found if self.symmetric else found | {"zeros": each}

    def effective(self, steps: Steps) -> tuple[Tensor, Tensor]:
        """Scale and zero of every group, float32 [rows, groups]."""
        scale = steps.scales.float()
        zero = torch.full_like(scale, 2.0 ** (self.bits - 1)) if steps.zeros is None else steps.zeros.float()
        return scale, zero


# Steps in quarter octaves. Mantissas of 8 bits, so that a code times a row's step times a column's is exact in float32.
_QUARTERS = (1.0, 1.1875, 1.4140625, 1.6796875)
ROW_ONE, COLUMN_ONE = 200, 128  # the exponents that stand for a step of 1


def quarter_octaves(exponents: Tensor) -> Tensor:
    """float32: 2^(exponents / 4), nearly, of integers."""
    return torch.ldexp(torch.tensor(_QUARTERS)[exponents % 4], torch.div(exponents, 4, rounding_mode="floor"))


@dataclass(frozen=True)
class Product(Even):
    """2^bits evenly spaced values of which one is 0, with a step for every row times one for every column.

    Both are stored as exponents, four an octave (uint8), so steps cost next to nothing and every weight of a tensor can
    have the step that its row's and column's sensitivity asks for. Made for codes that are stored coded: where most
    steps are wide the codes are mostly 0.
    """

    bits: int
    kind: ClassVar[str] = "product"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"no grid has {self.bits} bits")

    @property
    def group(self) -> int:
        return 1

    @property
    def span(self) -> int:
        return 0

    @property
    def widths(self) -> dict[str, int]:
        return {"codes": self.bits, "scales": 8, "columns": 8}

    def label(self) -> str:
        return f"int{self.bits} row x column"

    def shapes(self, rows: int, cols: int) -> dict[str, tuple[int, ...]]:
        """Of every part, before its bits are packed."""
        return {"codes": (rows, cols), "scales": (rows, 1), "columns": (1, cols)}

    def effective(self, steps: Steps) -> tuple[Tensor, Tensor]:
        """Scale and zero of every weight, float32 [rows, cols] and [1, 1]."""
        assert steps.columns is not None
        rows, columns = (quarter_octaves(part.int() - one) for part, one in
                         ((steps.scales, ROW_ONE), (steps.columns, COLUMN_ONE)))  # fmt: skip
        return rows * columns, torch.full((1, 1), 2.0 ** (self.bits - 1))


# What config.json calls each; a grid's own fields are the other keys of its entry.
KINDS: dict[str, Any] = {grid.kind: grid for grid in (Uniform, Product)} | dict.fromkeys(TYPES, Levels)


def spread(values: Tensor, group: int, cols: int) -> Tensor:
    """One value a group -> one a column: [rows, groups] -> [rows, cols], or [rows, 1] as it is."""
    return values if values.shape[1] == 1 else values.repeat_interleave(group or cols, dim=1)[:, :cols]


def dequantize(codes: Tensor, steps: Steps, grid: Grid) -> Tensor:
    """codes [rows, cols] -> float32 [rows, cols]: exactly the numbers that a saved file stands for."""
    scale, zero = (spread(item, grid.group, codes.shape[1]) for item in grid.effective(steps))
    return grid.decode(codes.float(), scale, zero)


def encode(rows: Tensor, steps: Steps, grid: Grid) -> Tensor:
    """The nearest code of every weight: uint8 [rows, cols]."""
    scale, zero = (spread(item, grid.group, rows.shape[1]) for item in grid.effective(steps))
    return grid.encode(rows, scale, zero).to(torch.uint8)
