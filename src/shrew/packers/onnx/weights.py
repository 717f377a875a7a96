"""Weights as a graph stores them: the codes that were chosen, in blocks, or dense in the narrowest exact type."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from shrew.folder.grids import Product, Steps, Uniform
from shrew.folder.packed import Packed, pack_bits
from shrew.packers.carry import as_uniform

BLOCKS = (128, 64, 32, 16)  # inputs that can share a scale in MatMulNBits
VALUES_OF = " (values of "
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Blocks:
    """A matrix as MatMulNBits reads it: `codes` uint8 [rows, blocks, bytes], `scales` [rows, blocks] and packed `zeros`
    uint8 [rows, bytes] or None, each [rows, ...] for `cols` inputs in blocks of `size`.

    With `columns` uint8 [cols], steps of the inputs, both are as `Product` stores them: `scales` uint8 [rows, 1]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    size: int
    cols: int
    columns: Tensor | None = None


def stored_bits(bits: int, size: int) -> int:
    """Bits that a code takes in the graph: 3 stand in 4, 5 to 7 in 8; and 2 in 4 where blocks of `size` have no kernel
    (ONNX Runtime would unpack the whole matrix at every call)."""
    return next(stored for stored in (2, 4, 8) if stored >= bits and (stored > 2 or size >= 32))


def block_size(group: int, cols: int) -> int:
    """The longest block that never crosses a group of `group` inputs (0: the row) nor the end of the row, 0 where there
    is none. Longer ones than 128 are no faster, and 2-bit codes have no kernel for them."""
    return next((size for size in BLOCKS if cols % size == 0 and (group or cols) % size == 0), 0)


def to_blocks(packed: Packed) -> Blocks:
    """The same codes in blocks. Scales are repeated where a group is longer than a block; symmetric codes move with
    their middle. Only for grids that have a `block_size`, and weights whose rows are outputs."""
    cols, rows, group, steps = packed.codes.shape[1], len(packed.codes), group_of(packed), packed.steps
    size = block_size(group, cols)
    bits = stored_bits(packed.grid.bits, size)
    if steps.columns is not None:  # few codes may be in use
        half = middle(packed.grid.bits)
        bits = 4 if half - 8 <= int(packed.codes.min()) and int(packed.codes.max()) < half + 8 else 8
    which = torch.arange(0, cols, size) // (group or cols)
    codes = packed.codes if steps.zeros is not None else packed.codes + (2 ** (bits - 1) - middle(packed.grid.bits))
    zeros = None if steps.zeros is None else pack_bits(steps.zeros[:, which].contiguous(), bits)
    codes = pack_bits(codes, bits).view(rows, -1, size * bits // 8)
    if steps.columns is not None:
        return Blocks(codes, steps.scales, None, bits, size, cols, steps.columns[0])
    return Blocks(codes, steps.scales[:, which].contiguous(), zeros, bits, size, cols)


def group_of(packed: Packed) -> int:
    """Inputs that share a scale; 0: the row."""
    return 0 if packed.steps.columns is not None else packed.grid.group


def _codes(packed: Packed) -> Packed | None:
    return packed if isinstance(packed.grid, Product) else as_uniform(packed)


def middle(bits: int) -> int:
    """The code of zero on a symmetric grid."""
    return int(2 ** (bits - 1))


def narrowest(value: Tensor) -> torch.dtype:
    """The narrowest type that holds every value exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(value.to(dtype).float(), value.float()):
            return dtype
    return torch.float32


@dataclass
class Weights:
    """The parameters of a model of our blocks: all of them `dense`, float32, by name; some with their codes as well.

    `effective` collects what each is stored as."""

    dense: dict[str, Tensor]
    packed: dict[str, Packed] = field(default_factory=dict)
    effective: dict[str, str] = field(default_factory=dict)

    def blocks(self, *names: str, rows: Tensor | None = None) -> Blocks | None:
        """The rows of several weights, one under the other, as blocks; None where they have no codes, or codes that no
        integer grid says or that cannot stand in one matrix. `rows` picks among them; -1 is a row of zeros."""
        found = [same for name in names if name in self.packed and (same := _codes(self.packed[name])) is not None]
        kinds = {(item.grid, item.codes.shape[1], item.steps.scales.dtype) for item in found}
        if len(found) < len(names) or len(kinds) > 1 or not block_size(group_of(found[0]), found[0].codes.shape[1]):
            return None
        grid: Any = found[0].grid
        columns = found[0].steps.columns
        if columns is not None and not all(torch.equal(columns, other.steps.columns) for other in found[1:]):  # type: ignore[arg-type]
            return None
        codes, scales = torch.cat([item.codes for item in found]), torch.cat([item.steps.scales for item in found])
        zeros = None
        if found[0].steps.zeros is not None:
            zeros = torch.cat([item.steps.zeros for item in found if item.steps.zeros is not None])
        if rows is not None:
            codes, scales = picked(codes, rows, 0 if zeros is not None else middle(grid.bits)), picked(scales, rows, 1)
            zeros = None if zeros is None else picked(zeros, rows, 0)
        blocks = to_blocks(Packed(codes, Steps(scales, zeros, columns=columns), grid, tuple(codes.shape)))
        for name in names:
            held = self.packed[name].grid
            self.effective[name] = held.label() + (f" in {blocks.bits} bits" if blocks.bits != held.bits else "")
        return blocks

    def scale(self, name: str, exponent: int) -> bool:
        """Multiply what a linear layer gives by 2^exponent, exactly; False where its weights cannot hold that."""
        if f"{name}.low.weight" in self.dense:
            name = f"{name}.high"
        held = self.packed.get(f"{name}.weight")
        factor = 2.0**exponent
        if held is not None:
            steps = held.steps
            if isinstance(held.grid, Product):
                scales = steps.scales.int() + 4 * exponent
                if int(scales.min()) < 0 or int(scales.max()) > 255:
                    return False
                steps = replace(steps, scales=scales.to(torch.uint8))
            elif isinstance(held.grid, Uniform):
                steps = replace(steps, scales=steps.scales * factor)
            else:
                return False
            self.packed[f"{name}.weight"] = replace(held, steps=steps)
        for part in (f"{name}.weight", f"{name}.bias"):
            if part in self.dense:
                self.dense[part] = self.dense[part].detach() * factor
        return True

    def exact(self, *names: str, rows: Tensor | None = None) -> Tensor:
        """The rows of weights, one under the other, dense, in the narrowest type that holds them."""
        value = torch.cat([self.dense[name] for name in names]) if len(names) > 1 else self.dense[names[0]]
        value = value.detach() if rows is None else picked(value.detach(), rows, 0)
        dtype = narrowest(value)
        for name in names:
            codes = f"{VALUES_OF}{self.packed[name].grid.label()})" if name in self.packed else ""
            self.effective[name] = SHORT[dtype] + codes
        return value.to(dtype)


def picked(values: Tensor, rows: Tensor, nothing: float) -> Tensor:
    """The rows of `values` of these numbers; `nothing` throughout where the number is -1."""
    found = values[rows.clamp(min=0)]
    found[rows < 0] = nothing
    return found
