"""Leave out whole layers, the least important ones on calibration text."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from shrew import files
from shrew.errors import SpecError, UnsupportedError
from shrew.folder import Loaded
from shrew.moves.anatomy import (
    batches,
    check_same_layer,
    find_layers,
    fingerprint,
    logits,
    rebuild,
    skeleton,
    without_layers,
)
from shrew.moves.context import Context
from shrew.moves.importance import damages
from shrew.spec import Meta, doc

Measure = Literal["kl", "influence"]

SCORE_TOKENS = 4096  # of calibration text; layers differ far more than the noise that this leaves


@dataclass(frozen=True, kw_only=True)
class DropLayers:
    """Leave out `count` layers, one after the other, each time the one that matters least; or exactly `layers`."""

    name: ClassVar[str] = "drop-layers"
    paper: ClassVar[str] = "Men et al. 2024, ShortGPT (arXiv:2403.03853)"

    count: Annotated[int, Meta(ge=0)] = doc("how many layers to leave out", 1)
    layers: tuple[int, ...] | None = doc("leave out exactly these layers (the first is 0), whatever count says", None)
    measure: Literal["kl", "influence"] = doc(
        "what a layer's importance is: KL of the logits without it, or block influence", "kl"
    )

    def apply(self, loaded: Loaded, context: Context) -> Loaded:
        """Raises SpecError for layers that are not there, UnsupportedError where the architecture allows no drop."""
        total = len(find_layers(loaded.model)[1])
        if self.layers is not None:
            if wrong := [index for index in self.layers if not 0 <= index < total]:
                raise SpecError(f"drop-layers: there is no layer {wrong[0]}; the layers are 0 to {total - 1}.")
            dropped = set(self.layers)
        else:
            dropped = set()
        count = len(dropped) if self.layers is not None else self.count
        if count >= total:
            raise SpecError(f"drop-layers: {count} of {total} layers cannot go; leave at least one.")
        while len(dropped) < count:
            dropped.add(self._least(loaded, context, dropped))
        return drop(loaded, dropped) if dropped else loaded

    def _least(self, loaded: Loaded, context: Context, dropped: set[int]) -> int:
        candidates = droppable(loaded.model, dropped)
        if not candidates:
            left = set(range(len(find_layers(loaded.model)[1]))) - dropped
            without_layers(loaded.model, dropped | {min(left)})  # says why, where it is the config that forbids it
            raise UnsupportedError(
                f"{loaded.model.config.model_type}: no further layer can go, because the layers left differ in kind by "
                f"their place; ask for at most {len(dropped)}."
            )
        scores = layer_scores(loaded, context, self.measure, sorted(dropped))
        least = min(candidates, key=lambda index: scores[index])
        context.say(f"drop-layers: layer {least} matters least ({self.measure} {scores[least]:.4g})")
        return least


def layer_scores(loaded: Loaded, context: Context, measure: Measure = "kl", without: Sequence[int] = ()) -> list[float]:
    """Importance of every layer on calibration text, given that the layers `without` are left out already.

    "kl": mean KL(whole model || model without the layer) in nats a prediction. "influence": 1 - cos(input, output) of
    the layer, mean over tokens (block influence of ShortGPT). The layers `without` score 0. Cached in `context.cache`.
    """
    key = fingerprint(loaded.model, context.calibration, "layers", measure, sorted(without), SCORE_TOKENS)
    cached = context.cache / f"layers-{key}.json"
    if cached.exists():
        return [float(score) for score in json.loads(cached.read_text())]
    with torch.inference_mode():
        score = _kl_scores if measure == "kl" else _influence_scores
        scores = score(loaded, context, frozenset(without))
    files.write_text(cached, json.dumps(scores))
    return scores


def _kl_scores(loaded: Loaded, context: Context, without: frozenset[int]) -> list[float]:
    layers = find_layers(loaded.model)[1]
    left = [index for index in range(len(layers)) if index not in without]
    changes = [(min(without | {index}), partial(bypassed, layers, without | {index})) for index in left]
    found = dict(zip(left, damages(loaded, context, changes, SCORE_TOKENS), strict=True))
    return [found.get(index, 0.0) for index in range(len(layers))]


def _influence_scores(loaded: Loaded, context: Context, without: frozenset[int]) -> list[float]:
    layers = find_layers(loaded.model)[1]
    total, tokens = [0.0] * len(layers), 0
    with ExitStack() as hooks:
        for index, layer in enumerate(layers):

            def note(_: nn.Module, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
                before, after = _hidden(args, kwargs), output[0] if isinstance(output, tuple) else output
                total[index] += float((1 - F.cosine_similarity(before, after, dim=-1)).sum())

            if index not in without:
                hooks.enter_context(layer.register_forward_hook(note, with_kwargs=True))
        hooks.enter_context(bypassed(layers, without))
        for ids in batches(loaded, context.calibration, 2048, SCORE_TOKENS):
            logits(loaded, ids)
            tokens += ids.numel()
    return [value / tokens for value in total]


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


@contextmanager
def bypassed(layers: nn.ModuleList, which: frozenset[int]) -> Iterator[None]:
    """Inside the block, these layers hand their input on unchanged."""

    def skip(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = _hidden(args, kwargs)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with ExitStack() as hooks:
        for index in which:
            hooks.enter_context(layers[index].register_forward_hook(skip, with_kwargs=True))
        yield


def droppable(model: Any, dropped: set[int]) -> list[int]:
    """Layers that can go besides those dropped: every layer left must have the tensors its new place asks for."""
    path, layers = find_layers(model)
    left = [index for index in range(len(layers)) if index not in dropped]
    signatures = [_signature(layer) for layer in layers]
    if len(left) == 1:
        return []
    if all(signature == signatures[0] for signature in signatures):
        return left
    return [index for index in left if _fits(model, path, signatures, dropped | {index})]


def _signature(layer: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in layer.state_dict().items()}


def _fits(model: Any, path: str, signatures: list[dict[str, torch.Size]], dropped: set[int]) -> bool:
    kept = [index for index in range(len(signatures)) if index not in dropped]
    mine = {f"{path}.{at}.{name}": shape for at, old in enumerate(kept) for name, shape in signatures[old].items()}
    try:
        wanted = skeleton(model, without_layers(model, dropped))
    except UnsupportedError:
        return False
    return mine == {name: shape for name, shape in wanted.items() if name.startswith(f"{path}.")}


def drop(loaded: Loaded, dropped: set[int]) -> Loaded:
    """The model without these layers: config, tensors, places in the cache, and what is packed or untouched.

    Raises UnsupportedError when a layer left cannot take its new place (a first layer of its own kind, for one).
    """
    model = loaded.model
    path, layers = find_layers(model)
    kept = [index for index in range(len(layers)) if index not in dropped]
    places = {str(old): str(new) for new, old in enumerate(kept)}

    def rename(name: str) -> str | None:
        if not name.startswith(f"{path}."):
            return name
        number, _, rest = name.removeprefix(f"{path}.").partition(".")
        return f"{path}.{places[number]}.{rest}" if number in places else None

    def renamed(values: dict[str, Any]) -> dict[str, Any]:
        return {new: value for name, value in values.items() if (new := rename(name)) is not None}

    smaller = rebuild(model, without_layers(model, dropped), renamed(model.state_dict()))
    for new, old in enumerate(kept):
        check_same_layer(model.config.model_type, layers[old], find_layers(smaller)[1][new], new)
    return dataclasses.replace(
        loaded, model=smaller, packed=renamed(loaded.packed), untouched=renamed(loaded.untouched)
    )
