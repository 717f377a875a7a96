"""Rules beside the model: data in TOML, matched on syntax trees. docs/rules.md says how to write one.

What a rule costs is counted in steps, never in seconds, so the same file gives the same findings on every machine; a
file that uses up its steps is named in `skipped`. Nothing that is scanned is run.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from shrew.errors import SpecError
from shrew.scan.cwe import SEVERITIES
from shrew.scan.functions import AT_ONCE, Source, parse
from shrew.scan.rules import expressions
from shrew.scan.rules.flow import File, Flow, Value
from shrew.scan.rules.query import Captures, Query, Spent, Steps
from shrew.scan.rules.rule import Condition, Rule, Stated, read
from shrew.scan.rules.sequence import after
from shrew.scan.rules.syntax import LANGUAGES, LONGEST, Names, callee, imports, is_called, nodes_of, tail, text_of

if TYPE_CHECKING:
    from tree_sitter import Language, Node, Tree

__all__ = ["Finding", "Rules", "load_rules"]

STEPS = 300_000  # of one file; ordinary ones take a few thousand
_IMPORTS = {
    "python": ("import_statement", "import_from_statement"),
    "javascript": ("import_statement", "variable_declarator"),
}
# The file of a language, read when its first source comes; C++ takes the rules of C.
_SHIPPED = {language: "c" if language == "cpp" else language for language in LANGUAGES}
_NEW = ("new_expression", "object_creation_expression")


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule or a tool says about some lines. `cwe` is "" where it is not known; lines and columns are from 1."""

    rule: str
    cwe: str
    severity: str  # one of SEVERITIES
    message: str
    path: str
    start: int
    end: int
    column: int = 1
    tool: str = "shrew"


def load_rules(paths: Iterable[Path | str] = ()) -> "Rules":
    """The rules that ship, and those of the files `paths`. Raises SpecError for a file that is not as it should be."""
    others = [stated for path in paths for stated in read(Path(path))]
    rules = Rules(others)
    if others:  # what is wrong with a rule, or with two, is said now
        ids = [stated.written.id for stated in (*rules.own, *others)]
        for stated in others:
            if ids.count(stated.written.id) > 1:
                raise SpecError(f"{stated.where}: another rule has this name; give it one of its own.")
    for language in sorted({language for stated in others for language in stated.written.languages}):
        rules.table(language)
    return rules


@cache
def _shipped(name: str) -> tuple[Stated, ...]:
    return tuple(read(Path(__file__).with_name(f"{name}.toml")))


class _Table:
    """The rules of one language, found by what a node calls or is."""

    def __init__(self, language: str, grammar: "Language", own: Iterable[Stated], others: list[Stated]) -> None:
        self.syntax = LANGUAGES[language]
        self.calls: dict[str, list[tuple[str, Rule, bool]]] = {}
        self.kinds: dict[str, list[tuple[Rule, Query, bool]]] = {}
        for stated, foreign in [*((item, False) for item in own), *((item, True) for item in others)]:
            if language not in stated.written.languages:
                continue
            rule = stated.ready(language, grammar)
            for name in rule.written.calls:
                self.calls.setdefault(tail(name), []).append((name, rule, foreign))
            if rule.query is not None:
                for kind in rule.query.roots:
                    self.kinds.setdefault(kind, []).append((rule, rule.query, foreign))
        self.imports = _IMPORTS.get(language, ())
        self.wanted = frozenset({*self.kinds, *self.syntax.calls, *self.imports})
        self.called = frozenset(self.syntax.calls)

    def fitting(self, data: bytes) -> dict[str, list[tuple[Rule, Query, bool]]]:
        """`kinds` without the rules that fit nowhere in a file."""
        return {
            kind: [row for row in rows if row[1].possible(data) and (row[0].then is None or row[0].then.possible(data))]
            for kind, rows in self.kinds.items()
        }


