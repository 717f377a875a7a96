"""What blocks share: norms, rotary positions, the place of the tokens, and the state that decoding carries.

B rows, T new positions, S positions seen so far and new, H heads, D head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from shrew.errors import UnsupportedError


@dataclass(frozen=True)
class Shape:
    """What a block must know of the model around it."""

    width: int
    eps: float
    vocabulary: int = 0
    layer: int = 0  # the block's own number, from 0


class Place:
    """Where the tokens of one forward pass stand. Every block of the model reads the same one.

    tokens, positions [B, T]; `owner` [B, S] numbers the document that each position seen or new belongs to, None where
    every row is one document. Nothing may pass from one document to another; padding is a document of its own, so
    packed rows and left-padded rows need no further rule.
    """

    def __init__(self, tokens: Tensor, positions: Tensor, owner: Tensor | None = None, seen: int = 0) -> None:
        if owner is not None and bool((owner == owner[:, :1]).all()):
            owner = None
        self.tokens, self.positions, self.owner, self.seen = tokens, positions, owner, seen
        self._kept: dict[Any, Any] = {}

    @property
    def new(self) -> Tensor | None:
        """[B, T]: the documents of the new positions."""
        return None if self.owner is None else self.owner[:, self.seen :]

    @property
    def before(self) -> Tensor | None:
        """[B]: the document of the last position seen before the new ones."""
        return None if self.owner is None or not self.seen else self.owner[:, self.seen - 1]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once in this pass and shared by all blocks that ask under the same key."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def rotary(self, width: int, theta: float) -> tuple[Tensor, Tensor]:
        return self.once(("rotary", width, theta), lambda: rotary_tables(self.positions, width, theta))

    def mask(self) -> Tensor | None:
        """Causal mask [B or 1, 1, T, S], true where attention is allowed; None where plain causal attention of a whole
        row, or of one new position to all, needs none."""
        return self.once("mask", self._mask)

    def _mask(self) -> Tensor | None:
        length = self.positions.shape[1]
        if self.owner is None and (length == 1 or not self.seen):
            return None
        total = self.seen + length
        causal = torch.ones(length, total, dtype=torch.bool, device=self.positions.device).tril(self.seen)
        if self.owner is None:
            return causal[None, None]
        return ((self.owner[:, self.seen :, None] == self.owner[:, None, :]) & causal)[:, None]


class State(CacheLayerMixin):
    """What a mixer keeps between calls when decoding: tensors by name, rows first. `seen` counts positions."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, Tensor] = {}
        self.seen = 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.held.values())

    def reset(self) -> None:
        self.held, self.seen = {}, 0

    def offload(self) -> None:
        self.held = {name: value.to("cpu", non_blocking=True) for name, value in self.held.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.held = {name: value[indices.to(value.device)] for name, value in self.held.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.held = {name: value.repeat_interleave(repeats, 0) for name, value in self.held.items()}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise UnsupportedError("a recurrent state holds no keys and values.")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise UnsupportedError("a recurrent state holds no keys and values.")

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise UnsupportedError("a recurrent state cannot be rolled back; decode without an assistant model.")


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return nn.functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def rotary_tables(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, T, D] for positions [B, T] (Su et al. 2021, half-split layout as in Llama)."""
    rates = theta ** (-torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)
    angles = positions[:, None, :, None].float() * rates
    return torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, T, D]."""
    low, high = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-high, low], -1) * sin.to(x.dtype)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, place: Place, state: State | None = None,
                name: str = "conv") -> Tensor:  # fmt: skip
    """Depthwise causal convolution of x [B, T, C] with weight [C, K]: y_t = bias + sum_j weight[:, K-1-j] x_{t-j}.

    No tap reaches into another document. `state.held[name]` [B, K-1, C] holds the last inputs.
    Shifts and adds instead of `conv1d`, whose depthwise CPU kernel is several times slower at these sizes.
    """
    taps, length = weight.shape[1], x.shape[1]
    past = None if state is None else state.held.get(name)
    if past is None:
        past = x.new_zeros(x.shape[0], taps - 1, x.shape[2])
    whole = torch.cat([past, x], 1)
    if state is not None:
        state.held[name] = whole[:, whole.shape[1] - (taps - 1) :]
    y = x * weight[:, -1] if bias is None else torch.addcmul(bias, x, weight[:, -1])
    same = place.once(("taps", taps), lambda: same_document(place, taps))
    for back in range(1, taps):
        shifted = whole[:, taps - 1 - back : taps - 1 - back + length]
        if same is not None:
            shifted = shifted * same[back - 1].to(x.dtype)
        y = torch.addcmul(y, shifted, weight[:, taps - 1 - back])
    return y


def same_document(place: Place, taps: int) -> list[Tensor] | None:
    """For each step back, [B, T, 1]: is that position of the same document?"""
    if place.owner is None:
        return None
    owner = nn.functional.pad(place.owner, (taps - 1, 0), value=-1)  # before the first position there is nothing
    start, length = place.seen + taps - 1, place.positions.shape[1]
    new = owner[:, start:]
    return [(owner[:, start - back : start - back + length] == new)[..., None] for back in range(1, taps)]
