"""Forward passes from the first layer that has changed: what the layers before it gave is kept, not computed again."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shrew.errors import UnsupportedError
from shrew.folder import Loaded
from shrew.moves.anatomy import find_layers, logits
from shrew.objectives import IN_CACHE

TRIED = 16  # tokens on which it is tried whether a model can be run from any of its layers


class Replay:
    """A model on one batch of input ids. `whole`: its logits as it was when this was made.

    `logits(first)` are those of the model as it is now, where nothing before layer `first` has changed since: the same
    numbers, bit for bit, as of a whole pass. Models that cannot be run so, see `steady`, are run whole.
    """

    def __init__(self, loaded: Loaded, ids: Tensor, layers: list[nn.Module]) -> None:
        """`layers`: those of `steady`."""
        self.loaded, self.ids, self.layers = loaded, ids, layers
        self.given: list[list[Any]] = [[] for _ in layers]
        with ExitStack() as hooks:
            for layer, given in zip(layers, self.given, strict=True):
                hooks.enter_context(layer.register_forward_hook(lambda *found, given=given: given.append(found[-1])))
            self.whole = logits(loaded, ids)

    def logits(self, first: int) -> Tensor:
        with replaced(self.layers[:first], (lambda *_, given=given, **__: given[0] for given in self.given)):
            return logits(self.loaded, self.ids)


@contextmanager
def replaced(layers: Iterable[nn.Module], forwards: Iterable[Callable[..., Any]]) -> Iterator[None]:
    """Inside the block these layers run these functions in place of their own forward passes; their hooks stay."""
    with ExitStack() as changed:
        for layer, forward in zip(layers, forwards, strict=False):
            own = {"forward": layer.forward} if "forward" in vars(layer) else {}
            changed.callback(vars(layer).update, own)
            changed.callback(vars(layer).pop, "forward")
            vars(layer)["forward"] = forward
        yield


@torch.inference_mode()
def steady(loaded: Loaded, ids: Tensor) -> list[nn.Module]:
    """The layers of a model, each of which is run once and hands on nothing but what it returns; of any other model
    none. Found by trying on the beginning of `ids`, after another text has left its traces wherever layers keep any."""
    try:
        layers = list(find_layers(loaded.model)[1])
        short = Replay(loaded, ids[:1, :TRIED], layers)
        Replay(loaded, ids.flip(-1)[:1, :TRIED], layers)
        if any(len(given) != 1 for given in short.given):
            return []
        # Twice, so that a layer that writes into what it is given is found out.
        same = [torch.equal(short.logits(first), short.whole) for first in 2 * list(range(1, len(layers) + 1))]
    except UnsupportedError:
        return []
    except (RuntimeError, LookupError, TypeError, AttributeError, ValueError):
        return []  # a layer missed what one before it, which was not run, would have left for it
    return layers if all(same) else []


@torch.no_grad()
def divergence(new: Tensor, old: Tensor) -> float:
    """Sum over positions of KL(old || new) in nats: logits [..., V] of the changed model, log-probabilities [..., V] of
    the other."""
    new, old = new.flatten(0, -2), old.flatten(0, -2)
    step, total = max(1, IN_CACHE // new.shape[-1]), 0.0
    for low in range(0, len(new), step):
        p, q = old[low : low + step], new[low : low + step].float().log_softmax(-1)
        total += float(torch.dot(p.exp().flatten(), (p - q).flatten()))
    return total
