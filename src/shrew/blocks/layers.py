"""What blocks share: norms, rotary positions, the place of the tokens, and the state that decoding carries.

B rows, T new positions, S positions seen so far and new, H heads, D head width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from shrew.errors import UnsupportedError

WIDEST = 1 << 20  # channels: what has more is a slip of the pen, and would take all memory before anybody says so


@dataclass(frozen=True)
class Shape:
    """What a block must know of the model around it."""

    width: int
    eps: float
    vocabulary: int = 0
    layer: int = 0  # the block's own number, from 0


class Place:
    """Where the tokens of one forward pass stand. Every block of the model reads the same one.

    tokens, positions [B, T]; `owner` [B, S] tells the documents of the positions seen and new apart, None where every
    row is one document: a document is a run of equal numbers, and a number that comes back is another one. Nothing may
    pass from one document to another; padding is a document of its own, so packed rows and left-padded rows need no
    further rule. What blocks read as `owner` counts the runs of a row from 0.

    `real` [N]: the new positions b T + t that count; where given, only mixers see the others.
    """

    def __init__(
        self, tokens: Tensor, positions: Tensor, owner: Tensor | None = None, seen: int = 0, real: Tensor | None = None
    ) -> None:
        if owner is not None and bool((owner == owner[:, :1]).all()):
            owner = None
        owner = None if owner is None else runs(owner[:, 1:] != owner[:, :-1])
        self.tokens, self.positions, self.owner, self.seen, self.real = tokens, positions, owner, seen, real
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

    def gathered(self, x: Tensor) -> Tensor:
        """x [B, T, d] -> [1, N, d]: the positions that count; x itself where all do."""
        return x if self.real is None else x.flatten(0, 1)[self.real][None]

    def scattered(self, y: Tensor) -> Tensor:
        """The inverse of `gathered`: zeros where nothing counts."""
        if self.real is None:
            return y
        rows, length = self.tokens.shape
        return y.new_zeros(rows * length, y.shape[-1]).index_copy(0, self.real, y[0]).view(rows, length, -1)

    def rotary(self, width: int, theta: float, yarn: float = 1.0, trained: int = 0) -> tuple[Tensor, Tensor]:
        key = ("rotary", width, theta, yarn, trained)
        return self.once(key, lambda: rotary_tables(self.positions, width, theta, yarn, trained))

    def mask(self) -> Tensor | None:
        """Causal mask [B or 1, 1, T, S], true where attention is allowed; None where plain causal attention of a whole
        row, or of one new position to all, needs none."""
        return self.once("mask", self._mask)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """`mask` as the fused kernels take it, which would make it anew in every layer and keep it for the gradient."""
        mask = self.mask()
        return None if mask is None else self.once(("bias", dtype), lambda: additive(mask, dtype))

    def _mask(self) -> Tensor | None:
        length = self.positions.shape[1]
        if self.owner is None and (length == 1 or not self.seen):
            return None
        return self.allowed(0, length)

    def allowed(self, start: int, end: int) -> Tensor:
        """[B or 1, 1, end - start, seen + end]: what the new positions from `start` to before `end` may attend to."""
        first, total = self.seen + start, self.seen + end
        causal = torch.ones(end - start, total, dtype=torch.bool, device=self.positions.device).tril(first)
        if self.owner is None:
            return causal[None, None]
        return ((self.owner[:, first:total, None] == self.owner[:, None, :total]) & causal)[:, None]


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where `allowed`, elsewhere minus infinity."""
    return torch.where(allowed, allowed.new_zeros((), dtype=dtype), float("-inf"))


def runs(breaks: Tensor) -> Tensor:
    """[B, S] of `breaks` [B, S - 1], true where a position begins a new run: the number of its run, from 0."""
    return nn.functional.pad(breaks.cumsum(1), (1, 0))


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

    def stored(self, new: Tensor) -> Tensor:
        """New keys or values [B, K, T, D] as they are kept; a cache of fewer bits rounds them here."""
        return new

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


class _RmsNorm(torch.autograd.Function):
    """x / rms(x) * weight and its gradient (the first alone), in half the passes over memory of the library's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        both, flat = (grads[0] * x).flatten(0, -2), scale.flatten()
        share = torch.mv(both, weight).mul_(flat**3).div_(-x.shape[-1])
        down = (grads[0] * weight).mul_(scale).addcmul_(x, share.view(scale.shape))
        return down, torch.mv(both.t(), flat), None


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype and x.dtype in (torch.float32, torch.float64):
            y: Tensor = _RmsNorm.apply(x, self.weight, self.eps)
            return y
        if x.dtype == self.weight.dtype:
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return nn.functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def rotary_tables(
    positions: Tensor, width: int, theta: float, yarn: float = 1.0, trained: int = 0
) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, T, D] for positions [B, T] (Su et al. 2021, half-split layout as in Llama); `yarn` is the
    factor by which the context was stretched beyond the `trained` one."""
    rates, warm = rotary_rates(width, theta, yarn, trained)
    angles = positions[:, None, :, None].float() * rates.to(positions.device)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    return (cos * warm, sin * warm) if warm != 1 else (cos, sin)


def rotary_rates(width: int, theta: float, yarn: float = 1.0, trained: int = 0) -> tuple[Tensor, float]:
    """Angles [D / 2] by which the pairs of channels turn from one position to the next, and the factor of cos and sin:
    the paper's temperature of the scores with YaRN, applied here as everyone does."""
    rates = theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    return (_stretched(rates, width, theta, yarn, trained), 0.1 * math.log(yarn) + 1) if yarn > 1 else (rates, 1.0)


