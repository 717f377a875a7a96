"""`delta`: the gated delta rule (Yang, Kautz and Hatamizadeh 2024), as Qwen3-Next's linear attention has it.

A head keeps a matrix S that maps keys to values. At each step it forgets a share of S, then corrects what S says of
the new key:  S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,  y_t = S_t^T q_t.  Inside a chunk the corrections
depend on each other through one triangular system (Yang et al. 2024); between chunks S takes one small matmul.

B rows, T new positions, H value heads, K key heads (H is a multiple of K; R = H / K), D key width, E value width,
N chunks of L positions.
"""

import math
import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from shrew.blocks.layers import Place, RMSNorm, Shape, State, causal_conv
from shrew.spec import Meta, doc

SPAN = 1024  # positions whose chunks are worked on at once: bounds the memory of a long forward pass


@dataclass(frozen=True, kw_only=True)
class DeltaSpec:
    kind: str = "delta"
    heads: Annotated[int, Meta(ge=1)] = doc("value heads", 4)
    key_heads: Annotated[int, Meta(ge=1)] | None = doc("key heads, shared by groups of heads; default: heads", None)
    key_width: Annotated[int, Meta(ge=1)] | None = doc("width of a key; default: model width / heads", None)
    value_width: Annotated[int, Meta(ge=1)] | None = doc("width of a value; default: key_width", None)
    conv: Annotated[int, Meta(ge=0)] = doc("taps of the causal convolution of queries, keys, values; 0: none", 4)
    gate: bool = doc("output gate, silu(z) after the norm", True)
    decay: bool = doc("forget by a learned share at each step; false: plain DeltaNet", True)
    chunk: Annotated[int, Meta(ge=1)] | None = doc(
        "positions of a chunk: speed only; default: 32, or 64 where keys are wider than 64", None
    )

    def problem(self, width: int) -> str:
        """What is wrong with these settings at a model's width; empty when nothing is."""
        if self.heads % (self.key_heads or self.heads):
            return f"{self.heads} heads are no multiple of {self.key_heads} key_heads"
        if self.key_width is None and width % self.heads:
            return f"width {width} is no multiple of {self.heads} heads; set key_width"
        return ""


def naive_delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, owner: Tensor | None = None
) -> Tensor:
    """The definition, step by step: q, k [B, T, K, D], v [B, T, H, E], beta and decay (logs) [B, T, H], owner [B, T]
    -> y [B, T, H, E]. The oracle of the tests."""
    share = v.shape[2] // k.shape[2]
    q, k = q.repeat_interleave(share, 2), k.repeat_interleave(share, 2)
    state, found = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3]), []
    for t in range(v.shape[1]):
        if owner is not None and t:
            state = state * (owner[:, t] == owner[:, t - 1])[:, None, None, None]
        if decay is not None:
            state = state * decay[:, t, :, None, None].exp()
        said = torch.einsum("bhd,bhde->bhe", k[:, t], state)
        state = state + torch.einsum("bhd,bhe->bhde", k[:, t], beta[:, t, :, None] * (v[:, t] - said))
        found.append(torch.einsum("bhd,bhde->bhe", q[:, t], state))
    return torch.stack(found, 1)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, chunk: int,
    state: Tensor | None = None, owner: Tensor | None = None, before: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`naive_delta` by chunks -> y [B, T, H, E] and the state [B, H, D, E] after it. `state` is the one before, which
    only document `before` [B] may read."""
    if state is None:
        state = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    if owner is not None and before is None:
        before = owner[:, 0]
    if v.shape[1] == 1:
        if owner is not None and before is not None:
            state = state * (owner[:, 0] == before)[:, None, None, None]
        return _step(q, k, v, beta, decay, state)
    step = max(SPAN // chunk, 1) * chunk
    # by `split`: slices would each fill a gradient of the whole length, which is quadratic
    count = -(-v.shape[1] // step)
    parts: list[Any] = [[None] * count if x is None else x.split(step, 1) for x in (q, k, v, beta, decay, owner)]
    found = []
    for asked, keys, values, strength, log, own in zip(*parts, strict=True):
        y, state = _span(asked, keys, values, strength, log, chunk, state, own, before)
        before = None if own is None else own[:, -1]
        found.append(y)
    return torch.cat(found, 1), state


def _step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One position, T = 1."""
    share = v.shape[2] // k.shape[2]
    q, k = (part.transpose(1, 2).repeat_interleave(share, 1) for part in (q, k))  # [B, H, 1, D]
    v, beta = v.transpose(1, 2), beta.transpose(1, 2)[..., None]  # [B, H, 1, E], [B, H, 1, 1]
    if decay is not None:
        state = state * decay.transpose(1, 2)[..., None].exp()
    state = state + k.mT @ (beta * (v - k @ state))
    return (q @ state).transpose(1, 2), state


