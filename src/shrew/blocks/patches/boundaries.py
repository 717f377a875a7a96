"""Where the patches of a text start: `static`, `space` and `entropy`, as functions of bytes [B, T].

Whether the byte at t starts a patch depends on the bytes before t alone: a decoder that is at t - 1 knows whether its
patch ends there. An entropy belongs to the byte that it is about, so entropies[:, t] is that of p(byte t | bytes
before t). The first two positions of a row always start a patch, because a decoder that finds the patch of its next
byte by dropping the first patch is right only where that one is a single byte long; with a longer one it sees later
bytes. A value outside 0..255 is a special token (begin, end, padding): whatever follows it starts a patch.

Between those, greedily from left to right: a patch that starts at s ends before the first position t that the rule
names, at least `shortest` bytes after s, and at most `longest` bytes after it. What follows a special token starts a
patch however short the one before is. B rows, T positions.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from shrew.errors import SpecError
from shrew.spec import Meta, doc

NEWLINE = 10
SURE = 2  # positions of a row that start a patch under every rule


@dataclass(frozen=True, kw_only=True)
class StaticSpec:
    kind: str = "static"
    size: Annotated[int, Meta(ge=1)] = doc("bytes of a patch", 4)

    def problem(self) -> str:
        return ""


@dataclass(frozen=True, kw_only=True)
class SpaceSpec:
    """A patch ends with the first space-like byte behind one that is not: Latin letters, digits and the bytes that go
    on with a UTF-8 character are not space-like, all others are (Slagle 2024; Pagnoni et al. 2024)."""

    kind: str = "space"
    shortest: Annotated[int, Meta(ge=1)] = doc("least bytes of a patch", 1)
    longest: Annotated[int, Meta(ge=0)] = doc("most bytes of a patch; 0: no limit", 0)

    def problem(self) -> str:
        return _limits(self.shortest, self.longest)


@dataclass(frozen=True, kw_only=True)
class EntropySpec:
    """Patches start where the next byte is hard to tell (Pagnoni et al. 2024). With H the entropies in nats, t starts
    one under the rule `global` where H[t] > threshold, `monotonic` where H[t] - H[t-1] > rise, `combined` where both
    hold and t - 1 does not start one."""

    kind: str = "entropy"
    rule: Literal["global", "monotonic", "combined"] = doc("what is compared: the entropy, its rise, or both", "global")
    threshold: float = doc("nats above which a byte starts a patch (global, combined)", 1.335442066192627)
    rise: float = doc("nats more than at the byte before (monotonic, combined)", 0.5)
    reset: bool = doc("lines apart: a byte behind a newline starts a patch, and entropies know its line alone", False)
    shortest: Annotated[int, Meta(ge=1)] = doc("least bytes of a patch", 1)
    longest: Annotated[int, Meta(ge=0)] = doc("most bytes of a patch; 0: no limit", 0)

    def problem(self) -> str:
        return _limits(self.shortest, self.longest)


def _limits(shortest: int, longest: int) -> str:
    return f"shortest is {shortest} bytes and longest {longest}" if 0 < longest < shortest else ""


RULES: dict[str, Any] = {"entropy": EntropySpec, "space": SpaceSpec, "static": StaticSpec}


@dataclass(frozen=True)
class Open:
    """What the patches of later bytes depend on, of each row [B]: positions so far, bytes of the open patch, whether
    one of them is not space-like, the last byte and its entropy."""

    seen: Tensor
    held: Tensor
    word: Tensor
    last: Tensor
    entropy: Tensor

    @classmethod
    def new(cls, rows: int, device: Any = None) -> "Open":
        zero = torch.zeros(rows, dtype=torch.long, device=device)
        return cls(zero, zero, zero.bool(), zero, zero.double())

    def rows(self, index: Tensor) -> "Open":
        """The state of these rows, in this order."""
        return Open(*(getattr(self, item.name)[index] for item in dataclasses.fields(self)))


def boundaries(bytes: Tensor, lengths: Tensor, spec: Any, entropies: Tensor | None = None) -> Tensor:
    """bytes [B, T] (integers), lengths [B], entropies [B, T] -> bool [B, T], true at the first byte of each patch and
    false from a row's length on. Rows do not depend on each other, nor on what stands behind their length."""
    return advance(bytes, lengths, spec, entropies, Open.new(len(bytes), bytes.device))[0]


