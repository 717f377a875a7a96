"""Steps for grids by a table of levels: weighted least squares, alternately over scales, minima and codes.

Every trial is rounded as a file stores it and then judged by the codes it leads to, so the best of them is the best of
what can be saved. K types add the codes of scales and minima, and the two floats that those are multiples of.
"""

from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from shrew.folder.blocktypes import Levels, power
from shrew.folder.grids import Steps

# How far the range of a group is cut (1: nothing clips) where the best cut is searched, by the bits of a code; a wider
# one moves where codes fall, and may be better too.
CUTS = {2: (0.3, 1.1), 3: (0.5, 1.1), 4: (0.7, 1.05), 5: (0.75, 1.05), 6: (0.85, 1.02), 8: (0.96, 1.005)}
TRIALS = 8  # cuts
SHARES = (0.0, 0.5, 1.0)  # of what is cut off, at the lower end, where a group has a minimum
STARTS = (1.0, 0.9, 1.1)  # times the float of a super-block that lets its largest scale have the largest code
NEARBY = (0, -1, 1, -2, 2)  # codes of scales and minima that are tried around the best ones
ROUNDS = 3  # of codes, scales and super-blocks after one another
LARGEST = 65504.0  # of 16-bit floats


@dataclass
class Best:
    """The parts with the least loss that were offered, one choice for each entry of the loss."""

    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)

    def offer(self, loss: Tensor, **parts: Tensor) -> None:
        better = loss < self.loss
        for name, value in parts.items():
            held = self.parts.get(name, value)
            which = better.reshape(*better.shape, *[1] * (value.ndim - better.ndim))
            self.parts[name] = torch.where(which, value, held)
        self.loss = torch.where(better, loss, self.loss)


