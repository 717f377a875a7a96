"""The `smooth` move: weights that meet large inputs made larger before rounding, and what feeds them smaller."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from shrew.errors import UnsupportedError
from shrew.folder import Loaded
from shrew.folder.grids import Uniform, dequantize
from shrew.folder.packed import to_rows
from shrew.moves import grids
from shrew.moves.anatomy import find_layers
from shrew.moves.calibrate import Block, aliases, stages
from shrew.moves.context import Context
from shrew.moves.quantize import quantizable
from shrew.moves.seams import Seam, Side, seams
from shrew.spec import Meta, doc

DAMP = 0.01  # as in quantize
SAMPLE = 512  # rows of each weight that a choice looks at
TOLERANCE = 1e-4  # of the largest output: what folding may change in a layer by rounding in float32


@dataclass(frozen=True, kw_only=True)
class Smooth:
    """Scale input channels by how large they are, folded into norms and neighbours; the model says the same."""

    name: ClassVar[str] = "smooth"
    paper: ClassVar[str] = "Lin et al. 2023, AWQ, arXiv:2306.00978"

    bits: Annotated[int, Meta(ge=2, le=8)] = doc("bits of the quantization that will follow", 4)
    group: Annotated[int, Meta(ge=0)] = doc("its group: weights that share a scale; 0 for a whole row", 64)
    steps: Annotated[int, Meta(ge=1, le=100)] = doc("exponents between 0 and 1 that are tried", 10)

    def apply(self, loaded: Loaded, context: Context) -> Loaded:
        """Scale in place. Raises UnsupportedError without text, for packed weights and where layers cannot be told."""
        if not context.calibration:
            raise UnsupportedError("smooth needs calibration text; give a text or a task.")
        if loaded.packed:
            raise UnsupportedError("smooth goes before quantize: scaled codes would be off their grid.")
        find_layers(loaded.model)
        text = torch.from_numpy(context.calibration[0])[None]
        known: dict[int, list[Seam]] = {}
        for seam in seams(loaded.model, text):
            known.setdefault(seam.layer, []).append(seam)
        number, rounded = 0, quantizable(loaded.model)[0]
        for stage in stages(loaded, context.calibration, sequential=False, say=context.say):
            if stage.block is not None:
                statistics = {name: value for name, value in stage.statistics.items() if name in rounded}
                self._layer(loaded, context, stage.block, statistics, known.get(number, []))
                number += 1
        if not number:
            raise UnsupportedError("smooth: the layers of this model cannot be run one by one; leave the move out.")
        return loaded

    @torch.no_grad()
    def _layer(
        self, loaded: Loaded, context: Context, block: Block, statistics: dict[str, Tensor], known: list[Seam]
    ) -> None:
        shared = _shared(loaded.model)
        before = block.run(0, block.inputs[0])
        for seam in known:
            factors = self._choose(loaded.model, seam, statistics)
            if factors is None:
                continue
            held = {name: loaded.model.get_parameter(name).detach().clone() for name in seam.names}
            reason = "a weight of it serves elsewhere too" if shared & held.keys() else ""
            if not reason:
                seam.move(loaded.model, factors)
                change = (block.run(0, block.inputs[0]) - before).abs().max()
                if not change <= TOLERANCE * before.abs().max():
                    reason = "its channels meet more than the weights that are known"
                    for name, value in held.items():
                        loaded.model.get_parameter(name).copy_(value)
            if reason:
                context.say(f"smooth: {seam.what} is left as it is; {reason}")
        left = sorted(set(statistics) - {side.name for seam in known for side in seam.readers})
        if left:
            context.say(f"smooth: {', '.join(left)} left as they are; nothing known feeds them")

    def _choose(self, model: Any, seam: Seam, statistics: dict[str, Tensor]) -> Tensor | None:
        """The factors [width] or [experts, width] of least error in the readers' outputs; None where 1 is best.

        The magnitude of a channel is the root of its second moment, where the paper takes the mean of |x|.
        """
        readers = [_sampled(model, side, statistics[side.name]) for side in seam.readers if side.name in statistics]
        if not readers:
            return None
        moments = torch.stack([reader.moments if seam.experts else reader.moments.sum(0) for reader in readers])
        size = seam.gathered(moments.sum(0)).sqrt()
        size = (size / size.mean(-1, keepdim=True).clamp(min=1e-30)).clamp(min=1e-4)
        trials: list[Tensor | None] = [None]
        for step in range(1, self.steps + 1):
            factors = size ** (step / self.steps)
            trials.append(factors / (factors.amax(-1, keepdim=True) * factors.amin(-1, keepdim=True)).sqrt())
        errors = [sum(self._error(reader, None if trial is None else seam.spread(trial)) for reader in readers)
                  for trial in trials]  # fmt: skip
        return trials[errors.index(min(errors))]

    def _error(self, reader: "Reader", factors: Tensor | None) -> float:
        """What rounding a weight times `factors` [in] or [batch, in] does to its outputs."""
        rows, hessian = reader.rows, reader.hessian
        across = torch.ones(1, 1, rows.shape[-1]) if factors is None else factors.reshape(-1, 1, rows.shape[-1])
        grid = Uniform(self.bits, self.group if self.group < rows.shape[-1] else 0)
        codes, steps = grids.weighted(rows * across, reader.moments / across[:, 0].square(), grid, DAMP)
        change = dequantize(codes, steps, grid).view_as(rows) / across - rows
        return float(((change @ hessian) * change).sum()) * reader.step


@dataclass(frozen=True)
class Reader:
    """Every `step`-th row of a weight, [batch, rows, in], and its input statistics [batch, in, in]; the batch is that
    of experts."""

    rows: Tensor
    hessian: Tensor
    step: int

    @property
    def moments(self) -> Tensor:
        return self.hessian.diagonal(dim1=1, dim2=2)


def _sampled(model: Any, side: Side, hessian: Tensor) -> Reader:
    weight = model.get_parameter(side.name).detach().float()
    hessian = hessian if hessian.ndim == 3 else hessian[None]
    rows = to_rows(weight, side.axis == weight.ndim - 2).reshape(len(hessian), -1, hessian.shape[-1])
    step = max(1, -(-rows.shape[1] // SAMPLE))
    return Reader(rows[:, ::step], hessian, step)


def _shared(model: Any) -> set[str]:
    """Parameters that go by several names, under the first."""
    return {first for name, first in aliases(model).items() if name != first}