def next_starts(state: Open, spec: Any, entropies: Tensor | None = None) -> Tensor:
    """bool [B]: whether the byte that comes next, whatever it is, starts a patch; entropies [B] are about that byte."""
    unknown = torch.zeros_like(state.seen)[:, None]
    given = None if entropies is None else entropies[:, None]
    return advance(unknown, torch.ones_like(state.seen), spec, given, state)[0][:, 0]


def advance(
    bytes: Tensor, lengths: Tensor, spec: Any, entropies: Tensor | None, state: Open
) -> tuple[Tensor, Open]:  # fmt: skip
    """`boundaries` of bytes that go on from `state`, and the state behind them: any cut of a text gives the same."""
    if problem := spec.problem():
        raise SpecError(f"patches: {problem}; make the one smaller or the other larger.")
    if spec.kind == "entropy" and entropies is None:
        raise SpecError("patches by entropy: no entropies given; they come from a model of bytes.")
    bytes, lengths = bytes.long(), lengths.to(bytes.device).long()
    rows, length = bytes.shape
    if not rows or not length:
        return bytes.bool(), state
    before = torch.cat([state.last[:, None], bytes[:, :-1]], 1)
    place = torch.arange(length, device=bytes.device)
    sure = (state.seen[:, None] + place < SURE) | _special(before)
    named = _named(before, spec, entropies, state)
    word = ~_spacelike(bytes)
    shortest, longest = _reach(spec)

    # follow[s]: where the patch that starts at s ends; `length` means not in this chunk
    to_sure, to_named, to_word = _upcoming(sure), _upcoming(named), _upcoming(word)
    end = length if not longest else place + longest
    low = place + shortest
    if spec.kind == "space":
        low = torch.maximum(low, to_word[:, :-1] + 1)
    follow = torch.minimum(to_sure[:, 1:], to_named.gather(1, low.expand(rows, -1).clamp(max=length)))
    follow = torch.minimum(follow, torch.as_tensor(end, device=bytes.device)).clamp(max=length)

    # the same for the patch that was open before the chunk
    low = (shortest - state.held).clamp(min=0)
    if spec.kind == "space":
        low = torch.maximum(low, torch.where(state.word, 0, to_word[:, 0] + 1))
    first = torch.minimum(to_sure[:, 0], to_named.gather(1, low[:, None].clamp(max=length))[:, 0])
    if longest:
        first = torch.minimum(first, (longest - state.held).clamp(0, length))
    starts = _walk(first, follow) & (place < lengths[:, None])
    return starts, _after(state, bytes, lengths, starts, word, entropies)


def _reach(spec: Any) -> tuple[int, int]:
    """The least bytes of a patch and the most, 0 for no limit."""
    if spec.kind == "static":
        return spec.size, spec.size
    apart = spec.kind == "entropy" and spec.rule == "combined"
    return max(spec.shortest, 2) if apart else spec.shortest, spec.longest


def _special(bytes: Tensor) -> Tensor:
    return (bytes < 0) | (bytes > 255)


def _spacelike(bytes: Tensor) -> Tensor:
    letter = ((bytes | 32) >= ord("a")) & ((bytes | 32) <= ord("z"))
    digit = (bytes >= ord("0")) & (bytes <= ord("9"))
    return ~(letter | digit | ((bytes >= 0x80) & (bytes < 0xC0)))


def _named(before: Tensor, spec: Any, entropies: Tensor | None, state: Open) -> Tensor:
    """bool [B, T]: positions that the rule names, patch limits aside; `before` [B, T] holds the byte before each."""
    if spec.kind == "space":
        return _spacelike(before)
    if spec.kind == "static" or entropies is None:
        return torch.zeros_like(before, dtype=torch.bool)
    level, rise = _levels(entropies, state)
    named = torch.ones_like(before, dtype=torch.bool)
    if spec.rule != "monotonic":
        named &= level > spec.threshold
    if spec.rule != "global":
        named &= rise > spec.rise
    return named | (before == NEWLINE) if spec.reset else named


def _levels(entropies: Tensor, state: Open) -> tuple[Tensor, Tensor]:
    """The entropies [B, T] and how much each is above the one before, in float64: thresholds compare exactly."""
    level = entropies.double()
    return level, level.diff(dim=1, prepend=state.entropy[:, None].to(level.device))


