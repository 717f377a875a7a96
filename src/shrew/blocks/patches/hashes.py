"""n-gram tables with the hash of the published models (Pagnoni et al. 2024), so that these can be read; a model of
one's own does as well with `ModelSpec.ngrams`.

h = sum_i id_{t-n+1+i} prime^i, in integers of 64 bits that wrap around, mod rows; ids before the document are 0.
B rows, T new positions.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from shrew.blocks.embeddings import same_document
from shrew.blocks.layers import Place, State
from shrew.spec import Meta, doc

PRIMES = (1000000007, 5915587277, 1500450271, 3267000013, 5754853343, 4093082899, 9576890767, 3628273133, 2860486313,
          5463458053, 3367900313)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HashSpec:
    sizes: tuple[Annotated[int, Meta(ge=2, le=64)], ...] = doc(
        "lengths of the n-grams, each with a table", (3, 4, 5, 6, 7, 8)
    )
    rows: Annotated[int, Meta(ge=1, le=1 << 32)] = doc("rows of each table", 500002)
    functions: Annotated[int, Meta(ge=1, le=64)] = doc("hash functions, each with tables of its own", 1)


    def problem(self) -> str:
        """What is wrong with these settings; empty when nothing is."""
        if not self.sizes:
            return "sizes names no length; name one, or leave hashes out"
        return "two equal sizes would learn the same table twice" if len(set(self.sizes)) < len(self.sizes) else ""


class Hashes(nn.Module):
    """The tables of the first function, one of each size, then those of the next."""

    def __init__(self, spec: HashSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.table = nn.Embedding(spec.rows * len(spec.sizes) * spec.functions, width)

    def forward(self, place: Place, state: State | None = None) -> Tensor:
        """[B, T, d]: the sum of the n-grams' rows. `state.held["tokens"]` holds the last tokens."""
        spec, longest, length = self.spec, max(self.spec.sizes), place.tokens.shape[1]
        past = place.tokens.new_zeros(len(place.tokens), longest - 1)
        whole = torch.cat([past if state is None else state.held.get("tokens", past), place.tokens], 1)
        if state is not None:
            state.held["tokens"] = whole[:, length:]
        same = place.once(("grams", longest), lambda: same_document(place, longest))
        found = []
        for function in range(spec.functions):
            total, by_size = whole[:, longest - 1 :], {}
            for back in range(1, longest):
                term = whole[:, longest - 1 - back : longest - 1 - back + length]
                term = term if same is None else term * same[back - 1][..., 0]
                total = total * PRIMES[function % len(PRIMES)] + term
                by_size[back + 1] = total % spec.rows
            found += [by_size[size] for size in spec.sizes]
        offset = spec.rows * torch.arange(len(found), device=whole.device)
        rows = (torch.stack(found, -1) + offset).flatten(0, 1)
        return nn.functional.embedding_bag(rows, self.table.weight, mode="sum").unflatten(0, place.tokens.shape)

    def init_state(self) -> State:
        return State()

    def state_bytes(self) -> int:
        return 8 * (max(self.spec.sizes) - 1)
