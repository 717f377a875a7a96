"""What decoding carries from call to call beside the states of the local layers: the bytes of the patch that is open,
the patch that bytes look at, and, row by row, the states of the layers on patches, whose numbers differ.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from shrew.blocks.layers import Place, State
from shrew.blocks.patches.boundaries import Open


def joined(rows: list[list[Any]]) -> list[Any]:
    """The states of the layers of several rows, equally far, as those of one batch."""
    if len(rows) == 1:
        return rows[0]
    found = []
    for states in zip(*rows, strict=True):
        one = copy.copy(states[0])
        if isinstance(one, State):
            one.held = {name: torch.cat([state.held[name] for state in states]) for name in one.held}
        elif one.is_initialized:
            one.keys = torch.cat([state.keys for state in states])
            one.values = torch.cat([state.values for state in states])
        found.append(one)
    return found


def parted(states: list[Any], rows: int) -> list[list[Any]]:
    """The inverse of `joined`."""
    if rows == 1:
        return [states]
    return [[_row(state, row) for state in states] for row in range(rows)]


def _row(state: Any, row: int) -> Any:
    one = copy.copy(state)
    if isinstance(one, State):
        one.held = {name: value[row : row + 1] for name, value in state.held.items()}
    elif one.is_initialized:
        one.keys, one.values = state.keys[row : row + 1], state.values[row : row + 1]
    return one


class PatchState(State):
    """held["bytes"] [B, M, d]: hidden states of the bytes of open patches, right-aligned, held["size"] [B] of them;
    held["last"] [B, k, d]: what bytes read until the next patch ends. `open` is the boundaries' own. `rows`: of each
    row the states of the layers, `documents` [P] of its patches so far."""

    def __init__(self, rows: Any) -> None:
        super().__init__()
        self.new_row = rows  # () -> the states of a row without a patch
        self.open: Open | None = None
        self.rows: list[list[Any]] = []
        self.documents: list[Tensor] = []

    def begin(self, rows: int, device: Any) -> None:
        if not self.rows:
            self.rows = [self.new_row() for _ in range(rows)]
            self.documents = [torch.zeros(0, dtype=torch.long, device=device) for _ in range(rows)]

    def window(
        self, x: Tensor, closed: Tensor, place: Place
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """The open bytes before the new ones x [B, T, d], which are noted for the next call: hidden states
        [B, M + T, d], which of them end a patch, their documents, and which are there at all."""
        old = self.held.get("bytes", x[:, :0])
        size = self.held.get("size", torch.zeros(len(x), dtype=torch.long, device=x.device))
        more, length = old.shape[1], old.shape[1] + x.shape[1]
        whole = torch.cat([old.to(x.dtype), x], 1)
        at = torch.arange(length, device=x.device)
        shut = torch.nn.functional.pad(closed, (more, 0))
        there = at >= more - size[:, None]
        owner = None
        if place.owner is not None:
            owner = place.owner[:, place.seen :]
            if more:
                owner = torch.cat([place.owner[:, place.seen - 1 : place.seen].expand(-1, more), owner], 1)
        tail = there & (at > at.expand_as(shut).masked_fill(~shut, -1).amax(1, keepdim=True))
        if owner is not None:
            tail = tail & (owner == owner[:, -1:])
        sizes = tail.sum(1)
        self.held["size"] = sizes
        self.held["bytes"] = whole[:, length - int(sizes.max()) :]
        return whole, shut, owner, there

    def nbytes(self) -> int:
        found = super().nbytes() + sum(value.nbytes for value in self.documents)
        for states in self.rows:
            for state in states:
                if isinstance(state, State):
                    found += state.nbytes()
                elif state.is_initialized:
                    found += state.keys.nbytes + state.values.nbytes
        return found

    def reset(self) -> None:
        super().reset()
        self.open, self.rows, self.documents = None, [], []

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        chosen = indices.tolist()
        self.rows = [[copy.copy(state) for state in self.rows[row]] for row in chosen]
        for states in self.rows:
            for state in states:
                if isinstance(state, State):
                    state.held = dict(state.held)
        self.documents = [self.documents[row] for row in chosen]
        self.open = None if self.open is None else self.open.rows(indices.to(self.open.seen.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.rows:
            device = self.documents[0].device
            self.batch_select_indices(torch.arange(len(self.rows), device=device).repeat_interleave(repeats))
