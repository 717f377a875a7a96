"""What fewer bits for keys and values cost: a model whose cache holds rounded ones, measured like any other.

Each key and value is rounded when it is stored and read back so, by its own token too, as in step-by-step decoding. A
step is shared by (a group of) a head's channels of one token, so a whole text can be given at once. With
`kv_keys = "channel"` keys share a step by channel over a group of tokens (KIVI, Liu et al. 2024, arXiv:2402.02750): the
tokens of a group that is not yet full are held in full, so a text is given group by group.

B rows, T new positions, K key-value heads, D head width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from shrew.blocks.layers import State
from shrew.blocks.model import ShrewForCausalLM
from shrew.errors import UnsupportedError, UsageError
from shrew.folder import Loaded
from shrew.record import Record
from shrew.spec import Meta, doc

STEP_BYTES = 2  # of a scale or a lowest value, both float16
FULL_BYTES = 2  # of an element of a cache that is not rounded (bf16 or float16)


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """How keys and values are held."""

    kv: Literal[0, 8, 4] = doc("bits of cached keys and values, measured against the full cache; 0: not measured", 0)
    kv_group: Annotated[int, Meta(ge=0)] = doc("channels (by channel: tokens) that share a step; 0: a head, or 32", 0)
    kv_symmetric: bool = doc("steps around zero, without a lowest value of their own", False)
    kv_keys: Literal["token", "channel"] = doc("whose keys share a step: a token's, or a channel's (KIVI)", "token")

    @property
    def label(self) -> str:
        keys = ", keys by channel" if self.kv_keys == "channel" else ""
        return f"{self.kv}-bit cache{keys}"

    @property
    def tokens(self) -> int:
        """Tokens that share a step of keys."""
        return (self.kv_group or 32) if self.kv_keys == "channel" else 1

    def width(self, channels: int) -> int:
        """Channels that share a step."""
        group = 0 if self.kv_keys == "channel" else self.kv_group
        return group if 0 < group < channels else channels

    def bytes(self, heads: int, channels: int) -> float:
        """Of the keys and values of one token in one layer, steps included."""
        codes = 2 * heads * channels * self.kv / 8
        by_token = heads * -(-channels // self.width(channels))
        steps = by_token + (heads * channels / self.tokens if self.kv_keys == "channel" else by_token)
        return codes + steps * STEP_BYTES * (1 if self.kv_symmetric else 2)


def rounded(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """x [..., n] -> the values that `bits` bits a number can hold, with a step for each row of n in float16."""
    wide = x.float()
    if symmetric:
        most = 2 ** (bits - 1) - 1
        low, step = torch.zeros(()), _held(wide.abs().amax(-1, keepdim=True) / most)
        least = -most
    else:
        most, least = 2**bits - 1, 0
        low = _held(wide.amin(-1, keepdim=True))
        step = _held((wide.amax(-1, keepdim=True) - low) / most)
    codes = ((wide - low) / step.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(least, most)
    return (codes * step + low).to(x.dtype)


def _held(x: Tensor) -> Tensor:
    """As float16 holds it."""
    limit = torch.finfo(torch.float16).max
    return x.clamp(-limit, limit).half().float()


def by_token(x: Tensor, spec: CacheSpec) -> Tensor:
    """Keys or values [B, K, T, D], rounded by (a group of) the channels of each head and token."""
    width = spec.width(x.shape[-1])
    if x.shape[-1] % width:
        raise UsageError(f"--kv-group {width}: a head of {x.shape[-1]} channels is no multiple of that.")
    return rounded(x.unflatten(-1, (-1, width)), spec.kv, spec.kv_symmetric).flatten(-2)


def by_channel(x: Tensor, spec: CacheSpec) -> Tensor:
    """Keys [B, K, T, D], rounded by channel over all T tokens."""
    return rounded(x.transpose(-1, -2), spec.kv, spec.kv_symmetric).transpose(-1, -2)


class Rounding(nn.Module):
    """A causal model that reads its keys and values back from a rounded cache; it scores and generates as `model`."""

    def __init__(self, model: Any, spec: CacheSpec) -> None:
        super().__init__()
        self.model, self.spec, self.config = model, spec, model.config
        self.layers: dict[int, tuple[int, int]] = {}  # heads and channels of each layer that was rounded

    @property
    def generation_config(self) -> Any:
        return self.model.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.model.generation_config = value

    def cache(self) -> Any:
        """An empty cache of the model whose layers round what they are given."""
        ours = isinstance(self.model, ShrewForCausalLM)
        cache = self.model.model.new_cache() if ours else DynamicCache(config=self.config)
        for number, layer in enumerate(cache.layers):
            # On the instance: a cache of other classes would not be taken for one of this model.
            if isinstance(layer, DynamicLayer):
                layer.update = self._update(number, layer)
            elif isinstance(layer, State):
                layer.stored = self._stored(number)  # type: ignore[assignment, method-assign]
        return cache

    def _seen(self, number: int, x: Tensor) -> None:
        self.layers[number] = (x.shape[1], x.shape[3])

    def _update(self, number: int, layer: DynamicLayer) -> Callable[..., tuple[Tensor, Tensor]]:
        inner = layer.update

        def update(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            self._seen(number, keys)
            values = by_token(values, self.spec)
            if self.spec.kv_keys == "token":
                return inner(by_token(keys, self.spec), values, *args, **kwargs)
            if layer.is_sliding:
                raise UnsupportedError("--kv-keys channel: this model has windows, which drop tokens of a group.")
            found = inner(keys, values, *args, **kwargs)
            if keys.shape[2] == self.spec.tokens and layer.keys is not None:  # the group is full: from now on rounded
                layer.keys = torch.cat([layer.keys[:, :, : -keys.shape[2]], by_channel(keys, self.spec)], 2)
            return found

        return update

    def _stored(self, number: int) -> Callable[[Tensor], Tensor]:
        def stored(new: Tensor) -> Tensor:
            self._seen(number, new)
            if self.spec.kv_keys == "channel":
                raise UnsupportedError("--kv-keys channel: this model has windows, which drop tokens of a group.")
            return by_token(new, self.spec)

        return stored

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = True, logits_to_keep: int = 0
    ) -> Any:
        """input_ids [B, T] -> logits [B, T or logits_to_keep, V], by one pass, or one for each group of tokens."""
        total, cache = input_ids.shape[1], self.cache()
        step = self.spec.tokens if self.spec.kv_keys == "channel" else total
        first = total - logits_to_keep if logits_to_keep else 0
        parts = []
        for low in range(0, total, step):
            end = min(low + step, total)
            out = self.model(input_ids=input_ids[:, low:end], attention_mask=attention_mask[:, :end],
                             past_key_values=cache, use_cache=True)  # fmt: skip
            if end > first:
                parts.append(out.logits[:, max(first - low, 0) :])
                last = out
        last.logits = torch.cat(parts, 1)
        return last

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        if self.spec.kv_keys == "channel":
            raise UnsupportedError("--kv-keys channel measures no generation; use --kv-keys token.")
        return self.model.generate(*args, past_key_values=self.cache(), **kwargs)


def with_rounded_cache(loaded: Loaded, spec: CacheSpec) -> Loaded:
    """The same model with a rounded cache. Raises UnsupportedError where it keeps no keys and values."""
    if loaded.is_classifier:
        raise UnsupportedError(f"{loaded.path}: a classifier has no cache; leave out --kv.")
    model = Rounding(loaded.model, spec).eval()
    probe = torch.zeros(1, 2, dtype=torch.long, device=next(loaded.model.parameters()).device)
    with torch.inference_mode():
        model(probe, torch.ones_like(probe))
    if not model.layers:
        raise UnsupportedError(f"{loaded.path}: this model keeps no keys and values; leave out --kv.")
    return replace(loaded, model=model)


def cache_records(run: str, label: str, loaded: Loaded) -> list[Record]:
    """Bytes of keys and values that one token takes, in full (16 bits) and rounded. `loaded` has a rounded cache."""
    model: Rounding = loaded.model
    full = sum(2 * heads * channels * FULL_BYTES for heads, channels in model.layers.values())
    held = sum(model.spec.bytes(heads, channels) for heads, channels in model.layers.values())
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", len(model.layers))
    detail = {"layers": len(model.layers), "of_layers": depth, "other_states": "kept in full"}
    return [Record(run=run, model=name, metric="kv_bytes", value=value, unit="bytes/token", detail=detail)
            for name, value in ((label, full), (f"{label}, {model.spec.label}", held))]  # fmt: skip

