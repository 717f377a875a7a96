"""What the parts of a language are called in its grammar, and the dotted names of things."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shrew.scan.functions import words

if TYPE_CHECKING:
    from tree_sitter import Node

LONGEST, PARTS = 200, 24  # characters and parts of a name


_NAMES = words(
    "identifier constant this self super type_identifier field_identifier property_identifier package_identifier"
    " namespace_identifier instance_variable global_variable class_variable dotted_name"
    " shorthand_property_identifier_pattern private_property_identifier scoped_type_identifier"
)
_OWN = ("self.", "this.", "cls.", "@")


def _fields(text: str) -> dict[str, tuple[str, str]]:
    """'call:function:arguments ...' -> {'call': ('function', 'arguments'), ...}."""
    rows = [row.split(":") for row in text.split()]
    return {kind: (first, second) for kind, first, second in rows}


@dataclass(frozen=True)
class Syntax:
    """Kinds of node of one language. Pairs are of field names."""

    calls: dict[str, tuple[str, str]]  # what is called, its arguments
    members: dict[str, tuple[str, str]]  # object, member
    elements: dict[str, str]  # a thing of which an element is taken, by index or key
    assigns: dict[str, tuple[str, str]]  # target, value
    functions: frozenset[str]
    blocks: frozenset[str]
    strings: frozenset[str]
    joins: frozenset[str]  # binary operators, + among them
    constants: frozenset[str]  # never text from outside
    keyword: tuple[str, str, str] = ("", "", "")  # kind of a named argument, its name, its value
    pieces: frozenset[str] = frozenset({"string_content", "string_fragment", "escape_sequence"})
    holes: frozenset[str] = frozenset({"interpolation", "template_substitution"})
    jumps: frozenset[str] = field(
        default_factory=lambda: words("return_statement goto_statement continue_statement break_statement"
                                       " raise_statement throw_statement return break next")
    )  # fmt: skip


_C = Syntax(
    calls=_fields("call_expression:function:arguments"),
    members=_fields("field_expression:argument:field qualified_identifier:scope:name"),
    elements={"subscript_expression": "argument", "pointer_expression": "argument"},
    assigns=_fields("init_declarator:declarator:value assignment_expression:left:right"),
    functions=words("function_definition lambda_expression"),
    blocks=words("compound_statement case_statement"),
    strings=words("string_literal concatenated_string raw_string_literal"),
    joins=words("binary_expression"),
    constants=words("number_literal char_literal true false null nullptr sizeof_expression comment"),
    pieces=words("string_content raw_string_content escape_sequence"),
)
LANGUAGES = {
    "python": Syntax(
        calls=_fields("call:function:arguments"),
        members=_fields("attribute:object:attribute"),
        elements={"subscript": "value"},
        assigns=_fields("assignment:left:right augmented_assignment:left:right named_expression:name:value"
                        " for_statement:left:right for_in_clause:left:right as_pattern:alias:"),
        functions=words("function_definition"),
        blocks=words("block"),
        strings=words("string concatenated_string"),
        joins=words("binary_operator"),
        constants=words("integer float true false none comment comparison_operator not_operator lambda ellipsis"),
        keyword=("keyword_argument", "name", "value"),
    ),
    "c": _C,
    "cpp": _C,
    "javascript": Syntax(
        calls=_fields("call_expression:function:arguments new_expression:constructor:arguments"),
        members=_fields("member_expression:object:property"),
        elements={"subscript_expression": "object"},
        assigns=_fields("variable_declarator:name:value assignment_expression:left:right"
                        " augmented_assignment_expression:left:right for_in_statement:left:right"),
        functions=words("function_declaration function_expression arrow_function method_definition"
                         " generator_function_declaration generator_function"),
        blocks=words("statement_block"),
        strings=words("string template_string"),
        joins=words("binary_expression"),
        constants=words("number true false null undefined comment regex arrow_function function_expression"),
        keyword=("pair", "key", "value"),
    ),
    "go": Syntax(
        calls=_fields("call_expression:function:arguments"),
        members=_fields("selector_expression:operand:field"),
        elements={"index_expression": "operand"},
        assigns=_fields("short_var_declaration:left:right assignment_statement:left:right var_spec:name:value"
                        " range_clause:left:right"),
        functions=words("function_declaration method_declaration func_literal"),
        blocks=words("block"),
        strings=words("interpreted_string_literal raw_string_literal"),
        joins=words("binary_expression"),
        constants=words("int_literal float_literal true false nil comment rune_literal func_literal"),
        pieces=words("interpreted_string_literal_content raw_string_literal_content"),
    ),
    "ruby": Syntax(
        calls=_fields("call:method:arguments"),
        members=_fields("scope_resolution:scope:name"),
        elements={"element_reference": "object"},
        assigns=_fields("assignment:left:right operator_assignment:left:right"),
        functions=words("method singleton_method"),
        blocks=words("body_statement block_body do_block then else"),
        strings=words("string subshell heredoc_body chained_string"),
        joins=words("binary"),
        constants=words("integer float true false nil comment simple_symbol hash_key_symbol"),
        keyword=("pair", "key", "value"),
        pieces=words("string_content heredoc_content escape_sequence"),
    ),
    "java": Syntax(
        calls=_fields("method_invocation:name:arguments object_creation_expression:type:arguments"),
        members=_fields("field_access:object:field"),
        elements={"array_access": "array"},
        assigns=_fields("variable_declarator:name:value assignment_expression:left:right"
                        " enhanced_for_statement:name:value"),
        functions=words("method_declaration constructor_declaration lambda_expression"),
        blocks=words("block constructor_body"),
        strings=words("string_literal"),
        joins=words("binary_expression"),
        constants=words("decimal_integer_literal decimal_floating_point_literal hex_integer_literal true false"
                         " null_literal character_literal line_comment block_comment class_literal"),
    ),
}  # fmt: skip


def text_of(node: "Node | None") -> str:
    return "" if node is None else (node.text or b"").decode("utf-8", "replace")


def nodes_of(wanted: frozenset[str], node: "Node") -> "list[Node]":
    """The nodes of the wanted kinds in a node, in their order.

    (tree-sitter's own queries are no faster, and take time that grows with the square of a long run of tokens without a
    name, such as brackets that are never closed.)
    """
    found, cursor = list[Any](), node.walk()
    while True:
        here: Any = cursor.node
        if here.type in wanted and here.is_named:
            found.append(here)
        if cursor.goto_first_child():
            continue
        while not cursor.goto_next_sibling():
            if not cursor.goto_parent():
                return found


class Around:
    """Which of some nodes of a tree is the innermost around another one. (tree-sitter finds a parent from the root
    down, so going up from what is deep takes long.) `same`: also one that has the same place."""

    def __init__(self, nodes: "list[Node]", same: bool) -> None:
        """`nodes` in their order."""
        self._nodes, self._same = nodes, same
        self._starts = [node.start_byte for node in nodes]
        self._ends = [node.end_byte for node in nodes]
        self._outer: list[int] = []  # index of the next one out, -1 for none
        above: list[int] = []
        for at, start in enumerate(self._starts):
            while above and self._ends[above[-1]] <= start:
                above.pop()
            self._outer.append(above[-1] if above else -1)
            above.append(at)

    def __call__(self, node: "Node") -> "Node | None":
        start, end = node.start_byte, node.end_byte
        at = bisect_right(self._starts, start) - 1
        while at >= 0:
            larger = self._ends[at] - self._starts[at] > end - start
            if self._ends[at] >= end and (larger or (self._same and self._nodes[at].id != node.id)):
                return self._nodes[at]
            at = self._outer[at]
        return None


def first_child(node: "Node") -> "Node | None":
    """Its first child with a name; tree-sitter's own way of asking raises where there is none."""
    return node.named_children[0] if node.named_child_count else None


