"""What an audit is made of: the weights that a file really holds, and what is to be said of them."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

SEVERITIES = {
    "note": "worth knowing",
    "waste": "bytes that carry nothing",
    "fallback": "a weight that got another type than it was asked to have",
    "claim": "the label says what the file does not hold",
    "broken": "numbers that no model can use",
}
ROLES = ("linear", "embedding", "head", "other")
EMBEDDING = re.compile(
    r"(^|[._/])(embed_tokens|embed_in|embed_positions|wte|wpe|token_embd|position_embd|tok_embeddings|embedding|"
    r"embeddings|\w+_embeddings?)([._]|$)"
)
HEAD = re.compile(r"(^|[._/])(lm_head|embed_out)([._/]|$)|^(model\.)?(output|score|classifier)(\.weight|\.qweight)?$")
DENSE = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64"}


@dataclass(frozen=True)
class Span:
    """Where a part of a weight lies: `bytes` bytes of `file` from `start` on."""

    file: Path
    start: int
    bytes: int


@dataclass(frozen=True)
class Held:
    """One weight as a file holds it, with all of its parts: codes, scales, zero points.

    `shape` is that of the weight and not of its codes; `effective` is its type as the bytes have it, `code` the bits of
    one code without scales, `group` how many weights share a scale (0: a row, None: they have none, or it is not
    known). `groups` gives the codes (or, of dense weights, the numbers) a few at a time as [n, group] for a deep scan.
    """

    name: str
    shape: tuple[int, ...]
    effective: str
    code: float
    spans: tuple[Span, ...]
    quantized: bool
    group: int | None = None
    role: str = ""
    stored: str = ""  # how the file calls it, where that says more
    groups: Callable[[], Iterator[np.ndarray]] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "role", self.role or role_of(self.name, self.shape))

    @property
    def weights(self) -> int:
        return count(self.shape)

    @property
    def bytes(self) -> int:
        return sum(span.bytes for span in self.spans)

    @property
    def bits(self) -> float:
        """Bits a weight, scales and zero points included."""
        return 8 * self.bytes / max(self.weights, 1)


@dataclass(frozen=True)
class Finding:
    """One plain sentence or two, and what helps; `tensors` names what it speaks of."""

    severity: str
    text: str
    advice: str = ""
    tensors: tuple[str, ...] = ()


@dataclass
class Audit:
    """What was found in a file or folder. `claims` is what labels say, each with where it stands."""

    path: Path
    format: str
    held: list[Held]
    size: int  # bytes of the files that hold the weights, headers and padding included
    claims: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def role(self, *roles: str) -> list[Held]:
        return [item for item in self.held if item.role in roles]

    @property
    def weights(self) -> int:
        return sum(item.weights for item in self.held)

    @property
    def bits(self) -> dict[str, float]:
        """Achieved bits a weight: of the whole file, and of each role that is there."""
        found = {"whole file": 8 * self.size / self.weights} if self.weights else {}
        return found | {role: mean_bits(items) for role in ROLES if (items := self.role(role))}


def count(shape: Iterable[int]) -> int:
    found = 1
    for extent in shape:
        found *= extent
    return found


def mean_bits(items: Iterable[Held]) -> float:
    """Bits a weight of several together."""
    items = list(items)
    return 8 * sum(item.bytes for item in items) / max(sum(item.weights for item in items), 1)


def role_of(name: str, shape: tuple[int, ...]) -> str:
    """Told by the name, and a matrix of any other name is a linear layer."""
    if sum(extent > 1 for extent in shape) < 2:
        return "other"
    if HEAD.search(name):
        return "head"
    return "embedding" if EMBEDDING.search(name) else "linear"


def named(names: Iterable[str], most: int = 3) -> str:
    """'a, b, c and 4 more'."""
    names = [printable(name) for name in names]
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def printable(text: str, most: int = 120) -> str:
    """A text out of a stranger's file, fit for a terminal."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text[:most])
    return shown + ("..." if len(text) > most else "")


def plural(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
