"""Where a value comes from, by name and within one function.

Labels of a value: `outside` (a request, the command line: the rule's sources), `parameter` (of the function), `built`
(text put together with something that is no constant), `unknown`. No label: a constant, or cleaned. Where a function is
too long or too deep to be followed it errs in the direction of silence, and it does not look into other functions.
"""

import re
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shrew.scan.rules.query import Steps
from shrew.scan.rules.syntax import (
    LANGUAGES,
    Around,
    Names,
    Syntax,
    callee,
    first_child,
    is_name,
    name_of,
    nodes_of,
    tail,
    text_of,
    words,
)

if TYPE_CHECKING:
    from tree_sitter import Node, Tree

LABELS = ("outside", "parameter", "built", "unknown")
DEEPEST, STEPS = 16, 400  # of one question
NEAREST = 40  # assignments to a name that are looked at
SAID = 2000  # characters of constant text that are kept
_NUMBERS = Names(tuple(words(
    "int float bool len ord round abs hash id parseInt parseFloat Number Integer Float isinstance type hex"
    " strconv.Atoi strconv.Itoa strconv.ParseInt strconv.FormatInt Integer.parseInt Integer.valueOf Long.parseLong"
    " atoi atol strtol strtoul *.to_i *.to_f *.isdigit *.count *.length *.hexdigest *.isoformat time.time"
    " datetime.datetime.now uuid.uuid4 os.getpid"
)))  # fmt: skip
_FORMATS = Names(("*.format", "*.format_map", "String.format", "fmt.Sprintf", "fmt.Sprint", "util.format", "format",
                  "sprintf", "*.concat", "String.join", "strings.Join"))  # fmt: skip
_GROWS = words("append extend push add insert concat write")
_WRITES = words("sprintf snprintf strcpy strncpy strcat strncat strlcpy strlcat vsnprintf vsprintf fgets read recv")
_OPERATORS = frozenset(("+", "%", "<<", "."))
_NUMERIC = re.compile(r"%[-+ #0-9.*]*(?:ll|l|h|z|j|t)?([a-zA-Z%])")
_NUMBER_TYPES = words("int float bool long short double boolean int64 int32 uint uint64 uint32 float64 integer")
_ROUTES = re.compile(
    r"@[\w.]+\.(route|get|post|put|delete|patch|head|options|websocket|api_route|errorhandler)\("
    r"|@(route|get|post|put|delete|view_config)\(|@(cherrypy\.)?expose\b"
)
_METHODS = words("get post put delete patch head options")  # of classes that answer requests
_ANSWERS = re.compile(r"(Handler|Resource|MethodView|APIView|HTTPEndpoint|Endpoint|Controller)\b")


@dataclass
class Value:
    labels: set[str] = field(default_factory=set)
    says: str = ""  # the constant text that is part of it, in order
    text: bool = False  # a string literal is part of it


@dataclass(frozen=True)
class Binding:
    start: int  # of the assignment, in bytes
    value: "Node"
    adds: bool  # to what was there
    block: tuple[int, int]  # where it surely holds, in bytes