def is_name(node: "Node") -> bool:
    return node.type in _NAMES


def name_of(node: "Node | None", syntax: Syntax) -> str:
    """The dotted name of an expression: `a.b().c[]` for `a.b(x).c[y]`, "?" for what has none, as in `?.c`."""
    parts: list[str] = []
    suffix = ""
    for _ in range(PARTS):
        if node is None:
            break
        kind = node.type
        if kind in _NAMES:
            parts.append(text_of(node).replace("::", ".") + suffix)
            break
        if kind in syntax.members:
            first, second = syntax.members[kind]
            parts.append(_last(node.child_by_field_name(second)) + suffix)
            node, suffix = node.child_by_field_name(first), ""
        elif kind in syntax.calls:
            called, suffix, node = _called(node, kind, syntax, suffix)
            if called:
                parts.append(called)
        elif kind in syntax.elements:
            suffix = "[]" + suffix
            node = node.child_by_field_name(syntax.elements[kind])
        elif kind in ("parenthesized_expression", "await", "await_expression", "non_null_expression"):
            node = first_child(node)
        else:
            parts.append("?" + suffix)
            break
    else:
        parts.append("?")
    return ".".join(reversed(parts))[-LONGEST:]


def _last(node: "Node | None") -> str:
    return text_of(node).rpartition("::")[2]


