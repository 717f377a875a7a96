"""The functions of a source file, by tree-sitter: a broken file still gives those that can be made out.

Nothing here recurses: nesting is as deep as whoever wrote the file liked.
"""

import hashlib
import importlib
import itertools
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from shrew.errors import DataError, UsageError, nearest

if TYPE_CHECKING:
    from tree_sitter import Node, Parser, Tree

__all__ = ["LANGUAGES", "MODULE", "Function", "Source", "cut", "functions", "module", "normalise", "parse", "words"]

MODULE = "<module>"
ANONYMOUS = "<anonymous>"
PARSE_SECONDS = 10.0  # of the processor for one file at most; what takes longer was made to take long
LEAST_SECONDS, RATE = 0.5, 2e5  # what any file may take, and bytes a second beyond: 7e6 are ordinary
OPEN = 300  # type parameters that begin and do not end in a statement: Java's parser takes the square of them at once
AT_ONCE = 1 << 12  # bytes that are parsed in no time, so without looking at the clock
PIECE = 1 << 16  # bytes that the parser is given at a time where the clock is looked at
SCOPES_SHOWN = 8  # innermost scopes in a name: thousands nest where someone wants them to
NAME_LENGTH = 120


@dataclass(frozen=True, slots=True)
class Source:
    """One file, decoded. `path` is as shown: posix, relative to the scan's root. `data` is the text in UTF-8 (for a
    UTF-8 file the bytes as they stand, without a byte-order mark), and every offset counts bytes of it."""

    path: str
    language: str
    data: bytes
    text: str


@dataclass(frozen=True, slots=True)
class Function:
    """`name` is qualified (Class.method), `start` and `end` are its first and last line from 1, `text` is the source
    dedented: line i of it is line start + i of the file. `key` is SHA-256 of the normalised text. `spans` are the byte
    ranges of the source that the text was cut from: one, or for the code outside functions all between them."""

    source: Source
    name: str
    start: int
    end: int
    text: str
    key: str
    spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class _Grammar:
    """What the nodes of a language are called. `wraps`: what stands around a function and belongs to it (decorators,
    templates); `closed`: what never holds a function; `runs`: what makes code outside functions worth a look."""

    package: str
    functions: frozenset[str]
    scopes: frozenset[str] = frozenset()
    wraps: frozenset[str] = frozenset()
    closed: frozenset[str] = frozenset()
    runs: frozenset[str] = frozenset()


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


_C_CLOSED = words("comment preproc_include preproc_def preproc_call initializer_list string_literal")
_GRAMMARS = {
    "python": _Grammar(
        "tree_sitter_python",
        words("function_definition"),
        words("class_definition"),
        words("decorated_definition"),
        words("comment expression_statement import_statement import_from_statement decorator argument_list"),
        words("expression_statement for_statement while_statement with_statement raise_statement delete_statement"),
    ),
    "c": _Grammar("tree_sitter_c", words("function_definition"), closed=_C_CLOSED),
    "cpp": _Grammar(
        "tree_sitter_cpp",
        words("function_definition"),
        words("class_specifier struct_specifier namespace_definition"),
        words("template_declaration"),
        _C_CLOSED,
    ),
    "javascript": _Grammar(
        "tree_sitter_javascript",
        words("function_declaration generator_function_declaration function_expression generator_function"
               " arrow_function method_definition"),
        words("class_declaration class"),
        closed=words("comment string regex import_statement"),
        runs=words("call_expression new_expression"),
    ),
    "go": _Grammar(
        "tree_sitter_go",
        words("function_declaration method_declaration func_literal"),
        closed=words("comment import_declaration"),
    ),
    "ruby": _Grammar(
        "tree_sitter_ruby",
        words("method singleton_method"),
        words("class module"),
        closed=words("comment string argument_list"),
        runs=words("call"),
    ),
    "java": _Grammar(
        "tree_sitter_java",
        words("method_declaration constructor_declaration compact_constructor_declaration static_initializer"),
        words("class_declaration interface_declaration enum_declaration record_declaration"),
        closed=words("line_comment block_comment import_declaration annotation"),
    ),
}  # fmt: skip
LANGUAGES = tuple(_GRAMMARS)

_STATEMENT = re.compile(rb"[;{}()]")
# Calls that only say what a file is made of.
_DECLARE = re.compile(
    rb"(require|require_relative|load|attr_\w+|include|extend|private|public|protected|module_function)\b"
)
# A definition with its decorators; or decorators alone, so that no run of them is read again from each of its lines.
_MARGIN = re.compile(rb"^(?:(?:@[^\n]*\n)+(?:(?:async )?def\b|class\b)?|(?:async )?def\b|class\b)", re.M)
COMMENTS = words("comment line_comment block_comment html_comment hash_bang_line")
# Text whose blanks count, with children (escapes) that do not cover all of it.
_WHOLE = words("string_content interpreted_string_literal_content raw_string_content heredoc_content string_fragment")


