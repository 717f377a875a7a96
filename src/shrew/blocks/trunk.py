"""Layers, and the stack of them below the head of a model of tokens."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from shrew.blocks.depth import EarlyExit, Router, drop_rates, skip_rows
from shrew.blocks.embeddings import Ngrams
from shrew.blocks.layers import Place, RMSNorm, Shape, State
from shrew.blocks.specs import FFNS, MIXERS, ModelSpec


class Layer(nn.Module):
    def __init__(self, spec: ModelSpec, number: int) -> None:
        super().__init__()
        shape = Shape(spec.width, spec.eps, spec.vocabulary or 0, number)
        mixer = spec.mixer(number)
        self.scale = spec.residual_scale
        self.mixer_norm = RMSNorm(spec.width, spec.eps)
        self.mixer = MIXERS[mixer.kind][1](mixer, shape)
        some = spec.ffn.kind != "none"
        self.ffn_norm = RMSNorm(spec.width, spec.eps) if some else None
        self.ffn = FFNS[spec.ffn.kind][1](spec.ffn, shape)
        self.mixer_after = RMSNorm(spec.width, spec.eps) if spec.norms == "sandwich" else None
        self.ffn_after = RMSNorm(spec.width, spec.eps) if some and spec.norms == "sandwich" else None
        routes = spec.mixture_of_depths
        self.router = Router(routes, spec.width) if some and routes and routes.routes(number) else None
        for block in self.blocks():
            for part in block.modules():
                part._is_hf_initialized = True  # by `start`, not part by part

    def blocks(self) -> list[Any]:
        return [block for block in (self.mixer, self.ffn, self.router) if block is not None]

    def forward(self, x: Tensor, place: Place, state: Any = None) -> tuple[Tensor, Tensor | None]:
        """x [B, T, d] -> [B, T, d], and the penalty of the ffn and its router, if there is one; where some positions
        do not count, x is as `place.gathered` gives it, and the mixer alone sees them."""
        y = place.gathered(self.mixer(place.scattered(self.mixer_norm(x)), place, state))
        x = x.add(y if self.mixer_after is None else self.mixer_after(y), alpha=self.scale)
        if self.ffn_norm is None:
            return x, None
        z = self.ffn_norm(x)
        y, penalty = self.feed(z) if self.router is None else self.router(z, self.feed)
        return x.add(y, alpha=self.scale), penalty

    def feed(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        y, penalty = self.ffn(z)
        return y if self.ffn_after is None else self.ffn_after(y), penalty

    def flops(self, context: int) -> int:
        fed: int = self.ffn.flops()
        return self.mixer.flops(context) + (fed if self.router is None else self.router.flops(fed))


class Trunk(nn.Module):
    """Embedding, layers and the last norm: everything below the head."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.vocabulary or 0, spec.width)
        self.ngrams = Ngrams(spec.ngrams, spec.width) if spec.ngrams else None
        self.layers = nn.ModuleList(Layer(spec, number) for number in range(spec.layers))
        self.order = spec.order
        self.norm = RMSNorm(spec.width, spec.eps)
        self.exits = spec.exits.after(spec.depth) if spec.exits else []
        self.exit_norms = nn.ModuleList(RMSNorm(spec.width, spec.eps) for _ in self.exits)
        self.drop_rates = drop_rates(spec.exits.layer_skip if spec.exits else 0.0, spec.depth)
        self.width = spec.width  # of what the head reads

    def forward(
        self, place: Place, cache: Cache | None = None, kept: list[Tensor] | None = None,
        leave: EarlyExit | None = None, every: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Hidden states [B, T, d] of the tokens, and the sum of the layers' penalties (None if there is none).

        `kept` gets the hidden states at each exit, `every` those before each layer and, normed, after the last.
        `leave` is asked at each exit; once it says yes it holds the answer, and the layers above only run their mixers
        on the hidden states there, for the sake of the mixers' states.
        """
        x = self.embed(place, cache)
        penalties = []
        for number, which in enumerate(self.order):
            layer: Any = self.layers[which]
            state = None if cache is None else cache.layers[number]
            if every is not None:
                every.append(x)
            if leave is not None and leave.layers:
                layer.mixer(layer.mixer_norm(x), place, state)
            else:
                y, penalty = layer(x, place, state)
                x = skip_rows(y, x, self.drop_rates[number]) if self.training and self.drop_rates[number] else y
                if penalty is not None:
                    penalties.append(penalty)
                if number + 1 in self.exits and (kept is not None or leave is not None):
                    early = self.exit_norms[self.exits.index(number + 1)](x)
                    if kept is not None:
                        kept.append(early)
                    if leave is not None:
                        leave(number + 1, early)
            count(state, place)
        x = self.norm(x)
        if every is not None:
            every.append(x)
        return x, torch.stack(penalties).sum() if penalties else None

    def embed(self, place: Place, cache: Cache | None = None) -> Tensor:
        x = self.embed_tokens(place.tokens)
        if self.ngrams is not None:
            state = None if cache is None else cache.layers[-1]
            x = x + self.ngrams(place, state)
            count(state, place)
        if self.spec.embedding_scale != 1:
            x = x * torch.tensor(self.spec.embedding_scale).to(x.dtype)  # rounded to the weights' dtype, as Gemma does
        return x

    def new_cache(self) -> Cache:
        """A state for each pass of a layer, and that of the n-grams at the end."""
        layers: list[Any] = [self.layers[which] for which in self.order]
        last = [] if self.ngrams is None else [self.ngrams.init_state()]
        return Cache(layers=[layer.mixer.init_state() for layer in layers] + last)

    def flops(self, context: int) -> int:
        """Multiply-adds times two, per token, when it sees `context` positions on average."""
        layers: list[Any] = [self.layers[which] for which in self.order]
        return sum(layer.flops(context) for layer in layers)

    def state_bytes(self, context: int, element: int = 2) -> int:
        """What a cache of one row holds after `context` positions."""
        layers: list[Any] = [self.layers[which] for which in self.order]
        each = sum(layer.mixer.state_bytes(context, element) for layer in layers)
        return each + (0 if self.ngrams is None else self.ngrams.state_bytes())

    @cached_property
    def state_kinds(self) -> list[type]:
        """The classes of the layers of a cache."""
        return [type(layer) for layer in self.new_cache().layers]


def count(state: Any, place: Place) -> None:
    """Note in the state of a block that it has seen the new positions; one of keys and values knows by itself."""
    if isinstance(state, State):
        state.seen += place.positions.shape[1]
