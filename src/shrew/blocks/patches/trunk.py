"""A model of patches: local layers on bytes, and between them the layers of the model, once for each patch.

The byte at t reads the last patch that has ended at t or before. Whether one ends at t depends on the bytes up to t
alone, and the first byte of a document always is a patch, so nothing leaks and every byte has a patch to read. A patch
that no byte can read, the last one where it is not at its end, is never computed.

B rows, T new bytes, d local width, D width, N patches of all rows, k vectors a patch.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from shrew.blocks.embeddings import Ngrams
from shrew.blocks.layers import Place, RMSNorm, State, runs
from shrew.blocks.patches.boundaries import NEWLINE
from shrew.blocks.patches.cross import Cross, Groups, Pool
from shrew.blocks.patches.hashes import Hashes
from shrew.blocks.patches.learned import Learned, LearnedSpec, smoothed, sure
from shrew.blocks.patches.packing import before, ends, lay, members
from shrew.blocks.patches.state import PatchState, joined, parted
from shrew.blocks.specs import ModelSpec, PatchesSpec
from shrew.blocks.trunk import Layer, Trunk, count
from shrew.errors import SpecError


class Stack(nn.Module):
    """Local layers."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(spec, number) for number in range(spec.layers))

    def flops(self, context: int) -> int:
        layers: list[Any] = list(self.layers)
        return sum(layer.flops(context) for layer in layers)

    def state_bytes(self, context: int, element: int) -> int:
        layers: list[Any] = list(self.layers)
        return sum(layer.mixer.state_bytes(context, element) for layer in layers)


class Oracle(nn.Module):
    """A small model of bytes, trained before and left as it is: how hard is the next byte to tell?"""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.model = Trunk(spec)
        self.lm_head = None if spec.tied else nn.Linear(spec.width, spec.vocabulary or 0, bias=False)
        self.train()

    def train(self, mode: bool = True) -> "Oracle":
        """It is never trained here, whatever the model around it is."""
        return super().train(False).requires_grad_(False)

    @torch.no_grad()
    def forward(self, place: Place, cache: Cache | None = None) -> Tensor:
        """[B, T]: the entropy in nats of the byte behind each new one, in float32 at least."""
        with torch.autocast(place.tokens.device.type, enabled=False):
            x, _ = self.model(place, cache)
            head = self.model.embed_tokens if self.lm_head is None else self.lm_head
            logits = nn.functional.linear(x, head.weight).to(torch.promote_types(x.dtype, torch.float32))
            logs = (logits * self.spec.logit_scale).log_softmax(-1)
        return -(logs.exp() * logs).sum(-1)