@cache
def _parser(language: str) -> "Parser":
    if language not in _GRAMMARS:
        raise UsageError(f"'{language}' is no language that can be scanned; {nearest(language, _GRAMMARS)}")
    from tree_sitter import Language, Parser

    return Parser(Language(importlib.import_module(_GRAMMARS[language].package).language()))


def parse(source: Source) -> "Tree":
    """The syntax tree of a file, errors and all. Raises DataError where that takes far longer than files of its length
    do."""
    return _parse(source.data, source.language)


def _parse(data: bytes, language: str) -> "Tree":
    parser = _parser(language)
    if len(data) <= AT_ONCE:
        return parser.parse(data)
    if language == "java" and any(part.count(b"<") - part.count(b">") > OPEN for part in _STATEMENT.split(data)):
        raise DataError(f"more than {OPEN} '<' in a statement that are not closed, which would not be parsed in time")
    limit = min(PARSE_SECONDS, LEAST_SECONDS + len(data) / RATE)
    until = time.thread_time() + limit
    try:
        return parser.parse(
            lambda at, _: data[at : at + PIECE], progress_callback=lambda *_: time.thread_time() > until
        )
    except ValueError:
        parser.reset()  # else the next file would go on where this one was left
        raise DataError(f"not parsed within {limit:.2g} seconds") from None


def normalise(text: str, language: str) -> str:
    """The tokens of a piece of code, a blank between: no comments, docstrings, whitespace or blank lines. Python's
    blocks are marked, since their indentation is what they mean."""
    data = text.encode("utf-8", "surrogatepass")
    blocks = language == "python"
    cursor = _parse(data, language).walk()
    parts: list[bytes] = []
    at, open_blocks = 0, [0]  # in bytes; the ends of the blocks that are open, outermost first
    while True:
        node: Any = cursor.node
        kind, start, end = node.type, node.start_byte, node.end_byte
        while len(open_blocks) > 1 and start >= open_blocks[-1]:
            open_blocks.pop()
            parts.append(b"<")
        if kind in COMMENTS or (blocks and kind == "expression_statement" and _is_docstring(node)):
            if gap := data[at:start].strip():
                parts.append(gap)
            at = max(at, end)
        elif blocks and kind == "block" and end > start:
            parts.append(b">")
            open_blocks.append(end)
            if cursor.goto_first_child():
                continue
        elif kind not in _WHOLE and cursor.goto_first_child():
            continue
        else:
            if gap := data[at:start].strip():  # what the grammar has no token for
                parts.append(gap)
            if end > start:
                parts.append(data[start:end])
            at = max(at, end)
        while not cursor.goto_next_sibling():
            if not cursor.goto_parent():
                if gap := data[at:].strip():
                    parts.append(gap)
                return b" ".join(parts).decode("utf-8", "replace")


def _is_docstring(statement: "Node") -> bool:
    first = statement.named_child(0) if statement.named_child_count == 1 else None
    return first is not None and first.type in ("string", "concatenated_string")


def _key(text: str, language: str) -> str:
    return hashlib.sha256(normalise(text, language).encode("utf-8")).hexdigest()


def cut(data: bytes, spans: tuple[tuple[int, int], ...]) -> str:
    """The text of a function from its source: its spans with only line ends between, dedented, lines by \\n."""
    parts, at = [], spans[0][0]
    for start, end in spans:
        parts += [b"\n" * data.count(b"\n", at, start), data[start:end]]
        at = end
    text = b"".join(parts).decode("utf-8", "replace").replace("\r\n", "\n")
    indent = len(text) - len(text.lstrip(" \t"))
    return re.sub(rf"^[ \t]{{1,{indent}}}", "", text, flags=re.M) if indent else text


def functions(source: Source, tree: "Tree | None" = None) -> list[Function]:
    """The outermost functions of a file in their order, and the code outside as one, MODULE, if it does something.

    A function in a function belongs to that one. Raises DataError where the file takes too long.
    """
    tree = parse(source) if tree is None else tree
    places, runs = _places(tree, source.data, source.language)
    if source.language == "python" and tree.root_node.has_error:
        # one bracket that is never closed swallows all after it; what begins at the margin begins anew
        marks = [0, *(match.start() for match in _MARGIN.finditer(source.data)), len(source.data)]
        pieces = [
            _places(_parse(piece, source.language), piece, source.language, start)[0]
            for start, piece in ((start, source.data[start:end]) for start, end in itertools.pairwise(marks))
        ]
        places = max(places, [place for piece in pieces for place in piece], key=len)
    found, line, at = [], 1, 0
    for name, start, end in places:
        line, at = line + source.data.count(b"\n", at, start), start
        found.append(_function(source, name, start, end, line))
    if runs and (rest := module(source, found)) is not None:
        found.append(rest)
    return found


def _places(tree: "Tree", data: bytes, language: str, offset: int = 0) -> tuple[list[tuple[str, int, int]], bool]:
    """Name, start and end of the outermost functions, and whether code outside them does something. `data`: what the
    tree was made of, which stands at `offset` in the file."""
    places, runs = [], False
    for node, start, name in _outermost(tree, data, language):
        if node is None:
            runs = True
        else:
            places.append((name, start + offset, node.end_byte + offset))
    return places, runs


