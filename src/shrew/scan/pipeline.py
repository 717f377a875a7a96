"""A scan, file by file: read, parse, match rules, ask the first stage; then the detector about the rest, in batches.

What was seen before comes from the cache at each of these steps. Where much is new, worker processes analyse the files
that come next; they are taken in their order all the same. Memory holds what is ahead, a batch and the alerts, never
the tree.
"""

import hashlib
import os
import re
import time
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from shrew.errors import DataError
from shrew.scan import cwe as weaknesses
from shrew.scan import diff as changes
from shrew.scan.alerts import Alert, Report, ordered
from shrew.scan.cache import Cache, Fact, Facts, Score
from shrew.scan.config import POINTS, Held, ScanSpec, comments
from shrew.scan.functions import MODULE, Function, Source, cut, functions, module, parse
from shrew.scan.judge import Judge
from shrew.scan.sources import Entry, Walk, decode, read, shown

if TYPE_CHECKING:
    from concurrent.futures import Future

    from shrew.scan.pool import Pool
    from shrew.scan.rules import Finding

__all__ = ["Matcher", "Scan", "Task", "analyse", "analysed", "by_file"]

BATCH = 64  # functions that the detector is given at once
POOLED = 1 << 20  # bytes of new files from which on workers pay for their start
AHEAD, AHEAD_BYTES = 256, 1 << 24  # files that are begun before the first of them is taken, and what they may hold
ODD_SHOWN = 20


class Matcher(Protocol):
    """What rules are to a scan. What those that are `given` by the user find is an alert, however likely."""

    @property
    def given(self) -> frozenset[str]: ...
    def match(
        self, source: Source, tree: Any, skipped: list[tuple[str, str]] | None = None
    ) -> "list[Finding]": ...


@dataclass
class _File:
    """A file whose facts are known; it is read again only where its text is needed."""

    entry: Entry
    facts: Facts
    held: Held
    limit: int

    @cached_property
    def source(self) -> Source:
        """The source; no text where the file is no longer what it was, since its functions are not known then."""
        text = ""
        with suppress(DataError):
            data, language = read(self.entry, self.limit)
            if _hash(data, language) == self.facts.hash:
                text, _ = decode(data)
        return Source(self.entry.shown, self.facts.language, text.encode(), text)

    def text(self, fact: Fact) -> str:
        return cut(self.source.data, fact.spans)

    def function(self, fact: Fact) -> Function:
        return Function(self.source, fact.name, fact.start, fact.end, self.text(fact), fact.key, fact.spans)


class Task(msgspec.Struct, array_like=True, frozen=True):
    """What `analyse` takes of a file."""

    data: bytes
    hash: bytes
    language: str
    path: str
    lines: list[int]


@dataclass
class _Begun:
    """A file with its facts, or with what they will be made of."""

    entry: Entry
    facts: Facts | None
    task: Task | None = None
    answer: "Future[Facts | None] | None" = None

    @property
    def size(self) -> int:
        return 0 if self.task is None else len(self.task.data)

    def send(self, pool: "Pool") -> None:
        if self.task is not None:
            self.answer = pool.submit(self.task)


