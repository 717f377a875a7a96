"""Codes of a model's weights taken to where another form of the same model has those weights, or to another grid."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from shrew.errors import UnsupportedError
from shrew.folder.blocktypes import Levels
from shrew.folder.grids import Steps, Uniform
from shrew.folder.packed import Packed, from_rows, to_rows

Tensors = dict[str, Tensor]


def refuse_corrections(packed: Mapping[str, Packed], form: str) -> None:
    """Raise UnsupportedError for weights with a low-rank correction, which no form but a model folder holds."""
    if corrected := [name for name, item in packed.items() if item.rank]:
        raise UnsupportedError(
            f"{form} holds no low-rank corrections, and {len(corrected)} weights have one ({corrected[0]}, ...); "
            "quantize the original with low_rank = 0."
        )


def carry(
    packed: Mapping[str, Packed], weights: Mapping[str, Tensor], move: Callable[[Tensors], Tensors]
) -> dict[str, Packed]:
    """The codes under the names that `move` gives the weights; without those whose rows do not stay whole.

    `move` takes one tensor in the shape of every weight. It is given the numbers of their rows, so that whatever it
    splits, joins or sorts, each row of what comes out says which row of codes it is.
    """
    first, sources, numbers = 0, [], {}
    for name, value in weights.items():
        numbers[name] = torch.full((), -1.0, dtype=torch.float64).expand(value.shape)
        if (item := packed.get(name)) is not None:
            rows, cols = item.codes.shape
            each = torch.arange(first, first + rows, dtype=torch.float64)[:, None].expand(rows, cols)
            numbers[name] = from_rows(each, item.shape, item.transposed)
            sources.append((first, item))
            first += rows
    found = {name: _taken(to_rows(value, False), tuple(value.shape), sources)
             for name, value in move(numbers).items() if value.ndim > 1}  # fmt: skip
    return {name: item for name, item in found.items() if item is not None}


def _taken(numbers: Tensor, shape: tuple[int, ...], sources: list[tuple[int, Packed]]) -> Packed | None:
    """The codes of these rows [rows, cols], each number constant along its row."""
    if not sources or bool((numbers[:, :1] < 0).any()) or bool((numbers != numbers[:, :1]).any()):
        return None
    rows = numbers[:, 0].long()
    parts = []
    for first, packed in sources:
        here = (rows >= first) & (rows < first + len(packed.codes))
        if here.any():
            parts.append((here, rows[here] - first, packed))
    kinds = {(packed.grid, packed.codes.shape[1], packed.steps.scales.dtype) for _, _, packed in parts}
    if len(kinds) > 1 or parts[0][2].codes.shape[1] != shape[-1]:
        return None

    def gathered(values: list[Tensor]) -> Tensor:
        if len(parts) == 1:
            return torch.as_tensor(values[0][parts[0][1]])
        joined = values[0].new_empty(len(rows), *values[0].shape[1:])
        for (here, at, _), value in zip(parts, values, strict=True):
            joined[here] = value[at]
        return torch.as_tensor(joined)

    held = [packed.steps.parts() for _, _, packed in parts]
    steps = Steps(**{name: gathered([one[name] for one in held]) for name in held[0]})
    return Packed(gathered([packed.codes for _, _, packed in parts]), steps, parts[0][2].grid, shape)


def as_uniform(packed: Packed) -> Packed | None:
    """The same values on an integer grid, whose scales may be wider floats; None where there is none."""
    grid, steps = packed.grid, packed.steps
    if isinstance(grid, Uniform):
        return packed
    if not isinstance(grid, Levels) or any(level != int(level) for level in grid.table.levels):
        return None
    scale, zero = grid.effective(steps)
    least, most = int(min(grid.table.levels)), int(max(grid.table.levels))
    level = grid.decode(packed.codes.float(), torch.ones(()), torch.zeros(()))
    if steps.zeros is None:
        bits, zeros = next(bits for bits in range(2, 9) if -(2 ** (bits - 1)) <= least and most < 2 ** (bits - 1)), None
        level += 2 ** (bits - 1)
    else:
        bits, zeros = grid.bits, torch.where(scale == 0, torch.zeros_like(zero), zero / scale)
        if not torch.equal(zeros, zeros.round().clamp(0, 2**bits - 1)):
            return None
        zeros = zeros.to(torch.uint8)
    kept = steps.scales.dtype if steps.scales.is_floating_point() else torch.bfloat16  # holds any power of two
    same = Uniform(bits, grid.group, zeros is None)
    found = Packed(level.to(torch.uint8), Steps(scale.to(kept if steps.supers is None else torch.float32), zeros), same,
                   packed.shape, packed.transposed)  # fmt: skip
    return found if torch.equal(found.dense(), packed.dense()) else None
