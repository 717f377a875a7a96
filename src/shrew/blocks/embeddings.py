"""`ngrams`: embeddings of the last n tokens, looked up by a hash and added to the token's own embedding.

The n-gram tables of the Byte Latent Transformer (Pagnoni et al. 2024): cheap in FLOPs (none are counted: a look-up
multiplies nothing), dear in bytes. B rows, T new positions, k sizes.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from shrew.blocks.layers import Place, State
from shrew.spec import Meta, doc

FACTOR, MODULUS = 1_000_000_007, 2**31 - 1  # products of two remainders stay below 2**62: exact in int64 everywhere


@dataclass(frozen=True, kw_only=True)
class NgramSpec:
    sizes: tuple[Annotated[int, Meta(le=64)], ...] = doc(
        "lengths of the n-grams in tokens, each with a table of its own", (2, 3, 4)
    )
    rows: Annotated[int, Meta(ge=1, le=1 << 32)] = doc("rows of each table; n-grams of equal hash share one", 8192)

    def problem(self) -> str:
        """What is wrong with these settings; empty when nothing is."""
        if not self.sizes or min(self.sizes) < 2:
            return "sizes are two tokens or more each; a table for single tokens is the embedding itself"
        return "two equal sizes would learn the same table twice" if len(set(self.sizes)) < len(self.sizes) else ""


def naive_hashes(tokens: list[int], owner: list[int], spec: NgramSpec) -> list[list[int]]:
    """The definition, of one row: for each position and size the row of that table. The oracle of the tests.

    h = (sum_i (id_{t-i} + 1) FACTOR^i mod MODULUS) mod rows, over the last n tokens of the same document; where there
    are fewer, over those (the one added keeps id 0 apart from nothing).
    """
    found = []
    for t in range(len(tokens)):
        hashes = []
        for size in spec.sizes:
            total = 0
            for back in range(size):
                if t - back >= 0 and owner[t - back] == owner[t]:
                    total += (tokens[t - back] + 1) * FACTOR**back
            hashes.append(total % MODULUS % spec.rows)
        found.append(hashes)
    return found


class Ngrams(nn.Module):
    """One table of all sizes, each on rows of its own."""

    def __init__(self, spec: NgramSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.table = nn.Embedding(spec.rows * len(spec.sizes), width)

    def forward(self, place: Place, state: State | None = None) -> Tensor:
        """[B, T, d]: the sum of the n-grams' rows, divided by sqrt(k) so that it is as large as a token's own."""
        hashes = self.hashes(place, state)
        rows = nn.functional.embedding_bag(hashes.flatten(0, 1), self.table.weight, mode="sum")
        return rows.view(*hashes.shape[:2], -1) / len(self.spec.sizes) ** 0.5

    def hashes(self, place: Place, state: State | None = None) -> Tensor:
        """[B, T, k]: rows of the table. `state.held["tokens"]` [B, n-1] holds the last tokens, each one more than its
        id, zero before the row."""
        longest, length = max(self.spec.sizes), place.tokens.shape[1]
        past = None if state is None else state.held.get("tokens")
        if past is None:
            past = place.tokens.new_zeros(place.tokens.shape[0], longest - 1)
        whole = torch.cat([past, place.tokens + 1], 1)
        if state is not None:
            state.held["tokens"] = whole[:, whole.shape[1] - (longest - 1) :]
        same = place.once(("grams", longest), lambda: same_document(place, longest))
        total, factor, found = whole[:, longest - 1 :], 1, {}
        for back in range(1, longest):
            factor = factor * FACTOR % MODULUS
            term = whole[:, longest - 1 - back : longest - 1 - back + length] * factor
            total = (total + (term if same is None else term * same[back - 1][..., 0])) % MODULUS
            found[back + 1] = total % self.spec.rows
        return torch.stack([found[size] + i * self.spec.rows for i, size in enumerate(self.spec.sizes)], -1)

    def init_state(self) -> State:
        return State()

    def state_bytes(self) -> int:
        return 8 * (max(self.spec.sizes) - 1)

    def idle(self) -> int:
        """The parameters that a token does not use."""
        return (self.spec.rows - 1) * len(self.spec.sizes) * self.table.embedding_dim


def same_document(place: Place, taps: int) -> list[Tensor] | None:
    """For each step back, [B, T, 1]: is that position of the same document?"""
    if place.owner is None:
        return None
    owner = nn.functional.pad(place.owner, (taps - 1, 0), value=-1)  # before the first position there is nothing
    start, length = place.seen + taps - 1, place.positions.shape[1]
    new = owner[:, start:]
    return [(owner[:, start - back : start - back + length] == new)[..., None] for back in range(1, taps)]