def _stretched(rates: Tensor, width: int, theta: float, yarn: float, trained: int) -> Tensor:
    """YaRN (Peng et al. 2023): what turns more than 32 times in the trained context keeps its rate, what turns less
    than once is slowed by the factor, with a ramp over the channels between."""

    def channel(turns: float) -> float:
        return width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(channel(32)), 0), min(math.ceil(channel(1)), width - 1)
    ramp = (torch.arange(len(rates), device=rates.device) - low) / max(high - low, 0.001)
    return torch.lerp(rates, rates / yarn, ramp.clamp(0, 1))


class _Rotate(torch.autograd.Function):
    """The rotation in place of a copy and its inverse as gradient: half the time of the written-out formula."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        width = cos.shape[-1]
        low, high = slice(width // 2), slice(width // 2, width)
        y = x * cos if width == x.shape[-1] else torch.cat([x[..., :width] * cos, x[..., width:]], -1)
        y[..., low].addcmul_(x[..., high], sin[..., low], value=-1)
        y[..., high].addcmul_(x[..., low], sin[..., high])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grads[0], cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, T, D]; of its first channels where the tables are narrower than D."""
    y: Tensor = _Rotate.apply(x, cos.to(x.dtype), sin.to(x.dtype))
    return y


class _Depthwise(torch.autograd.Function):
    """y [B, T, C] of x [B, K-1+T, C], weight [C, K] and a bias [C]: y_t = bias + sum_j weight[:, j] x_{t+j}.

    On a CPU the depthwise convolution of images in channels-last order, which x is in, runs at the speed of memory, and
    so does the gradient of x, which is one too. The library's gradient of the weight does not; products and sums do.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _depthwise(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        (grad,), taps = grads, weight.shape[1]
        length = grad.shape[1]
        down = _depthwise(nn.functional.pad(grad, (0, 0, taps - 1, taps - 1)), weight.flip(1), None)
        each = [(grad * x[:, tap : tap + length]).sum((0, 1)) for tap in range(taps)]
        return down, torch.stack(each, 1), grad.sum((0, 1)) if ctx.needs_input_grad[2] else None


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        image = x.transpose(1, 2)[:, :, None]
        return nn.functional.conv2d(image, weight[:, None, None], bias, groups=len(weight))[:, :, 0].transpose(1, 2)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, place: Place, state: State | None = None,
                name: str = "conv") -> Tensor:  # fmt: skip
    """Depthwise causal convolution of x [B, T, C] with weight [C, K]: y_t = bias + sum_j weight[:, K-1-j] x_{t-j}.

    No tap reaches into another document. `state.held[name]` [B, K-1, C] holds the last inputs. 2 C K FLOPs a token.
    """
    taps, length = weight.shape[1], x.shape[1]
    past = None if state is None else state.held.get(name)
    whole = nn.functional.pad(x, (0, 0, taps - 1, 0)) if past is None else torch.cat([past, x], 1)
    if state is not None:
        state.held[name] = whole[:, length:]
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)

    def few(windows: Tensor) -> Tensor:  # [..., K, C] -> [..., C]
        y = (windows * weight.t()).sum(-2)
        return y if bias is None else y + bias

    y: Tensor = few(whole)[:, None] if length == 1 else _Depthwise.apply(whole, weight, bias)
    seam = place.once(("seam", taps), lambda: _seam(place, taps))
    if seam is not None:
        row, column, same = seam
        reach = torch.arange(taps, device=x.device)
        y = y.index_put((row, column), few(whole[row[:, None], column[:, None] + reach] * same[..., None].to(x.dtype)))
    return y


def _seam(place: Place, taps: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Row [N] and column [N] of the new positions within reach of an earlier document, and which of their taps [N, K]
    are of their own."""
    if place.owner is None:
        return None
    owner = nn.functional.pad(place.owner, (taps - 1, 0), value=-1)  # before the first position there is nothing
    same = owner[:, place.seen :].unfold(1, taps, 1) == owner[:, place.seen + taps - 1 :, None]
    row, column = (~same.all(-1)).nonzero(as_tuple=True)
    return (row, column, same[row, column]) if len(row) else None


class Factored(nn.Module):
    """A linear layer of low rank: high(low(x)), in the place of a `nn.Linear`."""

    def __init__(self, old: nn.Linear, rank: int) -> None:
        super().__init__()
        self.low = nn.Linear(old.in_features, rank, bias=False)
        self.high = nn.Linear(rank, old.out_features, bias=old.bias is not None)
        parts: list[Any] = [self, self.low, self.high]
        for part in parts:
            part._is_hf_initialized = True
        self.start(0.02)

    def start(self, std: float) -> None:
        """Normal weights, whose product has this standard deviation."""
        for part in (self.low, self.high):
            nn.init.normal_(part.weight, std=(std / self.low.out_features**0.5) ** 0.5)
        if self.high.bias is not None:
            nn.init.zeros_(self.high.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        y: Tensor = self.high(self.low(x))
        return y


def multiplications(part: nn.Module) -> int:
    """Multiply-adds of a token in a linear layer, factored or not."""
    return sum(weight.numel() for weight in part.parameters() if weight.ndim == 2)
