"""`memory`: softmax attention inside a segment and a linear memory of the segments before it, behind one learned gate.

The attention of White-Basilisk (arXiv 2507.08540), a form of Infini-attention (Munkhdalai et al., arXiv 2404.07143).
With phi(x) = ELU(x) + 1, per head and segment, memory M [D, D] and z [D] zero where a document starts:

    A_mem   = phi(Q) M / (phi(Q) z + eps)                  read before the update, so nothing comes from the future
    M, z    = M + phi(K)^T V,  z + sum phi(K)
    A_local = softmax(Q K^T / sqrt(D) + causal mask) V     inside the segment
    O       = sigmoid(beta) A_mem + (1 - sigmoid(beta)) A_local

Segments are counted from each document's start, so packed, padded and cached documents are cut as if alone. Rotary
positions turn Q and K of A_local only: the memory holds no positions, as in Infini-attention.

Bounded or accumulating. White-Basilisk processes all segments inside the layer, keeps their outputs and applies the
gate "once on the accumulated outputs": O(T d) + O(D^2) memory. Infini-attention streams over the segments and carries
M and z alone: O(D^2), whatever the length. The gate acts on each position by itself, so both give the same numbers
(a test holds them to it): `accumulate` changes what is in memory, never what comes out. Streaming is the default.
Neither forgets. M and z grow with the length but A_mem does not, as it is a weighted mean of earlier values (phi > 0),
and sums of whole segments in float32 lose nothing before billions of tokens; so there is no decay.

B rows, T new positions, H query heads, G key-value heads, D head width, C segment, n segments or blocks.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor, nn

from shrew.blocks.attention import AttentionSpec
from shrew.blocks.layers import Place, RMSNorm, Shape, State, rotary_tables, rotate
from shrew.spec import Meta, doc

EPS = 1e-6
STRETCH = 4096  # positions computed at once; more segments in one matmul gain nothing


@dataclass(frozen=True, kw_only=True)
class MemorySpec:
    kind: str = "memory"
    heads: Annotated[int, Meta(ge=1)] = doc("query heads", 4)
    kv_heads: Annotated[int, Meta(ge=1)] | None = doc("key-value heads (grouped queries); default: heads", None)
    head_width: Annotated[int, Meta(ge=2)] | None = doc("width of a head; default: model width / heads", None)
    qk_norm: bool = doc("RMS norm on queries and keys (Henry et al. 2020)", False)
    rope_theta: Annotated[float, Meta(gt=0)] = doc("base of the rotary frequencies inside a segment", 10000.0)
    segment: Annotated[int, Meta(ge=2)] = doc("positions of a segment", 256)
    gate: Literal["layer", "head"] = doc("one learned gate for the layer (White-Basilisk) or for each head", "layer")
    accumulate: bool = doc("gate once on all segments' outputs, as the paper does: same numbers, more memory", False)

    def problem(self, width: int) -> str:
        """What is wrong with these settings at a model's width; empty when nothing is."""
        return AttentionSpec(heads=self.heads, kv_heads=self.kv_heads, head_width=self.head_width).problem(width)


class Carry(NamedTuple):
    """What one stretch of positions leaves to the next."""

    k: Tensor | None = None  # [B, G, up to C - 1, D]: the last keys, not rotated
    v: Tensor | None = None  # [B, G, up to C - 1, D]
    memory: Tensor | None = None  # [B, G, D, D + 1]: M and, as its last column, z; None while it is empty


class Runs(NamedTuple):
    """Where the document and the segment of each position start, [B, S]."""

    document: Tensor
    segment: Tensor


def phi(x: Tensor) -> Tensor:
    """ELU(x) + 1, in float32 at least."""
    return nn.functional.elu(x.to(torch.promote_types(x.dtype, torch.float32))) + 1


