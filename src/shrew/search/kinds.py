"""What weights may be stored as in a run: grids by their bits, or GGUF's own block types. Tables."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shrew.errors import UnsupportedError
from shrew.folder.blocktypes import TYPES, Levels
from shrew.folder.grids import Grid, Uniform

Kind = int | str  # bits of the grid int, or the name of a grid, as `quantize` takes them for single weights

# GGUF's block types by the length that rows must be a multiple of. Where the longer blocks fit, they are better.
BLOCKS: dict[int, tuple[str, ...]] = {
    256: ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0"),
    32: ("iq4_nl", "q5_0", "q8_0"),
}


@dataclass(frozen=True)
class Palette:
    """Grids to choose from: `bits` of each kind, those whose damage is `measured` (that of others follows from their
    errors), and what the move `quantize` is told besides."""

    bits: Mapping[Kind, int]
    measured: tuple[Kind, ...]
    settings: Mapping[str, Any]
    by_tensor: bool = False  # every weight for itself, where others choose for each part of a layer

    def grid(self, kind: Kind, cols: int) -> Grid:
        if isinstance(kind, str):
            return Levels(kind, TYPES[kind].groups[0])
        group = int(self.settings["group"])
        return Uniform(kind, group if group < cols else 0, bool(self.settings["symmetric"]))

    def bytes(self, kind: Kind, rows: int, cols: int) -> int:
        """Bytes in the file of rows on a grid: every part that the grid stores, streams padded to whole bytes a row."""
        grid, total = self.grid(kind, cols), 0
        for part, (_, *extent) in grid.shapes(rows, cols).items():
            each = math.prod(extent)
            total += rows * math.ceil(each * grid.widths[part] / 8 if part in grid.widths else 2 * each)
        return total

    def fitting(self, cols: int) -> tuple[Kind, ...]:
        """The kinds that rows of so many weights may have. Raises UnsupportedError where there are none."""
        if not any(isinstance(kind, str) for kind in self.bits):
            return tuple(self.bits)
        for length, kinds in BLOCKS.items():
            if cols % length == 0:
                return kinds
        raise UnsupportedError(f"rows of {cols} weights are no whole blocks of {min(BLOCKS)}, as all of GGUF's are")

    def move(self, kinds: Mapping[str, Kind]) -> dict[str, Any]:
        """The move's table that gives each weight its kind."""
        common = max(dict.fromkeys(kinds.values()), key=list(kinds.values()).count)
        told = {"grid": common} if isinstance(common, str) else {"bits": common}
        others = {name: kind for name, kind in kinds.items() if kind != common}
        return {"name": "quantize", **told, **self.settings, "embeddings": True, "tensors": others}

    def safest(self) -> dict[str, Any]:
        """The move's table that does the least damage."""
        kind = max(self.bits, key=self.bits.__getitem__)
        told = {"grid": kind} if isinstance(kind, str) else {"bits": kind, "group": self.settings["group"]}
        return {"name": "quantize", **told, "method": "rtn", "embeddings": True}


def widths(group: int, symmetric: bool) -> Palette:
    """Whole numbers of bits, in groups of so many weights."""
    return Palette({bits: bits for bits in (2, 3, 4, 5, 6, 8)}, (2, 3, 4), {"group": group, "symmetric": symmetric})


def blocks() -> Palette:
    """GGUF's block types."""
    bits: dict[Kind, int] = {kind: TYPES[kind].bits for kind in dict.fromkeys(sum(BLOCKS.values(), ()))}
    return Palette(bits, ("q2_k", "q4_k", "iq4_nl"), {}, by_tensor=True)
