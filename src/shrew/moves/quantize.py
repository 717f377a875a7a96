"""The `quantize` move: weights on a grid of 2 to 8 bits, by rounding to nearest or with GPTQ's error feedback."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shrew.errors import DataError, SpecError, UnsupportedError, nearest
from shrew.folder import Loaded
from shrew.folder.blocktypes import TYPES, Levels
from shrew.folder.grids import Grid, Steps, Uniform, dequantize
from shrew.folder.packed import Packed, to_rows
from shrew.moves import grids, rate
from shrew.moves.calibrate import Block, Stage, aliases, stages
from shrew.moves.context import Context, Progress
from shrew.moves.learned import learn
from shrew.moves.low_rank import factors
from shrew.moves.seams import fed
from shrew.moves.work import finish, finished
from shrew.spec import Meta, doc

GRIDS = (Uniform.kind, *TYPES)
SMALLEST_ROW = 16
LEAST_RATE = 0.3  # bits a weight
HEAD = "an embedding or output head; quantized only when embeddings are asked for"


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Round weights to 2 to 8 bits, with errors fed back by calibration text or not."""

    name: ClassVar[str] = "quantize"
    paper: ClassVar[str] = "Frantar et al. 2022, GPTQ, arXiv:2210.17323"

    grid: str = doc(f"values that weights may take: {', '.join(GRIDS)}", Uniform.kind)
    bits: Annotated[int, Meta(ge=2, le=8)] = doc("bits of each weight on the grid int", 4)
    group: Annotated[int, Meta(ge=0)] = doc(
        "weights that share a scale on int, nf4 and ternary: 32, 64, 128; 0 for a whole row, on int", 64
    )
    method: Literal["gptq", "rtn", "weighted", "learned"] = doc(
        "gptq spreads errors by calibration text; rtn rounds to nearest; weighted does, minding how large inputs are; "
        "learned moves gptq's codes by gradients of each layer's error (SignRound, arXiv:2309.05516), which is slow",
        "gptq",
    )
    steps: Annotated[int, Meta(ge=1)] = doc("learned: steps of descent for each layer", 200)
    sequential: bool = doc("calibrate each layer on what the rounded layers before it give", True)
    symmetric: bool = doc("no zero points on the grid int", True)
    embeddings: bool = doc("quantize embeddings and output head too", False)
    tensors: dict[str, int | str] = doc(
        "bits, or the grid, of single weights by name; 0 or 16 leaves one alone", default_factory=dict
    )
    low_rank: Annotated[int, Meta(ge=0)] = doc("rank of a correction kept beside the codes, in bf16; 0: none", 0)
    coded: bool = doc("store codes coded by their entropy: fewer bytes, slower to load, as large in memory", False)
    rate: Annotated[float, Meta(ge=0, le=8)] = doc(
        "bits a weight in the file, coded, each weight's step by what it matters; then bits and group do not count", 0.0
    )
    damp: Annotated[float, Meta(gt=0, le=1)] = doc("gptq: added to the diagonal, as a share of its mean", 0.01)

    def __post_init__(self) -> None:
        if 0 < self.group < 16:
            raise SpecError(f"quantize: group {self.group} costs more in scales than it saves; use 16 or more, or 0.")
        self._check_grid(self.grid)
        own = any(isinstance(asked, int) and asked not in (0, 16) for asked in self.tensors.values())
        if self.grid != Uniform.kind and (self.bits != 4 or not (self.symmetric or own)):
            raise SpecError(f"quantize: bits and symmetric speak of the grid int, and {self.grid} has its own; leave "
                            "them out, or choose another grid.")  # fmt: skip
        if self.rate and (self.method != "gptq" or self.grid != Uniform.kind):
            raise SpecError("quantize: a rate chooses its own grid and needs error feedback; leave grid and method as "
                            "they are, or give bits instead.")  # fmt: skip
        if self.rate and self.low_rank:
            raise SpecError("quantize: a rate counts codes alone; leave low_rank at 0, or give bits instead.")
        if 0 < self.rate < LEAST_RATE:
            raise SpecError(f"quantize: no model stands {self.rate} bits a weight; ask for {LEAST_RATE} or more.")
        for name, asked in self.tensors.items():
            if self.rate and asked not in (0, 16):
                raise SpecError(f"quantize: with a rate, '{name}' gets its bits from it; use 0 to leave it alone.")
            if isinstance(asked, str):
                self._check_grid(asked)
            elif asked not in (0, 2, 3, 4, 5, 6, 7, 8, 16):
                raise SpecError(f"quantize: {asked} bits for '{name}'; use 2 to 8, a grid, or 0 to leave it alone.")

    @property
    def light(self) -> bool:
        """Whether it works layer by layer, so that the whole model need not be in memory."""
        return not self.rate and self.method != "learned"

    def _check_grid(self, kind: str) -> None:
        if kind not in GRIDS:
            raise SpecError(f"quantize: no grid is called '{kind}'; {nearest(kind, GRIDS)}")
        sizes = TYPES[kind].groups if kind in TYPES else ()
        if len(sizes) > 1 and self.group not in sizes:
            raise SpecError(f"quantize: {kind} has groups of {', '.join(map(str, sizes))}, and not of {self.group}.")

    def _grid(self, asked: int | str, name: str, cols: int) -> Grid:
        """The grid of one weight. Raises UnsupportedError for one whose rows it does not fit."""
        if isinstance(asked, int) or asked == Uniform.kind:
            bits = asked if isinstance(asked, int) else self.bits
            return Uniform(bits, self.group if self.group < cols else 0, self.symmetric)
        sizes = TYPES[asked].groups
        grid = Levels(asked, self.group if len(sizes) > 1 else sizes[0])
        if grid.fits(cols):
            return grid
        if cols % 32:
            advice = "use int, nf4 or ternary, whose rows may have any length"
        else:
            shorter = cols // grid.span * grid.span
            narrow = f"narrow {cols} to {shorter} first, or " if shorter else ""
            advice = f"{narrow}use iq4_nl or q5_0, whose blocks are 32 (tensors = {{{name!r} = 'q5_0'}} for this one)"
        raise UnsupportedError(f"'{name}' has rows of {cols} weights, which are no whole blocks of {grid.span} as "
                               f"{asked} has them; {advice}.")  # fmt: skip

    def apply(self, loaded: Loaded, context: Context) -> Loaded:
        """Quantize in place. Parts that are finished are kept in `context.work`, where another run finds them."""
        targets = self._targets(loaded)
        if self.rate:
            self._round_to_rate(loaded, context, [target for target, _ in targets.values()])
            return loaded
        sequential = self.sequential and self.method != "weighted"
        nearby = (Stage({name}, {}) for name in targets)  # rounding to nearest looks at no text
        progress, done = Progress(context.say, "quantize", len(targets), ending=False), 0
        walk = stages(loaded, context.calibration, sequential, context.say, targets)
        for stage in nearby if self.method == "rtn" else walk:
            now = {name: target for name, target in targets.items() if name in stage.names}
            if not now:
                continue
            done += len(now)
            if made := finished(context.work, now):
                for name, item in made.items():
                    loaded.keep(name, item)
                progress.first = done  # it says nothing of how long the others take
                continue
            exact = {name: loaded.weight(name).clone() for name in now} if self.method == "learned" else {}
            self._round(loaded, context, now, stage)
            if self.method == "learned" and stage.block is not None:
                self._learn(loaded, context, now, stage.block, exact)
            finish(context.work, {name: loaded.packed[name] for name in now})
            progress(done, " weights")
        return loaded

    def _round_to_rate(self, loaded: Loaded, context: Context, targets: list[Target]) -> None:
        if not context.calibration:
            raise DataError("a rate is met by what weights matter to text; give --text or --task.")
        transposed = {target.name: target.transposed for target in targets}
        known = rate.sensitivities(loaded, context.calibration, transposed, context.seed, context.say)
        items = []
        for target in targets:
            if target.name not in known:
                context.say(f"{target.name}: no calibration text reached it, so it is left alone")
                loaded.untouched[target.name] = "no calibration text reached it"
                continue
            rows = to_rows(loaded.weight(target.name), target.transposed)
            items.append(rate.Coded(target.name, rows, known[target.name]))
        ids = torch.from_numpy(np.asarray(context.calibration[0], np.int64))[None]
        together = [{side.name for side in readers} for readers in fed(loaded.model, ids).values()]
        found = rate.round_to_rate(items, together, rate.crossings(loaded, ids), self.rate, self.damp, context.say)
        for target in targets:
            if target.name in found:
                made, shape = found[target.name], tuple(target.weight.shape)
                loaded.keep(
                    target.name, Packed(made.codes, made.steps, made.grid, shape, target.transposed, coded=True)
                )

    def _learn(
        self, loaded: Loaded, context: Context, targets: dict[str, tuple[Target, Grid]], block: Block,
        exact: dict[str, Tensor],
    ) -> None:  # fmt: skip
        packed = {name: loaded.packed[name] for name in targets}
        found, (before, after) = learn(block, packed, exact, self.steps, context.seed)
        context.say(f"{block.prefix[:-1]}: squared error {before:.3g} by gptq, {after:.3g} learned")
        for name, item in found.items():
            loaded.keep(name, item)

    def _round(
        self, loaded: Loaded, context: Context, targets: dict[str, tuple[Target, Grid]], stage: Stage
    ) -> None:
        by_input: dict[tuple[int, Grid], list[str]] = {}
        for name, (target, grid) in targets.items():
            hessian = stage.statistics.get(name)
            if hessian is None:
                if self.method != "rtn" and target.kind != "embedding":
                    context.say(f"{name}: no calibration text reached it, so it is rounded to nearest")
                rows = to_rows(loaded.weight(name), target.transposed)
                batched = rows.reshape(target.count, -1, rows.shape[-1])
                self._keep(loaded, [target], grid, batched, None, grids.nearest(rows, grid))
            elif target.kind in ("experts", "tied"):
                self._with_statistics(loaded, context, [target], grid, stage)
            else:
                by_input.setdefault((id(hessian), grid), []).append(name)
        for (_, grid), names in by_input.items():
            self._with_statistics(loaded, context, [targets[name][0] for name in names], grid, stage)

    def _targets(self, loaded: Loaded) -> dict[str, tuple[Target, Grid]]:
        """The weights to quantize with their grids; notes in `untouched` why each other one is left."""
        found, untouched = quantizable(loaded.model)
        first_names = aliases(loaded.model)
        asked: dict[str, int | str] = {}
        for name, own in self.tensors.items():
            known = first_names.get(name, name)
            if known not in found:
                reason = untouched.get(known)
                raise SpecError(f"quantize: '{name}' cannot be quantized: {reason}." if reason else
                                f"quantize: no weight is named '{name}'; {nearest(name, found)}")  # fmt: skip
            asked[known] = own
        targets: dict[str, tuple[Target, Grid]] = {}
        for name, target in found.items():
            head = target.kind in ("embedding", "tied", "head")
            own = asked.get(name, 0 if head and not self.embeddings else self.grid)
            if own in (0, 16):
                untouched[name] = "left alone on request" if name in asked else HEAD
                continue
            if name in loaded.packed:
                now = loaded.packed[name].label()
                raise UnsupportedError(f"'{name}' is already {now}; rounding it twice loses more than rounding once, "
                                       "so start from the original.")  # fmt: skip
            rows, cols = target.weight.shape[-2:][:: -1 if target.transposed else 1]
            if self.low_rank * (rows + cols) >= rows * cols:
                most = (rows * cols - 1) // (rows + cols)
                raise SpecError(f"quantize: a correction of rank {self.low_rank} is as large as '{name}' itself "
                                f"({rows} x {cols}); use low_rank = {most} at most.")  # fmt: skip
            targets[name] = target, self._grid(own, name, cols)
        loaded.untouched |= untouched
        for name in targets:
            loaded.untouched.pop(name, None)
        return targets

    def _with_statistics(
        self, loaded: Loaded, context: Context, targets: list[Target], grid: Grid, stage: Stage
    ) -> None:
        """Weights that see the same input; their rows are independent, so they go in one call."""
        hessian = stage.statistics[targets[0].name]
        if targets[0].kind == "tied":
            # Rows are also looked up as embeddings, where each weight's error counts alike: a second, round quadratic.
            hessian = hessian / hessian.diagonal().mean().clamp(min=1e-30) + torch.eye(len(hessian))
        batched = hessian if hessian.ndim == 3 else hessian[None]
        silent = (batched.diagonal(dim1=-2, dim2=-1).sum(-1) <= 0).nonzero()[:, 0].tolist()
        if silent and len(targets) == 1 and targets[0].kind == "experts":
            numbers = ", ".join(map(str, silent))
            context.say(f"{targets[0].name}: no text reached experts {numbers}, so they are rounded to nearest")
        parts = [to_rows(loaded.weight(target.name), target.transposed) for target in targets]
        rows = torch.cat(parts).reshape(len(batched), -1, batched.shape[-1])
        if (correction := stage.corrections.get(targets[0].name)) is not None:
            rows = rows @ correction
        if self.method == "weighted":
            made = grids.weighted(rows, batched.diagonal(dim1=1, dim2=2), grid, self.damp)
        else:
            made = grids.solve(rows, batched, grid, self.damp)
        self._keep(loaded, targets, grid, rows, batched, made)

    def _keep(
        self, loaded: Loaded, targets: list[Target], grid: Grid, rows: Tensor, hessian: Tensor | None,
        made: tuple[Tensor, Steps],
    ) -> None:  # fmt: skip
        """Give each target its codes, and the correction of what they lack of `rows` [batch, rows, cols]."""
        (codes, steps), first = made, 0
        for target in targets:
            own = slice(first, first + target.weight.numel() // codes.shape[1])
            first, low = own.stop, None
            shape = tuple(target.weight.shape)
            packed = Packed(codes[own], steps.rows(own), grid, shape, target.transposed, coded=self.coded)
            if self.low_rank:
                wanted = rows.reshape(-1, rows.shape[-1])[own]
                error = wanted - dequantize(packed.codes, packed.steps, grid)
                low = factors(error.reshape(target.count, -1, rows.shape[-1]), hessian, self.low_rank, self.damp)
            loaded.keep(target.name, replace(packed, low=low))


@dataclass(frozen=True)
class Target:
    """One weight that can be quantized. `transposed`: its last dimension is the output (Conv1D, some experts)."""

    name: str
    weight: nn.Parameter
    kind: Literal["linear", "experts", "embedding", "head", "tied"]
    transposed: bool

    @property
    def count(self) -> int:
        """Matrices in it: of experts, how many."""
        return len(self.weight) if self.weight.ndim == 3 else 1


def quantizable(model: Any) -> tuple[dict[str, Target], dict[str, str]]:
    """The weights of a model that can be quantized, and the reason for each that cannot, by parameter name."""
    head = model.get_output_embeddings()
    head_weight = head.weight if head is not None else None
    lookups = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found: dict[str, Target] = {}
    reasons: dict[str, str] = {}
    for name, weight in model.named_parameters():
        owner_name, _, own = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        reason = _obstacle(model, owner_name, owner, own, weight)
        if reason:
            reasons[name] = reason
            continue
        kind: Literal["linear", "experts", "embedding", "head", "tied"] = "linear"
        if id(weight) in lookups:
            kind = "tied" if weight is head_weight else "embedding"
        elif weight is head_weight:
            kind = "head"
        elif weight.ndim == 3:
            kind = "experts"
        transposed = isinstance(owner, Conv1D) or (kind == "experts" and bool(getattr(owner, "is_transposed", False)))
        found[name] = Target(name, weight, kind, transposed)
    return found, reasons


def _obstacle(model: Any, owner_name: str, owner: nn.Module, own: str, weight: nn.Parameter) -> str:
    """Why a parameter is not to be quantized; empty when it can be."""
    kind, last = type(owner).__name__, owner_name.rpartition(".")[2]
    experts = weight.ndim == 3 and "expert" in kind.lower()
    if weight.ndim < 2:
        return "one-dimensional (a norm, a bias, a gain or a decay)"
    if "router" in f"{kind} {owner_name}".lower() or last in ("gate", "shared_gate", "shared_expert_gate"):
        return "a router, which decides where tokens go; small and sensitive"
    if isinstance(owner, nn.Conv1d) or "conv" in own:
        return "taps of a convolution; few, and each for one channel alone"
    if not experts and (own != "weight" or not isinstance(owner, (nn.Linear, nn.Embedding, Conv1D))):
        return f"a parameter of {kind}, which is neither a linear layer, an embedding nor experts"
    labels = getattr(model.config, "num_labels", 0)
    if "ForSequenceClassification" in type(model).__name__ and isinstance(owner, nn.Linear) and len(weight) == labels:
        return "the layer that decides the label; small and sensitive"
    if min(weight.shape[-2:]) < SMALLEST_ROW and not isinstance(owner, nn.Embedding):
        return f"too small ({' x '.join(map(str, weight.shape))}): scales would eat the gain"
    return ""
