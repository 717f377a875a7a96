"""Even grids found again in dense weights, so that what a peer rounded can be trained without leaving its grid."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from shrew.errors import UnsupportedError
from shrew.folder import Loaded
from shrew.folder.grids import Steps, Uniform, encode
from shrew.folder.packed import Packed

NEAR = 2**-6.9  # of a group's largest weight: what bf16 leaves of a weight and of the step that is told from another


def regrid(loaded: Loaded, file: Path, names: list[str], bits: int, group: int, symmetric: bool) -> Loaded:
    """The model with a peer's dense weights, those of `names` as codes. Raises UnsupportedError for weights that are
    not evenly spaced with a whole zero point, as the grid says."""
    dense, grid = load_file(file), Uniform(bits, group, symmetric)
    with torch.no_grad():
        for name, value in dense.items():
            loaded.model.get_parameter(name).copy_(value)
    for name in names:
        rows = dense[name].float()
        steps, away = find(rows, grid)
        if away:
            raise UnsupportedError(f"{name} is not on the grid {grid.label()} in {away:.1%} of its groups, so its "
                                   "format cannot be trained on here.")  # fmt: skip
        loaded.keep(name, Packed(encode(rows, steps, grid), steps, grid, tuple(rows.shape)))
    return loaded


def find(rows: Tensor, grid: Uniform) -> tuple[Steps, float]:
    """Scales (and zeros) of every group of float32 [rows, cols], and the share of groups that no scale suits.

    A group's largest weight, or its range, is a whole number of steps: the widest step that puts all others on whole
    numbers too is taken, and fitted to them."""
    blocks = rows.reshape(len(rows), -1, grid.group or rows.shape[1])
    top, span = blocks.abs().amax(2), 2**grid.bits - 1
    least, most = (-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1) if grid.symmetric else (-span, span)
    reaches = [top, -top] if grid.symmetric else [blocks.amax(2) - blocks.amin(2), top]
    scale, whole = torch.zeros_like(top), torch.zeros_like(blocks)
    for count in range(1, (-least if grid.symmetric else span) + 1):
        for reach in reaches:
            step = torch.where(reach == 0, 1, reach)[..., None] / count
            codes = (blocks / step).round()
            low, high = codes.amin(2), codes.amax(2)
            inside = (low >= least) & (high <= most) & (high - low <= span)
            near = ((codes * step - blocks).abs().amax(2) <= NEAR * top) & inside & (scale == 0)
            scale = torch.where(near, step[..., 0], scale)
            whole = torch.where(near[..., None], codes, whole)
    away = float(((scale == 0) & (top > 0)).float().mean())
    fitted = (whole * blocks).sum(2) / whole.square().sum(2).clamp(min=1)
    scale = torch.where((scale != 0) & (whole.abs().amax(2) > 0), fitted, torch.ones_like(scale))
    zeros = None if grid.symmetric else (-whole.amin(2)).clamp(0, span).to(torch.uint8)
    return Steps(scale, zeros), away
