"""What a scan found: the two types that everything printed and written is made from."""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shrew.scan import cwe as weaknesses
from shrew.scan.cwe import SEVERITIES, Weakness

if TYPE_CHECKING:
    from shrew.scan.functions import Function
    from shrew.scan.rules import Finding

BASELINE = "baseline"  # why an alert is held back: it was known before


def fingerprint(key: str, cwe: str) -> str:
    """Names a kind of weakness in a function: 32 hex digits that stay while the function's code does.

    Neither the path nor a line is in it, so that it outlives edits elsewhere and a file that moves. Copies of one
    function share it; whoever needs them apart counts them (`numbered`, `baseline.split`).
    """
    return hashlib.sha256(f"{weaknesses.family(cwe)}\0{key}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True)
class Alert:
    """One function that somebody should look at."""

    function: "Function"
    probability: float  # calibrated, 0 to 1
    cwe: str  # "CWE-89", "" for unknown
    severity: str  # one of SEVERITIES
    findings: "tuple[Finding, ...]" = ()  # what rules, ours and other tools', said about lines of this function
    lines: tuple[float, ...] = ()  # one score a line of function.text, higher is more suspicious; () without a model
    message: str = ""  # one sentence; "" takes the weakness's name
    fingerprint: str = ""  # made from the function's key and the family where none is given
    suppressed: str = ""  # why it is held back: "inline", "path", "cwe", BASELINE; "" for what is reported

    def __post_init__(self) -> None:
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", fingerprint(self.function.key, self.cwe))

    @property
    def weakness(self) -> Weakness:
        return weaknesses.weakness(self.cwe)

    @property
    def path(self) -> str:
        return self.function.source.path

    @property
    def told(self) -> str:
        """The sentence for people."""
        return self.message or next((item.message for item in self.findings if item.message), "") or self.weakness.name

    def shades(self) -> list[float]:
        """How suspicious each line of the text is beside the others, 0 to 1; all 0 where the scores say nothing.

        Zero is the function's median line: scores of different functions are on different footings, and most lines of
        any function matter little.
        """
        texts = self.function.text.split("\n")
        scores = [score if text.strip() and math.isfinite(score) else None
                  for text, score in zip(texts, self.lines, strict=False)]  # fmt: skip
        known = sorted(score for score in scores if score is not None)
        if not known or known[-1] - known[0] < 1e-6:
            return [0.0] * len(texts)
        middle, top = known[(len(known) - 1) // 2], known[-1]
        found = [0.0 if score is None else max(0.0, score - middle) / ((top - middle) or 1.0) for score in scores]
        return found + [0.0] * (len(texts) - len(found))

    def first_line(self) -> int:
        """Where to look first: the first finding's line, else the most suspicious line, else the function's first."""
        own = [item.start for item in self.findings if self.function.start <= item.start <= self.function.end]
        if own:
            return own[0]
        shades = self.shades()
        best = max(range(len(shades)), key=lambda at: shades[at])
        return min(self.function.start + best, self.function.end) if shades[best] > 0 else self.function.start


@dataclass(frozen=True)
class Report:
    """One scan. Everything that `shrew scan` prints and writes is a pure function of it."""

    alerts: list[Alert]
    files: int  # that were read
    functions: int
    skipped: list[tuple[str, str]]  # path and why
    seconds: float
    point: str  # the operating point's name
    alerts_per_1000: float | None = None  # what the point costs on ordinary code, as measured; None when unknown
    suppressed: list[Alert] = field(default_factory=list)  # held back, each with its reason
    compared: bool = False  # a baseline was given, so `alerts` are the new ones
    notes: list[str] = field(default_factory=list)  # lines to be told: "no detector: rules alone"
    detector: str = ""  # name and hash of the model; "" for rules alone


def ordered(alerts: Iterable[Alert]) -> list[Alert]:
    """The worst first: by severity, probability, then place."""
    return sorted(alerts, key=lambda item: (-SEVERITIES.index(item.severity), -item.probability, _place(item)))


def _place(alert: Alert) -> tuple[str, int, int, str]:
    return alert.path, alert.function.start, alert.function.end, alert.fingerprint


def numbered(alerts: Iterable[Alert]) -> Iterator[tuple[Alert, int]]:
    """The alerts by place, each with its number, from 1, among those of one fingerprint in one file."""
    seen: Counter[tuple[str, str]] = Counter()
    for alert in sorted(alerts, key=_place):
        seen[alert.path, alert.fingerprint] += 1
        yield alert, seen[alert.path, alert.fingerprint]


def by_severity(alerts: Iterable[Alert]) -> dict[str, int]:
    """How many of each severity, the worst first, without those of none."""
    counts = Counter(alert.severity for alert in alerts)
    return {severity: counts[severity] for severity in reversed(SEVERITIES) if counts[severity]}


def by_file(alerts: Iterable[Alert]) -> dict[str, list[Alert]]:
    """The alerts of each file, the worst first in each."""
    found: dict[str, list[Alert]] = defaultdict(list)
    for alert in ordered(alerts):
        found[alert.path].append(alert)
    return dict(found)
