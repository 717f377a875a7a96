"""What a run chooses from: the uncut model and its cuts, each with the ways to store its weights and what they do."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shrew.search import trial
from shrew.search.allocate import Group, extend
from shrew.search.kinds import Kind
from shrew.search.propose import MEASURED_RATES, Choices, Family, Rates, Widths, coded, inherited
from shrew.search.repair import repaired

if TYPE_CHECKING:
    from shrew.search.run import Run

TRIMMED, TRIM = "unused tokens dropped", 0.05  # tried where it saves at least this share of the weights

Moves = list[dict[str, Any]]
Cuts = dict[str, tuple[Moves, list[int]]]  # moves, and the layers that they leave out
# Ways to store the weights of a model of these groups, from which these layers are gone.
Store = Callable[[tuple[Group, ...], Sequence[int]], Choices]


class Shelf:
    """`found`: the uncut model, then its cuts, the least damage for the bytes that it saves first. More can be made."""

    def __init__(self, run: "Run") -> None:
        self.run = run
        plain = run.executor.submit(trial.cut, run.json, [], run.wanted.gguf)
        single = run.executor.submit(trial.layer_damages, run.json)
        self.base = plain.result()
        self.store = rates(run) if run.wanted.coded else widths(run, self.base)
        self.proposed = cuts(run, single.result())
        uncut = family("no cut", [], self.base, self.store, [], self.base)
        run.probe_early(uncut)
        futures = {name: run.executor.submit(trial.cut, run.json, moves, run.wanted.gguf, TRIM * (name == TRIMMED))
                   for name, (moves, _) in self.proposed.items()}  # fmt: skip
        self.found = [uncut, *(item for name, future in futures.items() if (item := self._made(name, future.result())))]
        whole = size_of(uncut)
        self.found[1:] = sorted(self.found[1:], key=lambda item: item.cut / max(whole - size_of(item), 1))
        told = ", ".join(f"{item.name} {item.cut:.3g} ({1 - size_of(item) / whole:.0%})" for item in self.found[1:])
        if told:
            run.say(f"  Damage of cuts alone in nats a prediction, and what they save: {told}.")
        self.found = fast_enough(run, self.found)

    def both(self, name: str, moves: Moves, like: str) -> Family | None:
        """A family of its own that leaves out the layers that another does."""
        self.proposed[name] = moves, self.proposed[like][1]
        future = self.run.executor.submit(trial.cut, self.run.json, moves, self.run.wanted.gguf)
        return self._made(name, future.result())

    def _made(self, name: str, found: dict[str, Any]) -> Family | None:
        moves, dropped = self.proposed[name]
        reason = found.get("refused", "")
        if reason:
            self.run.say(f"  not tried: {name}: {reason}")
        self.run.tried.append(f"not {name}: {reason}" if reason else name)
        return None if reason else family(name, moves, found, self.store, dropped, self.base)


def size_of(item: Family) -> int:
    """Bytes of the weights file at its largest."""
    return item.rest + item.choices.ends()[0]


def widths(run: "Run", base: dict[str, Any]) -> Store:
    """Grids for each part of each layer (or each weight), by the damage that each does alone; checked together at the
    size that the run is likely to end near, and mended."""
    palette = run.palette
    parts = groups_of(base)
    cells = [(item, kind) for item in parts for kind in item.kinds(palette) if kind in palette.measured]
    alone = measure(run, [{name: kind for name, _, _ in item.tensors} for item, kind in cells])
    measured: dict[str, dict[Kind, float]] = {}
    for (item, kind), value in zip(cells, alone, strict=True):
        measured.setdefault(item.name, {})[kind] = value
    damages = {name: extend(found, each) for (name, found), each in
               zip(measured.items(), errors(run, list(measured)), strict=True)}  # fmt: skip
    prefix = trial.find_layers(run.original.model)[0]
    weights = {item.name: item.weights() for item in parts}

    def store(parts: tuple[Group, ...], dropped: Sequence[int]) -> Widths:
        return Widths(parts, inherited(parts, damages, weights, dropped, prefix, palette), palette)

    uncut = family("no cut", [], base, store, [], base)
    assert isinstance(uncut.choices, Widths)
    found = repaired(uncut.choices, run.likely_size(uncut) - uncut.rest, lambda asked: measure(run, asked))
    if found is None:
        return store
    told = f"{found.first:.3g} nats a prediction together, {found.expected:.3g} by the sum of the parts"
    run.repaired = f"{told}; {found.whole:.3g} after another choice" if found.scale else told
    run.say(f"  Damage of the likely choice, not healed: {run.repaired}.")
    for name, factor in found.scale.items():
        damages[name] = {kind: value * factor for kind, value in damages[name].items()}
    return store


def measure(run: "Run", asked: Sequence[Mapping[str, Kind]]) -> list[float]:
    """KL to the original of each choice {weight: its grid}, rounded to nearest; shared among the workers."""
    items = [dict(item) for item in asked]
    share = max(-(-len(items) // max(run.jobs, 1)), 1)
    futures = [run.executor.submit(trial.profile, run.json, items[low : low + share], dict(run.palette.settings))
               for low in range(0, len(items), share)]  # fmt: skip
    return [value for future in futures for value in future.result()]


def errors(run: "Run", names: list[str]) -> list[dict[Kind, float]]:
    """Squared errors of rounding each group to every grid of the palette: a bit more halves the step. Where the kinds
    of grid differ, that of the weights themselves."""
    palette = run.palette
    if not palette.by_tensor:
        return [{kind: 4.0**-bits for kind, bits in palette.bits.items()}] * len(names)
    found = run.executor.submit(trial.errors, run.json, names, list(palette.bits)).result()
    return [dict(item) for item in found]


def rates(run: "Run") -> Store:
    """A rate for all coded weights, by the damage that two rates do, the second on the side where the floor is likely
    to be; cuts are taken to change that little."""
    low, middle, high = MEASURED_RATES
    damages: dict[float, float] = {}
    for _ in range(2):
        rate = middle if not damages else high if damages[middle] > run.allowed() else low
        damages[rate] = float(run.executor.submit(trial.damage, run.json, [coded(rate)]).result())
    told = ", ".join(f"{value:.3g} at {rate:g}" for rate, value in damages.items())
    run.say(f"  Damage in nats a prediction by bits a weight, coded and not healed: {told}.")
    return lambda parts, dropped: Rates(sum(item.weights() for item in parts), damages)


def cuts(run: "Run", scores: list[float]) -> Cuts:
    """Structural cuts to try: moves, and the layers that they leave out, the least important first."""
    narrow: dict[float, Moves] = {share: [{"name": "narrow", "mlp": share}] for share in (0.75, 0.5)}
    found: Cuts = {TRIMMED: ([{"name": "trim-vocab"}], [])}
    found |= {f"MLP {share:.0%}": (moves, []) for share, moves in narrow.items()}
    if not run.original.is_classifier and not run.wanted.gguf and len(scores) > 1:  # what our own blocks alone can say
        found |= {"a layer run twice": ([{"name": "share"}], []), "projections factored": ([{"name": "factor"}], [])}
    counts = {1}
    if run.goals["faster"]:
        counts.add(math.ceil(len(scores) * (1 - 1 / run.goals["faster"])))
    for count in sorted(counts):
        least = sorted(range(len(scores)), key=scores.__getitem__)[:count]
        if count < 1 or count > len(scores) - 2 or any(math.isinf(scores[number]) for number in least):
            continue
        drop: Moves = [{"name": "drop-layers", "layers": sorted(least)}]
        name = f"{count} layer{'s' if count > 1 else ''} less"
        found[name] = (drop, least)
        share = 0.75 if count == 1 else 0.5
        found[f"{name}, MLP {share:.0%}"] = ([*drop, *narrow[share]], least)
    return found


def fast_enough(run: "Run", families: list[Family]) -> list[Family]:
    """With --faster, only the cuts that compute little enough: quantization alone speeds nothing up in torch."""
    if run.goals["faster"] is None:
        return families
    fast = [item for item in families if item.flops * run.goals["faster"] <= 1.25]
    return fast or [min(families, key=lambda item: item.flops)]


def groups_of(found: dict[str, Any]) -> tuple[Group, ...]:
    """Of a model that `trial.cut` told of."""
    return tuple(Group(part, tuple((tensor, rows, cols) for tensor, rows, cols in tensors))
                 for part, tensors in found["groups"])  # fmt: skip


def family(name: str, moves: Moves, found: dict[str, Any], store: Store, dropped: Sequence[int],
           base: dict[str, Any]) -> Family:  # fmt: skip
    return Family(name, tuple(moves), store(groups_of(found), dropped), found["damage"], found["rest"],
                  found["active"] / base["active"])  # fmt: skip
