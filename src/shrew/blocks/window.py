"""`window`: causal softmax attention to the last `window` positions, this one included, at a cost linear in length.

Queries go in blocks of half a window; a block's keys are its own positions and the two blocks before. A dense mask
of the whole row would cost more than full attention does. Everything else, options included, is `attention`'s.

B rows, T new positions, H query heads, K key-value heads, D head width, N blocks of Q queries.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from shrew.blocks.attention import PAIRS, Attention, AttentionSpec, naive_attention
from shrew.blocks.layers import Place, Shape, State, additive
from shrew.spec import Meta, doc

BEFORE = 2  # blocks before its own that a block of queries sees


@dataclass(frozen=True, kw_only=True)
class WindowSpec(AttentionSpec):
    kind: str = "window"
    window: Annotated[int, Meta(ge=1)] = doc("positions that a token attends to, itself included", 128)


def naive_window(q: Tensor, k: Tensor, v: Tensor, owner: Tensor, window: int, **options: Any) -> Tensor:
    """The definition, one position at a time: q [B, H, T, D], k, v [B, K, T, D], owner [B, T]. The tests' oracle."""
    rows = []
    for t in range(q.shape[2]):
        seen = slice(max(0, t - window + 1), t + 1)
        allowed = (owner[:, seen] == owner[:, t : t + 1])[:, None, None]
        rows.append(naive_attention(q[:, :, t : t + 1], k[:, :, seen], v[:, :, seen], allowed, **options))
    return torch.cat(rows, 2)


class _Windows(torch.autograd.Function):
    """x [N, Q, K, D] -> [N, 3 Q, K, D]: every block behind its two predecessors, zeros before the first: a view of one
    copy. Its gradient adds the three up in place, in less than half the time of autograd's for overlapping views."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = torch.cat([x.new_zeros(BEFORE, *x.shape[1:]), x])
        return x.unfold(0, BEFORE + 1, 1).movedim(-1, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        parts = grads[0].unflatten(1, (BEFORE + 1, -1))
        total = parts[:, BEFORE].clone()
        for back in range(1, BEFORE + 1):
            total[:-back] += parts[back:, BEFORE - back]
        return total


class Window(Attention):
    def __init__(self, spec: WindowSpec, shape: Shape) -> None:
        super().__init__(spec, shape)
        self.window = spec.window
        self.block = max(1, -(-(spec.window - 1) // BEFORE))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, place: Place, state: State | None) -> Tensor:
        """`state` holds the keys and values of the last window - 1 positions."""
        if state is not None:
            k, v = self._extended(state, "keys", k), self._extended(state, "values", v)
        length, total = q.shape[2], k.shape[2]
        if length == 1:
            alike = None if place.owner is None else place.owner[:, -total:] == place.owner[:, -1:]
            return self.core(q, k, v, None if alike is None else alike[:, None, None])
        if length == total <= self.window:
            return self.causal(q, k, v, place)
        return self._local(q, k, v, place, total - length)

    def _extended(self, state: State, name: str, new: Tensor) -> Tensor:
        new = state.stored(new)
        whole = torch.cat([state.held[name], new], 2) if name in state.held else new
        state.held[name] = whole[:, :, max(0, whole.shape[2] - (self.window - 1)) :]
        return whole

    def _local(self, q: Tensor, k: Tensor, v: Tensor, place: Place, past: int) -> Tensor:
        """Attention of q [B, H, T, D] to k, v [B, K, past + T, D] in blocks."""
        rows, heads, length, width = q.shape
        count = -(-length // self.block)
        spare = count * self.block - length

        def blocks(x: Tensor, lead: int) -> Tensor:
            x = x.transpose(1, 2)
            if lead or spare:
                x = nn.functional.pad(x, (0, 0, 0, 0, lead, spare))
            return x.unflatten(1, (-1, self.block))

        def near(x: Tensor) -> Tensor:  # rows stand one behind the other, so that no key is copied; the mask parts them
            x = blocks(x, -past % self.block)
            own = x.shape[1]
            x = _Windows.apply(x.flatten(0, 1))
            return x.unflatten(0, (rows, own))[:, own - count :].flatten(0, 1).transpose(1, 2)

        q, k, v = blocks(q, 0).flatten(0, 1).transpose(1, 2), near(k), near(v)
        allowed = place.once(("window", self.window), lambda: self._allowed(place, past, count))
        if self.capped:
            step = max(1, PAIRS // (heads * self.block * k.shape[2]))
            y = torch.cat([self.core(*part) for part in zip(*(x.split(step) for x in (q, k, v, allowed)), strict=True)])
        else:
            bias = place.once(("window", self.window, q.dtype), lambda: additive(allowed, q.dtype))
            y = self.core(q, k, v, bias)
        return y.transpose(1, 2).reshape(rows, -1, heads, width)[:, :length].transpose(1, 2)

    def _allowed(self, place: Place, past: int, count: int) -> Tensor:
        """[B N, 1, Q, 3 Q], true where attention is allowed."""
        block, device = self.block, place.positions.device
        front, rows = BEFORE * block, len(place.positions)
        query, key = torch.arange(block, device=device)[:, None], torch.arange(-front, block, device=device)
        band = (key <= query) & (key > query - self.window)
        real = block * torch.arange(count, device=device)[:, None] + key >= -past
        allowed = (band & real[:, None]).expand(rows, -1, -1, -1)
        if place.owner is not None:
            spare = count * block - place.positions.shape[1]
            owner = nn.functional.pad(place.owner[:, place.seen - past :], (front - past, spare), value=-1)
            new, near = owner[:, front:].unflatten(1, (-1, block)), owner.unfold(1, front + block, block)
            allowed = allowed & (new[..., None] == near[:, :, None])
        return allowed.flatten(0, 1)[:, None]

    def init_state(self) -> Any:
        return State()

    def flops(self, context: int) -> int:
        """As of `attention`, of the pairs that its blocks compute."""
        return super().flops(min(context, (BEFORE + 1) * self.block))

    def state_bytes(self, context: int, element: int = 2) -> int:
        return super().state_bytes(min(context, self.window - 1), element)
