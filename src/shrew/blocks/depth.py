"""Depth that is spent where it helps: early exits with layer skip, and mixture-of-depths that is causal.

B rows, T positions, d width, N tokens that are routed. (Layers that are run several times over need no block: see
`ModelSpec.loops` and `ModelSpec.repeats`.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from shrew.spec import Meta, doc


@dataclass(frozen=True, kw_only=True)
class ExitSpec:
    """Early exits as in LayerSkip (Elhoushi et al. 2024): the head reads earlier layers too."""

    every: Annotated[int, Meta(ge=1)] = doc("layers between exits", 2)
    weight: Annotated[float, Meta(ge=0)] = doc("weight of the mean of the exits' losses in training", 0.3)
    layer_skip: Annotated[float, Meta(ge=0, lt=1)] = doc("share of rows that skip the last layer in training", 0.0)

    def after(self, layers: int) -> list[int]:
        """The numbers of layers after which there is an exit; the end of the model is none."""
        return list(range(self.every, layers, self.every))

    def problem(self, layers: int) -> str:
        """What is wrong with these settings in a model of so many layers; empty when nothing is."""
        return "" if self.every < layers else f"every {self.every} leaves no exit before the end of {layers} layers"


def drop_rates(largest: float, layers: int) -> list[float]:
    """LayerSkip's share of rows that skip each layer: 2^(l / (layers - 1)) - 1, from none at the first layer to
    `largest` at the last."""
    return [largest * (2 ** (layer / max(layers - 1, 1)) - 1) for layer in range(layers)]


def skip_rows(after: Tensor, before: Tensor, rate: float) -> Tensor:
    """Stochastic depth: each row [T, d] is, at this rate, what it was before the layer.

    Drawn row by row from torch's generator, which the training loop seeds by the step. The layer is computed for all
    rows: that costs time, but every parameter has a gradient in every process.
    """
    kept = torch.rand(before.shape[0], 1, 1, device=before.device) >= rate
    return torch.where(kept, after, before)


class EarlyExit:
    """Decides at each exit of one decoding step whether to leave there: when each row's head gives its likeliest token
    at least `threshold` (softmax confidence, Schuster et al. 2022). Each question costs a pass of the head."""

    def __init__(self, threshold: float, head: Callable[[Tensor], Tensor]) -> None:
        self.threshold, self.head = threshold, head
        self.logits: Tensor | None = None  # [B, 1, V] of the exit taken
        self.layers = 0  # how many layers had run there

    def __call__(self, layers: int, hidden: Tensor) -> bool:
        """hidden [B, 1, d] after so many layers, normed -> leave?"""
        logits = self.head(hidden)
        if bool((logits.float().softmax(-1).amax(-1) < self.threshold).any()):
            return False
        self.logits, self.layers = logits, layers
        return True


@dataclass(frozen=True, kw_only=True)
class MixtureOfDepthsSpec:
    """Tokens that choose whether they pass through a feed-forward layer.

    As published (Raposo et al. 2024), the tokens of the highest scores in a row are taken, which looks ahead. Here each
    token is judged alone: it passes iff sigmoid(score) > 1/2, and a penalty drives the share that does to `share`.
    """

    every: Annotated[int, Meta(ge=1)] = doc("layers from one that is routed to the next", 2)
    share: Annotated[float, Meta(gt=0, lt=1)] = doc("wanted share of tokens that pass", 0.5)
    weight: Annotated[float, Meta(ge=0)] = doc("weight of the penalty (routed share - wanted share)^2", 0.1)

    def problem(self, layers: int) -> str:
        """What is wrong with these settings in a model of so many layers; empty when nothing is."""
        return "" if self.every <= layers else f"every {self.every} routes none of {layers} layers"

    def routes(self, layer: int) -> bool:
        return (layer + 1) % self.every == 0


Feed = Callable[[Tensor], tuple[Tensor, Any]]  # x [B, T, d] -> (what is added to the stream, penalty or None)


def naive_route(router: "Router", x: Tensor, feed: Feed) -> Tensor:
    """The definition: feed each token alone, where its gate is above 1/2. The oracle of the tests."""
    y = torch.zeros_like(x)
    for row in range(x.shape[0]):
        for t in range(x.shape[1]):
            gate = router.score(x[row, t]).sigmoid()
            if gate > 0.5:
                y[row, t] = gate * feed(x[row, t][None, None])[0][0, 0]
    return y


class Router(nn.Module):
    """Feeds the tokens it chooses to a feed-forward layer; the others cost it nothing there.

    All tokens pass through the layer's mixer: what later tokens see of them, and the states of decoding, do not depend
    on the choice, so any mixer goes with it and decoding is the whole pass. What is saved is the feed-forward layer's
    share of the FLOPs times (1 - share).
    """

    def __init__(self, spec: MixtureOfDepthsSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.score = nn.Linear(width, 1)

    def start(self, std: float, deep: float) -> None:
        """So that the wanted share is routed from the start: scores of normed inputs are normal, of std sqrt(d) std."""
        nn.init.normal_(self.score.weight, std=std)
        spread = std * self.score.in_features**0.5
        nn.init.constant_(self.score.bias, spread * NormalDist().inv_cdf(self.spec.share))

    def forward(self, x: Tensor, feed: Feed) -> tuple[Tensor, Tensor | None]:
        """x [B, T, d] -> ([B, T, d], penalty): gate * feed(x) where gate = sigmoid(score) > 1/2, else zero."""
        with torch.autocast(x.device.type, enabled=False):  # a rounded score is another choice
            exact = torch.promote_types(x.dtype, torch.float32)
            score = nn.functional.linear(x.to(exact), self.score.weight.to(exact), self.score.bias.to(exact))
        gate, routed = score.sigmoid(), score > 0
        picked = routed.flatten().nonzero()[:, 0]
        if not len(picked):
            if not self.training:
                return torch.zeros_like(x), None
            picked = picked.new_zeros(1)  # counts for nothing below, but gives every parameter a gradient
        y, penalty = feed(x.flatten(0, 1)[picked][None])
        y = y[0] * (gate * routed).flatten(0, 1)[picked].to(y.dtype)
        y = torch.zeros_like(x, dtype=y.dtype).flatten(0, 1).index_copy(0, picked, y).view_as(x)
        # The share itself in value, that of the gates in gradient (straight through).
        soft, hard = gate.mean(), routed.float().mean()
        own = self.spec.weight * (hard - soft.detach() + soft - self.spec.share) ** 2
        return y, own if penalty is None else own + penalty

    def flops(self, fed: int) -> int:
        """Multiply-adds times two of a token where the feed-forward layer has `fed`, at the wanted share."""
        return 2 * self.score.in_features + round(self.spec.share * fed)