def _span(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, chunk: int,
    state: Tensor, owner: Tensor | None, before: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`delta_rule` with all chunks at once, but for the states between them."""
    rows, length, groups, width = k.shape
    heads, out = v.shape[2:]
    size = min(chunk, length)
    count = -(-length // size)

    def chunks(x: Tensor) -> Tensor:  # [B, T, K R, ...] -> [N, B, K, R, L, ...]; what pads the last one writes nothing
        x = nn.functional.pad(x, (0, 0) * (x.ndim - 2) + (0, count * size - length))
        x = x.view(rows, count, size, groups, x.shape[2] // groups, *x.shape[3:])
        return x.permute(1, 0, 3, 4, 2, *range(5, x.ndim)).contiguous()

    q, k, v, beta = chunks(q), chunks(k), chunks(v), chunks(beta)[..., None]
    allowed = torch.ones(size, size, dtype=torch.bool, device=k.device).tril()
    if owner is not None:
        places = torch.arange(count * size, device=k.device).clamp(max=length - 1)
        own = owner[:, places].view(rows, count, size).transpose(0, 1)[:, :, None, None]  # [N, B, 1, 1, L]
        allowed = allowed & (own[..., :, None] == own[..., None, :])
    # pairs [L, L]: what is left at i of what was written at j; reach [L, 1]: of the chunk's first state at i;
    # left [L, 1]: of what was written at j when the chunk ends; stay [1, 1]: of the first state then.
    if decay is None:
        pairs = allowed.to(v.dtype)
        reach = left = stay = v.new_ones(1, 1)
    else:
        total = chunks(decay).cumsum(-1)
        pairs = (total[..., :, None] - total[..., None, :]).masked_fill(~allowed, float("-inf")).exp()
        total, end = total[..., None], total[..., -1:, None]
        reach, left, stay = total.exp(), (end - total).exp(), end.exp()
    if owner is not None and before is not None:
        last = own[..., -1:]
        past = torch.cat([before.view(1, rows, 1, 1, 1), last[:-1]])  # the document that wrote the first state
        reach, left = reach * (own == past)[..., None], left * (own == last)[..., None]
        stay = stay * (last == past)[..., None]

    # What each position writes if the first state is S:  fresh - lost S.
    keys = k * beta
    written = torch.linalg.solve_triangular(
        (keys @ k.mT) * pairs, torch.cat([v * beta, keys * reach], -1), upper=False, unitriangular=True
    )
    # The next state is then  add + keep S.
    add, keep = ((k * left).mT @ written).split([out, width], -1)
    keep = stay * torch.eye(width, dtype=v.dtype, device=v.device) - keep
    states, state = [], state.flatten(0, 1)
    for more, kept in zip(add.flatten(1, 3).unbind(), keep.flatten(1, 3).unbind(), strict=True):
        states.append(state)
        state = torch.baddbmm(more, kept, state)
    seen = torch.stack(states).view(add.shape)
    fresh, lost = written.split([out, width], -1)
    y = ((q @ k.mT) * pairs) @ (fresh - lost @ seen) + (q * reach) @ seen
    y = y.permute(1, 0, 4, 2, 3, 5).reshape(rows, count * size, heads, out)
    return y[:, :length], state.view(rows, heads, width, out)


@cache
def _kernel() -> Any:
    """The same on CUDA from flash-linear-attention, where that is installed."""
    if find_spec("fla") is None:
        return None
    kernel = import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    print("delta: fla kernels", file=sys.stderr)
    return kernel


class Delta(nn.Module):
    def __init__(self, spec: DeltaSpec, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.spec = spec
        self.heads, self.key_heads = spec.heads, spec.key_heads or spec.heads
        self.key_width = spec.key_width or width // spec.heads
        self.value_width = spec.value_width or self.key_width
        self.chunk = spec.chunk or (32 if self.key_width <= 64 else 64)
        keys, values = self.key_heads * self.key_width, self.heads * self.value_width
        self.sizes, self.counts = (keys, keys, values), (self.key_heads, self.key_heads, self.heads)
        self.qkv_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.conv = nn.Parameter(torch.empty(sum(self.sizes), spec.conv)) if spec.conv else None
        self.b_proj = nn.Linear(width, self.heads, bias=False)
        self.a_proj = nn.Linear(width, self.heads, bias=False) if spec.decay else None
        self.A_log = nn.Parameter(torch.empty(self.heads)) if spec.decay else None
        self.dt_bias = nn.Parameter(torch.empty(self.heads)) if spec.decay else None
        self.g_proj = nn.Linear(width, values, bias=False) if spec.gate else None
        self.o_norm = RMSNorm(self.value_width, shape.eps)
        self.o_proj = nn.Linear(values, width, bias=False)

    def forward(self, x: Tensor, place: Place, state: State | None = None) -> Tensor:
        """x [B, T, d] -> [B, T, d]. `state` holds the convolution's last inputs and S [B, H, D, E] (`rule`).

        From the convolution on, all is float32 at least: S sums over the whole text."""
        mixed, beta = self.qkv_proj(x), self.b_proj(x)
        low, exact = mixed.dtype, torch.promote_types(x.dtype, torch.float32)
        if self.conv is not None:
            mixed = nn.functional.silu(causal_conv(mixed, self.conv, None, place, state))
        q, k, v = (part.unflatten(-1, (count, -1)).to(exact)
                   for part, count in zip(mixed.split(self.sizes, -1), self.counts, strict=True))  # fmt: skip
        q, k, beta = _unit(q) * self.key_width**-0.5, _unit(k), beta.to(exact).sigmoid()
        decay = None
        if self.a_proj is not None and self.A_log is not None:
            decay = -self.A_log.to(exact).exp() * nn.functional.softplus(self.a_proj(x).to(exact) + self.dt_bias)
        past = None if state is None else state.held.get("rule")
        fits = x.is_cuda and x.shape[1] > 1 and low != exact and place.owner is None
        kernel = _kernel() if fits else None
        with torch.autocast(x.device.type, enabled=False):
            if kernel is not None:
                q, k = (part.to(low).repeat_interleave(self.heads // self.key_heads, 2) for part in (q, k))
                decay = torch.zeros_like(beta) if decay is None else decay
                y, last = kernel(q, k, v.to(low), g=decay, beta=beta, scale=1.0, initial_state=past,
                                 output_final_state=True)  # fmt: skip
            else:
                y, last = delta_rule(q, k, v, beta, decay, self.chunk, past, place.new, place.before)
        if state is not None:
            state.held["rule"] = last
        y = self.o_norm(y.to(exact)).flatten(2)
        if self.g_proj is not None:
            y = y * nn.functional.silu(self.g_proj(x).to(exact))
        return self.o_proj(y.to(x.dtype))

    def start(self, std: float, deep: float) -> None:
        """Initialise: normal with `std`, and with `deep` what adds to the residual stream; decays as in Mamba-2 (Dao
        and Gu 2024): heads begin with memories of one to a thousand steps."""
        for part in (self.qkv_proj, self.b_proj, self.a_proj, self.g_proj):
            if part is not None:
                nn.init.normal_(part.weight, std=std)
        nn.init.normal_(self.o_proj.weight, std=deep)
        nn.init.ones_(self.o_norm.weight)
        if self.conv is not None:
            nn.init.uniform_(self.conv, -(self.spec.conv**-0.5), self.spec.conv**-0.5)
        if self.A_log is not None and self.dt_bias is not None:
            with torch.no_grad():
                self.A_log.uniform_(1, 16).log_()
                step = torch.empty_like(self.dt_bias).uniform_(math.log(0.001), math.log(0.1)).exp()
                self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus(dt_bias) = step

    def init_state(self) -> State:
        return State()

    def flops(self, context: int) -> int:
        """Multiply-adds times two, per token, the triangular system among them."""
        parts = (self.qkv_proj, self.b_proj, self.a_proj, self.g_proj, self.o_proj)
        linear = sum(part.weight.numel() for part in parts if part is not None)
        size, key, value = min(self.chunk, context), self.key_width, self.value_width
        inside = size * (key + value) + size * (key + value) / 2  # keys with keys, pairs with values; the system
        states = key * (key + value) + key * key * value / size + 2 * key * value
        conv = self.spec.conv * sum(self.sizes)
        return round(2 * (linear + conv + self.key_heads * size * key + self.heads * (inside + states)))

    def state_bytes(self, context: int, element: int = 2) -> int:
        conv = max(self.spec.conv - 1, 0) * sum(self.sizes) * element
        return conv + self.heads * self.key_width * self.value_width * max(element, 4)


def _unit(x: Tensor) -> Tensor:
    """x / |x| over the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
