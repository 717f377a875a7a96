"""Choosing codes: pure arithmetic from matrices to matrices, each row cut into groups with a scale of their own.

Scales are rounded as a file stores them *before* codes are chosen, so what is measured is what is saved.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from shrew.folder.blocktypes import Levels
from shrew.folder.grids import (
    COLUMN_ONE,
    ROW_ONE,
    Grid,
    Product,
    Steps,
    Uniform,
    dequantize,
    encode,
    groups,
    spread,
)
from shrew.moves.fits import levels

CHUNK = 1 << 17  # weights searched at once: few enough for a processor's cache
BLOCK = 64  # columns, at least, whose errors are spread together in gptq
PANEL = 512  # columns of statistics that are made float64 together


def fit(rows: Tensor, grid: Grid, importance: Tensor | None = None, search: bool = True) -> Steps:
    """The steps of a grid for float32 [rows, cols].

    With `search`, each group takes the clipping range of least squared error, weighted by `importance` (broadcastable
    to rows); without, the range that clips nothing.
    """
    if importance is not None:
        importance = importance.expand_as(rows)
    step, chosen = max(1, CHUNK // max(rows.shape[1], 1)), FITS[type(grid)]
    found = [
        chosen(rows[at : at + step], grid, None if importance is None else importance[at : at + step], search).parts()
        for at in range(0, len(rows), step)
    ]
    return Steps(**{name: found[0][name] if name == "columns" else torch.cat([part[name] for part in found])
                    for name in found[0]})  # fmt: skip


def _grouped(values: Tensor, grid: Grid) -> Tensor:
    """[rows, cols] -> [rows, groups, width], the last group filled up with zeros."""
    cols = values.shape[1]
    count, width = groups(cols, grid.group), grid.group or cols
    return torch.nn.functional.pad(values, (0, count * width - cols)).reshape(len(values), count, width)


def _uniform(rows: Tensor, grid: Uniform, importance: Tensor | None, search: bool) -> Steps:
    """A symmetric scale may be negative: codes reach one step further down than up, and the sign puts that step where
    the largest weight is."""
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
    return Steps(chosen, None if grid.symmetric else zero[..., 0].to(torch.uint8))


def _product(rows: Tensor, grid: Product, importance: Tensor | None, search: bool) -> Steps:
    """Columns alike, and rows with the step that just reaches their largest weight; what weights matter is for
    `moves.rate` to say."""
    largest = rows.abs().amax(1).clamp(min=1e-12) / (2 ** (grid.bits - 1) - 1)
    scales = (ROW_ONE + (4 * largest.log2()).ceil()).clamp(0, 255).to(torch.uint8)
    return Steps(scales[:, None], columns=torch.full((1, rows.shape[1]), COLUMN_ONE, dtype=torch.uint8))


# How each kind of grid finds its steps: (rows, grid, importance or None, search) -> Steps.
FITS: dict[type, Callable[..., Steps]] = {Uniform: _uniform, Product: _product, Levels: levels}


def nearest(rows: Tensor, grid: Grid, search: bool = True, importance: Tensor | None = None) -> tuple[Tensor, Steps]:
    """Round to nearest: codes and steps of float32 [rows, cols]."""
    steps = fit(rows, grid, importance, search)
    return encode(rows, steps, grid), steps


def decompose(hessian: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """What `gptq` needs of input statistics [batch, cols, cols]: the upper Cholesky factor of the inverse, and its
    diagonal's importance [batch, cols].

    Inputs that never were anything but zero get no error and give none. `damp` is a share of the mean diagonal.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    importance, mean = _importance(diagonal, damp)
    diagonal = diagonal + torch.where(diagonal <= 0, mean, torch.zeros_like(mean))
    while True:
        diagonal = diagonal + damp * mean
        matrix = hessian.clone()  # one name for all that comes of it: each is as large as the statistics
        matrix.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
        matrix, failed = torch.linalg.cholesky_ex(matrix)
        if not failed.any():
            matrix = torch.cholesky_inverse(matrix)
            matrix, failed = torch.linalg.cholesky_ex(matrix, upper=True)
            if not failed.any():
                return matrix, importance
        damp *= 10  # inputs that are nearly linear combinations of others: float32 needs more damping


