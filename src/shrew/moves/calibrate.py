"""What reaches each weight when text runs through a model, one layer at a time.

`stages` walks a model from its embedding to its head and stops before each part, so that a move can change the part's
weights; what the next part sees is computed with the changed ones. Only one layer's statistics are held at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
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
from shrew.moves.anatomy import find_layers, logits
from shrew.moves.context import Progress

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
        """By parameter name (`names` maps every name to it), where anything but zeros came."""
        return {names[name]: self.sums[leader] for name, leader in self.leader.items() if self.sums[leader].any()}

    def corrections(self, names: dict[str, str]) -> dict[str, Tensor]:
        """By parameter name, [in, in] that weights are to be multiplied by; see `Stage`. Ridge regression."""
        found, made = {}, {}
        for name, leader in self.leader.items():
            if leader not in self.cross or leader in self.apart:
                continue
            if leader not in made:
                matrix, wanted = self.sums[leader].double(), self.cross[leader].double()
                ridge = RIDGE * matrix.diagonal().mean().clamp(min=1e-30)
                for item in (matrix, wanted):
                    item.diagonal().add_(ridge)
                made[leader] = torch.linalg.solve(matrix, wanted.T).T.float()
            found[names[name]] = made[leader]
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


@dataclass
class Block:
    """One layer and what goes through it: `inputs` [sequence] as the layers before it now are, `wanted` [sequence] what
    this layer gave in the original model, each [1, T, d]."""

    layer: nn.Module
    prefix: str
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
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
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Stage]:  # fmt: skip
    """The parts of a model in order: what is outside the layers, each layer, an untied head.

    With `sequential` each part's inputs come from the parts before it as the caller left them, as in the paper of GPTQ,
    and there are corrections; else they come from the original. A model whose layers cannot be run one by one is one
    stage.
    """
    flow = _trace(loaded, calibration, say)
    names = {name for name, _ in loaded.model.named_parameters()}
    if flow is None:
        if calibration:
            say("the layers of this model cannot be run one by one, so all are calibrated at once")
        yield Stage(names, hessians(loaded, calibration))
        return
    inside = {name for name in names if name.startswith(flow.path + ".")}
    late = {name for name in flow.late if name not in inside}
    early = names - inside - late
    yield Stage(early, {name: value for name, value in flow.outside.items() if name in early})
    # Embeddings as they now are belong to the reference: making up for their errors would shrink every layer's weights.
    original = flow.starts() if sequential else flow.first
    current = original
    for number, layer in enumerate(flow.layers):
        prefix = f"{flow.path}.{number}."
        block = Block(layer, prefix, [calls[number] for calls in flow.calls], current, [])
        sums, found = Sums(), []
        with torch.no_grad():
            for at, value in enumerate(current):
                if sequential:
                    sums.before.clear()
                    with ExitStack() as hooks:
                        sums.watch(hooks, {prefix[:-1]: layer}, remember=True)
                        block.wanted.append(block.run(at, original[at]))
                with ExitStack() as hooks:
                    sums.watch(hooks, {prefix[:-1]: layer})
                    found.append(block.run(at, value))
        sums.before.clear()
        block.wanted = block.wanted or found
        mine = {name for name in inside if name.startswith(prefix)}
        yield Stage(mine, sums.found(flow.names), sums.corrections(flow.names), block)
        original = block.wanted
        if number + 1 == len(flow.layers):
            break
        with torch.no_grad():
            current = [block.run(at, value) for at, value in enumerate(current)] if sequential else found
    if late:
        known = hessians(loaded, calibration) if sequential else flow.outside
        yield Stage(late, {name: value for name, value in known.items() if name in late})


class _Stop(Exception):
    """Ends a forward pass before the first layer."""


@dataclass
class _Flow:
    """One pass of the calibration text: what went into the first layer, what else each layer was called with, and the
    statistics outside the layers."""

    loaded: Loaded
    path: str
    layers: nn.ModuleList
    names: dict[str, str]
    calibration: Sequence[np.ndarray]
    first: list[Tensor] = field(default_factory=list)
    calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=list)
    outside: dict[str, Tensor] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)

    def starts(self) -> list[Tensor]:
        """What goes into the first layer now."""
        found: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            found.append(args[0] if args else named["hidden_states"])
            raise _Stop

        with self.layers[0].register_forward_pre_hook(hook, with_kwargs=True), torch.no_grad():
            for sequence in self.calibration:
                try:
                    logits(self.loaded, _ids(sequence))
                except _Stop:
                    continue
        return found


def _trace(loaded: Loaded, calibration: Sequence[np.ndarray], say: Callable[[str], None]) -> _Flow | None:
    """None where layers do not each run once, each on the output of the one before."""
    if not calibration:
        return None
    try:
        path, layers = find_layers(loaded.model)
    except UnsupportedError:
        return None
    flow = _Flow(loaded, path, layers, aliases(loaded.model), calibration)
    outer = {name: module for name, module in loaded.model.named_modules()
             if isinstance(module, (nn.Linear, Conv1D)) and not name.startswith(path + ".")}  # fmt: skip
    looked_up = {id(part.weight) for part in loaded.model.modules() if isinstance(part, nn.Embedding)}
    sums, seen = Sums(), _Seen()
    with ExitStack() as hooks, torch.no_grad():
        for number, layer in enumerate(layers):
            hooks.enter_context(layer.register_forward_pre_hook(seen.enter(number), with_kwargs=True))
            hooks.enter_context(layer.register_forward_hook(seen.leave))
        for name, module in outer.items():
            hooks.enter_context(module.register_forward_pre_hook(seen.note(name)))
        sums.watch(hooks, outer)
        progress = Progress(say, "calibration: text", len(calibration), ending=False)
        for number, sequence in enumerate(calibration, 1):
            seen.start()
            logits(loaded, _ids(sequence))
            if not seen.chained or seen.order != list(range(len(layers))):
                return None
            assert seen.first is not None
            flow.first.append(seen.first)
            flow.calls.append(seen.calls)
            progress(number)
    flow.outside = sums.found(flow.names)
    flow.late = {flow.names[f"{name}.weight"] for name in seen.late if id(outer[name].weight) not in looked_up}
    return flow


class _Seen:
    """Hooks that note how the layers of a model are called in one pass."""

    def __init__(self) -> None:
        self.late: set[str] = set()
        self.start()

    def start(self) -> None:
        self.order: list[int] = []
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.first: Tensor | None = None
        self.chained = True
        self._out: Any = None

    def enter(self, number: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden = args[0] if args else named.get("hidden_states")
            if not isinstance(hidden, Tensor):
                self.chained = False
                return
            if self.first is None:
                self.first = hidden.detach().clone()
            elif hidden is not self._out:
                self.chained = False
            self.order.append(number)
            rest = tuple(None if isinstance(item, Cache) else item for item in args[1:])
            self.calls.append((rest, {key: None if isinstance(item, Cache) else item for key, item in named.items()}))

        return hook

    def leave(self, _: nn.Module, __: Any, output: Any) -> None:
        self._out = output[0] if isinstance(output, tuple) else output

    def note(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if self.order:
                self.late.add(name)

        return hook
