"""What a run chooses from: the uncut model and its cuts, each with the ways to store its weights and what they do."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shrew.search import trial
from shrew.search.allocate import Group
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


def find(run: "Run") -> list[Family]:
    """The uncut model, then its cuts, the least damage for the bytes that it saves first."""
    plain = run.executor.submit(trial.cut, run.json, [], run.wanted.gguf)
    single = run.executor.submit(trial.layer_damages, run.json)
    base = plain.result()
    store = rates(run) if run.wanted.coded else widths(run, base)
    proposed = cuts(run, single.result())
    futures = {name: run.executor.submit(trial.cut, run.json, moves, run.wanted.gguf)
               for name, (moves, _) in proposed.items()}  # fmt: skip
    found, refused = [family("no cut", [], base, store, [], base)], []
    for name, (moves, dropped) in proposed.items():
        made = futures[name].result()
        if "refused" in made:
            refused.append(f"{name}: {made['refused']}")
        elif name == TRIMMED and weights_of(made) > (1 - TRIM) * weights_of(base):
            refused.append(f"{name}: it would save less than {TRIM:.0%} of the weights")
        else:
            found.append(family(name, moves, made, store, dropped, base))
    run.tried = [item.name for item in found] + [f"not {reason}" for reason in refused]
    for reason in refused:
        run.say(f"  not tried: {reason}")
    whole = found[0].choices.ends()[0] + found[0].rest
    found[1:] = sorted(found[1:], key=lambda item: item.cut / max(whole - item.rest - item.choices.ends()[0], 1))
    return fast_enough(run, found)


def widths(run: "Run", base: dict[str, Any]) -> Store:
    """Grids for each part of each layer (or each weight), by the damage that each does alone; checked together at the
    size that the run is likely to end near, and mended."""
    palette = run.palette
    parts = groups_of(base)
    cells = [(item, kind) for item in parts for kind in item.kinds(palette) if kind in palette.measured]
    alone = measure(run, [{name: kind for name, _, _ in item.tensors} for item, kind in cells])
    damages: dict[str, dict[Kind, float]] = {}
    for (item, kind), value in zip(cells, alone, strict=True):
        damages.setdefault(item.name, {})[kind] = value
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


def rates(run: "Run") -> Store:
    """A rate for all coded weights, by the damage that some rates do; cuts are taken to change that little."""
    futures = {rate: run.executor.submit(trial.damage, run.json, [coded(rate)]) for rate in MEASURED_RATES}
    damages = {rate: float(future.result()) for rate, future in futures.items()}
    told = ", ".join(f"{value:.3g} at {rate:g}" for rate, value in damages.items())
    run.say(f"  Damage in nats a prediction by bits a weight, coded and not healed: {told}.")
    return lambda parts, dropped: Rates(sum(item.weights() for item in parts), damages)


def cuts(run: "Run", scores: list[float]) -> Cuts:
    """Structural cuts to try: moves, and the layers that they leave out, the least important first."""
    narrow: dict[float, Moves] = {share: [{"name": "narrow", "mlp": share}] for share in (0.75, 0.5)}
    found: Cuts = {TRIMMED: ([{"name": "trim-vocab"}], [])}
    found |= {f"MLP {share:.0%}": (moves, []) for share, moves in narrow.items()}
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


def weights_of(found: dict[str, Any]) -> int:
    """How many weights there are to store in a model that `trial.cut` told of."""
    return sum(item.weights() for item in groups_of(found))


def family(name: str, moves: Moves, found: dict[str, Any], store: Store, dropped: Sequence[int],
           base: dict[str, Any]) -> Family:  # fmt: skip
    return Family(name, tuple(moves), store(groups_of(found), dropped), found["damage"], found["rest"],
                  found["active"] / base["active"])  # fmt: skip