@dataclass
class Scan:
    """One scan. `external`: what other tools found, by file. `pool` makes the workers, if any may be started; whoever
    gives it closes it. `progress(files, functions)` is told where it is."""

    spec: ScanSpec
    walk: Walk
    limit: int  # bytes of a file
    judge: Judge
    rules: Matcher
    cache: Cache
    external: "dict[str, list[Finding]]" = field(default_factory=dict)
    diff: changes.Diff | None = None
    pool: "Callable[[], Pool | None] | None" = None
    progress: Callable[[int, int], None] = lambda files, functions: None

    def __post_init__(self) -> None:
        self._skipped: list[tuple[str, str]] = []
        self._odd: list[str] = []
        self._alerts: list[Alert] = []
        self._pending: list[tuple[_File, Fact, list[Finding]]] = []
        self._files = self._functions = 0
        self._ranked: set[str] = set()  # files of other tools' findings that were met
        self._below: Counter[str] = Counter()  # findings of other tools in functions below the point, by tool
        self.given = self.rules.given
        self.walk.skip = lambda path, why: self._skipped.append((path, why))

    def run(self) -> Report:
        began = time.monotonic()
        threshold = self.judge.point(self.spec.point)
        for file in self._known():
            if file.facts.odd:
                self._odd.append(f"{file.entry.shown}: {file.facts.odd}.")
            self._take(file)
            if len(self._pending) >= BATCH:
                self._decide()
            self.progress(self._files, self._functions)
        self._decide()
        return Report(
            alerts=ordered(alert for alert in self._alerts if not alert.suppressed),
            files=self._files,
            functions=self._functions,
            skipped=sorted(self._skipped),
            seconds=time.monotonic() - began,
            point=self.spec.point if self.judge.has_model else "",
            alerts_per_1000=threshold.alerts_per_1000,
            suppressed=ordered(alert for alert in self._alerts if alert.suppressed),
            notes=self._notes(),
            detector=self.judge.name,
        )

    def _notes(self) -> list[str]:
        found = sorted(self._odd)[:ODD_SHOWN]
        if more := len(self._odd) - len(found):
            found.append(f"... and {more:,} more files like these.")
        left = self.walk.left_out
        for number, what in (
            (left.tests, "tests (--include-tests)"),
            (left.vendored, "vendored or generated code (--include-vendored)"),
            (left.chosen, "what --exclude names"),
        ):
            if number:
                each = "files or folders" if number > 1 else "file or folder"
                found.append(f"left out: {number:,} {each} of {what}.")
        missed = Counter({path: len(items) for path, items in self.external.items() if path not in self._ranked})
        if missed:
            found.append(f"{missed.total():,} findings of other tools are in files that were not scanned, the first "
                         f"in {min(missed)}.")  # fmt: skip
        if self._below:
            tools = ", ".join(f"{number:,} of {tool}" for tool, number in sorted(self._below.items()))
            looser = "" if self.spec.point == POINTS[-1] else f"--point {POINTS[-1]} shows more of them, "
            found.append(f"not shown: findings of other tools ({tools}) in functions whose score is below the point "
                         f"'{self.spec.point}'; {looser}--detector none shows all.")  # fmt: skip
        if not self._files and not self._skipped:
            found.append("nothing was scanned: no file here is in a language that is known."
                         if self.diff is None else "nothing was scanned: no function changed.")  # fmt: skip
        return found

    # --- files --------------------------------------------------------------------------------------------------------

    def _known(self) -> Iterator[_File]:
        """The files with their facts, in the order of the walk."""
        waiting: deque[_Begun] = deque()
        fresh = held = 0  # bytes of new files: all, and those in `waiting`
        pool: Pool | None = None
        for entry in self.walk:
            if (begun := self._begun(entry)) is None:
                continue
            waiting.append(begun)
            fresh, held = fresh + begun.size, held + begun.size
            if pool is not None:
                begun.send(pool)
            elif self.pool is not None and fresh > POOLED:
                if (pool := self.pool()) is None:
                    self.pool = None
                else:
                    for each in waiting:
                        each.send(pool)
            while waiting and (self.pool is None or len(waiting) > AHEAD or held > AHEAD_BYTES):
                held -= waiting[0].size
                yield from self._done(waiting.popleft())
        for begun in waiting:
            yield from self._done(begun)

    def _begun(self, entry: Entry) -> _Begun | None:
        """A file with what is known of it; None where it is not scanned, of which the reason is kept."""
        try:
            if self.diff is not None and self.diff.same(entry.path, read(entry, self.limit)[0]):
                self._ranked.add(entry.shown)
                return None
            return self._looked(entry)
        except DataError as error:
            self._skipped.append((entry.shown, str(error)))
            return None

    def _looked(self, entry: Entry) -> _Begun | None:
        more = self.external.get(entry.shown, [])
        if more:
            self._ranked.add(entry.shown)  # such a file is looked at anew, since the findings may be outside functions
        elif entry.stamp[0] <= self.limit and (facts := self.cache.file(entry)) is not None:
            return _Begun(entry, facts)
        data, language = read(entry, self.limit)
        if not language:
            return None
        hash = _hash(data, language)
        if not more and (facts := self.cache.content(hash)) is not None:
            self.cache.keep_file(entry, facts, new=False)
            return _Begun(entry, facts)
        return _Begun(entry, None, Task(data, hash, language, entry.shown, [item.start for item in more]))

    def _done(self, begun: _Begun) -> Iterator[_File]:
        """The file, if it can be scanned."""
        entry, facts = begun.entry, begun.facts
        if facts is None:
            assert begun.task is not None
            try:
                facts = begun.answer.result() if begun.answer is not None else None
                facts = facts or analysed(begun.task, self.rules, self.judge)
            except DataError as error:
                self._skipped.append((entry.shown, str(error)))
                return
            if not begun.task.lines:
                self.cache.keep_file(entry, facts, new=True)
        yield _File(entry, facts, Held(entry.shown, self.spec.ignore, facts.ignores), self.limit)

    def _take(self, file: _File) -> None:
        """Queue the functions of a file that somebody should judge."""
        facts = file.facts.functions
        wanted = range(len(facts)) if self.diff is None else self._touched(file, self.diff)
        if self.diff is not None and not wanted:
            return
        self._files += 1
        self._functions += len(wanted)
        more = _assigned(facts, self.external.get(file.entry.shown, []))
        for at in wanted:
            fact = facts[at]
            findings = [*_findings(fact, file.entry.shown), *more.get(at, [])]
            if findings or self.judge.passes(fact.gram):
                self._pending.append((file, fact, findings))

    def _touched(self, file: _File, diff: changes.Diff) -> Sequence[int]:
        """The indices of the functions that the change touched."""
        facts = file.facts.functions
        try:
            old = diff.old(file.entry.path)
            before = set() if old is None else changes.texts(old, file.facts.language)
        except DataError:
            before = set()  # what it was cannot be told, so all of it counts
        return [at for at, fact in enumerate(facts) if changes.bare(file.text(fact)) not in before]

    # --- functions ----------------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        """Judge what is queued, and empty the queue."""
        scores: dict[bytes, Score] = {}
        missing: dict[bytes, tuple[_File, Fact]] = {}
        for file, fact, _ in self._pending:
            if not self.judge.asks(file.facts.language) or fact.digest in scores or fact.digest in missing:
                continue
            if (score := self.cache.score(fact.digest)) is not None and len(score.lines) <= _lines(fact):
                scores[fact.digest] = score
            else:
                missing[fact.digest] = file, fact
        if missing:
            texts = [file.text(fact) for file, fact in missing.values()]
            languages = [file.facts.language for file, _ in missing.values()]
            for (digest, (file, _)), score in zip(missing.items(), self.judge.scores(texts, languages), strict=True):
                scores[digest] = score
                if file.source.text:  # else it changed meanwhile, and what was scored is not what the digest names
                    self.cache.keep_score(digest, score)
        for file, fact, findings in self._pending:
            if (alert := self._alert(file, fact, findings, scores.get(fact.digest))) is not None:
                self._alerts.append(alert)
        self._pending = []

    def _alert(self, file: _File, fact: Fact, findings: "list[Finding]", score: Score | None) -> Alert | None:
        whys = [file.held.why(item.cwe, item.start, item.end, fact.start) for item in findings]
        active = [item for item, why in zip(findings, whys, strict=True) if not why]
        counted = active or findings
        probability = self.judge.probability(score, fact.gram, counted)
        asked = any(item.tool == "shrew" and item.rule in self.given for item in active)
        if probability < self.judge.point(self.spec.point).threshold and not asked:
            self._below.update(item.tool for item in active if item.tool != "shrew")
            return None
        cwe = _weakness(counted, score)
        own = "" if findings else file.held.why(cwe, fact.start, fact.end, fact.start)
        said = next((item.message for item in counted if item.cwe == cwe), "")
        return Alert(
            file.function(fact),
            probability,
            cwe,
            self.judge.severity(probability, counted),
            tuple(counted),
            score.lines if score else self._lines(file, fact),
            said,
            suppressed=own if active or not whys else whys[0],
        )

    def _lines(self, file: _File, fact: Fact) -> tuple[float, ...]:
        """What each line adds to the first stage's logit: kept, since it takes as many looks as there are lines."""
        digest = hashlib.sha256(b"lines\0" + fact.digest).digest()
        if (known := self.cache.score(digest)) is not None and len(known.lines) <= _lines(fact):
            return known.lines
        lines = self.judge.lines(file.text(fact), file.facts.language)
        if file.source.text:
            self.cache.keep_score(digest, Score(0.0, lines, {}))
        return lines


