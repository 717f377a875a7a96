"""What reaches each weight when text runs through a model, one layer at a time.

`stages` walks a model from its embedding to its head and stops before each part, so that a move can change the part's
weights; what the next part sees is computed with the changed ones. Only one layer's statistics are held at a time.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

from shrew.errors import UnsupportedError
from shrew.folder import Loaded
from shrew.moves import grids
from shrew.moves.anatomy import find_layers, logits
from shrew.moves.context import Progress
from shrew.moves.importance import check_squares
from shrew.moves.replay import replaced

RIDGE = 0.1  # of the mean diagonal: how strongly a correction is held back


class Sums:
    """Sums of x xᵀ over everything that reaches a module; modules fed the same tensor share one sum.

    Where `before` holds what reached a module in the original, call by call, `cross` sums that with what reaches it
    now; where these are not the same tokens (`apart`), because a router sends them elsewhere, it sums nothing.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.cross: dict[str, Tensor] = {}
        self.before: dict[str, list[Tensor]] = {}
        self.apart: set[str] = set()
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
                self._add(self.sums, name, rows, rows)
                if name in self.before:
                    before = self.before[name].pop(0) if self.before[name] else rows[:0]
                    if before.shape == rows.shape:
                        self._add(self.cross, name, before, rows)
                    else:
                        self.apart.add(name)

        return hook

    def remember(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            rows = inputs[0].detach().float().reshape(-1, inputs[0].shape[-1])
            self.before.setdefault(name, []).append(rows)

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

    @staticmethod
    def _add(sums: dict[str, Tensor], name: str, left: Tensor, right: Tensor) -> None:
        if name not in sums:
            sums[name] = torch.zeros(left.shape[1], right.shape[1])
        sums[name].addmm_(left.T, right)

    def watch(self, hooks: ExitStack, modules: dict[str, nn.Module], remember: bool = False) -> None:
        """Sum what reaches these modules, and those in them, until `hooks` is closed; or only remember it."""
        for outer, whole in modules.items():
            for inner, module in whole.named_modules():
                name = ".".join(part for part in (outer, inner) if part)
                if isinstance(module, (nn.Linear, Conv1D)):
                    made = self.remember if remember else self.linear
                    hooks.enter_context(module.register_forward_pre_hook(made(name + ".weight")))
                elif _readable_experts(module) and not remember:
                    hooks.enter_context(module.register_forward_pre_hook(self.experts(name)))

    def found(self, names: dict[str, str]) -> dict[str, Tensor]:
        """By parameter name (`names` maps every name to it), where anything but zeros came.

        Raises FolderError where what came is too large to be squared."""
        check_squares({names[leader]: total for leader, total in self.sums.items()})
        return {names[name]: self.sums[leader] for name, leader in self.leader.items() if self.sums[leader].any()}

    def corrections(self, names: dict[str, str]) -> dict[str, Tensor]:
        """By parameter name, [in, in] that weights are to be multiplied by; see `Stage`. Ridge regression. They take
        the place of `cross`, which is used up."""
        found, cross = {}, {leader: sums for leader, sums in self.cross.items() if leader not in self.apart}
        self.cross = {}
        for leader, wanted in cross.items():
            matrix = self.sums[leader].double()
            ridge = RIDGE * matrix.diagonal().mean().clamp(min=1e-30)
            matrix.diagonal().add_(ridge)
            wanted.diagonal().add_(ridge)
            matrix = torch.linalg.cholesky(matrix)
            for part in wanted.split(grids.PANEL):
                part.copy_(torch.cholesky_solve(part.double().T, matrix).T)
            del matrix  # in float64 it is twice as large as the statistics of the next one, which is to come
        for name, leader in self.leader.items():
            if leader in cross:
                found[names[name]] = cross[leader]
        return found


def _readable_experts(module: Any) -> bool:
    """Whether fused experts have the usual form, gate and up in one tensor [experts, 2 * inner, d], without biases."""
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not isinstance(gate_up, nn.Parameter) or not isinstance(down, nn.Parameter) or gate_up.ndim != 3:
        return False
    plain = not getattr(module, "is_transposed", False) and not getattr(module, "has_bias", False)
    return plain and callable(getattr(module, "_apply_gate", None))


def aliases(model: Any) -> dict[str, str]:
    """Every name of a tied weight -> the name that `named_parameters` gives it."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}


def hessians(loaded: Loaded, calibration: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """Input statistics by parameter name: float32 [in, in], or [experts, in, in] for fused experts.

    One pass over the calibration sequences with the weights as they are. Weights with the same input share one tensor.
    Weights whose input cannot be seen, or never came, are missing.
    """
    sums = Sums()
    with ExitStack() as hooks, torch.no_grad():
        sums.watch(hooks, {"": loaded.model})
        for sequence in calibration:
            logits(loaded, _ids(sequence))
    return sums.found(aliases(loaded.model))


def _ids(sequence: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(sequence, np.int64))[None]


Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a layer is called with besides its input


@dataclass
class Block:
    """One layer and what goes through it: `inputs` [sequence] as the layers before it now are, `wanted` [sequence] what
    this layer gave in the original model, each [1, T, d]."""

    layer: nn.Module
    prefix: str
    calls: list[Call]
    inputs: list[Tensor]
    wanted: list[Tensor]

    def run(self, number: int, hidden: Tensor, values: dict[str, Tensor] | None = None) -> Tensor:
        """The layer's output for a sequence; `values` stand for parameters of these names (within the layer)."""
        rest, named = self.calls[number]
        if "hidden_states" in named:
            rest, named = rest, {**named, "hidden_states": hidden}
        else:
            rest = (hidden, *rest)
        found = self.layer(*rest, **named) if values is None else functional_call(self.layer, values, rest, named)
        return found[0] if isinstance(found, tuple) else found


@dataclass
class Stage:
    """A part of a model whose turn it is: the names of its parameters, and the input statistics of those that have any
    (see `hessians`). `block` is the layer, None for what stands before and after the layers.

    A weight times its `corrections` answers to the inputs it now gets as it did to those it had in the original, as
    nearly as can be, so what the layers before it got wrong is made up for (as in GPTAQ, Li et al. 2025,
    arXiv:2504.02692; here by regression).
    """

    names: set[str]
    statistics: dict[str, Tensor]
    corrections: dict[str, Tensor] = field(default_factory=dict)
    block: Block | None = None


def stages(
    loaded: Loaded, calibration: Sequence[np.ndarray], sequential: bool = True,
    say: Callable[[str], None] = lambda text: None, only: Collection[str] | None = None,
) -> Iterator[Stage]:  # fmt: skip
    """The parts of a model in order: what is outside the layers, each layer, an untied head.

    With `sequential` each part's inputs come from the parts before it as the caller left them, as in the paper of GPTQ,
    and there are corrections; else they come from the original. A model whose layers cannot be run one by one is one
    stage. `only`: the parameters that the caller asks about, by default all. Where no head is among them, `sequential`
    saves the first and the last pass over the text, and heads have no statistics. A layer's stage holds what it
    says until the next one is asked for.
    """
    names = {name for name, _ in loaded.model.named_parameters()}
    asked = names if only is None else set(only)
    flow = _trace(loaded, calibration, sequential, asked, say)
    if flow is None:
        if calibration:
            say("the layers of this model cannot be run one by one, so all are calibrated at once")
        yield Stage(names, hessians(loaded, calibration))
        return
    inside = {name for name in names if name.startswith(flow.path + ".")}
    late = flow.late - flow.tied - inside
    early = names - inside - late
    yield Stage(early, {name: value for name, value in flow.outside.items() if name in early})
    # Embeddings as they now are belong to the reference: making up for their errors would shrink every layer's weights.
    original = flow.starts() if sequential else flow.first
    current = list(original)
    for number, layer in enumerate(flow.layers):
        prefix = f"{flow.path}.{number}."
        block = Block(layer, prefix, [calls[number] for calls in flow.calls], current, original)
        sums = Sums()
        with torch.no_grad():
            for at, value in enumerate(current):
                if sequential:
                    sums.before.clear()
                    with ExitStack() as hooks:
                        sums.watch(hooks, {prefix[:-1]: layer}, remember=True)
                        original[at] = block.run(at, original[at])
                with ExitStack() as hooks:
                    sums.watch(hooks, {prefix[:-1]: layer})
                    found = block.run(at, value)
                if not sequential:
                    original[at] = found
        sums.before.clear()
        mine = {name for name in inside if name.startswith(prefix)}
        stage = Stage(mine, sums.found(flow.names), sums.corrections(flow.names), block)
        yield stage
        stage.statistics, stage.corrections = {}, {}  # whoever asked may hold the stage while the next one is made
        if number + 1 == len(flow.layers):
            break
        with torch.no_grad():
            for at, value in enumerate(current):
                current[at] = block.run(at, value) if sequential else original[at]
    if late:
        known = flow.outside
        if sequential:
            known = {} if late.isdisjoint(asked) else hessians(loaded, calibration)
        yield Stage(late, {name: value for name, value in known.items() if name in late})


class _Stop(Exception):
    """Ends a forward pass of which the rest is not needed."""


def _stop(*_: Any, **__: Any) -> None:
    raise _Stop


@dataclass
class _Flow:
    """One pass of the calibration text: what went into the first layer, what else each layer was called with, and the
    statistics outside the layers. `late`: the parameters of matrices behind layers, `tied`: those of them which are
    embeddings as well. In turn (`sequential`) `first` stays empty, and `outside` may know nothing of `late`."""

    loaded: Loaded
    path: str
    layers: nn.ModuleList
    names: dict[str, str]
    calibration: Sequence[np.ndarray]
    late: set[str] = field(default_factory=set)
    tied: set[str] = field(default_factory=set)
    first: list[Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    outside: dict[str, Tensor] = field(default_factory=dict)

    def starts(self) -> list[Tensor]:
        """What goes into the first layer now."""
        found, seen = [], _Seen(self.layers, {})
        with replaced(self.layers, [_stop]), torch.no_grad():
            for sequence in self.calibration:
                seen.run(self.loaded, sequence)
                assert seen.first is not None
                found.append(seen.first)
        return found


def _hidden(args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The input of a layer among what it is called with."""
    return args[0] if args else named.get("hidden_states")


def _passing(more: int | None) -> Callable[..., Any]:
    """A layer's forward pass that hands its input on; where `more` is given, in a tuple with so many None behind it."""

    def forward(*args: Any, **named: Any) -> Any:
        hidden = _hidden(args, named)
        return hidden if more is None else (hidden, *[None] * more)

    return forward


def _trace(
    loaded: Loaded, calibration: Sequence[np.ndarray], sequential: bool, asked: set[str], say: Callable[[str], None]
) -> _Flow | None:
    """None where layers do not each run once, each on the output of the one before."""
    if not calibration:
        return None
    try:
        path, layers = find_layers(loaded.model)
    except UnsupportedError:
        return None
    outer = {name: module for name, module in loaded.model.named_modules()
             if isinstance(module, (nn.Linear, Conv1D)) and not name.startswith(path + ".")}  # fmt: skip
    flow, seen = _Flow(loaded, path, layers, aliases(loaded.model), calibration), _Seen(layers, outer)
    with ExitStack() as hooks, torch.no_grad():
        if not seen.run(loaded, calibration[0]):
            return None
        calls, late, passing = seen.calls, seen.late, seen.passing
        looked_up = {id(part.weight) for part in loaded.model.modules() if isinstance(part, nn.Embedding)}
        flow.late = {flow.names[f"{name}.weight"] for name in late}
        flow.tied = {flow.names[f"{name}.weight"] for name in late if id(outer[name].weight) in looked_up}
        # Layer after layer, all that is asked here is what each is called with besides its input, which seldom hangs on
        # what layers before it gave: then they need not run.
        if sequential and seen.alone and flow.tied.isdisjoint(asked):
            hooks.enter_context(replaced(layers, [*passing[:-1], _stop]))
            try:
                brief = seen.run(loaded, calibration[0]) and _alike(seen.calls, calls)
            except (RuntimeError, LookupError, TypeError, AttributeError, ValueError):
                brief = False  # what stands between layers wanted what a layer leaves
            if not brief:
                hooks.close()
        sums = Sums()
        sums.watch(hooks, outer)
        progress = Progress(say, "calibration: text", len(calibration), ending=False)
        for number, sequence in enumerate(calibration, 1):
            if not seen.run(loaded, sequence):
                return None
            if not sequential:
                assert seen.first is not None
                flow.first.append(seen.first)
            flow.calls.append(seen.calls)
            progress(number)
    flow.outside = sums.found(flow.names)
    return flow


def _alike(one: Any, other: Any) -> bool:
    """Whether two calls are the same as far as anybody can tell: of objects without values that can be compared the
    kind."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return type(one) is type(other) and len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, Mapping):
        same = isinstance(other, Mapping) and one.keys() == other.keys()
        return same and all(_alike(item, other[key]) for key, item in one.items())
    return type(one) is type(other) and (one == other or not isinstance(one, (bool, int, float, str)))


class _Seen:
    """How the layers of a model are called in one pass, and which other modules come behind them."""

    def __init__(self, layers: nn.ModuleList, outer: dict[str, nn.Module]) -> None:
        self.layers, self.outer = layers, outer

    def run(self, loaded: Loaded, sequence: np.ndarray) -> bool:
        """Whether each layer ran once, on the output of the one before."""
        self.order: list[int] = []
        self.calls: list[Call] = []
        self.passing: list[Callable[..., Any]] = []
        self.late: set[str] = set()
        self.alone = True  # no layer gives anything but hidden states
        self.first: Tensor | None = None
        self._out: Any = None
        self._chained = True
        with ExitStack() as hooks:
            for number, layer in enumerate(self.layers):
                hooks.enter_context(layer.register_forward_pre_hook(self._enter(number), with_kwargs=True))
                hooks.enter_context(layer.register_forward_hook(self._leave))
            for name, module in self.outer.items():
                hooks.enter_context(module.register_forward_pre_hook(self._note(name)))
            with suppress(_Stop):
                logits(loaded, _ids(sequence))
        return self._chained and self.order == list(range(len(self.layers)))

    def _enter(self, number: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden = _hidden(args, named)
            if not isinstance(hidden, Tensor):
                self._chained = False
                return
            if self.first is None:
                self.first = hidden.detach().clone()
            elif hidden is not self._out:
                self._chained = False
            self.order.append(number)
            rest = tuple(None if isinstance(item, Cache) else item for item in args[1:])
            kept = {key: None if isinstance(item, Cache) or key == "hidden_states" else item
                    for key, item in named.items()}  # fmt: skip
            self.calls.append((rest, kept))

        return hook

    def _leave(self, _: nn.Module, __: Any, output: Any) -> None:
        self._out, more = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        self.passing.append(_passing(None if more is None else len(more)))
        self.alone = self.alone and (more is None or all(item is None for item in more))

    def _note(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if self.order:
                self.late.add(name)

        return hook