def _function(source: Source, name: str, start: int, end: int, first: int) -> Function:
    """`first`: the line that `start` is in."""
    data = source.data
    line = data.rfind(b"\n", 0, start) + 1
    if not data[line:start].strip():
        start = line  # with its indentation, which is then taken off every line
    text = cut(data, ((start, end),))
    return Function(
        source, name, first, first + text.count("\n"), text, _key(text, source.language), ((start, end),)
    )


def module(source: Source, found: list[Function]) -> Function | None:
    """The code outside the functions `found`, whose lines keep their places; None if there is none."""
    data, at, spans = source.data, 0, []
    for start, end in [*(span for each in found for span in each.spans), (len(data), len(data))]:
        piece = data[at:start]
        if piece.strip():
            # whole lines at both ends, so that the place of the first and last line is that of code
            first = at + len(piece) - len(piece.lstrip())
            spans.append((data.rfind(b"\n", at, first) + 1 or at, at + len(piece.rstrip())))
        at = max(at, end)
    if not spans:
        return None
    text = cut(data, tuple(spans))
    first = data.count(b"\n", 0, spans[0][0]) + 1
    key = _key(text, source.language)
    return Function(source, MODULE, first, first + text.count("\n"), text, key, tuple(spans))


def _outermost(tree: "Tree", data: bytes, language: str) -> Iterator[tuple["Node | None", int, str]]:
    """Each outermost function: its node, where its text begins, its name. Once (None, 0, "") for code that runs when
    the file does."""
    grammar = _GRAMMARS[language]
    cursor, path = tree.walk(), list[Any]()  # the nodes above
    scopes: list[tuple[int, str]] = []  # depth and name
    told = not grammar.runs
    while True:
        node: Any = cursor.node
        kind = node.type
        inside = True
        if kind in grammar.functions and _has_body(node, kind):
            above = path[-1] if path else None
            start = above.start_byte if above is not None and above.type in grammar.wraps else node.start_byte
            outer = [name for _, name in scopes[-SCOPES_SHOWN:]]
            yield node, start, ".".join([*outer, _name(node, path, data)])
            inside = False
        elif not told and kind in grammar.runs and not scopes and _does_something(node, kind, data):
            told = True
            yield None, 0, ""
        if kind in grammar.scopes:
            scopes.append((len(path), _text(node.child_by_field_name("name"), data) or ANONYMOUS))
        if inside and kind not in grammar.closed and cursor.goto_first_child():
            path.append(node)
            continue
        while True:
            if scopes and scopes[-1][0] == len(path):
                scopes.pop()
            if cursor.goto_next_sibling():
                break
            if not cursor.goto_parent():
                return
            path.pop()


def _has_body(node: "Node", kind: str) -> bool:
    if kind == "static_initializer":
        return True
    body = node.child_by_field_name("body")
    if kind == "arrow_function":
        return body is not None and body.type == "statement_block"  # `x => x + 1` stays in the code around it
    return body is not None or kind in ("method", "singleton_method")  # Ruby's may be empty


def _does_something(node: "Node", kind: str, data: bytes) -> bool:
    if kind == "expression_statement":
        return not _is_docstring(node)
    return not (kind in ("call", "call_expression") and _DECLARE.match(data, node.start_byte))


def _text(node: "Node | None", data: bytes) -> str:
    """The first words of a node. (Its own `text` would be a copy of all of it, for each function that begins in it.)"""
    if node is None:
        return ""
    start = node.start_byte
    words = " ".join(data[start : min(node.end_byte, start + 4 * NAME_LENGTH)].decode("utf-8", "replace").split())
    return words[:NAME_LENGTH]


def _name(node: "Node", path: list[Any], data: bytes) -> str:
    """The name of a function: its own, or of what it is put into."""
    if (named := node.child_by_field_name("name")) is not None:
        receiver = _text(node.child_by_field_name("receiver"), data)  # Go: (s *Server)
        of = re.findall(r"\w+", receiver.partition("[")[0])[-1:]
        return ".".join([*of, _text(named, data)])
    if node.type == "static_initializer":
        return "<static>"
    declared = node.child_by_field_name("declarator")
    for _ in range(50):  # C: a pointer to an array of functions ... of a name
        if declared is None or (deeper := declared.child_by_field_name("declarator")) is None:
            break
        declared = deeper
    if declared is not None:
        return _text(declared, data).replace("::", ".") or ANONYMOUS
    above = path[-1] if path else None
    for field in ("name", "left", "key", "property"):  # JavaScript: const f = ..., f = ..., {f: ...}, a field
        if above is not None and (target := above.child_by_field_name(field)) is not None:
            return _text(target, data)
    if above is not None and above.type == "arguments" and len(path) > 1:
        return f"{_text(path[-2].child_by_field_name('function'), data)}()"
    return ANONYMOUS
