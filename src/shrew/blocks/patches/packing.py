"""Where patches stand: of bytes in patches, and of patches in the rows of the layers that run on them.

B rows, T bytes, N patches of all rows, one row after the other.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from shrew.blocks.layers import Place
from shrew.blocks.patches.boundaries import Open, advance
from shrew.blocks.patches.learned import begins


def ends(
    bytes: Tensor, place: Place, rule: object, entropies: Tensor | None = None, state: Open | None = None,
    more: bool = True,
) -> tuple[Tensor, Open | None]:  # fmt: skip
    """bool [B, T]: whether a patch ends with each of the new bytes [B, T], which a decoder there knows; and the state
    behind them, if `more` bytes may come. entropies [B, T + 1] are about the new bytes and the one to come. Every
    document is cut as if alone."""
    rows, length = bytes.shape
    device = bytes.device
    if place.owner is None:
        state = Open.new(rows, device) if state is None else state
        whole = torch.full((rows,), length, device=device)
        starts, _ = advance(nn.functional.pad(bytes, (0, 1)), whole + 1, rule, entropies, state)
        then = None if entropies is None else entropies[:, :-1]
        return starts[:, 1:], advance(bytes, whole, rule, then, state)[1] if more else None
    first = begins(place)
    first[:, 0] = True  # a document that goes on from earlier bytes has a part here too
    row, at = first.nonzero(as_tuple=True)
    last = nn.functional.pad(row[1:] != row[:-1], (0, 1), value=True)
    size = nn.functional.pad(at[1:], (0, 1)).masked_fill(last, length) - at
    column = at[:, None] + torch.arange(int(size.max()) + 1, device=device)
    alone = bytes[row[:, None], column.clamp(max=length - 1)]
    known = None if entropies is None else entropies[row[:, None], column.clamp(max=length)]
    parts = Open.new(len(row), device)
    if state is not None:
        goes_on = ~begins(place)[:, 0]
        index = torch.arange(len(row), device=device)
        index[at == 0] = torch.where(goes_on, len(row) + torch.arange(rows, device=device), index[at == 0])
        parts = both(parts, state).rows(index)
    starts, _ = advance(alone, size + 1, rule, known, parts)
    if more:
        _, parts = advance(alone, size, rule, known, parts)
    number = first.flatten().cumsum(0).view(rows, length) - 1
    inside = torch.arange(length, device=device) - at[number]
    return starts[number, inside + 1], parts.rows(number[:, -1]) if more else None


def both(one: Open, other: Open) -> Open:
    """The rows of both."""
    return Open(*(torch.cat([getattr(one, item.name), getattr(other, item.name)]) for item in fields(Open)))


def members(closed: Tensor, owner: Tensor | None, there: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The patch 0..N-1 of each byte, and whether it is in one at all: bytes of a patch that has not ended yet, and
    those that are not `there`, are in none. closed [B, T] ends patches, owner [B, T] tells documents apart."""
    length = closed.shape[1]
    place = torch.arange(length, device=closed.device).expand_as(closed).masked_fill(~closed, length)
    end = place.flip(1).cummin(1).values.flip(1)
    inside = end < length
    if owner is not None:
        inside = inside & (owner.gather(1, end.clamp(max=length - 1)) == owner)
    if there is not None:
        inside = inside & there
    return before(closed)[:, None] + closed.cumsum(1) - closed.long(), inside


def before(closed: Tensor) -> Tensor:
    """[B]: patches that the rows above end."""
    counts = closed.sum(1)
    return counts.cumsum(0) - counts


@dataclass(frozen=True)
class Layout:
    """Patches in rows of equal length: `at` [N] of each, and the place that the layers read."""

    at: Tensor
    place: Place
    rows: int
    length: int

    def laid(self, x: Tensor) -> Tensor:
        """x [N, ...] -> [rows, length, ...], zeros where no patch is."""
        whole = x.new_zeros(self.rows * self.length, *x.shape[1:]).index_copy(0, self.at, x)
        return whole.unflatten(0, (self.rows, self.length))

    def taken(self, x: Tensor) -> Tensor:
        """The inverse of `laid`."""
        return x.flatten(0, 1).index_select(0, self.at)


def lay(counts: list[int], documents: Tensor) -> Layout:
    """Rows of so many patches, of which `documents` [N] (no number stands for two) go together, in as few rows as hold
    the longest: first the longest, each into the first row that has room."""
    length = max(counts)
    room: list[int] = []
    start = [0] * len(counts)
    for number in sorted(range(len(counts)), key=lambda number: -counts[number]):
        row = next((row for row, free in enumerate(room) if free >= counts[number]), len(room))
        if row == len(room):
            room.append(length)
        start[number] = row * length + length - room[row]
        room[row] -= counts[number]
    device = documents.device
    each = torch.tensor(counts, device=device)
    within = torch.arange(len(documents), device=device) - torch.repeat_interleave(each.cumsum(0) - each, each)
    at = torch.repeat_interleave(torch.tensor(start, device=device), each) + within
    positions = torch.arange(length, device=device).expand(len(room), -1)
    owner = None
    if len(room) < len(counts) or int(documents.max()) >= len(counts):
        owner = documents.new_full((len(room) * length,), -1).index_copy(0, at, documents).view(len(room), length)
    full = len(documents) == len(room) * length
    return Layout(at, Place(positions, positions, owner, real=None if full else at), len(room), length)