def analysed(task: Task, rules: Matcher, judge: Judge) -> Facts:
    """`analyse`, with DataError for all that may be wrong with a file."""
    try:
        return analyse(task.data, task.hash, task.language, task.path, rules, judge, task.lines)
    except (RecursionError, MemoryError) as error:
        raise DataError(f"too much for the parser ({type(error).__name__})") from None


def analyse(
    data: bytes, hash: bytes, language: str, path: str, rules: Matcher, judge: Judge, lines: Sequence[int] = ()
) -> Facts:
    """What is in a file: its functions, with the first stage's logits and the findings of the rules.

    Code outside functions is one of them where it does something, or where a finding is in it, or one of `lines`.
    Raises DataError for what is no text or takes too long.
    """
    text, odd = decode(data)
    source = Source(path, language, text.encode(), text)
    tree = parse(source)
    found = functions(source, tree)
    stopped: list[tuple[str, str]] = []
    findings = rules.match(source, tree, stopped)
    odd = ", ".join(filter(None, [odd, *(why for _, why in stopped)]))
    places = [(each.start, each.end) for each in found if each.name != MODULE]
    outside = any(_place(places, line) is None for line in [*(item.start for item in findings), *lines])
    if outside and len(places) == len(found) and (rest := module(source, found)) is not None:
        found.append(rest)
    logits = judge.grams([each.text for each in found], [language] * len(found))
    bare = [
        Fact(
            each.name, each.start, each.end, each.key, each.spans,
            hashlib.sha256(f"{language}\0{each.text}".encode()).digest(), logit,
        )
        for each, logit in zip(found, logits, strict=True)
    ]  # fmt: skip
    by_function = _assigned(bare, findings)
    rows = [
        [(item.rule, item.cwe, item.severity, item.message, item.start, item.end, item.column)
         for item in by_function.get(at, [])]
        for at in range(len(bare))
    ]  # fmt: skip
    made = [
        Fact(fact.name, fact.start, fact.end, fact.key, fact.spans, fact.digest, fact.gram, row)
        for fact, row in zip(bare, rows, strict=True)
    ]
    return Facts(hash, language, made, _ignores(comments(source, tree), found), odd)


