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
    rope_theta: Annotated[float, Meta(gt=1)] = doc("base of the rotary frequencies inside a segment", 10000.0)
    segment: Annotated[int, Meta(ge=2)] = doc("positions of a segment", 256)
    gate: Literal["layer", "head"] = doc("one learned gate for the layer (White-Basilisk) or for each head", "layer")
    accumulate: bool = doc("gate once on all segments' outputs, as the paper does: same numbers, more memory", False)

    def problem(self, width: int) -> str:
        """What is wrong with these settings at a model's width; empty when nothing is."""
        return AttentionSpec(heads=self.heads, kv_heads=self.kv_heads, head_width=self.head_width).problem(width)


class Carry(NamedTuple):
    """What one stretch of positions leaves to the next. A memory [B, G, D, D + 1] is M and, as its last column, z;
    None while it is empty."""

    k: Tensor | None = None  # [B, G, up to C - 1, D]: the last keys, rotated
    v: Tensor | None = None  # [B, G, up to C - 1, D]: the last values
    memory: Tensor | None = None  # of the document's segments that have ended
    pending: Tensor | None = None  # of the segment that has not


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
        """x [B, T, d] -> [B, T, d]. `state` holds the fields of a `Carry`."""
        carry, total = Carry(), x.shape[1]
        if state is not None and state.held:
            carry = Carry(**state.held)
            if place.seen < self.spec.segment:
                carry = carry._replace(memory=None)
        kept: list[tuple[Tensor, Tensor | None]] = []
        done: list[Tensor] = []
        cuts = self._stretches(place, total)
        for (start, stop), part in zip(cuts, x.split([stop - start for start, stop in cuts], 1), strict=True):
            last = stop == total and state is None
            local, far, carry = self._stretch(part, place, start, carry, last)
            if self.spec.accumulate:
                kept.append((local, far))
            else:
                done.append(self._gated(local, far))
        if kept:
            far = torch.cat([torch.zeros_like(part) if read is None else read for part, read in kept], 1)
            done = [self._gated(torch.cat([part for part, _ in kept], 1), far)]
        if state is not None:
            shape = x.shape[0], self.kv_heads, self.head_width, self.head_width + 1
            empty = x.new_zeros(shape, dtype=torch.promote_types(x.dtype, torch.float32))
            state.held = {name: empty if part is None else part for name, part in carry._asdict().items()}
        return done[0] if len(done) == 1 else torch.cat(done, 1)

    def _stretches(self, place: Place, total: int) -> list[tuple[int, int]]:
        """The new positions in parts: whole segments, at most STRETCH positions of them unless they accumulate, and
        less than a segment before and after. Where a row has several documents its segments lie anywhere in these."""
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
        at, keep = place.seen + start, self.spec.segment - 1
        cos, sin = self._tables(place, at, length)
        turned, keys, values = rotate(q, cos, sin), _behind(carry.k, rotate(k, cos, sin)), _behind(carry.v, v)
        if place.owner is None:
            phase = at % self.spec.segment
            local = self._local(turned, keys, values, phase)
            far, memory, pending = self._far(q, k, v, carry, phase, last)
        else:
            local = self._local_of_many(turned, keys, values, place, at)
            far, memory, pending = self._far_of_many(q, k, v, carry, place, at, last)
        carry = Carry(_last(keys, keep), _last(values, keep), memory, pending)
        return _joined(local, rows), None if far is None else _joined(far.to(local.dtype), rows), carry

    def _local(self, q: Tensor, k: Tensor, v: Tensor, phase: int) -> Tensor:
        """A_local [B, n, H, L / n, D] where every row is one document, of q [B, H, L, D] and k and v that reach at
        least `phase` further back, as many as belong to the first segment."""
        length = q.shape[2]
        count = 1 if phase else max(length // self.spec.segment, 1)
        k, v = k[:, :, -(phase + length) :], v[:, :, -(phase + length) :]
        q, k, v = (part.unflatten(2, (count, -1)).transpose(1, 2) for part in (q, k, v))
        mask = None
        if phase and length > 1:
            mask = torch.ones(length, phase + length, dtype=torch.bool, device=q.device).tril(phase)
        return self._attend(q, k, v, mask, causal=not phase and length > 1)

    def _far(
        self, q: Tensor, k: Tensor, v: Tensor, carry: Carry, phase: int, last: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """A_mem [B, n, H, L / n, D], and the memory after and the pending one, where every row is one document."""
        segment, length = self.spec.segment, q.shape[2]
        count = 1 if phase else max(length // segment, 1)
        q, k, v = (part.unflatten(2, (count, -1)).transpose(1, 2) for part in (q, k, v))
        memories, pending = [carry.memory], None
        wanted = count - int(last)  # segments that a later position reads
        if wanted:
            new = list(self._write(k[:, :wanted], v[:, :wanted]).unbind(1))
            if phase and carry.pending is not None:
                new[0] = new[0] + carry.pending
            if (phase + length) % segment:
                pending = new.pop()
            for part in new:
                memories.append(part if memories[-1] is None else memories[-1] + part)
        read = [memory for memory in memories[:count] if memory is not None]
        if not read:
            return None, memories[-1], pending
        empty = count - len(read)  # the first segment of a document has nothing to read
        far = _ratio(self._read(phi(q[:, empty:]), torch.stack(read, 1)))
        if empty:
            far = nn.functional.pad(far, (0, 0) * 3 + (empty, 0))
        return far, memories[-1], pending

    def _local_of_many(self, q: Tensor, k: Tensor, v: Tensor, place: Place, at: int) -> Tensor:
        """A_local where rows hold several documents, in blocks of C positions of the row: a segment lies in a block and
        the one before it, at most. k and v reach back to the start of the first segment, or further."""
        segment, length = self.spec.segment, q.shape[2]
        count, lead = max(length // segment, 1), k.shape[2] - length
        size = length // count
        if count > 1:
            k, v = (nn.functional.pad(part, (0, 0, segment - lead, 0)) for part in (k, v))
            lead = segment
        begun = nn.functional.pad(self._runs(place).segment[:, : at + length], (segment, 0), value=-1)
        keys = begun[:, segment + at - lead :].unfold(1, lead + size, size)  # [B, n, lead + C]
        causal = torch.ones(size, lead + size, dtype=torch.bool, device=q.device).tril(lead)
        mask = (keys[:, :, -size:, None] == keys[:, :, None]) & causal
        q = q.unflatten(2, (count, size)).transpose(1, 2)
        return self._attend(q, _pairs(k, count, size), _pairs(v, count, size), mask.flatten(0, 1)[:, None])

    def _far_of_many(
        self, q: Tensor, k: Tensor, v: Tensor, carry: Carry, place: Place, at: int, last: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """A_mem, the memory after and the pending one where rows hold several documents, in the same blocks.

        Of the documents in a block only the one that owns its first position can have a memory, and only one segment
        of it, the one that this position is in, can end in the block: a query reads the memory from before that
        segment, or that and the segment, or nothing."""
        length = q.shape[2]
        count = max(length // self.spec.segment, 1)
        size, stop = length // count, at + length
        runs = self._runs(place)
        reads = place.once(
            ("memory reads", self.spec.segment, at),
            lambda: bool((runs.segment > runs.document)[:, at:stop].any()),
        )
        if last and not reads:
            return None, None, None
        q, k, v = (part.unflatten(2, (count, size)).transpose(1, 2) for part in (q, k, v))
        document, segment = (part[:, at:stop].unflatten(1, (count, size)) for part in runs)
        first, begun = document[..., 0], segment[..., 0]  # [B, n]: of a block's first position, and of what follows it
        then, next_begun = (torch.cat([part[:, 1:, 0], part[:, -1:, -1]], 1) for part in (document, segment))
        ends = begun + self.spec.segment <= torch.arange(at + size, stop + 1, size, device=q.device)
        where = torch.stack([segment == begun[..., None], segment == next_begun[..., None]], -1)[:, :, None]
        heads, tails = self._write(k, v, where).chunk(2, -1)  # for the segments of its first position and what follows

        memory = torch.zeros_like(heads[:, 0]) if carry.memory is None else carry.memory * _each(first[:, 0] < at)
        pending = torch.zeros_like(memory) if carry.pending is None else carry.pending * _each(begun[:, 0] < at)
        before, segments = [], []
        for number in range(count):
            before.append(memory)
            segments.append(pending + heads[:, number])
            memory = (memory + segments[-1] * _each(ends[:, number])) * _each((then == first)[:, number])
            pending = tails[:, number]
        pending = torch.where(_each((next_begun == begun)[:, -1]), segments[-1], pending)
        pending = pending * _each(next_begun[:, -1] + self.spec.segment > stop)
        if not reads:
            return None, memory, pending

        queries, inside = phi(q), document == first[..., None]
        old = self._read(queries, torch.stack(before, 1)) * inside[:, :, None, :, None]
        inside = inside & (segment != begun[..., None])
        ended = self._read(queries, torch.stack(segments, 1)) * inside[:, :, None, :, None]
        return _ratio(old + ended), memory, pending

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        """Softmax attention of q [B, n, H, L, D] to k and v [B, n, G, S, D]."""
        y = nn.functional.scaled_dot_product_attention(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1),
            attn_mask=mask, is_causal=causal, enable_gqa=self.heads != self.kv_heads,
        )  # fmt: skip
        return y.unflatten(0, q.shape[:2])

    def _write(self, k: Tensor, v: Tensor, where: Tensor | None = None) -> Tensor:
        """What k and v [B, n, G, L, D] add to the memory: [B, n, G, D, D + 1]; side by side for each of the masks
        `where` [B, n, 1, L, masks]."""
        with torch.autocast(k.device.type, enabled=False):
            keys = phi(k)
            values = nn.functional.pad(v.to(keys.dtype), (0, 1), value=1.0)
            if where is not None:
                values = (where[..., None] * values[..., None, :]).flatten(-2)
            return keys.transpose(-1, -2) @ values

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

    def _tables(self, place: Place, at: int, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin [B or 1, 1, L, D] of the places inside their segments of `length` positions from `at` on."""
        segment, width, theta = self.spec.segment, self.head_width, self.spec.rope_theta
        first = at if place.owner is not None else at % segment

        def make() -> tuple[Tensor, Tensor]:
            row = torch.arange(first, first + length, device=place.positions.device)
            begun = row // segment * segment if place.owner is None else self._runs(place).segment[:, at : at + length]
            return rotary_tables((row - begun).view(-1, length), width, theta)

        return place.once(("memory rotary", first, length, segment, width, theta), make)

    def _runs(self, place: Place) -> Runs:
        return place.once(("memory runs", self.spec.segment), lambda: _runs(place, self.spec.segment))

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
        """Keys and values of a segment, and two memories, which are float32 at least."""
        window = 2 * self.kv_heads * self.head_width * min(context, self.spec.segment - 1) * element
        return window + 2 * self.kv_heads * self.head_width * (self.head_width + 1) * max(element, 4)


def _ratio(sums: Tensor) -> Tensor:
    """phi(Q) M / (phi(Q) z + eps) of [..., D + 1]."""
    return sums[..., :-1] / (sums[..., -1:] + EPS)


def _joined(y: Tensor, rows: int) -> Tensor:
    """[B, n, H, L, D] -> [B, n * L, H * D]."""
    return y.transpose(2, 3).reshape(rows, -1, y.shape[2] * y.shape[4])


def _each(x: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1], to go with a memory."""
    return x[:, None, None, None]


def _behind(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else torch.cat([old, new], 2)


def _last(x: Tensor, count: int) -> Tensor:
    """The last `count` positions (axis 2) of x, or all where there are fewer."""
    kept = x[:, :, max(x.shape[2] - count, 0) :]
    return kept.clone() if x.shape[2] > 2 * count else kept  # a view would keep the whole stretch


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
