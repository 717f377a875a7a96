"""What `shrew patch` found, and the words and signs that its terminal and its page share."""

import unicodedata
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from shrew import spec

SIGNS = {"\n": "⏎", "\r": "␍", "\t": "→", "\0": "␀", "\x1b": "␛"}


@dataclass(frozen=True)
class Shown:
    """A text with its patches: `starts` are offsets of bytes, `entropies` in nats, None where no model was asked.
    `level` is the threshold in nats that entropies are held against, where one line can show it."""

    text: bytes
    left_out: bool
    rule: Any
    model: str
    starts: list[int]
    entropies: list[float] | None
    wanted: float | None

    @property
    def level(self) -> float | None:
        line = self.rule.kind == "entropy" and self.rule.rule != "monotonic"
        return self.rule.threshold if line else None

    @property
    def patches(self) -> list[tuple[int, int]]:
        return list(pairwise([*self.starts, len(self.text)]))

    @property
    def mean(self) -> float:
        return len(self.text) / len(self.starts)


def signs(text: bytes) -> list[str]:
    """One sign for each byte of a text: a character stands at its first byte, with '' at its others. What cannot be
    seen, or would move the cursor, has a stand-in; a byte that is no part of UTF-8 is shown in hexadecimal."""
    found: list[str] = []
    at = 0
    while at < len(text):
        size = next((n for n in (1, 2, 3, 4) if _is_character(text[at : at + n])), 0)
        found.append(_sign(text[at : at + size].decode()) if size else f"\\x{text[at]:02x}")
        found += [""] * (max(size, 1) - 1)
        at += max(size, 1)
    return found


def _is_character(part: bytes) -> bool:
    try:
        return len(part.decode()) == 1
    except UnicodeDecodeError:
        return False


def _sign(character: str) -> str:
    if character in SIGNS:
        return SIGNS[character]
    kind = unicodedata.category(character)
    if kind[0] == "C" or kind in ("Zl", "Zp", "Mn", "Me"):
        return "·"
    return " " if kind == "Zs" else character


def sentence(shown: Shown) -> str:
    """How the text was cut."""
    rule = shown.rule
    limits = [f"at least {rule.shortest}"] if getattr(rule, "shortest", 1) > 1 else []
    limits += [f"at most {rule.longest}"] if getattr(rule, "longest", 0) else []
    most = f", {' and '.join(limits)} bytes each" if limits else ""
    if rule.kind == "static":
        return f"A patch every {rule.size} bytes."
    if rule.kind == "learned":
        return f"Patches end where the states of the model take a turn, every {rule.mean:g} bytes or so{most}."
    if rule.kind == "space":
        return f"Patches end with the space-like byte behind a word{most}."
    how = {
        "global": f"Patches start where the entropy of the next byte is above {rule.threshold:.3f} nats",
        "monotonic": f"Patches start where the entropy rises by more than {rule.rise:.3f} nats",
        "combined": f"Patches start where the entropy is above {rule.threshold:.3f} nats and has risen by more than "
                    f"{rule.rise:.3f}",
    }[rule.rule]  # fmt: skip
    fitted = f", fitted to a mean of {shown.wanted:g} bytes" if shown.wanted is not None else ""
    return how + fitted + most + (", or a line does." if rule.reset else ".")


def counts(shown: Shown) -> str:
    """'812 bytes in 180 patches, 4.51 bytes each'."""
    size, many = len(shown.text), len(shown.starts)
    first = f"the first {size:,} bytes" if shown.left_out else f"{size:,} byte{'s' * (size > 1)}"
    return f"{first} in {many:,} patch{'es' * (many > 1)}, {shown.mean:.2f} bytes each on average"


def plain(shown: Shown) -> dict[str, Any]:
    """Everything, for machines."""
    return {
        "bytes": len(shown.text), "left_out": shown.left_out, "rule": spec.dump(shown.rule), "model": shown.model,
        "mean": shown.mean, "entropies": shown.entropies,
        "patches": [{"start": low, "end": high, "text": shown.text[low:high].decode("utf-8", "backslashreplace")}
                    for low, high in shown.patches],
    }  # fmt: skip