def _ignores(ignores: list[tuple[int, list[str]]], found: "Sequence[Function]") -> list[tuple[int, list[str]]]:
    """The comments that hold alerts back. One at the line of a name that stands below decorators or annotations is one
    at the function's first line, too."""
    lines = {}
    for each in found if ignores else ():
        if each.text.startswith("@"):
            named = re.search(rf"^[^@\n]*\b{re.escape(each.name.rpartition('.')[2])}\s*[(\[]", each.text, re.M)
            if named is not None:
                lines[each.start + each.text.count("\n", 0, named.start())] = each.start
    return ignores + [(lines[line], words) for line, words in ignores if line in lines]


def _hash(data: bytes, language: str) -> bytes:
    return hashlib.sha256(f"{language}\0".encode() + data).digest()


def _lines(fact: Fact) -> int:
    return fact.end - fact.start + 1


def _findings(fact: Fact, path: str) -> "list[Finding]":
    if not fact.findings:
        return []
    from shrew.scan.rules import Finding

    return [
        Finding(rule, cwe, severity, message, path, start, end, column)
        for rule, cwe, severity, message, start, end, column in fact.findings
    ]


def _place(places: list[tuple[int, int]], line: int) -> int | None:
    """The index of the last of `places` (first and last line, in order) that holds a line."""
    at = bisect_right(places, line, key=lambda place: place[0]) - 1
    return at if at >= 0 and places[at][1] >= line else None


def _assigned(facts: "Sequence[Fact]", findings: "Iterable[Finding]") -> "dict[int, list[Finding]]":
    """The findings of each function, by its index; those in none are the module's, which stands last if at all."""
    places = [(fact.start, fact.end) for fact in facts if fact.name != MODULE]
    given: dict[int, list[Finding]] = {}
    for item in findings:
        at = _place(places, item.start)
        if at is None and len(facts) > len(places):
            at = len(facts) - 1
        if at is not None:
            given.setdefault(at, []).append(item)
    return given


def _weakness(findings: "Sequence[Finding]", score: Score | None) -> str:
    """The CWE of an alert: that of the worst finding that names one, the likelier where two are equal; else the
    model's guess, "" where that is "unknown"."""
    families = score.families if score else {}
    named = [item for item in findings if item.cwe]
    if named:
        order = {severity: at for at, severity in enumerate(weaknesses.SEVERITIES)}
        return max(named, key=lambda item: (order.get(item.severity, -1), families.get(item.cwe, 0.0))).cwe
    best = max(sorted(families), key=lambda name: families[name], default="")
    return weaknesses.normal(best)


def by_file(findings: "Iterable[Finding]", root: str) -> "dict[str, list[Finding]]":
    """The findings of other tools by the file's name in this scan: paths of theirs may be absolute, or begin with
    ./ ."""
    found: dict[str, list[Finding]] = {}
    for item in findings:
        full = os.path.normpath(os.path.join(root, item.path))  # noqa: PTH118
        found.setdefault(shown(full, root), []).append(item)
    return found
