"""Choosing codes: pure arithmetic from matrices to matrices, each row cut into groups with a scale of their own.

Scales are rounded to bf16, as a file stores them, *before* codes are chosen, so what is measured is what is saved.
"""

import torch
from torch import Tensor

from shrew.folder.packed import Grid, dequantize

__all__ = ["Grid", "decompose", "dequantize", "encode", "fit", "gptq", "nearest"]

CHUNK = 1 << 22  # weights searched at once; bounds memory
BLOCK = 64  # columns, at least, whose errors are spread together in gptq


def fit(
    rows: Tensor, grid: Grid, importance: Tensor | None = None, search: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Scales bf16 [rows, groups] and zero points uint8 [rows, groups] (None when symmetric) for float32 [rows, cols].

    With `search`, each group takes the clipping range of least squared error, weighted by `importance` (broadcastable
    to rows); without, the range that clips nothing. A symmetric scale may be negative: codes reach one step further
    down than up, and the sign puts that step where the largest weight is.
    """
    if importance is not None:
        importance = importance.expand_as(rows)
    step = max(1, CHUNK // max(rows.shape[1], 1))
    parts = [
        _fit(rows[at : at + step], grid, None if importance is None else importance[at : at + step], search)
        for at in range(0, len(rows), step)
    ]
    return torch.cat([scale for scale, _ in parts]), None if grid.symmetric else torch.cat([zero for _, zero in parts])


def _grouped(values: Tensor, grid: Grid) -> Tensor:
    """[rows, cols] -> [rows, groups, width], the last group filled up with zeros."""
    cols = values.shape[1]
    groups, width = grid.groups(cols), grid.group or cols
    return torch.nn.functional.pad(values, (0, groups * width - cols)).reshape(len(values), groups, width)


def _fit(rows: Tensor, grid: Grid, importance: Tensor | None, search: bool) -> tuple[Tensor, Tensor]:
    values = _grouped(rows, grid)
    weights = None if importance is None else _grouped(importance, grid)
    top_code, half = 2**grid.bits - 1, 2 ** (grid.bits - 1)
    if grid.symmetric:
        zero = torch.full(values.shape[:2], float(half)).unsqueeze(2)
        largest = values.gather(2, values.abs().argmax(2, keepdim=True))
        # At ratio 1 the largest weight is exactly the lowest code.
        unit = -largest / half
        widest = half / (half - 1)
        ratios = torch.linspace(0.5, widest, 14).tolist() if grid.bits <= 4 else torch.linspace(0.85, 1, 6).tolist()
        signs = (1.0, -1.0) if grid.bits <= 4 else (1.0,)
        trials = [ratio * sign for ratio in ratios for sign in signs] if search else [1.0]
    else:
        low, high = values.amin(2, keepdim=True).clamp(max=0), values.amax(2, keepdim=True).clamp(min=0)
        unit = (high - low) / top_code
        zero = (-low / unit).nan_to_num(0.0).round().clamp(0, top_code)
        trials = torch.linspace(0.5, 1, 11).tolist() if search else [1.0]
    best = torch.full(values.shape[:2], torch.inf)
    chosen = torch.ones(values.shape[:2], dtype=torch.bfloat16)
    for trial in trials:
        scale = (unit * trial).bfloat16()
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        wide = scale.float()
        error = (((values / wide).round() + zero).clamp_(0, top_code) - zero).mul_(wide).sub_(values).square_()
        loss = (error if weights is None else error.mul_(weights)).sum(2)
        better = loss < best
        best = torch.where(better, loss, best)
        chosen = torch.where(better, scale[..., 0], chosen)
    return chosen, zero[..., 0].to(torch.uint8)


def encode(rows: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid) -> Tensor:
    """The nearest code of every weight: uint8 [rows, cols], half-way cases to even."""
    values = _grouped(rows, grid)
    zero = 2.0 ** (grid.bits - 1) if zeros is None else zeros.float().unsqueeze(2)
    codes = ((values / scales.float().unsqueeze(2)).round() + zero).clamp_(0, 2**grid.bits - 1)
    return codes.to(torch.uint8).flatten(1)[:, : rows.shape[1]].contiguous()


def nearest(rows: Tensor, grid: Grid, search: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round to nearest: (codes, scales, zeros) of float32 [rows, cols]."""
    scales, zeros = fit(rows, grid, search=search)
    return encode(rows, scales, zeros, grid), scales, zeros


def decompose(hessian: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """What `gptq` needs of input statistics [batch, cols, cols]: the upper Cholesky factor of the inverse, and its
    diagonal's importance [batch, cols].

    Inputs that never were anything but zero get no error and give none. `damp` is a share of the mean diagonal.
    """
    matrix = hessian.clone()
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    silent = diagonal <= 0
    live = (~silent).sum(-1, keepdim=True).clamp(min=1)
    mean = diagonal.sum(-1, keepdim=True) / live
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    importance = torch.where(silent, damp * mean, diagonal.clone())
    diagonal += torch.where(silent, mean, torch.zeros_like(mean))
    while True:
        diagonal += damp * mean
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed.any():
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed.any():
                return upper, importance
        damp *= 10  # inputs that are nearly linear combinations of others: float32 needs more damping


def gptq(rows: Tensor, upper: Tensor, importance: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
    """GPTQ (Frantar et al. 2022, arXiv:2210.17323): round column after column, each error spread over the next ones.

    rows float32 [batch, rows, cols]; `upper` and `importance` from `decompose`. Returns codes uint8, scales bf16 and
    zeros, each with [batch, rows, ...] folded into rows. A group's scale is chosen when its first column is reached.
    """
    batch, count, cols = rows.shape
    width = grid.group or cols
    rest = rows.transpose(1, 2).contiguous()  # [batch, cols, rows]: a column is contiguous
    codes = torch.empty(batch, cols, count, dtype=torch.uint8)
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    middle = torch.full((batch, count), 2.0 ** (grid.bits - 1))
    scale, zero = torch.ones(batch, count), middle
    top_code = 2**grid.bits - 1
    block = width * max(1, BLOCK // width) if grid.group else BLOCK  # groups start where blocks do or inside them
    for start in range(0, cols, block):
        end = min(start + block, cols)
        errors = torch.empty(batch, end - start, count)
        for column in range(start, end):
            if column % width == 0:
                group = rest[:, column : column + width].transpose(1, 2).reshape(batch * count, -1)
                weight = importance[:, None, column : column + width].expand(-1, count, -1).reshape(batch * count, -1)
                new_scale, new_zero = fit(group, Grid(grid.bits, 0, grid.symmetric), weight)
                scales.append(new_scale)
                scale = new_scale.float().reshape(batch, count)
                if new_zero is not None:
                    zeros.append(new_zero)
                    zero = new_zero.float().reshape(batch, count)
            value = rest[:, column]
            code = ((value / scale).round_() + zero).clamp_(0, top_code)
            codes[:, column] = code
            error = (value - (code - zero) * scale) / upper[:, column, column, None]
            errors[:, column - start] = error
            rest[:, column + 1 : end] -= upper[:, column, column + 1 : end, None] * error[:, None]
        rest[:, end:] -= upper[:, start:end, end:].transpose(1, 2) @ errors
    return (
        codes.transpose(1, 2).reshape(batch * count, cols),
        torch.cat(scales, dim=1),
        torch.cat(zeros, dim=1) if zeros else None,
    )
