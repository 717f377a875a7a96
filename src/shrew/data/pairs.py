"""Vulnerable functions with their fixed twins, and ordinary functions, as batches for a detector.

A row of a pairs file is {"before": vulnerable, "after": fixed, "language", "cwe", "project", "licence"}, a row of
ordinary functions {"text", "language"} and perhaps "project". A batch is a pure function of (texts, seed, step).
"""

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from shrew import code
from shrew.data import read_jsonl
from shrew.errors import DataError, SpecError
from shrew.objectives import IGNORE, Emphasis
from shrew.spec import Meta, doc

UNKNOWN = "unknown"
FAMILIES = ("CWE-20", "CWE-22", "CWE-78", "CWE-79", "CWE-89", "CWE-119", "CWE-125", "CWE-190", "CWE-200", "CWE-327",
            "CWE-377", "CWE-416", "CWE-476", "CWE-502", "CWE-787")  # fmt: skip
COPYLEFT = re.compile(r"\b[AL]?GPL", re.IGNORECASE)
KERNEL = {"linux"}  # projects under the GPL whatever a row says of its licence


@dataclass(frozen=True, kw_only=True)
class DetectSpec:
    """The `[detect]` table of a recipe: a detector of vulnerable functions."""

    pairs: list[str] = doc("JSONL files of vulnerable functions (before) and fixed ones (after)", default_factory=list)
    negatives: list[str] = doc("JSONL files of ordinary functions", default_factory=list)
    share: Annotated[float, Meta(ge=0, le=0.95)] = doc("share of the rows of a step that are ordinary functions", 0.5)
    languages: list[str] = doc("languages to learn from; default: all", default_factory=list)
    hold_out: list[str] = doc("projects that are left out", default_factory=list)
    fold: str = doc("K/N: also leave out the projects of fold K of N, counted from 0, by a hash of their names", "")
    gpl: bool = doc("learn from code under the GPL too", False)
    comments: bool = doc("let the model read comments and docstrings", False)
    families: list[str] = doc("CWE ids to tell apart; all others are unknown", default_factory=lambda: [*FAMILIES])
    pooling: list[Literal["mean", "last", "max", "lines"]] = doc(
        "what of a function is judged: mean, last or largest hidden states, or their mean weighted by the line scores",
        default_factory=lambda: ["mean"])  # fmt: skip
    dropout: Annotated[float, Meta(ge=0, lt=1)] = doc("share of the pooled features left out in training", 0.1)
    noise: Annotated[float, Meta(ge=0, le=0.5)] = doc(
        "share of the tokens that are replaced by another one of the same function in training", 0.0)  # fmt: skip
    margin: Annotated[float, Meta(ge=0)] = doc("how far the vulnerable logit is to stand above its twin's", 1.0)
    pair_weight: Annotated[float, Meta(ge=0)] = doc("weight of the loss of that margin", 1.0)
    line_weight: Annotated[float, Meta(ge=0)] = doc("weight of the loss of the lines", 0.5)
    family_weight: Annotated[float, Meta(ge=0)] = doc("weight of the loss of the families", 0.2)

    def __post_init__(self) -> None:
        if not self.pooling or len(set(self.pooling)) < len(self.pooling):
            raise SpecError("detect.pooling: name one or more ways, each once.")
        if self.fold:
            fold_numbers(self.fold)

    @property
    def emphasis(self) -> Emphasis:
        return Emphasis(self.margin, self.pair_weight, self.line_weight, self.family_weight)

    def known_families(self) -> list[str]:
        """The families in order, normalised, the unknown one last."""
        return [*dict.fromkeys(cwe_id(name) for name in self.families if name != UNKNOWN), UNKNOWN]


def cwe_id(name: str | None) -> str:
    """'CWE-089', 'cwe-89' and '89' -> 'CWE-89'; what is none -> 'unknown'."""
    found = re.fullmatch(r"(?:cwe)?[-_ ]?0*(\d+)", str(name).strip(), re.IGNORECASE)
    return f"CWE-{found[1]}" if found else UNKNOWN


def project_name(name: str | None) -> str:
    """'Torvalds/Linux' -> 'linux': files spell projects differently."""
    return str(name or "").rstrip("/").rpartition("/")[2].lower().removesuffix(".git")


def fold_of(project: str | None, folds: int) -> int:
    """The fold, from 0, that a project belongs to, whatever file it comes from."""
    return int.from_bytes(hashlib.sha256(project_name(project).encode()).digest()[:8], "big") % folds


