"""Which tensors of a GGUF file hold which weight of a model, and how to get from the one to the other and back.

llama.cpp rotates neighbouring channels for some architectures where transformers rotates the halves of a head, keeps
gate and up of experts apart, stores -exp(A_log), and norms that multiply by 1 + weight with the one added.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH, get_tensor_name_map
from torch import Tensor

from shrew.errors import UnsupportedError

FLOAT32 = re.compile(r".*(_norm\.weight|ffn_gate_inp(_shexp)?\.weight|conv1d\.weight|shortconv\.conv\.weight|_[ad])")


@dataclass(frozen=True)
class Change:
    """`out` makes the file's tensors of a weight, `back` undoes it. `whole_rows`: it only moves rows, so that it can be
    applied to codes and scales as well. `targets` names the file's tensors where gguf's table of names does not."""

    out: Callable[[Tensor], tuple[Tensor, ...]]
    back: Callable[..., Tensor]
    whole_rows: bool = False
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One weight: its name in transformers, and those of its tensors in the file."""

    source: str
    targets: tuple[str, ...]
    change: Change


SAME = Change(lambda w: (w,), lambda w: w, True)
TWICE = Change(lambda w: (w, w), lambda w, copy: w, True, ("token_embd.weight", "output.weight"))
PLUS_ONE = Change(lambda w: (w + 1,), lambda w: w - 1)
DECAY = Change(lambda w: (-w.exp(),), lambda w: (-w).log())  # A_log -> A
FLAT = Change(lambda w: (w[0],), lambda w: w[None])
TAPS = Change(lambda w: (w[:, 0],), lambda w: w[:, None])  # [C, 1, K] of a Conv1d
COLUMN = Change(lambda w: (w[:, None],), lambda w: w[:, 0])
DECAY_COLUMN = Change(lambda w: (-w.exp()[:, None],), lambda w: (-w[:, 0]).log())


def renamed(*targets: str) -> Change:
    return Change(SAME.out, SAME.back, True, targets)


def grouped(groups: int) -> Change:
    return Change(lambda w: (w.reshape(groups, -1),), lambda w: w.reshape(-1))


def rotated(heads: int) -> Change:
    """Rows of a head from two halves to neighbouring pairs."""

    def out(weight: Tensor) -> tuple[Tensor]:
        return (weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2),)

    def back(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    return Change(out, back, True)


def halves(first: str, second: str) -> Change:
    """Rows [..., 2 * F, d] of gate and up -> two tensors."""
    return Change(lambda w: w.chunk(2, -2), lambda a, b: torch.cat([a, b], -2), True, (first, second))


def by_heads(heads: int, sizes: list[int], apart: int, *targets: str) -> Change:
    """Rows that stand head by head, each with parts of `sizes` rows -> the first `apart` parts of all heads one after
    the other as one tensor, and the rest as another."""

    def out(weight: Tensor) -> tuple[Tensor, ...]:
        parts = [part.flatten(0, 1) for part in weight.unflatten(0, (heads, -1)).split(sizes, 1)]
        return torch.cat(parts[:apart]), torch.cat(parts[apart:])

    def back(first: Tensor, rest: Tensor) -> Tensor:
        parts = [
            *first.split([heads * size for size in sizes[:apart]]),
            *rest.split([heads * size for size in sizes[apart:]]),
        ]
        return torch.cat([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 1)

    return Change(out, back, True, targets)


def plan(arch: MODEL_ARCH, layers: int, names: Iterable[str], changes: dict[str, Change]) -> list[Row]:
    """A row for each weight; `changes` are found by the end of its name, longest first. Raises UnsupportedError for a
    weight that the architecture has no place for."""
    table: Any = get_tensor_name_map(arch, layers)
    order = sorted(changes, key=len, reverse=True)
    rows = []
    for name in names:
        change = next((changes[end] for end in order if name.endswith(end)), SAME)
        layer = re.search(r"\.layers\.(\d+)\.", name)
        block = f"blk.{layer[1]}." if layer else ""
        if change.targets:
            targets = tuple(block + target for target in change.targets)
        else:
            target = table.get_name(name.replace(".dt_bias", ".dt_proj.bias"), (".weight", ".bias"))
            if target is None:
                raise UnsupportedError(f"llama.cpp's {arch.name.lower()} has no place for the weight '{name}'.")
            targets = (target,)
        rows.append(Row(name, targets, change))
    return rows


def always_float32(target: str, shape: tuple[int, ...]) -> bool:
    """Of tensors that llama.cpp's operations take in float32 alone."""
    return len(shape) <= 1 or FLOAT32.fullmatch(target) is not None
