"""Tree-sitter queries, matched here so that no rule can run away: every step is counted, and there is an end to them.

What is known of the query language: `(kind child ...)`, `(_)` for any named node, `"text"` for one without a name,
`field: child`, `!field` (it is not there), `[a b]` for either, `.` (neighbours; first or last child), `@name`, and the
predicates `#eq?`, `#any-of?`, `#match?` with their `not-` forms. There are no `*`, `+`, `?`: what they are for is
better said by two rules. Two things differ: patterns with a field stand in no order, and `(deep x)` is any node below
that fits x.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from shrew.scan.rules import expressions
from shrew.scan.rules.syntax import text_of

if TYPE_CHECKING:
    from tree_sitter import Language, Node

TOKEN = re.compile(
    r'\s+|;[^\n]*|(?P<t>"(?:[^"\\]|\\.)*"|[A-Za-z_][\w-]*:?|@[\w.-]+|#[\w-]+\?|![\w-]+|[()\[\].])'
)
LONGEST, DEEPEST = 4000, 12  # characters and nesting of a query
DEEP = "deep"
PREDICATES = ("eq", "any-of", "match")
Captures = dict[str, "Node"]


class Spent(Exception):
    """The steps that there were are used up."""


@dataclass
class Steps:
    """How much more may be tried."""

    left: int

    def take(self, count: int = 1) -> None:
        self.left -= count
        if self.left < 0:
            raise Spent

    def paid(self, count: int) -> bool:
        """Take steps, if there are so many."""
        self.left -= count
        return self.left >= 0


@dataclass(frozen=True)
class Part:
    """One node of a pattern. `kind` is "" for any named node; with `choices` it is one of these instead."""

    kind: str = ""
    named: bool = True
    choices: "tuple[Part, ...]" = ()
    children: "tuple[tuple[str, Part, bool], ...]" = ()  # field or "", pattern, directly after the one before
    last: bool = False  # nothing named after the last child
    absent: tuple[str, ...] = ()
    captures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Predicate:
    name: str
    negated: bool
    capture: str
    words: frozenset[str] = frozenset()
    other: str = ""  # a capture to be equal to
    pattern: re.Pattern[str] | None = None

    def holds(self, captures: Captures) -> bool:
        node = captures.get(self.capture)
        if node is None:
            return True
        text = text_of(node)
        if self.pattern is not None:
            holds = expressions.found(self.pattern, text)
        elif self.other:
            holds = self.other in captures and text == text_of(captures[self.other])
        else:
            holds = text in self.words
        return holds is not self.negated


@dataclass(frozen=True)
class Query:
    """One pattern with its predicates."""

    part: Part
    predicates: tuple[Predicate, ...]

    @cached_property
    def checks(self) -> dict[str, list[Predicate]]:
        """What each capture alone must hold."""
        found: dict[str, list[Predicate]] = {}
        for predicate in self.predicates:
            if not predicate.other:
                found.setdefault(predicate.capture, []).append(predicate)
        return found

    @cached_property
    def roots(self) -> frozenset[str]:
        """The kinds of node at which it can begin."""
        return frozenset(part.kind for part in (self.part.choices or (self.part,)))

    @property
    def named(self) -> bool:
        """Whether it begins with nodes that have names."""
        return all(part.named and not part.choices for part in (self.part.choices or (self.part,)))

    @property
    def captures(self) -> frozenset[str]:
        return frozenset(_captures(self.part))

    @cached_property
    def words(self) -> tuple[tuple[bytes, ...], ...]:
        """Of each of these one must stand in a file, or the pattern fits nowhere in it."""
        sure = _sure(self.part)
        found = [item.words for item in self.predicates if item.words and not item.negated and item.capture in sure]
        return tuple(tuple(word.encode() for word in sorted(words)) for words in found)

    def possible(self, data: bytes) -> bool:
        """Whether the pattern may fit somewhere in a file."""
        return all(any(word in data for word in words) for words in self.words)

    def matches(self, node: "Node", steps: Steps) -> Iterator[Captures]:
        """Every way in which the pattern fits at this node. Raises Spent."""
        steps.take((node.end_byte - node.start_byte) >> 10)  # its text may be copied
        for found in _fit(self.part, node, {}, _Run(steps, self.checks)):
            if all(predicate.holds(found) for predicate in self.predicates):
                yield found


def parse(text: str, language: "Language") -> Query:
    """Read a query and check that its kinds and fields exist. Raises ValueError with what is wrong."""
    return _Reader(text, language).query()


def _captures(part: Part) -> Iterator[str]:
    yield from part.captures
    for inner in (*part.choices, *(child for _, child, _ in part.children)):
        yield from _captures(inner)


def _sure(part: Part) -> set[str]:
    """The captures that every match has."""
    found = set(part.captures)
    for _, child, _ in part.children:
        found |= _sure(child)
    if part.choices:
        found |= set.intersection(*map(_sure, part.choices))
    return found


class _Reader:
    def __init__(self, text: str, language: "Language") -> None:
        if len(text) > LONGEST:
            raise ValueError(f"the query is longer than {LONGEST} characters")
        self.tokens: list[str] = []
        self.inner: list[Predicate] = []  # that stand inside the pattern
        self.language, self.at, at = language, 0, 0
        while at < len(text):
            match = TOKEN.match(text, at)
            if match is None:
                raise ValueError(f"the query has '{text[at]}' where nothing such is known")
            if match["t"]:
                self.tokens.append(match["t"])
            at = match.end()

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def next(self) -> str:
        token = self.peek()
        if not token:
            raise ValueError("the query ends too early: a bracket is not closed")
        self.at += 1
        return token

    def query(self) -> Query:
        predicates: list[Predicate] = []
        wrapped = self.tokens[:2] in (["(", "("], ["(", "["])
        if wrapped:
            self.next()
        part = self.part(0)
        while self.peek() == "(" and wrapped:
            self.next()
            predicates.append(self.predicate())
        if wrapped and self.next() != ")":
            raise ValueError("only predicates stand beside the pattern of a query")
        if self.peek():
            raise ValueError("there is more than one pattern; write a rule for each, or [a b]")
        predicates += self.inner
        known = set(_captures(part))
        for predicate in predicates:
            for name in (predicate.capture, predicate.other):
                if name and name not in known:
                    raise ValueError(f"a predicate speaks of @{name}, which is not captured")
        return Query(part, tuple(predicates))

    def part(self, depth: int) -> Part:
        if depth > DEEPEST:
            raise ValueError(f"the query is nested more than {DEEPEST} deep")
        token = self.next()
        if token == "[":
            choices = []
            while self.peek() != "]":
                choices.append(self.part(depth + 1))
            self.next()
            if not choices:
                raise ValueError("[] holds no alternative")
            return Part(choices=tuple(choices), captures=self.capturing())
        if token[0] == '"':
            kind = re.sub(r"\\(.)", r"\1", token[1:-1])
            if self.language.id_for_node_kind(kind, False) is None:
                raise ValueError(f'there is no "{kind}" in this language')
            return Part(kind, named=False, captures=self.capturing())
        if token == "_":
            return Part(captures=self.capturing())
        if token != "(":
            raise ValueError(f"'{token}' stands where a node should")
        return self.node(depth)

    def node(self, depth: int) -> Part:
        kind = self.next()
        if kind == "_":
            kind = ""
        elif kind != DEEP and self.language.id_for_node_kind(kind, True) is None:
            raise ValueError(f"there is no node '{kind}' in this language")
        children: list[tuple[str, Part, bool]] = []
        absent, near, last = [], False, False
        while (token := self.peek()) != ")":
            if token == ".":
                self.next()
                near = last = True
            elif token[:1] == "!":
                absent.append(self.field(self.next()[1:]))
            elif token == "(" and self.tokens[self.at + 1 : self.at + 2][0][:1] == "#":
                self.next()
                self.inner.append(self.predicate())
            else:
                field = self.field(self.next()[:-1]) if token[-1:] == ":" else ""
                children.append((field, self.part(depth + 1), near))
                near = last = False
        self.next()
        if kind == DEEP and (len(children) != 1 or children[0][0]):
            raise ValueError("(deep x) holds one pattern")
        return Part(kind, True, (), tuple(children), last, tuple(absent), self.capturing())

    def field(self, name: str) -> str:
        if self.language.field_id_for_name(name) is None:
            raise ValueError(f"there is no field '{name}' in this language")
        return name

    def capturing(self) -> tuple[str, ...]:
        names = []
        while self.peek()[:1] == "@":
            names.append(self.next()[1:])
        return tuple(names)

    def predicate(self) -> Predicate:
        name = self.next()[1:-1]
        negated, plain = name.startswith("not-"), name.removeprefix("not-")
        words = []
        while self.peek() != ")":
            words.append(self.next())
        self.next()
        if plain not in PREDICATES:
            raise ValueError(f"#{name}? is not known; known: {', '.join(f'#{each}?' for each in PREDICATES)} and not-")
        if len(words) < 2 or words[0][0] != "@" or (plain != "any-of" and len(words) != 2):
            raise ValueError(f"#{name}? takes a capture and what to hold it against")
        capture, values = words[0][1:], words[1:]
        if plain == "eq" and values[0][0] == "@":
            return Predicate(plain, negated, capture, other=values[0][1:])
        if any(value[0] != '"' for value in values):
            raise ValueError(f"#{name}? takes texts in double quotes")
        texts = [re.sub(r'\\(["\\])', r"\1", value[1:-1]) for value in values]
        if plain == "match":
            return Predicate(plain, negated, capture, pattern=expressions.compile_safely(texts[0]))
        return Predicate(plain, negated, capture, frozenset(texts))


@dataclass
class _Run:
    """One trial of a query: its steps, and what each capture alone must hold, asked as soon as it is bound."""

    steps: Steps
    checks: dict[str, list[Predicate]]


def _fit(part: Part, node: "Node", captures: Captures, run: _Run) -> Iterator[Captures]:
    run.steps.take()
    if part.captures:
        captures = captures | dict.fromkeys(part.captures, node)
        if not all(check.holds(captures) for name in part.captures for check in run.checks.get(name, ())):
            return
    if part.choices:
        for choice in part.choices:
            yield from _fit(choice, node, captures, run)
        return
    if part.kind == DEEP:
        yield from _below(part.children[0][1], node, captures, run)
        return
    if node.is_named is not part.named or (part.kind and node.type != part.kind):
        return
    if any(node.child_by_field_name(field) is not None for field in part.absent):
        return
    if not part.children:
        yield captures
        return
    yield from _children(part, node, [], 0, 0, captures, run)


def _below(part: Part, node: "Node", captures: Captures, run: _Run) -> Iterator[Captures]:
    waiting = [node]
    while waiting:
        run.steps.take()
        inner = waiting.pop()
        yield from _fit(part, inner, captures, run)
        waiting += reversed(inner.children)


def _children(
    part: Part, node: "Node", plain: "list[Node]", index: int, start: int, captures: Captures, run: _Run
) -> Iterator[Captures]:
    """Fit the children of a pattern from `index` on; those without a field to children from `start` on."""
    if index == len(part.children):
        yield captures
        return
    field, child, near = part.children[index]
    if field:
        for inner in node.children_by_field_name(field):
            for found in _fit(child, inner, captures, run):
                yield from _children(part, node, plain, index + 1, start, found, run)
        return
    if not plain:
        plain = node.children if _unnamed(part) else node.named_children
        plain = [inner for inner in plain if not inner.is_extra]
    ends = part.last and index == len(part.children) - 1
    for at in range(start, min(start + 1, len(plain)) if near else len(plain)):
        if ends and at != len(plain) - 1:
            continue
        for found in _fit(child, plain[at], captures, run):
            yield from _children(part, node, plain, index + 1, at + 1, found, run)


def _unnamed(part: Part) -> bool:
    """Whether a child without a field is one without a name, such as an operator."""
    plain = [child for field, child, _ in part.children if not field]
    return any(not choice.named for child in plain for choice in (child.choices or (child,)))