class Rules:
    """Rules, ready for each language when its first file comes."""

    def __init__(self, others: list[Stated]) -> None:
        self.others = others
        self.tables: dict[str, _Table] = {}

    @property
    def own(self) -> list[Stated]:
        """Those that ship, of every language."""
        return [stated for name in sorted(set(_SHIPPED.values())) for stated in _shipped(name)]

    @property
    def given(self) -> frozenset[str]:
        """The names of the user's own: what they find is always told."""
        return frozenset(stated.written.id for stated in self.others)

    def __len__(self) -> int:
        return len(self.own) + len(self.others)

    def table(self, language: str) -> _Table:
        if language not in self.tables:
            grammar = parse(Source("", language, b"", "")).language
            self.tables[language] = _Table(language, grammar, _shipped(_SHIPPED[language]), self.others)
        return self.tables[language]

    def match(
        self, source: Source, tree: "Tree", skipped: list[tuple[str, str]] | None = None
    ) -> list[Finding]:
        """What the rules say about a file, by line; of one weakness in one place the worst only.

        A file that takes too many steps gives what was found until then, and its path and the reason go to `skipped`.
        """
        table = self.table(source.language)
        steps, foreign = Steps(STEPS), Steps(STEPS if self.others else 0)
        if len(source.data) > AT_ONCE:
            from tree_sitter import Parser

            # It was read in pieces, and then a node's text takes long; all of the old tree is used again.
            tree = Parser(tree.language).parse(source.data, tree)
        work = _Work(table, source, tree)
        found: dict[tuple[str, int, int], Finding] = {}
        for rule, node, captures, stranger in work.candidates(steps, foreign):
            try:
                hits = list(work.hits(rule, node, captures, foreign if stranger else steps))
            except Spent:
                continue
            for finding in hits:
                key = (finding.cwe or finding.rule, finding.start, finding.column)
                known = found.get(key)
                if known is None or SEVERITIES.index(finding.severity) > SEVERITIES.index(known.severity):
                    found[key] = finding
        if skipped is not None:
            for spent, whose in ((steps, "the rules"), (foreign, "the rules of your files")):
                if spent.left < 0:
                    skipped.append((source.path, f"{whose} stopped after {STEPS:,} steps; not all of it is checked"))
        return sorted(found.values(), key=lambda item: (item.start, item.column, item.rule))


