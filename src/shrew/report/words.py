"""Numbers and foreign text as words: every string that reaches the page or the terminal passes through here."""

import html
import json
import math
import re
from collections.abc import Callable
from typing import Any

SPACE = "\u00a0"  # between a number and its unit, so that a line never breaks there

# Control characters (ANSI escapes among them), marks that reorder text on screen, and code points UTF-8 cannot hold.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(value: Any) -> str:
    """Text with nothing in it that a terminal or a browser would obey: control characters become visible signs."""
    return _INVISIBLE.sub(_sign, value if isinstance(value, str) else str(value))


def _sign(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\ufffd" if 0xD800 <= code <= 0xDFFF else f"⟨U+{code:04X}⟩"


def escape(value: Any) -> str:
    """`plain` text that is safe between HTML tags and inside double-quoted attributes."""
    return html.escape(plain(value), quote=True)


def number_in(value: Any) -> float | None:
    """A finite number, or None for anything else (booleans, text, NaN)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def table_in(value: Any) -> dict[str, Any]:
    """A mapping with text keys, empty for anything else."""
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}


def list_in(value: Any) -> list[Any]:
    """A list, empty for anything else."""
    return list(value) if isinstance(value, list | tuple) else []


def text_in(value: Any) -> str:
    """A string, empty for anything else."""
    return value if isinstance(value, str) else ""


def number(value: float) -> str:
    """Four significant digits: 1.132, 0.004118, 12,345."""
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e15:
        return f"{value:.3g}"
    digits = 3 - math.floor(math.log10(abs(value)))
    return f"{value:,.0f}" if digits <= 0 else f"{value:,.{digits}f}"


def size(value: float) -> str:
    """Bytes in decimal units, three significant digits: 2.87 MB (1 MB = 1,000,000 bytes)."""
    amount, units = value, ["bytes", "kB", "MB", "GB", "TB", "PB"]
    while abs(amount) >= 999.5 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    if units[0] == "bytes":
        return f"{amount:.0f}{SPACE}bytes"
    if abs(amount) >= 1e6:
        return f"{amount:.3g}{SPACE}{units[0]}"
    return f"{amount:.{2 if abs(amount) < 9.995 else 1 if abs(amount) < 99.95 else 0}f}{SPACE}{units[0]}"


def size_exact(value: float) -> str:
    """A size that somebody set or an axis names: 3 MB, not 3.00 MB."""
    return re.sub(r"\.(\d*?)0+(?=\s)", lambda found: f".{found[1]}" if found[1] else "", size(value))


def interval(low: str, high: str) -> str:
    """'98.1 to 99.1 %': the unit is said once."""
    number, space, unit = low.rpartition(SPACE)
    return f"{number if space and high.endswith(space + unit) else low} to {high}"


def count(value: float) -> str:
    """A count, in millions (M) and billions (B) from one million on: 5,820,000 is 5.82 M."""
    if abs(value) >= 1e9:
        return f"{value / 1e9:.3g}{SPACE}B"
    return f"{value / 1e6:.3g}{SPACE}M" if abs(value) >= 1e6 else f"{value:,.0f}"


def percent(share: float) -> str:
    """98.6 % for 0.986."""
    return f"{100 * share:,.1f}{SPACE}%"


def percent_at_least(share: float) -> str:
    """Like `percent` but never rounded up: a lower bound of 0.9799 does not print as 98.0 %."""
    return f"{math.floor(1000 * share + 1e-9) / 10:,.1f}{SPACE}%"


def percent_exact(share: float) -> str:
    """A percentage that somebody set: 98 %, 99.75 %."""
    return f"{100 * share:.6g}{SPACE}%"


def signed(value: float, told: Callable[[float], str]) -> str:
    """−0.5 or +0.5: a change, its size in words."""
    return ("−" if value < 0 else "+") + told(abs(value))


def times(ratio: float) -> str:
    """How many times smaller or faster, never rounded up: 4.04."""
    return f"{math.floor(100 * ratio + 1e-9) / 100:,.2f}" if abs(ratio) < 100 else f"{math.floor(ratio):,}"


def duration(seconds: float) -> str:
    """312 -> 5 min 12 s."""
    if seconds < 120:
        return f"{seconds:.3g}{SPACE}s"
    minutes = round(seconds) // 60
    if minutes < 120:
        return f"{minutes}{SPACE}min {round(seconds) % 60}{SPACE}s"
    return f"{minutes // 60:,}{SPACE}h {minutes % 60}{SPACE}min"


def value_of(value: Any) -> str:
    """A setting's value in words: lists joined, tables as compact JSON."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(value_of(item) for item in value)
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def move(settings: Any) -> str:
    """A move as a phrase: {"name": "quantize", "bits": 3} is 'quantize (bits 3)'."""
    told = table_in(settings)
    name = value_of(told.pop("name", "unnamed move"))
    rest = ", ".join(f"{key} {_brief(value)}" for key, value in told.items() if value is not None and value != {})
    return f"{name} ({rest})" if rest else name


def _brief(value: Any) -> str:
    """A setting inside a phrase; what a long table says in full stands in the recipe."""
    return f"set apart for {len(value)}" if isinstance(value, dict) and len(value) > 2 else value_of(value)


def shared_prefix(first: str, second: str) -> int:
    """How many leading characters two texts share."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
