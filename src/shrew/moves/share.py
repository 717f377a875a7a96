"""`share`: neighbouring layers that do nearly the same become one that is run twice.

The bytes of a layer go and its FLOPs stay. Which pair, and which weights for both, is measured: the KL on calibration
text of the model with that pair tied. Put `distil` behind it, which trains the one layer in both of its places.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor, nn

from shrew import files
from shrew.blocks.model import ModelSpec, ShrewForCausalLM
from shrew.blocks.stock import adopt
from shrew.blocks.stock.adapter import shortest
from shrew.errors import SpecError, UnsupportedError
from shrew.folder import Loaded
from shrew.moves.anatomy import fingerprint, rebuild, with_settings
from shrew.moves.context import Context
from shrew.moves.importance import damages
from shrew.spec import Meta, doc, dump

SCORE_TOKENS = 4096  # of calibration text
WEIGHTS = ("average", "first", "second")


@dataclass(frozen=True, kw_only=True)
class Share:
    """Let `count` pairs of neighbouring layers share their weights, each time the pair that misses its own least."""

    name: ClassVar[str] = "share"
    paper: ClassVar[str] = "Liu et al. 2024, MobileLLM (arXiv:2402.14905)"

    count: Annotated[int, Meta(ge=1)] = doc("how many layers to do without", 1)
    weights: Literal["best", "average", "first", "second"] = doc(
        "what both places get: the layers' average, or one of the two; best: whichever misses least", "best"
    )

    def apply(self, loaded: Loaded, context: Context) -> Loaded:
        """Raises SpecError for more than there are, UnsupportedError for a model that our blocks cannot say, and where
        no two neighbours are of one kind."""
        if loaded.is_classifier:
            raise UnsupportedError("share: only causal language models can run a layer twice.")
        if loaded.packed:
            raise UnsupportedError("share: the weights are quantized already; put share before quantize in the recipe.")
        ours = adopt(loaded.model)
        if self.count >= ours.spec.layers:
            raise SpecError(f"share: {self.count} of {ours.spec.layers} layers cannot go; leave at least one.")
        if ours.spec.ranks:
            raise UnsupportedError("share: this model's projections are factored already; put share before factor.")
        if ours.spec.mixture_of_depths:
            raise UnsupportedError("share: mixture-of-depths routes by the number of a layer, which would change; "
                                   "leave the layers whole.")  # fmt: skip
        made = loaded
        for _ in range(self.count):
            made = replace(made, model=ours, untouched={})
            pairs = neighbours(ours)
            if not pairs:
                raise UnsupportedError("share: no two neighbouring layers are of one kind; leave the move out.")
            options = WEIGHTS if self.weights == "best" else (self.weights,)
            scores = pair_scores(made, context, pairs, options)
            (first, weights), score = min(scores.items(), key=lambda item: item[1])
            context.say(f"share: layers {first} and {first + 1} become one, weights {weights} (kl {score:.4g})")
            ours = tied(ours, first, weights)
        return replace(made, model=ours)


def neighbours(ours: ShrewForCausalLM) -> list[int]:
    """The layers whose next one has the same blocks and tensors."""
    spec, layers = ours.spec, ours.model.layers
    shapes = [{name: value.shape for name, value in layer.state_dict().items()} for layer in layers]
    return [at for at in range(spec.layers - 1)
            if spec.mixer(at) == spec.mixer(at + 1) and shapes[at] == shapes[at + 1]]  # fmt: skip


def merged(ours: ShrewForCausalLM, first: int, weights: str) -> dict[str, Tensor]:
    """The tensors that layer `first` and the next one get; an average counts each by how often it is run."""
    one, two = (ours.model.layers[at].state_dict() for at in (first, first + 1))
    if weights != "average":
        return {"first": one, "second": two}[weights]
    times = (ours.spec.repeats or (1,) * ours.spec.layers)[first : first + 2]
    share = times[0] / sum(times)
    return {name: share * value + (1 - share) * two[name] if value.is_floating_point() else value
            for name, value in one.items()}  # fmt: skip


def pair_scores(
    made: Loaded, context: Context, pairs: list[int], options: tuple[str, ...]
) -> dict[tuple[int, str], float]:
    """Mean KL(model || model with layers n and n + 1 tied) in nats a prediction on calibration text, by n and by the
    weights that both get. Cached in `context.cache`."""
    ours: Any = made.model
    wanted = [(first, weights) for first in pairs for weights in options]
    key = fingerprint(ours, context.calibration, "share", wanted, SCORE_TOKENS)
    cached = context.cache / f"share-{key}.json"
    if cached.exists():
        return dict(zip(wanted, json.loads(cached.read_text()), strict=True))
    scores = damages(made, context, [(item[0], partial(_tied_for_now, ours, *item)) for item in wanted], SCORE_TOKENS)
    files.write_text(cached, json.dumps(scores))
    return dict(zip(wanted, scores, strict=True))


@contextmanager
def _tied_for_now(ours: ShrewForCausalLM, first: int, weights: str) -> Iterator[None]:
    """Inside the block both layers are one: the second's place is taken by the first's, with the weights of both."""
    layers: Any = ours.model.layers
    one, two = layers[first], layers[first + 1]
    kept = {name: value.clone() for name, value in one.state_dict().items()}
    one.load_state_dict(merged(ours, first, weights))
    layers[first + 1] = one
    try:
        yield
    finally:
        layers[first + 1] = two
        one.load_state_dict(kept)


def tied(ours: ShrewForCausalLM, first: int, weights: str) -> Any:
    """The model in which layer `first` is run in the place of the next one too."""
    spec = ours.spec
    letters = [spec.pattern[at % len(spec.pattern)] for at in range(spec.layers)]
    repeats = list(spec.repeats or (1,) * spec.layers)
    repeats[first] += repeats.pop(first + 1)
    del letters[first + 1]
    new: ModelSpec = replace(spec, layers=spec.layers - 1, pattern=shortest("".join(letters)), repeats=tuple(repeats))
    state: dict[str, Tensor] = {}
    for name, value in ours.state_dict().items():
        head, dot, rest = name.partition("model.layers.")
        number, _, part = rest.partition(".")
        if not dot or int(number) <= first:
            state[name] = value
        elif int(number) > first + 1:
            state[f"{head}{dot}{int(number) - 1}.{part}"] = value
    state |= {f"model.layers.{first}.{name}": value for name, value in merged(ours, first, weights).items()}
    made: nn.Module = rebuild(ours, with_settings(ours.config, spec=dump(new)), state)
    return made