def naive_memory(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, segment: int, theta: float, owner: Tensor | None = None
) -> Tensor:
    """The definition, position by position: the oracle of the tests.

    q [B, H, T, D], k and v [B, G, T, D], gate [H] in 0..1, owner [B, T] -> [B, H, T, D]."""
    rows, heads, length, width = q.shape
    k, v = (part.repeat_interleave(heads // part.shape[1], 1) for part in (k, v))
    cos, sin = (part[0, 0] for part in rotary_tables(torch.arange(segment)[None], width, theta))
    found = []
    for row in range(rows):
        for t in range(length):
            if t == 0 or (owner is not None and owner[row, t] != owner[row, t - 1]):
                first, memory, z = t, q.new_zeros(heads, width, width), q.new_zeros(heads, width)
            elif (t - first) % segment == 0:
                for i in range(t - segment, t):
                    memory = memory + phi(k[row, :, i])[:, :, None] * v[row, :, i][:, None]
                    z = z + phi(k[row, :, i])
            at = (t - first) % segment
            keys = rotate(k[row, :, t - at : t + 1], cos[: at + 1], sin[: at + 1])
            query = rotate(q[row, :, t : t + 1], cos[at : at + 1], sin[at : at + 1])
            local = (query @ keys.transpose(1, 2) / width**0.5).softmax(-1) @ v[row, :, t - at : t + 1]
            read = phi(q[row, :, t])
            far = (read[:, None] @ memory)[:, 0] / ((read * z).sum(-1, keepdim=True) + EPS)
            found.append(gate[:, None] * far + (1 - gate[:, None]) * local[:, 0])
    return torch.stack(found).view(rows, length, heads, width).transpose(1, 2)


class Memory(nn.Module):
    def __init__(self, spec: MemorySpec, shape: Shape) -> None:
        super().__init__()
        width, eps = shape.width, shape.eps
        self.spec = spec
        self.heads, self.kv_heads = spec.heads, spec.kv_heads or spec.heads
        self.head_width = spec.head_width or width // spec.heads
        self.q_proj = nn.Linear(width, self.heads * self.head_width, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_width, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_width, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_width, width, bias=False)
        self.q_norm = RMSNorm(self.head_width, eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(self.head_width, eps) if spec.qk_norm else None
        self.beta = nn.Parameter(torch.zeros(self.heads if spec.gate == "head" else 1))

    def forward(self, x: Tensor, place: Place, state: State | None = None) -> Tensor:
        """x [B, T, d] -> [B, T, d]. `state` holds the last keys and values and the memory of whole segments."""
        carry, total = Carry(), x.shape[1]
        if state is not None and state.held:
            carry = Carry(state.held["k"], state.held["v"], state.held["memory"])
            if place.seen < self.spec.segment:
                carry = carry._replace(memory=None)
        kept: list[tuple[Tensor, Tensor | None]] = []
        done: list[Tensor] = []
        for start, stop in self._stretches(place, total):
            last = stop == total and state is None
            local, far, carry = self._stretch(x[:, start:stop], place, start, carry, last)
            if self.spec.accumulate:
                kept.append((local, far))
            else:
                done.append(self._gated(local, far))
        if kept:
            far = torch.cat([torch.zeros_like(part) if read is None else read for part, read in kept], 1)
            done = [self._gated(torch.cat([part for part, _ in kept], 1), far)]
        if state is not None:
            memory = carry.memory
            if memory is None:
                empty = x.shape[0], self.kv_heads, self.head_width, self.head_width + 1
                memory = x.new_zeros(empty, dtype=torch.promote_types(x.dtype, torch.float32))
            assert carry.k is not None and carry.v is not None  # a stretch leaves both
            # Copies: views would keep the whole stretch alive.
            state.held = {"k": carry.k.clone(), "v": carry.v.clone(), "memory": memory}
        return done[0] if len(done) == 1 else torch.cat(done, 1)

    def _stretches(self, place: Place, total: int) -> list[tuple[int, int]]:
        """The new positions in parts: whole segments, at most STRETCH positions of them unless they accumulate, and
        less than a segment before and after. Where there are several documents, segments are cut in the part."""
        segment = self.spec.segment
        head = min(-place.seen % segment, total) if place.owner is None else 0
        whole = (total - head) // segment * segment
        step = whole if self.spec.accumulate else max(STRETCH // segment, 1) * segment
        cuts = [0, head, *range(head + step, head + whole, step or 1), head + whole, total]
        return [(start, stop) for start, stop in pairwise(cuts) if stop > start]

    def _stretch(
        self, x: Tensor, place: Place, start: int, carry: Carry, last: bool
    ) -> tuple[Tensor, Tensor | None, Carry]:
        """x [B, L, d] -> A_local and A_mem (None: nothing to read) [B, L, H * D], and the carry (no use when `last`).

        L is at most C or a multiple of it."""
        rows, length, _ = x.shape
        q = self.q_proj(x).view(rows, length, self.heads, self.head_width).transpose(1, 2)
        k = self.k_proj(x).view(rows, length, self.kv_heads, self.head_width).transpose(1, 2)
        v = self.v_proj(x).view(rows, length, self.kv_heads, self.head_width).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if place.owner is None:
            local, far, memory = self._one_document(q, k, v, place, start, carry, last)
        else:
            local, far, memory = self._documents(q, k, v, place, start, carry)
        keep = self.spec.segment - 1
        carry = Carry(_last(carry.k, k, keep), _last(carry.v, v, keep), memory)
        return _joined(local, rows), None if far is None else _joined(far.to(local.dtype), rows), carry

    def _one_document(
        self, q: Tensor, k: Tensor, v: Tensor, place: Place, start: int, carry: Carry, last: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """A_local and A_mem [B, n, H, L / n, D] and the memory after, where every row is one document."""
        segment, length = self.spec.segment, q.shape[2]
        phase = (place.seen + start) % segment
        count = 1 if phase else max(length // segment, 1)
        if phase:
            assert carry.k is not None and carry.v is not None  # a segment was begun
            k = torch.cat([carry.k[:, :, -phase:], k], 2)
            v = torch.cat([carry.v[:, :, -phase:], v], 2)
        q, k, v = (part.unflatten(2, (count, -1)).transpose(1, 2) for part in (q, k, v))  # [B, n, heads, C, D]
        size = q.shape[3]
        cos, sin = self._tables(place, segment)
        mask = None
        if phase and size > 1:
            mask = torch.ones(size, phase + size, dtype=torch.bool, device=q.device).tril(phase)
        local = self._attend(
            rotate(q, cos[phase : phase + size], sin[phase : phase + size]),
            rotate(k, cos[: phase + size], sin[: phase + size]), v, mask, causal=mask is None and size > 1,
        )  # fmt: skip
        written = (count if phase + size == segment else 0) - int(last)  # segments that a later position reads
        memories = [carry.memory]
        if written > 0:
            for new in self._write(k[:, :written], v[:, :written]).unbind(1):
                memories.append(new if memories[-1] is None else memories[-1] + new)
        read = [memory for memory in memories[:count] if memory is not None]
        if not read:
            return local, None, memories[-1]
        empty = count - len(read)  # the first segment of a document has nothing to read
        far = _ratio(self._read(phi(q[:, empty:]), torch.stack(read, 1)))
        return local, nn.functional.pad(far, (0, 0) * 3 + (empty, 0)), memories[-1]

    def _documents(
        self, q: Tensor, k: Tensor, v: Tensor, place: Place, start: int, carry: Carry
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same with several documents in a row, in blocks of C positions of the row.

        A segment lies in a block and the one before it, at most. Of the documents in a block only the one that owns
        its first position can have a memory, and only one segment of it, the one that this position is in, can end
        in the block: a query reads the memory from before that segment, or that and the segment, or nothing."""
        segment, (rows, _, length, _) = self.spec.segment, q.shape
        count = max(length // segment, 1)
        size, at = length // count, place.seen + start
        if carry.k is not None and carry.v is not None:
            k, v = torch.cat([carry.k, k], 2), torch.cat([carry.v, v], 2)
        lead = k.shape[2] - length
        if count > 1:
            k, v = (nn.functional.pad(part, (0, 0, segment - lead, 0)) for part in (k, v))
            lead = segment
        cos, sin = self._tables(place, k.shape[2])  # only differences of positions matter
        q = q.unflatten(2, (count, size)).transpose(1, 2)
        turned, k, v = (_pairs(part, count, size) for part in (rotate(k, cos, sin), k, v))
        runs: Runs = place.once(("memory runs", segment), lambda: _runs(place, segment))
        document = runs.document[:, at : at + length].view(rows, count, size)
        own = runs.segment[:, at : at + length].view(rows, count, size)
        keys = nn.functional.pad(runs.segment[:, : at + length], (segment, 0), value=-1)
        keys = keys[:, segment + at - lead :].unfold(1, lead + size, size)  # [B, n, lead + C]
        causal = torch.ones(size, lead + size, dtype=torch.bool, device=q.device).tril(lead)
        mask = ((own[..., None] == keys[:, :, None]) & causal)[:, :, None]
        turns = cos[lead : lead + length].view(count, 1, size, -1), sin[lead : lead + length].view(count, 1, size, -1)
        local = self._attend(rotate(q, *turns), turned, v, mask)

        first, begun = document[..., :1], own[..., :1]  # [B, n, 1]: of a block's first position
        new = self._write(k, v, (keys == begun)[:, :, None, :, None])
        after = torch.cat([first[:, 1:], document[:, -1:, -1:]], 1) == first
        whole = begun + segment <= at + size * torch.arange(1, count + 1, device=q.device)[:, None]
        memory = torch.zeros_like(new[:, 0]) if carry.memory is None else carry.memory
        memory = memory * (first[:, 0] < at)[..., None, None]
        memories = []
        for number in range(count):
            memories.append(memory)
            added = new[:, number] * whole[:, number, :, None, None]
            memory = (memory + added) * after[:, number, :, None, None]
        queries = phi(q)
        old = self._read(queries, torch.stack(memories, 1)) * (document == first)[:, :, None, :, None]
        ended = self._read(queries, new) * ((document == first) & (own != begun))[:, :, None, :, None]
        return local, _ratio(old + ended), memory

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        """Softmax attention of q [B, n, H, L, D] to k and v [B, n, G, S, D]."""
        if mask is not None and mask.ndim > 2:
            mask = mask.flatten(0, 1)
        y = nn.functional.scaled_dot_product_attention(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1),
            attn_mask=mask, is_causal=causal, enable_gqa=self.heads != self.kv_heads,
        )  # fmt: skip
        return y.unflatten(0, q.shape[:2])

    def _write(self, k: Tensor, v: Tensor, where: Tensor | None = None) -> Tensor:
        """What k and v [B, n, G, L, D] add to the memory: [B, n, G, D, D + 1]."""
        with torch.autocast(k.device.type, enabled=False):
            keys = phi(k)
            values = nn.functional.pad(v.to(keys.dtype), (0, 1), value=1.0)
            return keys.transpose(-1, -2) @ (values if where is None else values * where)

    def _read(self, queries: Tensor, memory: Tensor) -> Tensor:
        """phi(Q) [B, n, H, L, D] on memory [B, n, G, D, D + 1]: numerators and, as last column, denominators."""
        grouped = queries.unflatten(2, (self.kv_heads, -1)).flatten(3, 4)
        with torch.autocast(queries.device.type, enabled=False):
            return (grouped @ memory).unflatten(3, (-1, queries.shape[3])).flatten(2, 3)

    def _gated(self, local: Tensor, far: Tensor | None) -> Tensor:
        """The layer's output [B, L, d] of A_local and A_mem [B, L, H * D]."""
        gate = self.beta.sigmoid().to(local.dtype)
        if self.spec.gate == "head":
            gate = gate.repeat_interleave(self.head_width)
        y = (1 - gate) * local
        return self.o_proj(y if far is None else torch.addcmul(y, gate, far))

    def _tables(self, place: Place, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin [length, D] of the positions from 0."""
        width, theta, device = self.head_width, self.spec.rope_theta, place.positions.device
        tables = place.once(
            ("memory rotary", length, width, theta),
            lambda: rotary_tables(torch.arange(length, device=device)[None], width, theta),
        )
        return tables[0][0, 0], tables[1][0, 0]

    def start(self, std: float, deep: float) -> None:
        """Initialise: normal with `std`, with `deep` what adds to the residual stream; the gate half open."""
        for part in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(part.weight, std=std)
        nn.init.normal_(self.o_proj.weight, std=deep)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                nn.init.ones_(norm.weight)
        nn.init.zeros_(self.beta)

    def init_state(self) -> State:
        return State()

    def flops(self, context: int) -> int:
        """Multiply-adds times two, per token, when it sees `context` positions on average."""
        linear = sum(item.weight.numel() for item in (self.q_proj, self.k_proj, self.v_proj, self.o_proj))
        local = 4 * self.heads * self.head_width * min(context, self.spec.segment)
        matrix = 2 * (self.heads + self.kv_heads) * self.head_width * (self.head_width + 1)
        past = max(context - self.spec.segment, 0)  # a document's first segment reads nothing, its last writes nothing
        return 2 * linear + local + matrix * past // max(context, 1)

    def state_bytes(self, context: int, element: int = 2) -> int:
        """Keys and values of a segment, and the memory, which is float32 at least."""
        window = 2 * self.kv_heads * self.head_width * min(context, self.spec.segment - 1) * element
        return window + self.kv_heads * self.head_width * (self.head_width + 1) * max(element, 4)


def _ratio(sums: Tensor) -> Tensor:
    """phi(Q) M / (phi(Q) z + eps) of [..., D + 1]."""
    return sums[..., :-1] / (sums[..., -1:] + EPS)


def _joined(y: Tensor, rows: int) -> Tensor:
    """[B, n, H, L, D] -> [B, n * L, H * D]."""
    return y.transpose(2, 3).reshape(rows, -1, y.shape[2] * y.shape[4])


def _last(old: Tensor | None, new: Tensor, count: int) -> Tensor:
    """The last `count` of the positions (axis 2) of both, or all where there are fewer."""
    both = new if old is None or new.shape[2] >= count else torch.cat([old, new], 2)
    return both[:, :, max(both.shape[2] - count, 0) :]


def _pairs(x: Tensor, count: int, size: int) -> Tensor:
    """x [B, G, lead + n * C, D] -> [B, n, G, lead + C, D]: each block behind what leads to it, C positions if n > 1."""
    if count == 1:
        return x[:, None]
    blocks = x.unflatten(2, (count + 1, size)).transpose(1, 2)
    return torch.cat([blocks[:, :-1], blocks[:, 1:]], 3)


def _runs(place: Place, segment: int) -> Runs:
    owner = place.owner
    assert owner is not None
    at = torch.arange(owner.shape[1], device=owner.device).expand_as(owner)
    changed = nn.functional.pad(owner[:, 1:] != owner[:, :-1], (1, 0), value=True)
    document = torch.where(changed, at, 0).cummax(1).values
    return Runs(document, at - (at - document) % segment)
