"""How likely a function is vulnerable: rules, a cheap first stage for every function, the detector for the rest.

A folder holds it all: `scan.json`, whose operating points are thresholds with the alerts per 1,000 functions that they
cost, and beside it `grams.npz`, a packed detector, or both. Each part is loaded when it is first asked.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import msgspec
from msgspec import Meta

from shrew import files
from shrew.errors import DataError, FolderError
from shrew.scan.cache import Score
from shrew.scan.config import POINTS
from shrew.scan.cwe import SEVERITIES

if TYPE_CHECKING:
    from shrew.scan.detector import Detector
    from shrew.scan.grams import Grams
    from shrew.scan.rules import Finding

__all__ = ["BUILT_IN", "Judge", "Point", "line_effects"]

BUILT_IN = Path(__file__).parents[1] / "models" / "scan"  # one that is only asked for by NAME is "scan-NAME"
LONGEST, LARGEST = 200, 2_000_000  # lines of a function that are told apart by leaving each out; characters in all
DIGITS = 4  # of what the detector says: how texts are put into batches shows in the digits after these
RULES_ALONE = {"low": 0.25, "medium": 0.5, "high": 0.75}  # an order, no measurement: nothing was calibrated


class Point(msgspec.Struct, frozen=True):
    threshold: float
    alerts_per_1000: float | None = None


Weight = Annotated[float, Meta(ge=-1e6, le=1e6)]


class _Table(TypedDict):
    bias: Weight
    weights: dict[str, Weight]


class _Settings(msgspec.Struct, frozen=True):
    """scan.json."""

    combine: dict[str, _Table]  # "with" the detector's logit and "without"
    points: dict[str, Point]
    first_stage: float = -math.inf  # the least logit of the first stage that the detector is asked about
    languages: list[str] | None = None  # that the detector learnt from; None: all
    version: Annotated[int, Meta(ge=1, le=1)] = 1


class Judge:
    """`folder` None: rules alone. Raises FolderError for a folder that is no detector of ours."""

    def __init__(self, folder: Path | None, jobs: int | None = None) -> None:
        self._folder, self._jobs = folder, jobs
        self.has_model = folder is not None
        self.has_detector = folder is not None and (folder / "pack.json").is_file()
        self.ident, self.name = "rules alone", ""
        self._settings = _Settings({}, {name: Point(0.0) for name in POINTS})
        if folder is not None:
            self._settings = _read(folder / "scan.json")
            parts = [f"{item.name} {files.sha256(item)}" for item in sorted(folder.iterdir()) if item.is_file()]
            self.ident = hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
            self.name = f"{folder.resolve().name} {self.ident[:12]}"

    @cached_property
    def _grams(self) -> "Grams | None":
        path = self._folder / "grams.npz" if self._folder else None
        if path is None or not path.exists():
            return None
        from shrew.scan.grams import Grams

        try:
            return Grams.load(path)
        except DataError as error:  # what is wrong with the detector is nothing that is wrong with a file scanned
            raise FolderError(str(error)) from None

    @cached_property
    def _detector(self) -> "Detector":
        from shrew.scan.detector import Detector

        assert self._folder is not None
        return Detector.load(self._folder, self._jobs)

    def point(self, name: str) -> Point:
        return self._settings.points[name]

    def grams(self, texts: Sequence[str], languages: Sequence[str]) -> list[float | None]:
        """The first stage's logit of each function; None where there is no first stage."""
        if self._grams is None or not texts:
            return [None] * len(texts)
        found: list[float | None] = [*_logits(self._grams, texts, languages)]
        return found

    def passes(self, gram: float | None) -> bool:
        """Whether a function goes to the detector on the first stage's word alone."""
        return self.has_model and (gram is None or gram >= self._settings.first_stage)

    def asks(self, language: str) -> bool:
        """Whether the detector speaks of that language; else the first stage and the rules judge alone."""
        known = self._settings.languages
        return self.has_detector and (known is None or language in known)

    def scores(self, texts: Sequence[str], languages: Sequence[str]) -> list[Score]:
        """What the detector says of each function."""
        return [
            Score(
                round(float(score.logit), DIGITS),
                tuple(round(float(line), DIGITS) for line in score.lines),
                {name: round(float(share), DIGITS) for name, share in score.families.items()},
            )
            for score in self._detector.score(list(texts), list(languages))
        ]

    def lines(self, text: str, language: str) -> tuple[float, ...]:
        """`line_effects` of the first stage; () where there is none."""
        return () if self._grams is None else line_effects(self._grams, text, language)

    def probability(self, score: Score | None, gram: float | None, findings: "Sequence[Finding]") -> float:
        """Calibrated, where there is a model; else an order by the rules' severities."""
        if not self.has_model:
            return max((RULES_ALONE.get(finding.severity, 0.0) for finding in findings), default=0.0)
        from shrew.scan.combine import chance

        found = chance(self._settings.combine, score.logit if score else None, gram or 0.0, findings)
        return round(found, DIGITS + 2)  # thresholds can be small

    def severity(self, probability: float, findings: "Sequence[Finding]") -> str:
        """The worst that a rule says; where only the model speaks, by the strictest point that it passes."""
        if findings:
            return max((item.severity if item.severity in SEVERITIES else "low" for item in findings),
                       key=SEVERITIES.index)
        for name, severity in zip(POINTS, reversed(SEVERITIES), strict=True):
            if probability >= self._settings.points[name].threshold:
                return severity
        return "low"


def line_effects(grams: "Grams", text: str, language: str) -> tuple[float, ...]:
    """How much the logit falls without each line of a text; () where telling them apart would take too long."""
    lines = text.split("\n")
    if len(lines) > LONGEST or len(lines) * len(text) > LARGEST:
        return ()
    without = ["\n".join([*lines[:at], "", *lines[at + 1 :]]) for at in range(len(lines))]
    whole, *rest = _logits(grams, [text, *without], [language] * (len(lines) + 1))
    return tuple(round(whole - other, DIGITS) for other in rest)


def _logits(grams: "Grams", texts: Sequence[str], languages: Sequence[str]) -> list[float]:
    return [round(float(logit), DIGITS) for logit in grams.score(list(texts), list(languages))]


def _read(path: Path) -> _Settings:
    again = "give the folder of a detector, with scan.json beside its weights"
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_Settings)
    except OSError as error:
        raise FolderError(f"{path} cannot be read ({error.strerror}); {again}.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FolderError(f"{path} is damaged ({error}); {again}.") from None
    if missing := [name for name in POINTS if name not in found.points]:
        raise FolderError(f"{path} has no operating point '{missing[0]}'; {again}.")
    if missing := [name for name in ("with", "without") if name not in found.combine]:
        raise FolderError(f"{path} does not say how scores combine '{missing[0]}' a detector; {again}.")
    return found