class _Work:
    """The matching of one file."""

    def __init__(self, table: _Table, source: Source, tree: "Tree") -> None:
        self.table, self.source, self.tree = table, source, tree
        self.syntax = table.syntax
        self.imported: dict[str, str] = {}
        self.kept: dict[tuple[int, int], bool] = {}
        self.known: dict[int, dict[int, Value]] = {}

    @cached_property
    def file(self) -> File:
        return File(self.tree, self.source.language, self.imported)

    def candidates(self, steps: Steps, foreign: Steps) -> Iterator[tuple[Rule, "Node", Captures, bool]]:
        """Rules with the nodes that they look at, before their conditions."""
        table = self.table
        kinds = table.fitting(self.source.data)
        nodes = nodes_of(table.wanted, self.tree.root_node)
        for node in nodes:
            if node.type in table.imports:
                self.imported |= imports(node, self.source.language)
        renamed = {name for name, full in self.imported.items() if tail(full) != name}
        for node in nodes:
            kind = node.type
            if kind in self.syntax.calls:
                last = self._tail(node, kind)
                if last in table.calls or last in renamed:
                    name = self._name(node)
                    for pattern, rule, stranger in table.calls.get(tail(name), ()):
                        if is_called(name, pattern) and (foreign if stranger else steps).paid(_cost(node)):
                            yield rule, node, {}, stranger
            for rule, query, stranger in kinds.get(kind, ()):
                left = foreign if stranger else steps
                if left.left < 0:
                    continue
                try:
                    matches = list(query.matches(node, left))
                except Spent:
                    continue
                for captures in matches:
                    yield rule, node, captures, stranger

    def _tail(self, node: "Node", kind: str) -> str:
        called = node.child_by_field_name(self.syntax.calls[kind][0])
        if called is None:
            return ""
        if kind not in _NEW and called.type in self.syntax.members:
            called = called.child_by_field_name(self.syntax.members[called.type][1])
        if called is None or called.end_byte - called.start_byte > LONGEST:  # a chain of calls, of which each is asked
            return ""
        if kind in _NEW:
            return tail("new " + text_of(called).partition("<")[0])
        return text_of(called).rpartition("::")[2]

    def _name(self, node: "Node") -> str:
        name = callee(node, self.syntax)
        first, dot, rest = name.partition(".")
        return self.imported[first] + dot + rest if first in self.imported else name

    def hits(self, rule: Rule, node: "Node", captures: Captures, steps: Steps) -> Iterator[Finding]:
        if rule.conditions:
            known = self.known.setdefault(id(rule), {})
            flow = Flow(self.file, rule.sources, rule.cleaners, steps, known)
            if not all(self._holds(condition, node, captures, flow) for condition in rule.conditions):
                return
        if self._cleared(rule, node, steps):
            return
        if rule.then is None:
            yield self._finding(rule, captures.get("at", node))
            return
        for found in after(self.file, rule, captures, steps):
            yield self._finding(rule, found)

    def _holds(self, condition: Condition, node: "Node", captures: Captures, flow: Flow) -> bool:
        where = condition.where
        if where.capture:
            targets, whole = [captures[where.capture]] if where.capture in captures else [], True
        else:
            targets, whole = self._arguments(condition, node)
        if where.missing:
            return not targets and whole
        return any(_fits(condition, target, flow) for target in targets)

    def _arguments(self, condition: Condition, node: "Node") -> "tuple[list[Node], bool]":
        """The arguments of a call that a condition speaks of, and whether the call shows all that it is given."""
        where, syntax = condition.where, self.syntax
        given = node.child_by_field_name(syntax.calls[node.type][1])
        items = [] if given is None else [item for item in given.named_children if not item.is_extra]
        kind, name, value = syntax.keyword
        named: dict[str, Node] = {}
        plain: list[Node] = []
        whole = True
        for item in items:
            if "splat" in item.type or item.type in ("spread_element", "dictionary_splat"):
                whole = False
                break
            pairs = [item] if item.type == kind else item.named_children if item.type in ("object", "hash") else []
            for pair in pairs:
                if pair.type == kind and (inner := pair.child_by_field_name(value)) is not None:
                    named[text_of(pair.child_by_field_name(name)).strip("\"':")] = inner
            if item.type != kind:
                plain.append(item)
        if where.any:
            return [*plain, *named.values()], whole
        if where.argument is not None and where.argument < len(plain):
            return [plain[where.argument]], whole
        return ([named[where.keyword]] if where.keyword in named else []), whole

    def _cleared(self, rule: Rule, node: "Node", steps: Steps) -> bool:
        """Whether the function around a node holds what clears it."""
        if not rule.unless and not rule.unless_calls.by_tail:
            return False
        function = self.file.function(node)
        key = (id(rule), function.id)
        if key not in self.kept:
            self.kept[key] = self._calls_one(rule.unless_calls, function) or any(
                self._fits_in(query, function, steps) for query in rule.unless
            )
        return self.kept[key]

    def _calls_one(self, names: Names, function: "Node") -> bool:
        return bool(names.by_tail) and any(
            self._tail(call, call.type) in names.by_tail and names.hold(self._name(call))
            for call in nodes_of(self.table.called, function)
        )

    def _fits_in(self, query: Query, function: "Node", steps: Steps) -> bool:
        nodes = nodes_of(query.roots, function)
        return any(True for node in nodes for _ in query.matches(node, steps))

    def _finding(self, rule: Rule, node: "Node") -> Finding:
        row, column = node.start_point
        line = self.source.data[node.start_byte - column : node.start_byte].decode("utf-8", "replace")
        written = rule.written
        return Finding(
            written.id, written.cwe, written.severity, written.message, self.source.path,
            row + 1, node.end_point[0] + 1, len(line) + 1,
        )  # fmt: skip


def _cost(node: "Node") -> int:
    """The steps that questions about a node may cost by its length alone: its text is copied for some."""
    return (node.end_byte - node.start_byte) >> 8


def _fits(condition: Condition, node: "Node", flow: Flow) -> bool:
    if condition.matches is not None and not expressions.found(condition.matches, text_of(node)):
        return False
    if condition.unlike is not None and expressions.found(condition.unlike, text_of(node)):
        return False
    if not condition.flows:
        return True
    value: Value = flow.of(node)
    if condition.labels and not condition.labels & value.labels:
        return False
    if condition.without & value.labels:
        return False
    return condition.says is None or expressions.found(condition.says, value.says)