@dataclass(frozen=True)
class Groups:
    """Weights [..., groups, width] with the importance of each, and sums over a group of what codes stand for."""

    grid: Levels
    values: Tensor
    weights: Tensor

    def levels(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest levels, and the loss of every group that they leave."""
        one, nothing = torch.ones(()), torch.zeros(())
        codes = self.grid.encode(self.values, scale[..., None], zero[..., None])
        level = self.grid.decode(codes, one, nothing)
        error = level * scale[..., None] - zero[..., None] - self.values
        return level, (error.square_() * self.weights).sum(-1)

    def sums(self, level: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Weighted sums of level², level, 1, level * value and value: all that a quadratic loss needs."""
        weighted = level * self.weights
        return ((weighted * level).sum(-1), weighted.sum(-1), self.weights.sum(-1), (weighted * self.values).sum(-1),
                (self.values * self.weights).sum(-1))  # fmt: skip

    def solve(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero of least squares for these levels, of every group."""
        return _solved(self.grid, *self.sums(level))


def _solved(grid: Levels, a: Tensor, b: Tensor, c: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    alone = _ratio(p, a)
    if not grid.table.mins:
        return alone, torch.zeros_like(alone)
    scale, zero = _pair(a, b, c, p, q)
    if grid.table.per:  # minima of K types are never above zero
        scale, zero = torch.where(zero < 0, alone, scale), zero.clamp(min=0)
    return scale, zero


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, torch.zeros_like(below))


def _pair(a: Tensor, b: Tensor, c: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and zero that make a s² - 2 b s z + c z² - 2 p s + 2 q z least; the scale alone where they are one."""
    size = a * c - b * b
    plain = size <= 1e-6 * a * c
    size = torch.where(plain, torch.ones_like(size), size)
    scale = torch.where(plain, _ratio(p, a), (p * c - b * q) / size)
    return scale, torch.where(plain, torch.zeros_like(size), (b * p - a * q) / size)


def levels(rows: Tensor, grid: Levels, importance: Tensor | None, search: bool) -> Steps:
    """The steps of float32 rows [rows, cols] that are whole blocks, or that end in a shorter group."""
    cols = rows.shape[1]
    count = -(-cols // grid.group)

    def grouped(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (0, count * grid.group - cols)).reshape(len(rows), count, grid.group)

    groups = Groups(grid, grouped(rows), grouped(torch.ones_like(rows) if importance is None else importance))
    if grid.table.scale == "e8m0":
        return _powers(groups, search)
    best = _ranges(groups, search)
    if grid.table.per:
        return _supers(groups, best, search)
    scale, zero = _stored(grid, best["scale"]), best["zero"]
    return Steps(scale, _stored(grid, -zero) if grid.table.mins else None)


def _stored(grid: Levels, value: Tensor) -> Tensor:
    if grid.table.scale == "bf16":
        return value.bfloat16()
    return value.clamp(-LARGEST, LARGEST).half()


def _powers(groups: Groups, search: bool) -> Steps:
    """Exponents: the largest weight at the highest level, or one to either side (OCP MX leaves the choice free)."""
    largest = groups.values.abs().amax(-1)
    exact = torch.frexp(largest / max(groups.grid.table.levels)).exponent + 128
    best = Best(torch.full_like(largest, torch.inf))
    for step in (0, -1, 1) if search else (0,):
        exponent = torch.where(largest > 0, exact + step, 0).clamp(0, 254).to(torch.uint8)
        best.offer(groups.levels(power(exponent), torch.zeros_like(largest))[1], exponent=exponent)
    return Steps(best.parts["exponent"])


def _ranges(groups: Groups, search: bool) -> dict[str, Tensor]:
    """Scale and zero of every group alone, float32; as stored where nothing comes after."""
    grid, values = groups.grid, groups.values
    table = grid.table
    low, high = values.amin(-1), values.amax(-1)
    best = Best(torch.full_like(low, torch.inf))

    def offer(scale: Tensor, zero: Tensor) -> Tensor:
        if not table.per:
            scale, zero = _stored(grid, scale).float(), _stored(grid, zero).float()
        level, loss = groups.levels(scale, zero)
        best.offer(loss, scale=scale, zero=zero)
        return level

    first, last = CUTS[table.bits]
    cuts = [1.0, *torch.linspace(first, last, TRIALS).tolist()] if search else [1.0]
    if table.mins:
        low, high = (low.clamp(max=0), high.clamp(min=0)) if table.per else (low, high)
        for cut in cuts:
            for share in SHARES if search else SHARES[:1]:
                bottom = low + (high - low) * (1 - cut) * share
                bottom = bottom.clamp(max=0) if table.per else bottom
                level = offer((high - low) * cut / table.levels[-1], -bottom)
                if search:
                    offer(*groups.solve(level))
    else:
        least, most = min(table.levels), max(table.levels)
        upright, turned = torch.maximum(high / most, low / least), torch.minimum(high / least, low / most)
        if not search:
            upright = torch.where(-turned < upright, turned, upright)
        for cut in cuts:
            for unit in (upright, turned) if search and least != -most else (upright,):
                level = offer(unit * cut, torch.zeros_like(unit))
                if search:
                    offer(*groups.solve(level))
    for _ in range(ROUNDS if search else 0):
        level, _ = groups.levels(best.parts["scale"], best.parts["zero"])
        offer(*groups.solve(level))
    return best.parts


def _supers(groups: Groups, start: dict[str, Tensor], search: bool) -> Steps:
    """K types: scales and zeros of groups as codes times the floats of their super-block, all chosen together."""
    grid, table, count = groups.grid, groups.grid.table, len(groups.values)
    fold = (count, -1, table.per)
    inner = Groups(grid, groups.values.reshape(*fold, grid.group), groups.weights.reshape(*fold, grid.group))
    scale, zero = start["scale"].reshape(fold), start["zero"].reshape(fold)
    lowest, highest = -table.middle, 2**table.scale_bits - 1 - table.middle
    best = Best(torch.full(scale.shape[:2], torch.inf))

    def coded(value: Tensor, unit: Tensor) -> Tensor:
        safe = torch.where(unit == 0, torch.ones_like(unit), unit)[..., None]
        return torch.where(unit[..., None] == 0, 0.0, (value / safe).round()).clamp_(lowest, highest)

    def offer(d: Tensor, m: Tensor, u: Tensor, v: Tensor) -> Tensor:
        level, loss = inner.levels(d[..., None] * u, m[..., None] * v)
        best.offer(loss.sum(-1), d=d, m=m, u=u, v=v)
        return level

    def half(value: Tensor) -> Tensor:
        return value.clamp(-LARGEST, LARGEST).half().float()

    def refitted(level: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c, p, q = inner.sums(level)
        if not table.mins:
            return half(_ratio((p * u).sum(2), (a * u * u).sum(2))), torch.zeros_like(u[..., 0])
        d, m = _pair((a * u * u).sum(2), (b * u * v).sum(2), (c * v * v).sum(2), (p * u).sum(2), (q * v).sum(2))
        return half(d), half(m)

    # A code reaches one further down than up where it has a sign.
    unit = scale.gather(2, scale.abs().argmax(2, keepdim=True))[..., 0] / (lowest or highest)
    for start_at in STARTS if search else (1.0,):
        d, m = half(unit * start_at), half(zero.amax(2) / highest)
        u, v = coded(scale, d), coded(zero, m)
        level = offer(d, m, u, v)
        for _ in range(ROUNDS if search else 0):
            d, m = refitted(level, u, v)
            a, b, c, p, q = inner.sums(level)
            centre, near = coded(_solved(grid, a, b, c, p, q)[0], d), Best(torch.full_like(scale, torch.inf))
            for step in (0, -1, 1) if table.mins else (0,):  # by the quadratic loss of these levels
                u = (centre + step).clamp(lowest, highest)
                s = u * d[..., None]
                v = coded(_ratio(b * s - q, c), m)
                z = v * m[..., None]
                near.offer(a * s * s - 2 * b * s * z + c * z * z - 2 * p * s + 2 * q * z, u=u, v=v)
            u, v = near.parts["u"], near.parts["v"]
            level = offer(d, m, u, v)
    if search:
        d, m, u0, v0 = (best.parts[name] for name in "dmuv")
        near = Best(torch.full_like(scale, torch.inf))
        for one, other in product(NEARBY, NEARBY if table.mins else (0,)):  # by the levels that each pair leads to
            u, v = (u0 + one).clamp(lowest, highest), (v0 + other).clamp(lowest, highest)
            level, loss = inner.levels(d[..., None] * u, m[..., None] * v)
            near.offer(loss, u=u, v=v, level=level)
        u, v, level = (near.parts[name] for name in ("u", "v", "level"))
        best.offer(near.loss.sum(-1), d=d, m=m, u=u, v=v)
        offer(*refitted(level, u, v), u, v)
    parts = best.parts
    codes = [(parts[name] + table.middle).flatten(1).to(torch.uint8) for name in "uv"]
    supers = torch.stack([parts["d"], parts["m"]][: 1 + table.mins], -1).half()
    return Steps(codes[0], codes[1] if table.mins else None, supers)