def _upcoming(flags: Tensor) -> Tensor:
    """bool [B, T] -> [B, T + 1]: the first position from t on where a flag stands; T where there is none."""
    length = flags.shape[1]
    place = torch.arange(length, device=flags.device).expand_as(flags).masked_fill(~flags, length)
    found = place.flip(1).cummin(1).values.flip(1)
    return torch.nn.functional.pad(found, (0, 1), value=length)


def _walk(first: Tensor, follow: Tensor) -> Tensor:
    """bool [B, T]: the positions on the way first, follow[first], follow[follow[first]], ...; T ends it.

    In log2(T) rounds: each marks what is a jump away from a marked position, and makes the jumps twice as long."""
    rows, length = follow.shape
    jump = torch.nn.functional.pad(follow, (0, 1), value=length)
    marked = torch.zeros(rows, length + 1, dtype=torch.uint8, device=follow.device)
    marked.scatter_(1, first[:, None], 1)
    for _ in range(math.ceil(math.log2(length + 1))):
        marked = marked.scatter_reduce(1, jump, marked, "amax")
        jump = jump.gather(1, jump)
    return marked[:, :length].bool()


def _after(
    state: Open, bytes: Tensor, lengths: Tensor, starts: Tensor, word: Tensor, entropies: Tensor | None
) -> Open:  # fmt: skip
    place = torch.arange(bytes.shape[1], device=bytes.device)
    there = place < lengths[:, None]
    last_start = place.expand_as(starts).masked_fill(~starts, -1).amax(1)
    same = last_start < 0  # the patch that was open still is
    held = torch.where(same, state.held + lengths, lengths - last_start)
    words = (word & there & (place >= last_start[:, None])).any(1) | (same & state.word)
    some, last = lengths > 0, (lengths - 1).clamp(min=0)[:, None]
    byte = torch.where(some, bytes.gather(1, last)[:, 0], state.last)
    entropy = state.entropy
    if entropies is not None:
        entropy = torch.where(some, entropies.double().gather(1, last)[:, 0], state.entropy)
    return Open(state.seen + lengths, held, words, byte, entropy)


def mean_size(starts: Tensor, lengths: Tensor) -> float:
    """Bytes a patch of starts [B, T] and lengths [B]; 0 where there is no byte."""
    return int(lengths.sum()) / max(int(starts.sum()), 1)


def fit_threshold(bytes: Tensor, lengths: Tensor, spec: EntropySpec, entropies: Tensor, mean: float) -> EntropySpec:
    """The spec whose threshold (`rise` under the rule `monotonic`) brings the mean size of the patches of these texts
    nearest to `mean`, limits and newlines included.

    A lower threshold never gives fewer patches, limits or not (by induction, the nth patch never starts later), so
    bisecting over the values themselves is exact. Raises SpecError for a mean beyond the limits of the spec.
    """
    shortest, longest = _reach(spec)
    if not mean >= shortest or mean > (longest or math.inf):
        most = f" to {longest}" if longest else " on"
        raise SpecError(f"patches of {mean:g} bytes on average: the limits allow {shortest}{most}; change one of them.")
    level, rise = _levels(entropies, Open.new(len(bytes), bytes.device))
    there = torch.arange(bytes.shape[1], device=bytes.device) < lengths[:, None]
    name, score = ("rise", rise) if spec.rule == "monotonic" else ("threshold", level)
    values: list[float] = score[there].unique().tolist()

    def tried(index: int) -> EntropySpec:
        """With a threshold below values[index] and above the one before."""
        if index in (0, len(values)):
            cut = values[0] - 1 if not index else values[-1]
        else:
            cut = (values[index - 1] + values[index]) / 2
            cut = cut if cut < values[index] else values[index - 1]  # neighbours have no number between them
        return dataclasses.replace(spec, **{name: cut})  # type: ignore[arg-type]

    def size(index: int) -> float:
        return mean_size(boundaries(bytes, lengths, tried(index), entropies), lengths)

    if not values:
        return spec
    low, high = 0, len(values)  # size(low) <= mean, unless even the lowest threshold gives larger patches
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= mean else (low, middle)
    return tried(min((low, high), key=lambda index: abs(size(index) - mean)))