def fold_numbers(text: str) -> tuple[int, int]:
    """'2/5' -> (2, 5). Raises SpecError."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise SpecError(f"detect.fold '{text}' is no fold; write K/N with K from 0 to N - 1, such as 0/5.")
    return int(found[1]), int(found[2])


@dataclass(frozen=True)
class Text:
    """A function: its tokens, the line of each, and which lines the fix took out or changed."""

    tokens: np.ndarray
    lines: np.ndarray
    changed: frozenset[int] = frozenset()
    places: tuple[int, ...] = ()  # tokens at which the changes begin, the same changes in both members of a pair


@dataclass(frozen=True)
class Pair:
    before: Text
    after: Text
    family: int


def removed_lines(before: str, after: str) -> frozenset[int]:
    """The lines of `before`, counted from 0, that `after` lacks, without blank ones."""
    return _removed(before.split("\n"), _steps(before, after))


def changes(before: str, after: str) -> tuple[frozenset[int], list[tuple[int, int]]]:
    """The lines of `before` that `after` lacks, and where each change begins in both, by line from 0.

    Where the fix only added lines, the line that each addition now stands before is the one that was wrong."""
    old, steps = before.split("\n"), _steps(before, after)
    removed = _removed(old, steps) or frozenset(
        next((line for line in range(low, len(old)) if old[line].strip()), max(low - 1, 0)) for _, low, _, _, _ in steps
    )
    return removed, [(low, first) for _, low, _, first, _ in steps]


def _steps(before: str, after: str) -> list[tuple[str, int, int, int, int]]:
    matched = difflib.SequenceMatcher(None, before.split("\n"), after.split("\n"), autojunk=False)
    return [step for step in matched.get_opcodes() if step[0] != "equal"]


def _removed(old: Sequence[str], steps: Sequence[tuple[str, int, int, int, int]]) -> frozenset[int]:
    return frozenset(line for _, low, high, _, _ in steps for line in range(low, high) if old[line].strip())


class Reader:
    """Reads files of functions for one tokenizer; `left_out` counts what is not learned from, by reason."""

    def __init__(self, item: DetectSpec, tokenizer: Any, families: Sequence[str]) -> None:
        self.item, self.tokenizer = item, code.uncut(tokenizer)
        self.left_out: Counter[str] = Counter()
        self._families = {name: number for number, name in enumerate(families)}
        self._seen: set[str] = set()

    def pairs(self) -> list[Pair]:
        found = []
        for where, row in _rows(self.item.pairs, ("before", "after")):
            before, after = (self._canonical(row, key) for key in ("before", "after"))
            if self._passed_over(where, row, before + "\0" + after):
                continue
            if before == after:
                self.left_out["equal but for comments and blanks"] += 1
                continue
            removed, begins = changes(before, after)
            family = self._families.get(cwe_id(row.get("cwe")), self._families[UNKNOWN])
            found.append(Pair(self._text(before, removed, [low for low, _ in begins]),
                              self._text(after, frozenset(), [first for _, first in begins]), family))  # fmt: skip
            self._seen |= {before, after}
        if not found:
            raise DataError(f"{', '.join(self.item.pairs) or 'no file'}: no pair to learn from; give a JSONL file of "
                            '{"before": ..., "after": ..., "language": ...} with detect.pairs or --pairs.')  # fmt: skip
        return found

    def ordinary(self) -> list[Text]:
        """The ordinary functions, without those that the pairs hold."""
        found = []
        for where, row in _rows(self.item.negatives, ("text",)):
            text = self._canonical(row, "text")
            if not self._passed_over(where, row, text) and text.strip():
                found.append(self._text(text, frozenset(), []))
        return found

    def _canonical(self, row: dict[str, Any], key: str) -> str:
        return code.canonical(row[key], str(row.get("language")), self.item.comments)

    def _passed_over(self, where: str, row: dict[str, Any], text: str) -> bool:
        """Whether a row is not to be learned from."""
        item, project = self.item, project_name(row.get("project"))
        licence = str(row.get("licence") or row.get("license") or "")
        reason = ""
        if item.languages and row.get("language") not in item.languages:
            reason = "in other languages"
        elif not item.gpl and (COPYLEFT.search(licence) or project in KERNEL):
            reason = "under the GPL"
        elif project and project in {project_name(name) for name in item.hold_out}:
            reason = "held out"
        elif project and item.fold and fold_of(project, fold_numbers(item.fold)[1]) == fold_numbers(item.fold)[0]:
            reason = f"in fold {item.fold}"
        elif text in self._seen:
            reason = "repeated"
        self._seen.add(text)
        if reason:
            self.left_out[reason] += 1
        return bool(reason)

    def _text(self, text: str, changed: frozenset[int], begins: Sequence[int]) -> Text:
        tokens, lines = code.tokenized(self.tokenizer, text)
        places = np.searchsorted(lines, begins)  # lines only grow
        return Text(tokens.astype(np.int32), lines.astype(np.int32), changed, tuple(int(place) for place in places))


def _rows(sources: Sequence[str], keys: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    for source in sources:
        for number, row in read_jsonl(Path(source)):
            for key in keys:
                if not isinstance(row.get(key), str):
                    raise DataError(f"{source}, line {number}: no text under '{key}'.")
            yield f"{source}, line {number}", row


@dataclass(frozen=True)
class Pairs:
    """Batches of pairs and ordinary functions. Rows come in twos, a vulnerable function and its fix or two ordinary
    ones, in the order of their lengths, so that a part of a batch pads little."""

    pairs: list[Pair]
    ordinary: list[Text]
    emphasis: Emphasis
    share: float  # of ordinary functions
    length: int
    first: int | None  # the token that every row begins with
    pad: int
    seed: int
    noise: float = 0.0
    rows: int = 2
    rank: int = 0
    world: int = 1

    def digest(self) -> str:
        """SHA-256 of what is learned from."""
        mark = hashlib.sha256()
        for text in [*(member for pair in self.pairs for member in (pair.before, pair.after)), *self.ordinary]:
            mark.update(hashlib.sha256(text.tokens.tobytes()).digest() + repr(sorted(text.changed)).encode())
        mark.update(repr([pair.family for pair in self.pairs]).encode())
        return mark.hexdigest()

    def __getitem__(self, number: int) -> tuple[np.ndarray, ...]:
        """tokens [R, T], labels [R] (1: vulnerable), mask [R, T], line of each token [R, T], counted from 0 in a row
        (-1: none), whether a fix changes it [R, T], family [R] (IGNORE: none) and weight [R] of each row."""
        units = self.rows // 2
        plain = round(units * self.share) if self.ordinary else 0
        draw = np.random.default_rng([self.seed, number, self.rank, 3])
        rows: list[list[_Row]] = []
        for place in self._places(number, units - plain):
            pair = self.pairs[_order(len(self.pairs), self.seed, place)]
            shift, which = draw.random(), int(draw.integers(max(len(pair.before.places), 1)))
            rows.append([self._row(draw, pair.before, shift, which, 1, pair.family),
                         self._row(draw, pair.after, shift, which, 0)])  # fmt: skip
        for place in self._places(number, plain):
            twins = (self.ordinary[_order(len(self.ordinary), self.seed + 1, 2 * place + at)] for at in (0, 1))
            rows.append([self._row(draw, text, draw.random(), -1, 0) for text in twins])
        rows.sort(key=lambda two: max(len(row.tokens) for row in two))
        return self._arrays([row for two in rows for row in two])

    def _places(self, number: int, count: int) -> range:
        first = (number * self.world + self.rank) * count
        return range(first, first + count)

    def _row(self, draw: np.random.Generator, text: Text, shift: float, which: int, label: int,
             family: int = IGNORE) -> "_Row":  # fmt: skip
        """The window of a function that holds the start of change `which` in its first three quarters, at the share
        `shift` of them; any window for -1."""
        head = [] if self.first is None else [self.first]
        room, count = self.length - len(head), len(text.tokens)
        place = text.places[which] if which >= 0 and text.places else int(shift * count)
        start = int(np.clip(place - shift * (3 * room // 4), 0, max(count - room, 0)))
        tokens, lines = text.tokens[start : start + room], text.lines[start : start + room]
        if self.noise and len(tokens):
            tokens = np.where(draw.random(len(tokens)) < self.noise, draw.choice(tokens, len(tokens)), tokens)
        hit = np.isin(lines, list(text.changed))
        _, own = np.unique(lines, return_inverse=True)
        none = np.full(len(head), -1)
        return _Row(np.concatenate([head, tokens]).astype(np.int64),
                    np.concatenate([none, own]), np.concatenate([none * 0, hit]), label, family)  # fmt: skip

    def _arrays(self, rows: list["_Row"]) -> tuple[np.ndarray, ...]:
        shape = len(rows), max(len(row.tokens) for row in rows)
        tokens, mask, hits = np.full(shape, self.pad), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        lines = np.full(shape, -1)
        for at, row in enumerate(rows):
            size = len(row.tokens)
            tokens[at, :size], mask[at, :size], lines[at, :size], hits[at, :size] = row.tokens, 1, row.lines, row.hits
        labels = np.array([row.label for row in rows])
        # both classes weigh alike: a step has as many vulnerable functions as another, whatever their number
        weights = np.where(labels == 1, 0.5 / max(labels.mean(), 1e-9), 0.5 / max(1 - labels.mean(), 1e-9))
        return (tokens, labels, mask, lines, hits, np.array([row.family for row in rows]), weights.astype(np.float32))


@dataclass(frozen=True)
class _Row:
    tokens: np.ndarray
    lines: np.ndarray
    hits: np.ndarray
    label: int
    family: int


def _order(count: int, seed: int, place: int) -> int:
    """What stands at a place of an endless row of permutations of `count` things."""
    return int(_permutation(count, seed, place // count)[place % count])


@lru_cache(maxsize=4)  # pairs and ordinary functions, each perhaps at the end of an epoch
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)