class Scope:
    """The names of a function, or of a file."""

    def __init__(
        self, node: "Node", syntax: Syntax, assigns: "list[Node]", outer: "Scope | None", blocks: Around
    ) -> None:
        self.node, self.syntax, self.outer, self.blocks = node, syntax, outer, blocks
        self.bindings: dict[str, list[Binding]] = {}
        self.parameters: dict[str, str] = {} if outer is None else self._parameters()
        for assign in assigns:
            self._bind(assign)
        for known in self.bindings.values():
            known.sort(key=lambda item: item.start)

    def _parameters(self) -> dict[str, str]:
        node = self.node
        declared = node.child_by_field_name("parameters")
        declarator = node.child_by_field_name("declarator")
        while declared is None and declarator is not None:
            declared = declarator.child_by_field_name("parameters")
            declarator = declarator.child_by_field_name("declarator")
        label = "outside" if self._serves(declared) else "parameter"
        known = {}
        items = [] if declared is None else [declared] if is_name(declared) else declared.named_children
        for place, item in enumerate(items):
            kind = text_of(item.child_by_field_name("type")).split("[")[0]
            number = kind in _NUMBER_TYPES and self.syntax is not LANGUAGES["c"]  # where it may be a length
            for name in targets(item):
                if name not in ("self", "cls", "this") and not (place < 2 and name == "request"):
                    known[name] = "" if number else label
        return known

    def _serves(self, declared: "Node | None") -> bool:
        """Whether a Python function answers requests, so that what it is given comes from an address."""
        if self.syntax is not LANGUAGES["python"] or declared is None:
            return False
        above = self.node.parent
        if above is not None and above.type == "decorated_definition":
            for child in above.named_children:
                if child.type == "decorator" and _ROUTES.match(text_of(child)[:200]):
                    return True
        names = [text_of(item).partition(":")[0] for item in declared.named_children[:2]]
        if "request" in names:
            return True
        if text_of(self.node.child_by_field_name("name")) not in _METHODS:
            return False
        if above is not None and above.type == "decorated_definition":
            above = above.parent
        owner = None if above is None else above.parent
        bases = None if owner is None else owner.child_by_field_name("superclasses")
        return bases is not None and _ANSWERS.search(text_of(bases)[:400]) is not None

    def _bind(self, assign: "Node") -> None:
        block = self._block(assign)
        kind = assign.type
        if kind in self.syntax.calls:
            self._bind_call(assign, kind, block)
            return
        if kind in self.syntax.joins:  # Ruby's text << more
            left, right = assign.child_by_field_name("left"), assign.child_by_field_name("right")
        elif kind == "as_pattern":
            left, right = assign.child_by_field_name("alias"), first_child(assign)
        else:
            first, second = self.syntax.assigns[kind]
            left, right = assign.child_by_field_name(first), assign.child_by_field_name(second)
        if left is None or right is None:
            return
        operator = assign.child_by_field_name("operator")
        adds = kind in self.syntax.joins or (operator is not None and text_of(operator) not in ("=", ":="))
        lefts, rights = [left], [right]
        if left.type in ("pattern_list", "tuple_pattern", "expression_list", "left_assignment_list", "array_pattern"):
            lefts = left.named_children
            paired = right.type in ("expression_list", "tuple", "right_assignment_list", "array")
            rights = right.named_children if paired and right.named_child_count == len(lefts) else [right] * len(lefts)
        for target, value in zip(lefts, rights, strict=True):
            for name in targets(target) if not _is_place(target, self.syntax) else [_place(target, self.syntax)]:
                self.bindings.setdefault(name, []).append(Binding(assign.start_byte, value, adds, block))

    def _bind_call(self, call: "Node", kind: str, block: tuple[int, int]) -> None:
        """`parts.append(x)` adds to parts, `strcat(to, x)` to what it writes to."""
        arguments = call.child_by_field_name(self.syntax.calls[kind][1])
        if arguments is None:
            return
        name = callee(call, self.syntax)
        if tail(name) in _GROWS and "." in name:
            grown = name.rpartition(".")[0]
            self.bindings.setdefault(grown, []).append(Binding(call.start_byte, arguments, True, block))
        elif name in _WRITES and (target := first_child(arguments)) is not None:
            adds = "cat" in name
            written = _place(target, self.syntax)
            self.bindings.setdefault(written, []).append(Binding(call.start_byte, arguments, adds, block))

    def _block(self, node: "Node") -> tuple[int, int]:
        above, own = self.blocks(node), self.node
        if above is None or above.start_byte < own.start_byte or above.end_byte > own.end_byte:
            above = own
        return above.start_byte, above.end_byte

    def reaching(self, name: str, at: int) -> tuple[list[Binding], bool]:
        """The assignments whose value a name may have at byte `at`, and whether it may also have one from before."""
        known = self.bindings.get(name, [])
        end = bisect_left(known, at, key=lambda item: item.start)
        before = [
            item for item in known[max(0, end - NEAREST) : end] if not item.value.start_byte <= at < item.value.end_byte
        ]
        sure = [
            index for index, item in enumerate(before) if not item.adds and item.block[0] <= at < item.block[1]
        ]  # fmt: skip
        return (before[sure[-1] :], False) if sure else (before, True)


def _is_place(node: "Node", syntax: Syntax) -> bool:
    return node.type in syntax.members or node.type in syntax.elements


def _place(node: "Node", syntax: Syntax) -> str:
    return name_of(node, syntax).rstrip("[]")


def targets(node: "Node") -> list[str]:
    """The names that a parameter or the left side of an assignment brings."""
    for name in ("name", "pattern", "declarator"):
        for _ in range(DEEPEST):
            if (inner := node.child_by_field_name(name)) is None:
                break
            node = inner
    if is_name(node):
        return [text_of(node)]
    if node.type in ("reference_declarator", "typed_parameter", "list_splat_pattern", "dictionary_splat_pattern"):
        inner = first_child(node)
        return [] if inner is None else targets(inner)
    found, waiting = list[str](), list(node.named_children[:STEPS])
    while waiting and len(found) < STEPS:
        item = waiting.pop(0)
        if is_name(item) and item.type != "type_identifier":
            found.append(text_of(item))
        elif item.type not in ("type", "integer", "string"):
            waiting += item.named_children[:STEPS]
    return found


def assigning(syntax: Syntax) -> frozenset[str]:
    """The kinds of node that may give a name a value."""
    return frozenset({*syntax.assigns, *syntax.calls, *(syntax.joins if syntax is LANGUAGES["ruby"] else ())})


