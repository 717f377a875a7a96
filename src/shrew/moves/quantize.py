"""The `quantize` move: weights on a grid of 2 to 8 bits, by rounding to nearest or with GPTQ's error feedback.

Rows are independent of each other, so of every row the better one of the two is kept, by the error that it leaves in
the layer's output on calibration text: feedback is never worse than rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shrew.errors import SpecError, UnsupportedError, nearest
from shrew.folder import Loaded
from shrew.folder.blocktypes import TYPES, Levels
from shrew.folder.grids import KINDS, Grid, Steps, Uniform
from shrew.folder.packed import Packed, to_rows
from shrew.moves import grids
from shrew.spec import Meta, doc

if TYPE_CHECKING:
    from shrew.moves.context import Context

SMALLEST_ROW = 16
HEAD = "an embedding or output head; quantized only when embeddings are asked for"


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Round weights to 2 to 8 bits, with errors fed back by calibration text or not."""

    name: ClassVar[str] = "quantize"
    paper: ClassVar[str] = "Frantar et al. 2022, GPTQ, arXiv:2210.17323"

    grid: str = doc(f"values that weights may take: {', '.join(KINDS)}", Uniform.kind)
    bits: Annotated[int, Meta(ge=2, le=8)] = doc("bits of each weight on the grid int", 4)
    group: Annotated[int, Meta(ge=0)] = doc(
        "weights that share a scale on int, nf4 and ternary: 32, 64, 128; 0 for a whole row, on int", 64
    )
    method: Literal["gptq", "rtn"] = doc("gptq spreads errors by calibration text; rtn rounds to nearest", "gptq")
    symmetric: bool = doc("no zero points on the grid int", True)
    embeddings: bool = doc("quantize embeddings and output head too", False)
    tensors: dict[str, int | str] = doc(
        "bits, or the grid, of single weights by name; 0 or 16 leaves one alone", default_factory=dict
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
        for name, asked in self.tensors.items():
            if isinstance(asked, str):
                self._check_grid(asked)
            elif asked not in (0, 2, 3, 4, 5, 6, 7, 8, 16):
                raise SpecError(f"quantize: {asked} bits for '{name}'; use 2 to 8, a grid, or 0 to leave it alone.")

    def _check_grid(self, kind: str) -> None:
        if kind not in KINDS:
            raise SpecError(f"quantize: no grid is called '{kind}'; {nearest(kind, KINDS)}")
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
        """Quantize in place."""
        targets = self._targets(loaded)
        statistics = hessians(loaded, context.calibration) if self.method == "gptq" else {}
        by_input: dict[tuple[int, Grid], list[str]] = {}
        for name, (target, grid) in targets.items():
            hessian = statistics.get(name)
            if self.method == "rtn" or hessian is None:
                if self.method == "gptq" and target.kind != "embedding":
                    context.say(f"{name}: no calibration text reached it, so it is rounded to nearest")
                rows = to_rows(target.weight.detach().float(), target.transposed)
                _keep(loaded, target, grid, *grids.nearest(rows, grid))
            elif target.kind in ("experts", "tied"):
                self._with_feedback(loaded, context, [target], grid, hessian)
            else:
                by_input.setdefault((id(hessian), grid), []).append(name)
        for (_, grid), names in by_input.items():
            self._with_feedback(loaded, context, [targets[name][0] for name in names], grid, statistics[names[0]])
        return loaded

    def _targets(self, loaded: Loaded) -> dict[str, tuple[Target, Grid]]:
        """The weights to quantize with their grids; notes in `untouched` why each other one is left."""
        found, untouched = quantizable(loaded.model)
        aliases = _aliases(loaded.model)
        asked: dict[str, int | str] = {}
        for name, own in self.tensors.items():
            known = aliases.get(name, name)
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
                now = loaded.packed[name].grid.label()
                raise UnsupportedError(f"'{name}' is already {now}; rounding it twice loses more than rounding once, "
                                       "so start from the original.")  # fmt: skip
            cols = target.weight.shape[-2 if target.transposed else -1]
            targets[name] = target, self._grid(own, name, cols)
        loaded.untouched |= untouched
        for name in targets:
            loaded.untouched.pop(name, None)
        return targets

    def _with_feedback(
        self, loaded: Loaded, context: Context, targets: list[Target], grid: Grid, hessian: Tensor
    ) -> None:
        """GPTQ on weights that see the same input; their rows are independent, so they go in one call."""
        if targets[0].kind == "tied":
            # Rows are also looked up as embeddings, where each weight's error counts alike: a second, round quadratic.
            hessian = hessian / hessian.diagonal().mean().clamp(min=1e-30) + torch.eye(len(hessian))
        batched = hessian if hessian.ndim == 3 else hessian[None]
        silent = (batched.diagonal(dim1=-2, dim2=-1).sum(-1) <= 0).nonzero()[:, 0].tolist()
        if silent and len(targets) == 1 and targets[0].kind == "experts":
            numbers = ", ".join(map(str, silent))
            context.say(f"{targets[0].name}: no text reached experts {numbers}, so they are rounded to nearest")
        parts = [to_rows(target.weight.detach().float(), target.transposed) for target in targets]
        rows = torch.cat(parts).reshape(len(batched), -1, batched.shape[-1])
        feedback = grids.gptq(rows, *grids.decompose(batched, self.damp), grid)
        codes, steps = grids.better(rows, batched, grid, feedback, grids.nearest(rows.flatten(0, 1), grid))
        first = 0
        for target, part in zip(targets, parts, strict=True):
            own = slice(first, first + len(part))
            _keep(loaded, target, grid, codes[own], steps.rows(own))
            first += len(part)


def _keep(loaded: Loaded, target: Target, grid: Grid, codes: Tensor, steps: Steps) -> None:
    packed = Packed(codes, steps, grid, tuple(target.weight.shape), target.transposed)
    loaded.packed[target.name] = packed
    with torch.no_grad():
        target.weight.copy_(packed.dense())


@dataclass(frozen=True)
class Target:
    """One weight that can be quantized. `transposed`: its last dimension is the output (Conv1D, some experts)."""

    name: str
    weight: nn.Parameter
    kind: Literal["linear", "experts", "embedding", "head", "tied"]
    transposed: bool


def _aliases(model: Any) -> dict[str, str]:
    """Every name of a tied weight -> the name that `named_parameters` gives it."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}


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


class _Sums:
    """Sums of x xᵀ over everything that reaches a module; modules fed the same tensor share one sum."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.leader: dict[str, str] = {}
        self._last: tuple[Tensor | None, str] = (None, "")

    def linear(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            value, leader = self._last
            if name not in self.leader:
                self.leader[name] = leader if inputs[0] is value else name
            if self.leader[name] == name:
                self._last = (inputs[0], name)
                rows = inputs[0].detach().float().reshape(-1, inputs[0].shape[-1])
                self._add(name, rows)

        return hook

    def experts(self, name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        """For fused experts called with (hidden states [T, d], chosen experts [T, k], ...)."""

        def hook(module: Any, inputs: tuple[Any, ...]) -> None:
            hidden, chosen = inputs[0].detach().float(), inputs[1]
            for part, size in (("gate_up_proj", hidden.shape[-1]), ("down_proj", module.down_proj.shape[-1])):
                full = f"{name}.{part}"
                self.leader[full] = full
                self.sums.setdefault(full, torch.zeros(len(module.down_proj), size, size))
            for expert in chosen.unique().tolist():
                if expert >= len(module.down_proj):
                    continue  # the number after the last expert means "none"
                rows = hidden[(chosen == expert).any(-1)]
                inner = module._apply_gate(nn.functional.linear(rows, module.gate_up_proj[expert]))
                self.sums[f"{name}.gate_up_proj"][expert] += rows.T @ rows
                self.sums[f"{name}.down_proj"][expert] += inner.T @ inner

        return hook

    def _add(self, name: str, rows: Tensor) -> None:
        if name not in self.sums:
            self.sums[name] = torch.zeros(rows.shape[1], rows.shape[1])
        self.sums[name].addmm_(rows.T, rows)


def hessians(loaded: Loaded, calibration: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """Input statistics for GPTQ, by parameter name: float32 [in, in], or [experts, in, in] for fused experts.

    One pass over the calibration sequences with the weights as they are. Weights with the same input share one tensor.
    Weights whose input cannot be seen, or never came, are missing.
    """
    model, aliases = loaded.model, _aliases(loaded.model)
    sums = _Sums()
    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                hooks.enter_context(module.register_forward_pre_hook(sums.linear(name + ".weight")))
            elif _readable_experts(module):
                hooks.enter_context(module.register_forward_pre_hook(sums.experts(name)))
        for sequence in calibration:
            model(input_ids=torch.from_numpy(np.asarray(sequence, np.int64))[None])
    return {aliases[name]: sums.sums[leader] for name, leader in sums.leader.items() if sums.sums[leader].any()}


def _readable_experts(module: Any) -> bool:
    """Whether fused experts have the usual form, gate and up in one tensor [experts, 2 * inner, d], without biases."""
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not isinstance(gate_up, nn.Parameter) or not isinstance(down, nn.Parameter) or gate_up.ndim != 3:
        return False
    plain = not getattr(module, "is_transposed", False) and not getattr(module, "has_bias", False)
    return plain and callable(getattr(module, "_apply_gate", None))
