"""`linear`: linear attention whose state decays by one factor per head and position, computed in chunks.

Per head, with keys and queries of width N and values of width P:

    S_t = a_t S_{t-1} + k_t v_t^T        y_t = q_t S_t

The decay a_t comes from the token through a gate (simple GLA, Yang et al. 2023; the default), through a step size
(Mamba-2, Dao and Gu 2024), or is a constant of the head (RetNet, Sun et al. 2023, here without its rotary positions).
`MAMBA2` holds the settings that make the block Mamba-2. A decay for each key channel (full GLA) is left out: its chunks
need either as many exponentials as state elements or a second level of chunks.

B rows, T positions, L positions of a chunk, G groups that share queries and keys, H heads, R = H / G heads of a group.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init  # its functions leave alone what was loaded

from shrew.blocks.layers import Place, RMSNorm, Shape, State, causal_conv
from shrew.spec import Meta, doc

SPAN = 1024  # positions, all rows together, that are worked on at a time: bounds memory, and fits the caches
SPAN_GPU = 1 << 17


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    kind: str = "linear"
    heads: Annotated[int, Meta(ge=1)] = doc("heads", 4)
    state: Annotated[int, Meta(ge=1)] = doc("width of a head's keys and queries, the rows of its state", 64)
    head_width: Annotated[int, Meta(ge=1)] | None = doc("width of a head's values; default: model width / heads", None)
    groups: Annotated[int, Meta(ge=1)] | None = doc("groups of heads that share keys and queries; default: heads", None)
    decay: Literal["gate", "dt", "constant"] = doc(
        "what forgets: a gate (GLA), a step size that also scales the input (Mamba-2), a constant of the head (RetNet)",
        "gate",
    )
    conv: Annotated[int, Meta(ge=0, le=64)] = doc("taps of a causal convolution on values, keys, queries; 0: none", 0)
    conv_bias: bool = doc("a bias in the convolution", False)
    gate: Literal["after", "before", "none"] = doc("SiLU gate on the output: after its norm, before it, none", "after")
    norm_groups: Annotated[int, Meta(ge=1)] | None = doc("parts of the output normed apart; default: heads", None)
    skip: bool = doc("add each head's values, times a learned factor, to its output", False)
    bias: bool = doc("biases in the projections", False)
    chunk: Annotated[int, Meta(ge=1)] = doc("positions of a chunk; changes the cost, not the result", 64)

    def problem(self, width: int) -> str:
        """What is wrong with these settings at a model's width; empty when nothing is."""
        if self.head_width is None and width % self.heads:
            return f"width {width} is no multiple of {self.heads} heads"
        if self.heads % (self.groups or self.heads):
            return f"{self.heads} heads are no multiple of {self.groups} groups"
        inner = self.heads * (self.head_width or width // self.heads)
        if inner % (self.norm_groups or self.heads):
            return f"{inner} output channels are no multiple of {self.norm_groups} norm_groups"
        if self.conv_bias and not self.conv:
            return "conv_bias needs a convolution; set conv to its number of taps"
        return ""


MAMBA2 = LinearSpec(heads=8, state=64, head_width=64, groups=1, decay="dt", conv=4, conv_bias=True, gate="before",
                    norm_groups=1, skip=True)  # fmt: skip


def naive_ssd(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None = None,
              owner: Tensor | None = None, before: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, position by position. The oracle of the tests; arguments as `ssd`."""
    rows, length, heads, width = v.shape
    share = heads // q.shape[2]
    q, k = q.repeat_interleave(share, 2), k.repeat_interleave(share, 2)
    held = v.new_zeros(rows, heads, q.shape[3], width) if state is None else state.to(v.dtype)
    last, outputs = before, []
    for t in range(length):
        if owner is not None:
            held = held if last is None else held * (owner[:, t] == last)[:, None, None, None]
            last = owner[:, t]
        held = held * log_decay[:, t, :, None, None].exp() + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, None, :] @ held)[:, :, 0])
    return torch.stack(outputs, 1), held


def ssd(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None = None, owner: Tensor | None = None,
        before: Tensor | None = None, chunk: int = 64) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [B, T, H, P] of the recurrence above, and its last state [B, H, N, P].

    q, k [B, T, G, N]; v [B, T, H, P], head h of group h // R; log_decay [B, T, H], finite and at most 0; `state` is
    that before the first position; `owner` [B, T] numbers the documents of the positions (contiguous), `before` [B]
    that of the state. Matmuls run in v's type, decays and states in float32 at least. Linear in T, in bounded memory:
    beside inputs and output, only one state per SPAN is kept for the gradients.
    """
    exact = torch.promote_types(v.dtype, torch.float32)
    q, k, log_decay = q.to(v.dtype), k.to(v.dtype), log_decay.to(exact)
    if v.shape[1] == 1:
        return _step(q, k, v, log_decay, state, owner, before)
    y, last = _Ssd.apply(q, k, v, log_decay, state, owner, before, chunk)
    return y, last


def _step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, owner: Tensor | None,
          before: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ssd` of one position, as in decoding: the recurrence itself, with none of the work of chunks."""
    share, exact = v.shape[2] // q.shape[2], log_decay.dtype
    q, k = (x[:, 0].repeat_interleave(share, 1) if share > 1 else x[:, 0] for x in (q, k))
    held = k[..., None].to(exact) * v[:, 0, :, None].to(exact)
    if state is not None:
        kept = log_decay[:, 0].exp()
        if owner is not None and before is not None:
            kept = kept * (owner[:, 0] == before)[:, None]
        held = torch.addcmul(held, state.to(exact), kept[..., None, None])
    return (q[:, :, None] @ held.to(v.dtype)).transpose(1, 2), held


class _Decays(NamedTuple):
    pairs: Tensor  # [B, n, H, L, L]: from position j to i >= j of the chunk; 1 for the rest
    read: Tensor  # [B, n, L, H, 1]: from the state before the chunk to a position
    write: Tensor  # [B, n, L, H, 1]: from a position to the state after the chunk
    carry: Tensor  # [B, n, H]: from the state before the chunk to that after it


def _decays(logs: Tensor, owner: Tensor | None, before: Tensor | None) -> _Decays:
    """logs [B, n, L, H], owner [B, n, L], before [B]. Every exponent is a sum of decays, so nothing overflows."""
    total = logs.cumsum(2)
    by_head = total.transpose(2, 3).contiguous()
    pairs = (by_head[..., :, None] - by_head[..., None, :]).clamp_(-80, 0).exp_()  # exp is slow where it gives 0
    read, write = total.exp()[..., None], (total[:, :, -1:] - total).exp()[..., None]
    if owner is not None:
        first = owner[:, :1, 0] if before is None else before[:, None]
        previous = torch.cat([first, owner[:, :-1, -1]], 1)[..., None]
        read *= (owner == previous)[..., None, None]
        write *= (owner == owner[..., -1:])[..., None, None]
    return _Decays(pairs, read, write, read[:, :, -1, :, 0])


def _split(x: Tensor, parts: int) -> Tensor:
    """[B, n, L, ...] -> [B n parts, L, width of a part], for batched matmuls."""
    return x.reshape(*x.shape[:3], parts, -1).transpose(2, 3).flatten(0, 2)


def _join(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_split`: the shape of `like`."""
    rows, chunks, length = like.shape[:3]
    return x.view(rows, chunks, -1, length, x.shape[-1]).transpose(2, 3).reshape(like.shape)


def _scan(added: Tensor, carry: Tensor, state: Tensor, backward: bool = False) -> tuple[Tensor, Tensor]:
    """The recurrence over chunks, state <- carry state + added: the states that the chunks find, and the last one.

    added [B, n, G, N, R, P], carry [B, n, H], state [B, G, N, R, P]. A loop, but of T / L steps of one small addcmul.
    """
    factors = carry.view(*carry.shape[:2], added.shape[2], 1, -1, 1)
    found = torch.empty_like(added)
    order = range(added.shape[1])
    for index in reversed(order) if backward else order:
        found[:, index] = state
        state = torch.addcmul(added[:, index], state, factors[:, index])
    return found, state


class _Span:
    """What forward and backward both need of n chunks of L positions from `at` on."""

    def __init__(self, at: int, n: int, length: int, q: Tensor, k: Tensor, v: Tensor, logs: Tensor,
                 owner: Tensor | None, before: Tensor | None) -> None:  # fmt: skip
        self.at, self.shape, self.groups, self.heads = at, (n, length), q.shape[2], v.shape[2]
        self.v = self.cut(v)
        self.q, self.k, self.by_head = (_split(self.cut(q), self.groups), _split(self.cut(k), self.groups),
                                        _split(self.v, self.heads))  # fmt: skip
        if owner is not None and at:
            before = owner[:, at - 1]
        documents = None if owner is None else self.cut(owner)
        self.decays = _decays(self.cut(logs), documents, before)
        self.allowed = torch.ones(length, length, dtype=v.dtype, device=v.device).tril()
        if documents is not None:  # [B n, 1, L, L], else [L, L]
            same = documents[..., :, None] == documents[..., None, :]
            self.allowed = (self.allowed * same).flatten(0, 1)[:, None]
        self.scores = self.causal(self.q @ self.k.transpose(1, 2))
        self.written = _split(self.v * self.decays.write.to(v.dtype), self.groups)

    def cut(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B, n, L, ...]"""
        return x.narrow(1, self.at, self.shape[0] * self.shape[1]).unflatten(1, self.shape)

    def causal(self, scores: Tensor) -> Tensor:
        """Scores [B n G, L, L], 0 where the second position is later or of another document; in place."""
        scores.view(-1, self.groups, *scores.shape[1:]).mul_(self.allowed)
        return scores

    def weigh(self, scores: Tensor) -> Tensor:
        """Scores [B n G or B n H, L, L] times the decays between positions: [B n H, L, L]."""
        length = scores.shape[-1]
        weighed = self.decays.pairs.view(scores.shape[0], -1, length, length) * scores[:, None]
        return weighed.view(-1, length, length)

    def states(self, x: Tensor) -> Tensor:
        """[B n G, N, R P] -> [B, n, G, N, R, P] in the type of states."""
        rows, n, _, heads, width = self.v.shape
        x = x.to(self.decays.carry.dtype)
        return x.view(rows, n, self.groups, x.shape[1], heads // self.groups, width)

    def matrices(self, states: Tensor) -> Tensor:
        """The inverse of `states`, in the type of matmuls."""
        return states.to(self.v.dtype).flatten(4).flatten(0, 2)

    def scan(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The states that the chunks find, and the one that they leave."""
        return _scan(self.states(self.k.transpose(1, 2) @ self.written), self.decays.carry, state)


def _cuts(rows: int, length: int, chunk: int, on_cpu: bool) -> list[tuple[int, int, int]]:
    """(first position, chunks, positions of a chunk) of each span; what is left over is a chunk of its own."""
    chunk = min(chunk, length)
    whole, rest = divmod(length, chunk)
    most = max(1, (SPAN if on_cpu else SPAN_GPU) // (rows * chunk))
    cuts = [(at * chunk, min(most, whole - at), chunk) for at in range(0, whole, most)]
    return [*cuts, (length - rest, 1, rest)] if rest else cuts


class _Ssd(torch.autograd.Function):
    """Gradients by hand: autograd would keep every decay between two positions and walk over it several times.

    The loss feels a log decay through what crosses that position: the gradient of a chunk's cumulated log decay is, at
    position i, what i has read less what others have read of it, y_i . dy_i - v_i . dv_i.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, logs: Tensor, state: Tensor | None,
                owner: Tensor | None, before: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:  # fmt: skip
        rows, length, heads, width = v.shape
        shape = (rows, q.shape[2], heads // q.shape[2], q.shape[3], width)
        held = logs.new_zeros(shape) if state is None else state.to(logs.dtype).view(shape)
        held = held.transpose(2, 3)  # [B, G, N, R, P]: heads side by side, so that one matmul serves a group
        y, kept = torch.empty_like(v, memory_format=torch.contiguous_format), []
        with torch.autocast(v.device.type, enabled=False):
            for at, n, size in _cuts(rows, length, chunk, v.device.type == "cpu"):
                span = _Span(at, n, size, q, k, v, logs, owner, before)
                kept.append(held)
                found, held = span.scan(held)
                out = span.cut(y)
                out.copy_(_join(span.weigh(span.scores).to(v.dtype) @ span.by_head, out))
                if at or n > 1 or state is not None:
                    out.addcmul_(_join(span.q @ span.matrices(found), out), span.decays.read.to(v.dtype))
        ctx.save_for_backward(q, k, v, logs, owner, before, y, *kept)
        ctx.chunk, ctx.type = chunk, None if state is None else state.dtype
        ctx.set_materialize_grads(False)
        return y, held.transpose(2, 3).reshape(rows, heads, -1, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, logs, owner, before, y, *kept = ctx.saved_tensors
        dy = torch.zeros_like(y) if dy is None else dy
        dheld = torch.zeros_like(kept[0])
        if dlast is not None:
            dheld = dlast.unflatten(1, (q.shape[2], -1)).transpose(2, 3)
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, logs)]
        cuts = _cuts(len(v), v.shape[1], ctx.chunk, v.device.type == "cpu")
        with torch.autocast(v.device.type, enabled=False):
            for (at, n, size), held in zip(reversed(cuts), reversed(kept), strict=True):
                span = _Span(at, n, size, q, k, v, logs, owner, before)
                dheld = _span_backward(span, held, dheld, y, dy, *grads)
        dstate = None if ctx.type is None else dheld.transpose(2, 3).flatten(1, 2).to(ctx.type)
        return *grads, dstate, None, None, None


def _span_backward(span: _Span, held: Tensor, dleft: Tensor, y: Tensor, dy: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
                   dlogs: Tensor) -> Tensor:  # fmt: skip
    """Fills the span's part of the gradients; gives that of the state before it, `held`, from that of the state after
    it, `dleft`."""
    found, left = span.scan(held)
    y, dy, dq, dk, dv, dlogs = (span.cut(x) for x in (y, dy, dq, dk, dv, dlogs))
    read, write = span.decays.read.to(dy.dtype), span.decays.write.to(dy.dtype)
    by_head, by_group = _split(dy, span.heads), _split(dy * read, span.groups)
    dends, dheld = _scan(span.states(span.q.transpose(1, 2) @ by_group), span.decays.carry, dleft, backward=True)
    starts, ends = span.matrices(found), span.matrices(dends)
    scores = span.weigh(by_head @ span.by_head.transpose(1, 2))
    scores = span.causal(scores.view(len(span.q), -1, *scores.shape[1:]).sum(1).to(dy.dtype))
    dq.copy_(_join((scores @ span.k).baddbmm_(by_group, starts.transpose(1, 2)), dq))
    dk.copy_(_join((scores.transpose(1, 2) @ span.q).baddbmm_(span.written, ends.transpose(1, 2)), dk))
    dv.copy_(_join(span.weigh(span.scores).to(dy.dtype).transpose(1, 2) @ by_head, dv))
    dv.addcmul_(_join(span.k @ ends, dv), write)
    exact = dlogs.dtype
    felt = (y.to(exact) * dy.to(exact)).sum(-1) - (span.v.to(exact) * dv.to(exact)).sum(-1)
    felt[:, :, -1] += (torch.cat([found[:, 1:], left[:, None]], 1) * dends).sum((3, 5)).flatten(2)
    # a log decay is in the sums of its own position and the later ones; exactly nothing comes from other documents
    later = span.allowed.to(exact).transpose(-1, -2)
    later = later if later.ndim == 2 else later.view(*felt.shape[:2], *later.shape[2:])
    dlogs.copy_(later @ felt)
    return dheld


class Linear(nn.Module):
    """[gate, values, keys, queries, decay] = in_proj(x), in Mamba-2's order; then a convolution of the middle three,
    the recurrence, and a gated norm."""

    def __init__(self, spec: LinearSpec, shape: Shape) -> None:
        super().__init__()
        self.spec = spec
        self.heads, self.groups = spec.heads, spec.groups or spec.heads
        self.head_width = spec.head_width or shape.width // spec.heads
        self.inner, self.keys = self.heads * self.head_width, self.groups * spec.state
        self.parts = [self.inner if spec.gate != "none" else 0, self.inner + 2 * self.keys,
                      self.heads if spec.decay != "constant" else 0]  # fmt: skip
        self.in_proj = nn.Linear(shape.width, sum(self.parts), bias=spec.bias)
        self.conv_weight = nn.Parameter(torch.empty(self.parts[1], spec.conv)) if spec.conv else None
        self.conv_bias = nn.Parameter(torch.empty(self.parts[1])) if spec.conv_bias else None
        self.decay_bias = nn.Parameter(torch.empty(self.heads)) if spec.decay != "constant" else None
        self.A_log = nn.Parameter(torch.empty(self.heads)) if spec.decay == "dt" else None
        self.D = nn.Parameter(torch.empty(self.heads)) if spec.skip else None
        self.norm = RMSNorm(self.inner, shape.eps)
        self.out_proj = nn.Linear(self.inner, shape.width, bias=spec.bias)

    def forward(self, x: Tensor, place: Place, state: State | None = None) -> Tensor:
        """x [B, T, d] -> [B, T, d]. `state.held`: the matrices of the heads, and the last inputs of the convolution."""
        rows, length, _ = x.shape
        gate, mixed, raw = self.in_proj(x).split(self.parts, -1)
        if self.conv_weight is not None:
            mixed = nn.functional.silu(causal_conv(mixed, self.conv_weight, self.conv_bias, place, state))
        if torch.is_autocast_enabled(x.device.type):
            mixed = mixed.to(torch.get_autocast_dtype(x.device.type))
        v, k, q = mixed.split([self.inner, self.keys, self.keys], -1)
        v = v.unflatten(-1, (self.heads, self.head_width))
        k, q = (part.unflatten(-1, (self.groups, self.spec.state)) for part in (k, q))
        logs, step = self._log_decay(raw)
        values = v
        if step is None:
            q = q * self.spec.state**-0.5
        else:
            values = v * step[..., None].to(v.dtype)
        y, last = ssd(q, k, values, logs.expand(rows, length, self.heads), None if state is None else
                      state.held.get("matrix"), place.new, place.before, self.spec.chunk)  # fmt: skip
        if state is not None:
            state.held["matrix"] = last
        if self.D is not None:
            y = y + v * self.D[:, None].to(v.dtype)
        return self.out_proj(self._gated(y.flatten(2), gate).to(x.dtype))

    def _log_decay(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """raw [B, T, H] -> log decays in float32 at least, and the step sizes that scale the inputs of Mamba-2."""
        if self.decay_bias is None:  # RetNet: 1 - 1/32, 1 - 1/64, ...
            return torch.log1p(-(2.0 ** -(5 + torch.arange(self.heads, device=raw.device)))), None
        exact = torch.promote_types(raw.dtype, torch.float32)
        raw = raw.to(exact) + self.decay_bias.to(exact)
        if self.A_log is None:
            return nn.functional.logsigmoid(raw) / 16, None
        step = nn.functional.softplus(raw)
        return -step * self.A_log.to(exact).exp(), step

    def _gated(self, y: Tensor, gate: Tensor) -> Tensor:
        """The norm over each of `norm_groups` parts of y [B, T, inner], in float32, and the gate before or after it."""
        exact = torch.promote_types(y.dtype, torch.float32)
        y = y.to(exact)
        if self.spec.gate == "before":
            y = y * nn.functional.silu(gate.to(exact))
        parts = y.unflatten(-1, (self.spec.norm_groups or self.heads, -1))
        y = nn.functional.rms_norm(parts, parts.shape[-1:], eps=self.norm.eps).flatten(-2) * self.norm.weight.to(exact)
        return y * nn.functional.silu(gate.to(exact)) if self.spec.gate == "after" else y

    def start(self, std: float, deep: float) -> None:
        """Initialise: normal with `std`, and with `deep` what adds to the residual stream; decays over many spans."""
        nn.init.normal_(self.in_proj.weight, std=std)
        nn.init.normal_(self.out_proj.weight, std=deep)
        nn.init.ones_(self.norm.weight)
        for bias in (self.in_proj.bias, self.out_proj.bias, self.conv_bias):
            if bias is not None:
                nn.init.zeros_(bias)
        if self.conv_weight is not None:
            nn.init.uniform_(self.conv_weight, -(self.spec.conv**-0.5), self.spec.conv**-0.5)
        if self.D is not None:
            nn.init.ones_(self.D)
        if self.A_log is not None and self.decay_bias is not None:  # Mamba-2's ranges: A 1 to 16, dt 0.001 to 0.1
            init.copy_(self.A_log, torch.linspace(1, 16, self.heads).log())
            step = torch.exp(torch.empty(self.heads).uniform_(-6.9, -2.3))
            init.copy_(self.decay_bias, step.expm1().log())
        elif self.decay_bias is not None:  # heads that remember 16 to 1024 positions
            span = torch.logspace(4, 10, self.heads, base=2)
            init.copy_(self.decay_bias, -(16 / span).expm1().log())

    def init_state(self) -> State:
        return State()

    def flops(self, context: int) -> int:
        """Multiply-adds times two, per token: projections; pairs within a chunk; a state written, and read where there
        are several chunks."""
        linear = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        pairs = min(self.spec.chunk, context) * (self.keys + self.inner)
        states = self.spec.state * self.inner * (1 if context <= self.spec.chunk else 2)
        taps = self.parts[1] * self.spec.conv
        return 2 * (linear + taps + pairs + states)

    def state_bytes(self, context: int, element: int = 2) -> int:
        """The matrices are float32 at least."""
        taps = max(0, self.spec.conv - 1) * self.parts[1]
        return self.spec.state * self.inner * max(4, element) + taps * element