def _assigns(node: "Node", syntax: Syntax) -> bool:
    if node.type in syntax.calls:
        name = callee(node, syntax)
        return ("." in name and tail(name) in _GROWS) or name in _WRITES
    return node.type in syntax.assigns or text_of(node.child_by_field_name("operator")) == "<<"


class File:
    """One parsed file and its scopes, made when they are asked for."""

    def __init__(self, tree: "Tree", language: str, imported: dict[str, str]) -> None:
        self.root, self.language, self.imported = tree.root_node, language, imported
        self.syntax = syntax = LANGUAGES[language]
        kinds = assigning(syntax)
        found = nodes_of(kinds | syntax.functions | syntax.blocks, self.root)
        self.assigns = [node for node in found if node.type in kinds and _assigns(node, syntax)]
        self.functions = Around([node for node in found if node.type in syntax.functions], same=False)
        self.blocks = Around([node for node in found if node.type in syntax.blocks], same=True)
        self.starts = [node.start_byte for node in self.assigns]
        self.scopes: dict[int, Scope] = {}

    def full(self, name: str) -> str:
        """A name with its first part as it was imported."""
        first, dot, rest = name.partition(".")
        bare = first.rstrip("()[]")
        known = self.imported.get(bare)
        return name if known is None or known == bare else known + first[len(bare) :] + dot + rest

    def function(self, node: "Node") -> "Node":
        """The function that a node stands in, else the file."""
        return self.functions(node) or self.root

    def scope(self, node: "Node") -> Scope:
        """The scope that a node's names are looked up in."""
        owner = self.function(node)
        if owner.id not in self.scopes:
            outer = None if owner.id == self.root.id else self.scope(owner)
            first, last = (bisect_left(self.starts, at) for at in (owner.start_byte, owner.end_byte))
            inside = self.assigns[first:last]
            if outer is None:  # what functions assign is theirs
                inside = [item for item in inside if self.function(item).id == owner.id]
            self.scopes[owner.id] = Scope(owner, self.syntax, inside, outer, self.blocks)
        return self.scopes[owner.id]