class PatchTrunk(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.patches is not None
        front: PatchesSpec = spec.patches
        self.spec, self.front, self.width, self.order = spec, front, front.width, spec.order
        self.exits: list[int] = []
        wide = front.queries * front.width
        self.embed_tokens = nn.Embedding(spec.vocabulary or 0, front.width)
        self.ngrams: Ngrams | None = Ngrams(spec.ngrams, front.width) if spec.ngrams else None
        self.hashes: Hashes | None = Hashes(front.hashes, front.width) if front.hashes else None
        self.encoder = Stack(spec.local(front.encoder))
        self.pool = Pool(front.width, front.heads, front.queries, spec.eps, front.residual)
        self.into = nn.Linear(wide, spec.width, bias=False) if wide != spec.width else None
        self.layers = nn.ModuleList(Layer(spec, number) for number in range(spec.layers))
        self.back = nn.Linear(spec.width, wide, bias=False)
        self.cross = nn.ModuleList(
            Cross(front.width, front.heads, spec.eps, front.residual, front.queries > 1)
            for _ in range(front.decoder.layers if front.every else 1)
        )
        self.decoder = Stack(spec.local(front.decoder))
        self.norm = RMSNorm(front.width, spec.eps)
        rule = front.rule
        self.learned = Learned(rule, front.width) if isinstance(rule, LearnedSpec) else None
        if rule.kind == "entropy" and front.entropy is None:
            raise SpecError("front: rule entropy needs the model of the entropies; `shrew train` puts the one in that "
                            'entropy = "FOLDER" in [train] names.')  # fmt: skip
        asked = replace(front.entropy, vocabulary=spec.vocabulary) if front.entropy else None
        self.entropy = Oracle(asked) if asked else None
        for block in self.blocks():
            for part in block.modules():
                part._is_hf_initialized = True  # by `start`, not part by part

    def blocks(self) -> list[Any]:
        return [self.pool, *self.cross, *([self.learned] if self.learned else [])]

    def forward(
        self, place: Place, cache: Cache | None = None, kept: list[Tensor] | None = None, leave: Any = None,
        every: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Hidden states [B, T, d] of the bytes, and the sum of the layers' penalties. `every` gets the bytes' states
        before each local layer and, normed, after the last. `kept` and `leave` are of exits, which there are not."""
        states: Iterator[Any] = repeat(None) if cache is None else iter(cache.layers)
        state: PatchState | None = None if cache is None else cache.layers[-1]
        penalties: list[Tensor] = []

        def through(layer: Any, x: Tensor) -> Tensor:
            if every is not None:
                every.append(x)
            held = next(states)
            x, penalty = layer(x, place, held)
            count(held, place)
            if penalty is not None:
                penalties.append(penalty)
            return x

        x = self.embed(place, cache)
        for layer in self.encoder.layers:
            x = through(layer, x)
        closed, chance = self._ends(x, place, cache)
        vectors, patch = self._patches(x, closed, chance, place, state, penalties)
        seen = Groups.of(patch.flatten(), len(vectors))
        likely = None if chance is None else sure(closed, chance)
        crosses: list[Any] = list(self.cross)
        for number, layer in enumerate(self.decoder.layers):
            if number < len(crosses):
                x = crosses[number].look(x, vectors, seen, likely)
            x = through(layer, x)
        if self.learned is not None and chance is not None and self.training:
            penalties.append(self.learned.penalty(closed, chance))
        x = self.norm(x)
        if every is not None:
            every.append(x)
        count(state, place)
        return x, torch.stack(penalties).sum() if penalties else None

    def embed(self, place: Place, cache: Cache | None = None) -> Tensor:
        x = self.embed_tokens(place.tokens)
        if self._grams is not None:
            state = None if cache is None else cache.layers[self._local]
            x = x + self._grams(place, state)
            count(state, place)
        if self.spec.embedding_scale != 1:
            x = x * torch.tensor(self.spec.embedding_scale).to(x.dtype)
        return x

    # --- where patches end -------------------------------------------------------------------------------------------

    def ends(self, tokens: Tensor, owner: Tensor | None = None) -> Tensor:
        """bool [B, T]: the bytes of tokens [B, T] with which a patch ends; for those who look at or count patches."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        place = Place(tokens, positions, owner)
        x = self.embed(place)
        for layer in self.encoder.layers if self.learned else []:
            x, _ = layer(x, place)
        return self._ends(x, place, None)[0]

    def entropies(self, tokens: Tensor) -> Tensor | None:
        """[B, T]: how hard each of tokens [B, T] was to tell, in nats, by the model that cuts the patches; None where
        they are cut without one."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        if self.entropy is None:
            return None
        return self._entropies(self.entropy, tokens - self.front.first, Place(tokens, positions), None)[:, :-1]

    def _ends(self, x: Tensor, place: Place, cache: Cache | None) -> tuple[Tensor, Tensor | None]:
        """bool [B, T], and by a learned rule the chance of it; x [B, T, d] are the encoder's states."""
        state: Any = None if cache is None else cache.layers[-1]
        if self.learned is not None:
            return self.learned(x, place, state)
        bytes = place.tokens - self.front.first
        about = None if self.entropy is None else self._entropies(self.entropy, bytes, place, cache)
        held = None if state is None else state.open
        closed, then = ends(bytes, place, self.front.rule, about, held, more=state is not None)
        if state is not None:
            state.open = then
        return closed, None

    def _entropies(self, oracle: Oracle, bytes: Tensor, place: Place, cache: Cache | None) -> Tensor:
        """[B, T + 1]: entropies of the new bytes and of the one to come; 0 where there is nothing before one."""
        state: Any = None if cache is None else cache.layers[-1]
        place = self._alone(bytes, place, state)
        some = None if cache is None else Cache(layers=cache.layers[self._local + (self._grams is not None) : -1])
        found: Tensor = oracle(place, some)
        first = torch.zeros_like(found[:, :1])
        if state is not None:
            first = state.held.get("expected", first)
            state.held["expected"] = found[:, -1:]
        return torch.cat([first.to(found.dtype), found], 1)

    def _alone(self, bytes: Tensor, place: Place, state: Any) -> Place:
        """The place as the model of the entropies sees it: a special token begins a document, and so does a newline
        where the rule has lines apart."""
        breaks = (bytes < 0) | (bytes > 255)
        if self.front.rule.reset:
            breaks = breaks | (bytes == NEWLINE)
        if state is not None:
            breaks = state.held["breaks"] = torch.cat([state.held.get("breaks", breaks[:, :0]), breaks], 1)
        if place.owner is not None:
            breaks = breaks | nn.functional.pad(place.owner.diff(dim=1) != 0, (1, 0))
        return Place(place.tokens, place.positions, runs(breaks[:, 1:]), place.seen)

    # --- the layers on patches ---------------------------------------------------------------------------------------

    def _patches(
        self, x: Tensor, closed: Tensor, chance: Tensor | None, place: Place, state: PatchState | None,
        penalties: list[Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What bytes read: vectors of patches [.., k, d], and which of these each byte [B, T] reads."""
        rows, whole, shut, owner, there = len(x), x, closed, place.new, None
        if state is not None:
            state.begin(rows, x.device)
            whole, shut, owner, there = state.window(x, closed, place)
        patch, inside = members(shut, owner, there)
        inside_at = inside.flatten().nonzero()[:, 0]
        number = patch.flatten()[inside_at]
        total = int(closed.sum())
        passed = closed.cumsum(1)
        read = before(closed)[:, None] + passed - 1
        vectors = x.new_zeros(0, self.front.queries, self.width)
        if total:
            made = self.pool(whole.flatten(0, 1).index_select(0, inside_at), number, total).flatten(1)
            made = (made if self.into is None else self.into(made)).to(x.dtype)
            owners = torch.zeros_like(closed, dtype=torch.long) if place.new is None else place.new
            sides = owners[closed], None if chance is None else chance[closed]
            counts: list[int] = closed.sum(1).tolist()
            run = self._rows(made, counts, *sides, penalties) if state is None else self._decode(
                made, counts, *sides, state)  # fmt: skip
            vectors = self.back(run).unflatten(-1, (self.front.queries, self.width)).to(x.dtype)
        if state is None:
            return vectors, read
        last = state.held.get("last", x.new_zeros(rows, self.front.queries, self.width))
        vectors = torch.cat([last, vectors])
        read = torch.where(passed == 0, torch.arange(rows, device=x.device)[:, None], rows + read)
        state.held["last"] = vectors[read[:, -1]]
        return vectors, read

    def _rows(
        self, x: Tensor, counts: list[int], owners: Tensor, chance: Tensor | None, penalties: list[Tensor]
    ) -> Tensor:
        """x [N, D] of whole texts through the layers: so many patches of each row, of these documents of it."""
        each = torch.tensor(counts, device=x.device)
        row = torch.repeat_interleave(torch.arange(len(counts), device=x.device), each)
        layout = lay(counts, owners * len(counts) + row)
        full = layout.place.real is None
        likely = None if chance is None else layout.laid(chance)
        y = self._run(layout.laid(x) if full else x[None], layout.place, likely, None, penalties)
        return layout.taken(y) if full or likely is not None else y[0]

    def _decode(
        self, x: Tensor, counts: list[int], owners: Tensor, chance: Tensor | None, state: PatchState
    ) -> Tensor:
        """x [N, D] of what comes next; rows that are equally far go together."""
        starts = torch.tensor([0, *counts]).cumsum(0).tolist()
        groups: dict[tuple[int, int], list[int]] = {}
        for row, more in enumerate(counts):
            if more:
                groups.setdefault((len(state.documents[row]), more), []).append(row)
        parts, order = [], []
        for (seen, more), rows in groups.items():
            at = torch.cat([torch.arange(starts[row], starts[row] + more, device=x.device) for row in rows])
            for row in rows:
                state.documents[row] = torch.cat([state.documents[row], owners[starts[row] : starts[row] + more]])
            positions = torch.arange(seen, seen + more, device=x.device).expand(len(rows), -1)
            place = Place(positions, positions, torch.stack([state.documents[row] for row in rows]), seen)
            states = joined([state.rows[row] for row in rows])
            likely = None if chance is None else chance[at].view(len(rows), more)
            parts.append(self._run(x[at].view(len(rows), more, -1), place, likely, states, []).flatten(0, 1))
            order.append(at)
            for row, own in zip(rows, parted(states, len(rows)), strict=True):
                state.rows[row] = own
        return torch.cat(parts)[torch.cat(order).argsort()]

    def _run(
        self, x: Tensor, place: Place, chance: Tensor | None, states: list[Any] | None, penalties: list[Tensor]
    ) -> Tensor:
        """x [R, P, D], or what counts of it, through the layers and, by a learned rule, all of it smoothed."""
        for number, which in enumerate(self.order):
            state = None if states is None else states[number]
            x, penalty = self.layers[which](x, place, state)
            count(state, place)
            if penalty is not None:
                penalties.append(penalty)
        if chance is None:
            return x
        return smoothed(place.scattered(x), chance, place, None if states is None else states[-1])

    # --- states and costs --------------------------------------------------------------------------------------------

    @property
    def _grams(self) -> Ngrams | Hashes | None:
        return self.ngrams or self.hashes

    @property
    def _local(self) -> int:
        """Local layers, whose states come first."""
        return len(self.encoder.layers) + len(self.decoder.layers)

    def _new_row(self) -> list[Any]:
        layers: list[Any] = [self.layers[which] for which in self.order]
        return [layer.mixer.init_state() for layer in layers] + ([State()] if self.learned else [])

    def new_cache(self) -> Cache:
        """States of the encoder's, then the decoder's layers, of the n-grams, of the entropies' model, of patches."""
        local: list[Any] = [*self.encoder.layers, *self.decoder.layers]
        states = [layer.mixer.init_state() for layer in local]
        states += [] if self._grams is None else [self._grams.init_state()]
        states += [] if self.entropy is None else self.entropy.model.new_cache().layers
        return Cache(layers=[*states, PatchState(self._new_row)])

    @cached_property
    def state_kinds(self) -> list[type]:
        """The classes of the layers of a cache."""
        return [type(layer) for layer in self.new_cache().layers]

    def flops(self, context: int) -> int:
        """Multiply-adds times two, per byte, when it sees `context` bytes on average: the local layers, those on
        patches by their share, and the model of the entropies."""
        front, size = self.front, self.front.bytes
        layers: list[Any] = [self.layers[which] for which in self.order]
        on_patches = sum(layer.flops(round(context / size)) for layer in layers)
        on_patches += 2 * self.back.weight.numel() + (2 * self.into.weight.numel() if self.into is not None else 0)
        crosses: list[Any] = list(self.cross)
        on_bytes = self.encoder.flops(context) + self.decoder.flops(context) + self.pool.flops(size)
        on_bytes += sum(cross.flops(1, front.queries / size, front.queries) for cross in crosses)
        on_bytes += self.learned.flops() if self.learned else 0
        if self.entropy is not None:
            on_bytes += self.entropy.model.flops(context)
            on_bytes += 2 * self.entropy.spec.width * (self.entropy.spec.vocabulary or 0)
        return round(on_bytes + on_patches / size)

    def state_bytes(self, context: int, element: int = 2) -> int:
        """What a cache of one row holds after `context` bytes: the states of all layers, and the vectors of the open
        patch, which is taken to be of the mean size, or of all of them where they are fewer."""
        layers: list[Any] = [self.layers[which] for which in self.order]
        patches = round(context / self.front.bytes)
        found = sum(layer.mixer.state_bytes(patches, element) for layer in layers)
        found += self.encoder.state_bytes(context, element) + self.decoder.state_bytes(context, element)
        found += 0 if self._grams is None else self._grams.state_bytes()
        found += 0 if self.entropy is None else self.entropy.model.state_bytes(context, element)
        return found + round((min(self.front.bytes, context) + self.front.queries) * self.width * element)
