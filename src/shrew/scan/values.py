"""What calls are given, as words: features of the linear detector that follow values instead of names.

Each argument, receiver and returned or stored value of a function is described by what it is made of, through the
assignments of the same text: its head (a constant, a parameter, text put together with something, the result of a call,
a member ...) and its atoms, all that went into it. `q = "SELECT " + name; db.execute(q)` gives `execute 0 built`, and
`execute < parameter` where `name` is one. No name of a variable is in a feature; names of calls and members are.

It errs in the direction of saying less: of a name the NEAREST assignments before count, whatever branch they are in; a
question goes DEEPEST deep, and a text has STEPS of them. Nothing is looked up outside the text.
"""

from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from shrew.errors import DataError
from shrew.scan.functions import AT_ONCE, Source, parse, words
from shrew.scan.rules.flow import targets
from shrew.scan.rules.syntax import LANGUAGES, first_child, is_name, nodes_of, tail, text_of

if TYPE_CHECKING:
    from tree_sitter import Node

DEEPEST, STEPS = 12, 20_000
NEAREST = 4  # assignments to a name that count
WIDEST = 30  # parts of an expression that are looked at
ATOMS = 60  # of one value
SAID = 200  # bytes of a piece of a string whose marks count
LONG = 80  # bytes of a name
_FORMATS = words("format format_map join sprintf Sprintf concat")
_TEXTS = frozenset(("text", "built"))
_SIGNS = frozenset(("+", "%", "<<", "."))
_OWN = words("self this cls")
_RETURNS = words("return_statement return yield")
_WORDS = words("true false none null nil")
_AROUND = words("parenthesized_expression await await_expression expression_list")
_TESTS = words("comparison_operator not_operator")
_MARKS = ((b"<", "tag"), (b"/", "slash"))
_SQL = words("select insert update delete where from values")
_RECEIVERS = ("receiver", "object")

Value = tuple[str, frozenset[str]]  # head, atoms
_NOTHING: Value = ("constant", frozenset())


def values(text: str, language: str) -> set[str]:
    """The features of a text, blanks between their parts; none of one that cannot be parsed in time."""
    source = Source("", language, text.encode("utf-8", "replace"), text)
    try:
        tree = parse(source)
    except DataError:
        return set()
    if len(source.data) > AT_ONCE:
        from tree_sitter import Parser

        tree = Parser(tree.language).parse(source.data, tree)  # read in pieces, a node's text would take long
    work = _Work(language)
    work.collect(tree.root_node)
    work.describe()
    return work.found