class Flow:
    """Answers for one rule where values come from."""

    def __init__(
        self, file: File, sources: Names, cleaners: Names, steps: Steps, known: dict[int, Value]
    ) -> None:
        """`known`: what was found out before about assigned values, for the same rule and file; it is added to."""
        self.file, self.syntax, self.sources, self.cleaners = file, file.syntax, sources, cleaners
        self.all_steps, self.steps, self.known = steps, 0, known

    def of(self, node: "Node") -> Value:
        """What is known of an expression. Raises Spent."""
        self.steps = 0
        value = Value()
        self._look(node, value, 0, self.file.scope(node))
        return value

    def _look(self, node: "Node", value: Value, depth: int, scope: Scope) -> None:
        """Add to `value` what can be said of an expression."""
        self.steps += 1
        self.all_steps.take()
        if depth > DEEPEST or self.steps > STEPS:
            return
        kind = node.type
        if kind in self.syntax.constants:
            return
        if kind in self.syntax.strings:
            self._string(node, value, depth, scope)
        elif is_name(node):
            self._name(node, value, depth, scope)
        elif kind in self.syntax.calls:
            self._call(node, kind, value, depth, scope)
        elif kind in self.syntax.members or kind in self.syntax.elements:
            self._member(node, kind, value, depth, scope)
        elif kind in self.syntax.joins:
            self._join(node, value, depth, scope)
        elif kind == self.syntax.keyword[0]:
            if (inner := node.child_by_field_name(self.syntax.keyword[2])) is not None:
                self._look(inner, value, depth + 1, scope)
        else:
            for child in _operands(node):
                self._look(child, value, depth + 1, scope)

    def _string(self, node: "Node", value: Value, depth: int, scope: Scope) -> None:
        value.text = True
        inner = Value()
        for child in node.children:
            if child.type in self.syntax.pieces:
                _say(value, text_of(child))
            elif child.type in self.syntax.strings:
                self._string(child, inner, depth + 1, scope)
                _say(value, inner.says)
                inner.says = ""
            elif child.type in self.syntax.holes:
                for part in child.named_children[:1]:
                    self._look(part, inner, depth + 1, scope)
        if inner.labels:
            value.labels |= inner.labels | {"built"}
        _say(value, inner.says)

    def _name(self, node: "Node", value: Value, depth: int, scope: Scope) -> None:
        name = text_of(node)
        if self.sources.reach(self.file.full(name)):
            value.labels.add("outside")
            return
        self._lookup(name, node.start_byte, value, depth, scope)

    def _lookup(self, name: str, at: int, value: Value, depth: int, scope: "Scope | None") -> None:
        while scope is not None:
            bindings, earlier = scope.reaching(name, at)
            inner = Value()
            for item in bindings:
                part = self._assigned(item.value, depth, scope)
                joined = item.adds and part.labels and (part.text or inner.text)
                inner.labels |= part.labels | ({"built"} if joined else set())
                _say(inner, part.says)
                inner.text |= part.text
            _merge(value, inner)
            if not earlier:
                return
            if name in scope.parameters:
                value.labels |= {scope.parameters[name]} - {""}
                return
            if bindings and scope.outer is None:
                return
            at = scope.node.start_byte if scope.outer is None or scope.outer.outer else 1 << 62
            scope = scope.outer
        if name not in self.file.imported and not name.isupper():
            value.labels.add("unknown")

    def _assigned(self, node: "Node", depth: int, scope: Scope) -> Value:
        value = self.known.get(node.id)
        if value is None:
            value = Value()
            self._look(node, value, depth + 1, scope)
            if self.steps <= STEPS:
                self.known[node.id] = value
        return value

    def _member(self, node: "Node", kind: str, value: Value, depth: int, scope: Scope) -> None:
        name = name_of(node, self.syntax)
        if self.sources.reach(self.file.full(name)):
            value.labels.add("outside")
            return
        place = name.rstrip("[]")
        if place in scope.bindings and "?" not in place:
            bindings, _ = scope.reaching(place, node.start_byte)
            for item in bindings:
                _merge(value, self._assigned(item.value, depth, scope))
            if bindings:
                return
        first = self.syntax.elements.get(kind) or self.syntax.members[kind][0]
        inner = node.child_by_field_name(first)
        last = tail(place)
        if inner is not None and not (last.isupper() and len(last) > 1):
            if is_name(inner) and text_of(inner) in ("self", "this", "cls"):
                value.labels.add("unknown")
            else:
                self._look(inner, value, depth + 1, scope)

    def _join(self, node: "Node", value: Value, depth: int, scope: Scope) -> None:
        operator, inner = node.child_by_field_name("operator"), Value()
        left = node.child_by_field_name("left")
        for child in node.named_children:
            self._look(child, inner, depth + 1, scope)
        sign = text_of(operator)
        if sign == "%" and left is not None and left.type in self.syntax.strings and _only_numbers(text_of(left)):
            _say(value, inner.says)
            value.text = True
            return
        if inner.labels and inner.text and sign in _OPERATORS:
            inner.labels.add("built")
        _merge(value, inner)

    def _call(self, node: "Node", kind: str, value: Value, depth: int, scope: Scope) -> None:
        name = self.file.full(callee(node, self.syntax))
        if self.cleaners.hold(name) or _NUMBERS.hold(name):
            return
        if self.sources.reach(name):
            value.labels.add("outside")
            return
        arguments = node.child_by_field_name(self.syntax.calls[kind][1])
        if self.syntax.keyword[1] == "key" and kind == "call" and arguments is None and "." not in name:
            self._lookup(name, node.start_byte, value, depth, scope)  # Ruby: a name or a call, nobody knows
            return
        inner = Value()
        receiver = _receiver(node, self.syntax)
        for child in ([] if receiver is None else [receiver]) + ([] if arguments is None else _operands(arguments)):
            self._look(child, inner, depth + 1, scope)
        if _FORMATS.hold(name) or (tail(name) == "join" and inner.text and "." in name and "path" not in name):
            first = None if arguments is None else first_child(arguments)
            written = text_of(first) if first is not None and first.type in self.syntax.strings else ""
            if "%" in written and _only_numbers(written):
                inner.labels.clear()
            if inner.labels:
                inner.labels.add("built")
        elif not inner.labels and receiver is None and not inner.text and name == callee(node, self.syntax):
            inner.labels.add("unknown")  # of this file or nobody knows where from
        _merge(value, inner)


def _receiver(node: "Node", syntax: Syntax) -> "Node | None":
    """The object whose method is called."""
    for name in ("receiver", "object"):
        if (found := node.child_by_field_name(name)) is not None:
            return found
    called = node.child_by_field_name(syntax.calls[node.type][0])
    if called is None or called.type not in syntax.members or called.type == "qualified_identifier":
        return None
    return called.child_by_field_name(syntax.members[called.type][0])


def _operands(node: "Node") -> "list[Node]":
    return [child for child in node.named_children if not child.is_extra]


def _merge(value: Value, inner: Value) -> None:
    value.labels |= inner.labels
    value.text |= inner.text
    _say(value, inner.says)


def _say(value: Value, text: str) -> None:
    value.says = (value.says + text)[:SAID]


def _only_numbers(text: str) -> bool:
    """Whether a format puts in numbers alone."""
    return all(letter in "dioxXufFeEgGc%" for letter in _NUMERIC.findall(text[:SAID]))
