"""What a row of the table of stock types is."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shrew.blocks.model import ModelSpec

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Adapter:
    config: Callable[[ModelSpec], Any]  # spec -> a config of the type, or None
    spec: Callable[[Any], ModelSpec | None]  # config -> spec, or None where our blocks cannot say it
    names: Callable[[ModelSpec, int], dict[str, str]]  # spec, layer -> {our part of that layer: theirs}
    out: Callable[[ModelSpec, Weights], Weights] = lambda spec, weights: weights  # renamed weights -> theirs
    back: Callable[[ModelSpec, Weights], Weights] = lambda spec, weights: weights  # theirs -> ours but for the names


def by_kind(spec: ModelSpec, kinds: Iterable[str]) -> dict[str, Any] | None:
    """The mixers of a spec by kind; None where layers of a kind differ, or one is of no kind in `kinds`."""
    mixers = [spec.mixer(number) for number in range(spec.layers)]
    found = {mixer.kind: mixer for mixer in mixers}
    return found if found.keys() <= set(kinds) and all(mixer == found[mixer.kind] for mixer in mixers) else None


def shortest(letters: str) -> str:
    """The shortest pattern that repeats to `letters`: 'LLGLLGL' -> 'LLG'."""
    sizes = range(1, len(letters) + 1)
    return next(letters[:size] for size in sizes if (letters[:size] * len(letters))[: len(letters)] == letters)