def _importance(diagonal: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """How much an error in each column counts, and the mean over those that do, of second moments [batch, cols]."""
    silent = diagonal <= 0
    live = (~silent).sum(-1, keepdim=True).clamp(min=1)
    mean = diagonal.sum(-1, keepdim=True) / live
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    return torch.where(silent, damp * mean, diagonal.clone()), mean


def weighted(rows: Tensor, moments: Tensor, grid: Grid, damp: float) -> tuple[Tensor, Steps]:
    """Round rows [batch, rows, cols] to nearest, scales searched with errors weighted by the inputs' second moments
    [batch, cols]."""
    weights = _importance(moments, damp)[0][:, None].expand_as(rows)
    return nearest(rows.reshape(-1, rows.shape[-1]), grid, importance=weights.reshape(-1, rows.shape[-1]))


def gptq(rows: Tensor, upper: Tensor, importance: Tensor, grid: Grid) -> tuple[Tensor, Steps]:
    """GPTQ (Frantar et al. 2022, arXiv:2210.17323): round column after column, each error spread over the next ones.

    rows float32 [batch, rows, cols]; `upper` and `importance` from `decompose`. Returns codes uint8 and steps, each
    with [batch, rows, ...] folded into rows. The steps of a span are chosen when its first column is reached.
    """
    batch, count, cols = rows.shape
    span, group = grid.span or cols, grid.group or cols
    rest = rows.transpose(1, 2).contiguous()  # [batch, cols, rows]: a column is contiguous
    found: list[dict[str, Tensor]] = []
    pairs: list[Tensor] = []

    def at(column: int) -> list[Tensor]:
        nonlocal pairs
        if column % span == 0:
            part = rest[:, column : column + span].transpose(1, 2).reshape(batch * count, -1)
            weight = importance[:, None, column : column + span].expand(-1, count, -1).reshape(batch * count, -1)
            steps = fit(part, grid, weight)
            found.append(steps.parts())
            pairs = [item.reshape(batch, count, -1) for item in grid.effective(steps)]
        return [item[..., column % span // group] for item in pairs]

    # Every column of a span must have its errors when the span begins, so spans begin where blocks do or inside them.
    block = BLOCK if span % BLOCK == 0 or span == cols else span * max(1, BLOCK // span)
    codes = _feed_back(rest, upper, grid, block, at)
    steps = Steps(**{name: torch.cat([part[name] for part in found], dim=1) for name in found[0]})
    return codes.transpose(1, 2).reshape(batch * count, cols), steps


def gptq_ordered(
    rows: Tensor, hessian: Tensor, importance: Tensor, steps: Steps, grid: Grid, damp: float
) -> tuple[Tensor, Steps]:
    """GPTQ with the most important columns first, which then have the most columns left to take up their errors.

    `steps` were chosen for the columns as they stand, so the order costs nothing in the file ("static groups").
    """
    batch, count, cols = rows.shape
    order = importance.argsort(dim=1, descending=True, stable=True)
    across = order[:, None].expand(-1, cols, -1)
    upper, _ = decompose(hessian.gather(1, across.transpose(1, 2)).gather(2, across), damp)
    pairs = [spread(item, grid.group, cols).reshape(batch, count, -1).expand(batch, count, cols)
             .transpose(1, 2).gather(1, order[..., None].expand(-1, -1, count))
             for item in grid.effective(steps)]  # fmt: skip
    rest = rows.transpose(1, 2).gather(1, order[..., None].expand(-1, -1, count))
    found = _feed_back(rest, upper, grid, BLOCK, lambda column: [item[:, column] for item in pairs])
    codes = torch.empty_like(found).scatter_(1, order[..., None].expand(-1, -1, count), found)
    return codes.transpose(1, 2).reshape(batch * count, cols), steps


def feed_back(rows: Tensor, upper: Tensor, steps: Steps, grid: Grid) -> Tensor:
    """Codes of rows [batch, rows, cols] with error feedback on steps that are chosen already, [batch * rows, ...]."""
    batch, count, cols = rows.shape
    pairs = [spread(item, grid.group, cols).expand(batch * count, cols).reshape(batch, count, cols).transpose(1, 2)
             .contiguous() for item in grid.effective(steps)]  # fmt: skip
    rest = rows.transpose(1, 2).contiguous()
    codes = _feed_back(rest, upper, grid, BLOCK, lambda column: [item[:, column] for item in pairs])
    return codes.transpose(1, 2).reshape(batch * count, cols)


def _feed_back(
    rest: Tensor, upper: Tensor, grid: Grid, block: int, at: Callable[[int], list[Tensor]]
) -> Tensor:
    """Codes uint8 of `rest` [batch, cols, rows], which is used up; `at` gives scale and zero [batch, rows] of a column
    when it is reached."""
    batch, cols, count = rest.shape
    codes = torch.empty(batch, cols, count, dtype=torch.uint8)
    for start in range(0, cols, block):
        end = min(start + block, cols)
        errors = torch.empty(batch, end - start, count)
        for column in range(start, end):
            scale, zero = at(column)
            value = rest[:, column]
            code = grid.encode(value, scale, zero)
            codes[:, column] = code
            error = (value - grid.decode(code, scale, zero)) / upper[:, column, column, None]
            errors[:, column - start] = error
            rest[:, column + 1 : end] -= upper[:, column, column + 1 : end, None] * error[:, None]
        rest[:, end:] -= upper[:, start:end, end:].transpose(1, 2) @ errors
    return codes


def damage(rows: Tensor, codes: Tensor, steps: Steps, grid: Grid, hessian: Tensor) -> Tensor:
    """What rounding does to each row's output over the calibration text: the sum of squares, float64 [batch * rows].

    rows [batch, rows, cols], hessian [batch, cols, cols]."""
    change = (dequantize(codes, steps, grid).view_as(rows) - rows).double()
    loss = torch.zeros(rows.shape[:2], dtype=torch.float64)
    for at in range(0, rows.shape[2], PANEL):  # all statistics at once would be twice as large as they are
        part = slice(at, at + PANEL)
        loss += ((change @ hessian[..., part].double()) * change[..., part]).sum(-1)
    return loss.flatten()


def solve(rows: Tensor, hessian: Tensor, grid: Grid, damp: float) -> tuple[Tensor, Steps]:
    """Codes and steps of rows [batch, rows, cols] by error feedback under `hessian` [batch, cols, cols].

    Of each row the best of columns in their order, important columns first, and rounding to nearest, weighted and not:
    feedback is never worse than rounding."""
    best = weighted(rows, hessian.diagonal(dim1=1, dim2=2), grid, damp)
    least = damage(rows, *best, grid, hessian)
    plain = nearest(rows.flatten(0, 1), grid)
    upper, importance = decompose(hessian, damp)
    fed = gptq(rows, upper, importance, grid)
    del upper  # as large as the statistics, and ordered columns need one of their own
    ordered = gptq_ordered(rows, hessian, importance, best[1], grid, damp)
    for made in (plain, fed, ordered):
        loss = damage(rows, *made, grid, hessian)
        better, least = loss < least, torch.minimum(loss, least)
        best = pick(better, made, best)
    return best


def pick(which: Tensor, ones: tuple[Tensor, Steps], others: tuple[Tensor, Steps]) -> tuple[Tensor, Steps]:
    """Codes and steps of `ones` in the rows where `which` is true, of `others` elsewhere."""

    def chosen(one: Tensor, other: Tensor) -> Tensor:
        return torch.where(which.view(-1, *[1] * (one.ndim - 1)), one, other)

    held = others[1].parts()
    steps = Steps(**{name: chosen(value, held[name]) for name, value in ones[1].parts().items()})
    return chosen(ones[0], others[0]), steps
