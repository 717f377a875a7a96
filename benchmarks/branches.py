"""Budgets off one trunk: a run with a level rate, and at four fifths of each budget a copy that decays to zero."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from shrew import data, files

PARTS = 5  # the last of so many parts of a budget is its decay


def steps_of(budget: float, flops: int, tokens: int) -> int:
    """Steps of `tokens` tokens that a budget pays, rounded so that the decay begins at a whole step."""
    return PARTS * max(1, round(budget / (flops * tokens) / PARTS))


def level_of(steps: int) -> int:
    """The step at which a run of so many begins to decay."""
    return steps - steps // PARTS


def work_of(budgets: Iterable[float], done: Iterable[float] = ()) -> float:
    """FLOPs of a trunk and its branches to these budgets, of which some are done."""
    wanted, have = set(budgets), set(done)
    trunk = max(0.0, max(wanted, default=0.0) - max(have, default=0.0)) * (PARTS - 1) / PARTS
    return trunk + sum(wanted - have) / PARTS


def excerpt(document: data.Document, at: float, characters: int) -> data.Document:
    """About so many characters of a document from a share of it onward, whole lines."""
    low = document.text.find("\n", int(len(document.text) * at)) + 1
    high = document.text.find("\n", low + characters)
    return data.Document(Path(document.id).stem, document.text[low : high if high > 0 else None])


def newest(place: Path, name: str) -> Any:
    """The run folder of that name that was last written, if one has a checkpoint."""
    found = place.glob(f"runs/{name}-*/checkpoint/state.json")
    return max((path.parents[1] for path in found), key=lambda run: (run / "log.jsonl").stat().st_mtime, default=None)


def branch(place: Path, recipe: dict[str, Any], name: str, steps: int, train: Callable[[str], str]) -> str:
    """Train a recipe's [train] and [model] to its end, as `name`, off the trunk of the folder `place`. `train` runs the
    recipe OUT.toml there, given OUT, and says in words where the loss was infinite; so does this."""

    def run(out: str, count: int, decay: float) -> str:
        whole = {**recipe, "train": recipe["train"] | {"out": out, "steps": count, "decay": decay}}
        files.write_text(place / f"{out}.toml", tomli_w.dumps(whole))
        return train(out)

    trunk = newest(place, "trunk")
    past = trunk is not None and json.loads((trunk / "checkpoint/state.json").read_text())["step"] > level_of(steps)
    if newest(place, name) is None and not past:  # a trunk that is past it is of no use: all from the start
        if words := run("trunk", level_of(steps), 0.0):
            return words
        trunk = newest(place, "trunk")
        copy = trunk.with_name(f"{name}-{trunk.name.rpartition('-')[2]}")
        files.write_bytes(copy / "log.jsonl", (trunk / "log.jsonl").read_bytes())
        files.copy_folder(trunk / "checkpoint", copy / "checkpoint", "state.json")
    return run(name, steps, 1 / PARTS)


def beyond(rates: Sequence[float], best: Iterable[float]) -> list[float]:
    """The rates to add, each as far from the end as the end is from its neighbour, where a best one is at an end."""
    if len(rates) < 2:
        return []
    found = []
    if rates[0] in best:
        found.append(rates[0] ** 2 / rates[1])
    if rates[-1] in best:
        found.append(rates[-1] ** 2 / rates[-2])
    return [float(f"{rate:.3g}") for rate in found]