def _called(node: "Node", kind: str, syntax: Syntax, suffix: str) -> "tuple[str, str, Node | None]":
    """The part of a name that a call adds, what then hangs on the next part, and where that is."""
    called, _ = syntax.calls[kind]
    if kind in ("new_expression", "object_creation_expression"):
        return "new " + text_of(node.child_by_field_name(called)).partition("<")[0] + "()" + suffix, "", None
    if kind == "method_invocation":
        return text_of(node.child_by_field_name("name")) + "()" + suffix, "", node.child_by_field_name("object")
    if kind == "call" and called == "method":  # Ruby, where a call without arguments looks like a name
        return text_of(node.child_by_field_name("method")) + suffix, "", node.child_by_field_name("receiver")
    return "", "()" + suffix, node.child_by_field_name(called)


def callee(node: "Node", syntax: Syntax) -> str:
    """What a call calls: `os.path.join`, `new ProcessBuilder`, `?.execute`."""
    return name_of(node, syntax).removesuffix("()")


def without_self(name: str) -> str:
    return next((name.removeprefix(own) for own in _OWN if name.startswith(own)), name)


class Names:
    """Names as rules write them: `os.system` is that, `*.execute` a member of anything, `request.args` for sources also
    what is below it."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.by_tail: dict[str, list[str]] = {}
        for name in names:
            self.by_tail.setdefault(tail(name), []).append(name)

    def hold(self, name: str) -> bool:
        return any(is_called(name, pattern) for pattern in self.by_tail.get(tail(name), ()))

    def reach(self, name: str) -> bool:
        """Whether a name is one of these or below one: `request.args.get()` is below `request.args`."""
        if not self.by_tail:
            return False
        plain = without_self(name)
        return any(self.hold(part) for whole in {name, plain} for part in _above(whole))


def _above(name: str) -> Iterator[str]:
    """`a.b().c` -> `a`, `a.b`, `a.b().c`."""
    for at, mark in enumerate(name):
        if mark in ".([":
            yield name[:at]
    yield name


def tail(name: str) -> str:
    return name.rpartition(".")[2]


def is_called(name: str, pattern: str) -> bool:
    return name == pattern or (pattern.startswith("*.") and name.endswith(pattern[1:]))


def imports(node: "Node", language: str) -> dict[str, str]:
    """What an import makes known: local name -> full name."""
    if language == "javascript":
        return _script_imports(node)
    known = {}
    module = text_of(node.child_by_field_name("module_name"))
    for item in node.children_by_field_name("name"):
        full, local = text_of(item), text_of(item).partition(".")[0]
        if item.type == "aliased_import":
            full, local = (text_of(item.child_by_field_name(part)) for part in ("name", "alias"))
        elif not module:
            full = local
        known[local] = f"{module}.{full}" if module else full
    return known


def _script_imports(node: "Node") -> dict[str, str]:
    """Of `import`, and of `const x = require("y")`, `const {a: b} = require("y")`."""
    if node.type == "import_statement":
        module, targets = text_of(node.child_by_field_name("source")), node.named_children[:1]
    else:
        value, target = node.child_by_field_name("value"), node.child_by_field_name("name")
        if value is None or target is None or value.type != "call_expression":
            return {}
        arguments = value.child_by_field_name("arguments")
        if text_of(value.child_by_field_name("function")) != "require" or arguments is None:
            return {}
        module, targets = text_of(first_child(arguments)), [target]
    module = module.strip("\"'`").removeprefix("node:")
    known = {}
    waiting = list(targets)
    while waiting:
        item = waiting.pop()
        if item.type in ("identifier", "namespace_import"):
            known[text_of(item).removeprefix("* as ").strip()] = module
        elif item.type == "shorthand_property_identifier_pattern":
            known[text_of(item)] = f"{module}.{text_of(item)}"
        elif item.type in ("pair_pattern", "import_specifier"):
            names = [text_of(child) for child in item.named_children]
            known[names[-1]] = f"{module}.{names[0]}"
        else:
            waiting += item.named_children
    return known