class _Work:
    """The description of one text."""

    def __init__(self, language: str) -> None:
        self.syntax = LANGUAGES[language]
        self.ruby = language == "ruby"
        self.parameters: set[str] = set()
        self.assigned: dict[str, list[tuple[int, Node]]] = {}  # start and value of the assignments to a name, in order
        self.known: dict[int, Value] = {}
        self.found: set[str] = set()
        self.steps = 0

    def collect(self, root: "Node") -> None:
        """Find what is described, and what names are assigned."""
        syntax = self.syntax
        wanted = frozenset({*syntax.calls, *syntax.assigns, *syntax.functions, *_RETURNS})
        self.nodes = nodes_of(wanted, root)
        for node in self.nodes:
            kind = node.type
            if kind in syntax.assigns:
                self._assign(node, kind)
            if kind in syntax.functions:
                declared = _parameters(node)
                for item in [] if declared is None else [declared] if is_name(declared) else declared.named_children:
                    self.parameters.update(name for name in targets(item) if name not in _OWN)

    def _assign(self, node: "Node", kind: str) -> None:
        first, second = self.syntax.assigns[kind]
        if kind == "as_pattern":
            left, right = node.child_by_field_name("alias"), first_child(node)
        else:
            left, right = node.child_by_field_name(first), node.child_by_field_name(second)
        if left is None or right is None or left.type in self.syntax.members or left.type in self.syntax.elements:
            return
        for name in targets(left):
            self.assigned.setdefault(name, []).append((node.start_byte, right))

    def describe(self) -> None:
        syntax, found = self.syntax, self.found
        for node in self.nodes:
            kind = node.type
            if kind in syntax.calls:
                self._call_given(node, kind)
            elif kind in _RETURNS:
                if (value := first_child(node)) is not None:
                    self._tell("return", "", self.look(value, 0))
            elif kind in syntax.assigns:
                left, right = (node.child_by_field_name(name) if name else None for name in syntax.assigns[kind])
                if left is not None and right is not None and (place := self._stored(left)):
                    self._tell(f"set {place}", "", self.look(right, 0))
            if self.steps > STEPS:
                break
        found.discard("")

    def _call_given(self, node: "Node", kind: str) -> None:
        name = self.called(node, kind)
        arguments = node.child_by_field_name(self.syntax.calls[kind][1])
        place = 0
        for item in [] if arguments is None else _parts(arguments):
            if item.type == self.syntax.keyword[0]:
                slot = text_of(item.child_by_field_name(self.syntax.keyword[1]))[:LONG]
            else:
                slot, place = str(place), place + 1
            self._tell(name, slot, self.look(item, 0))
        if (receiver := self.receiver(node, kind)) is not None:
            self._tell(f"of {name}", "", self.look(receiver, 0))

    def _tell(self, name: str, slot: str, value: Value) -> None:
        head, atoms = value
        self.found.add(f"{name} {slot} {head}")
        self.found.update(f"{name} < {atom}" for atom in atoms)

    def _stored(self, left: "Node") -> str:
        """What a value is stored as: the member, or the thing of which it is an element; "" for a plain name."""
        kind, syntax = left.type, self.syntax
        if kind in syntax.members:
            return self._last(left.child_by_field_name(syntax.members[kind][1]))
        if kind in syntax.elements:
            inner = left.child_by_field_name(syntax.elements[kind])
            return self._stored(inner) + "[]" if inner is not None and inner.type in syntax.members else "[]"
        return ""

    # --- one value ----------------------------------------------------------------------------------------------------

    def look(self, node: "Node", depth: int) -> Value:
        known = self.known.get(node.id)
        if known is not None:
            return known
        self.steps += 1
        if depth > DEEPEST or self.steps > STEPS:
            return "deep", frozenset()
        self.known[node.id] = "again", frozenset()  # what is assigned to itself
        head, atoms = self._look(node, node.type, depth)
        if len(atoms) > ATOMS:
            atoms = frozenset(sorted(atoms)[:ATOMS])
        self.known[node.id] = head, atoms
        return head, atoms

    def _look(self, node: "Node", kind: str, depth: int) -> Value:
        syntax = self.syntax
        if kind in _WORDS:
            return kind, frozenset()
        if kind in _TESTS:
            return "test", self.together(_parts(node), depth)[1]
        if kind in syntax.constants:
            return _NOTHING
        if kind in syntax.strings:
            return self._string(node, depth)
        if is_name(node):
            return self._name(_name(node), node.start_byte, depth)
        if kind in syntax.calls:
            return self._call(node, kind, depth)
        if kind in syntax.members:
            return self._member(node, kind, depth)
        if kind in syntax.elements:
            inner = node.child_by_field_name(syntax.elements[kind])
            return "item", (frozenset() if inner is None else self.look(inner, depth + 1)[1]) | {"item"}
        if kind in syntax.joins:
            return self._join(node, depth)
        if kind == syntax.keyword[0]:
            inner = node.child_by_field_name(syntax.keyword[2])
            return _NOTHING if inner is None else self.look(inner, depth + 1)
        if kind in _AROUND and node.named_child_count == 1 and (inner := first_child(node)) is not None:
            return self.look(inner, depth + 1)
        return kind, self.together(_parts(node), depth)[1]

    def together(self, nodes: "list[Node]", depth: int) -> tuple[list[str], frozenset[str]]:
        """The heads of values, and all of their atoms."""
        heads, atoms = [], set[str]()
        for node in nodes:
            head, more = self.look(node, depth + 1)
            heads.append(head)
            atoms |= more
        return heads, frozenset(atoms)

    def _string(self, node: "Node", depth: int) -> Value:
        syntax, atoms, said, filled = self.syntax, set[str](), list[bytes](), False
        waiting = [node]
        while waiting:
            for child in waiting.pop().children:
                if child.type in syntax.pieces:
                    said.append((child.text or b"")[:SAID])
                elif child.type in syntax.strings:
                    waiting.append(child)
                elif child.type in syntax.holes:
                    atoms |= self.together(child.named_children[:1], depth)[1]
                    filled = True
        text = b" ".join(said)
        marks = [name for mark, name in _MARKS if mark in text]
        if not _SQL.isdisjoint(text.decode("utf-8", "replace").lower().split()):
            marks.append("sql")
        if filled:
            return "built", frozenset((*atoms, "built", " ".join(("built", *marks))))
        return "text", frozenset((" ".join(("text", *marks)),) if marks else ())

    def _name(self, name: str, at: int, depth: int) -> Value:
        if name in _OWN:
            return "self", frozenset(("self",))
        known = self.assigned.get(name, [])
        end = bisect_left(known, at, key=lambda item: item[0])
        nearest = [value for _, value in known[max(0, end - NEAREST) : end]]
        before = [value for value in nearest if not value.start_byte <= at < value.end_byte]
        heads, atoms = self.together(before, depth)
        if not before:
            if name in self.parameters:
                return "parameter", frozenset(("parameter",))
            return ("fixed", frozenset()) if name.isupper() else ("global", frozenset(("global",)))
        return heads[0] if len(set(heads)) == 1 else "built" if "built" in heads else "mixed", atoms

    def _call(self, node: "Node", kind: str, depth: int) -> Value:
        name = self.called(node, kind)
        arguments = node.child_by_field_name(self.syntax.calls[kind][1])
        receiver = self.receiver(node, kind)
        if self.ruby and arguments is None and receiver is None:
            return self._name(name, node.start_byte, depth)
        parts = [] if receiver is None else [receiver]
        heads, atoms = self.together(parts if arguments is None else [*parts, *_parts(arguments)], depth)
        if name in _FORMATS and not _TEXTS.isdisjoint(heads):
            return "built", atoms | {"built", f"{name}()"}
        return f"{name}()", atoms | {f"{name}()"}

    def _member(self, node: "Node", kind: str, depth: int) -> Value:
        first, second = self.syntax.members[kind]
        inner, last = node.child_by_field_name(first), self._last(node.child_by_field_name(second))
        if inner is None:
            return f".{last}", frozenset((f".{last}",))
        head, atoms = self.look(inner, depth + 1)
        return "self" if head == "self" else f".{last}", atoms | {f".{last}"}

    def _join(self, node: "Node", depth: int) -> Value:
        heads, atoms = self.together(_parts(node), depth)
        operator = node.child_by_field_name("operator")
        sign = "" if operator is None else operator.type
        if sign not in _SIGNS or _TEXTS.isdisjoint(heads):
            return f"op {sign}", atoms
        if all(head in ("text", "constant", "fixed") for head in heads):
            return "text", atoms
        return "built", atoms | {"built"}

    # --- names --------------------------------------------------------------------------------------------------------

    def _last(self, node: "Node | None") -> str:
        return "" if node is None else tail(_name(node).replace("::", "."))

    def called(self, node: "Node", kind: str) -> str:
        """The last part of what is called; "?" for what has no name."""
        called = node.child_by_field_name(self.syntax.calls[kind][0])
        if called is not None and called.type in self.syntax.members:
            called = called.child_by_field_name(self.syntax.members[called.type][1])
        if called is None or not (is_name(called) or called.child_count == 0):
            return "?"
        return self._last(called)

    def receiver(self, node: "Node", kind: str) -> "Node | None":
        """The object whose method is called."""
        for name in _RECEIVERS:
            if (found := node.child_by_field_name(name)) is not None:
                return found
        called = node.child_by_field_name(self.syntax.calls[kind][0])
        if called is None or called.type not in self.syntax.members or called.type == "qualified_identifier":
            return None
        return called.child_by_field_name(self.syntax.members[called.type][0])


def _parameters(function: "Node") -> "Node | None":
    """Where a function's parameters stand; of C inside its declarator."""
    here: Any = function
    for _ in range(DEEPEST):
        if here is None or (found := here.child_by_field_name("parameters")) is not None:
            return None if here is None else found
        here = here.child_by_field_name("declarator")
    return None


def _parts(node: "Node") -> "list[Node]":
    return [child for child in node.named_children[:WIDEST] if not child.is_extra]


def _name(node: "Node") -> str:
    return (node.text or b"")[:LONG].decode("utf-8", "replace")
