"""Templates from strangers, run in this process: no way out of the sandbox, and an end to time, memory and output.

Jinja's sandbox keeps a template from reaching Python. It does not keep it from `'a' * 10**10`, from a loop in a loop in
a loop, or from a list of lists of lists that is small until it is printed. Here every step that can repeat checks a
deadline, and everything that can make something long is measured before it is made. No deadline ends one call of
Python's own, so there are only the filters and methods whose time grows as what they are given, and what they are given
is bounded where it is not the length alone that counts.
"""

import json
import re
import threading
import time
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping, Sized, ValuesView
from datetime import datetime
from types import GeneratorType
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

WORK = 16_000_000  # characters and items that a rendering may make in all, on the way to its output
NUMBER_BITS = 4096
WIDTH = re.compile(r"\d{5}|[%{][^}%]*[*{]")  # a width in a format string that only wants memory
NUMBER = re.compile(r"\d+")

# What chat templates use, of Jinja's and Python's. Those left out take time by the square of a length (wordwrap,
# urlize, striptags), make bytes, which nothing here measures, or change from one time to the next.
FILTERS = frozenset(
    ["abs", "attr", "batch", "capitalize", "center", "count", "d", "default", "dictsort", "e", "escape", "first",
     "float", "format", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max",
     "min", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "slice", "sort",
     "string", "sum", "title", "tojson", "trim", "truncate", "unique", "upper"]
)  # fmt: skip
METHODS = {
    str: frozenset(
        ["capitalize", "casefold", "center", "count", "endswith", "find", "format", "index", "isalnum", "isalpha",
         "isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "ljust",
         "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rjust",
         "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper",
         "zfill"]
    ),
    dict: frozenset(["copy", "get", "items", "keys", "values"]),
    list: frozenset(["copy", "count", "index"]),
    tuple: frozenset(["count", "index"]),
    int: frozenset(["bit_length", "is_integer"]),
    float: frozenset(["is_integer"]),
    KeysView: frozenset[str](),
    ValuesView: frozenset[str](),
    ItemsView: frozenset[str](),
}  # fmt: skip
# Filters and methods whose result can be far longer than what they are given: subject times the largest of the rest.
MULTIPLYING = frozenset(
    ["batch", "center", "format", "indent", "join", "ljust", "replace", "rjust", "slice", "tojson", "truncate", "zfill"]
)  # fmt: skip
# Filters that go through what they are given item by item, with the rest said for each item.
WALKING = frozenset(
    ["batch", "dictsort", "first", "groupby", "items", "join", "last", "list", "map", "max", "min", "reject",
     "rejectattr", "reverse", "select", "selectattr", "slice", "sort", "sum", "unique"]
)  # fmt: skip
# Python searches from the end, and strips, by looking for each character of the subject in all of what is sought.
SEEKING = frozenset(["lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip", "trim"])
ITEMS = 100_000  # that one filter goes through
TABLE = 10_000  # keys that one call may put into a table: numbers can be chosen so that all of them collide
STATEMENTS = 2000  # of one template; Jinja compiles in the square of them
DIGITS = 1000  # to round to; Python computes 10 to that power
FORM = 1000  # characters that say how to write a time; the C library's widths may make 256 of each
SIZED = (str, int, float, Mapping, list, tuple, range, KeysView, ValuesView, ItemsView)


class Meter(threading.local):
    """What the rendering in this thread may still spend."""

    deadline = 0.0
    work = 0

    def start(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self.work = WORK

    def tick(self) -> str:
        if time.monotonic() > self.deadline:
            raise SecurityError("it takes too long")
        return ""

    def spend(self, amount: int) -> None:
        self.work -= amount
        if self.work < 0:
            raise SecurityError("it makes too much text")
        self.tick()


def size(value: Any, limit: int = WORK) -> int:
    """Characters and items of a value written out; something that is held twice counts twice. Stops above `limit`."""
    total, waiting = 0, [value]
    while waiting and total <= limit:
        item = waiting.pop()
        if isinstance(item, str):
            total += len(item) + 1
        elif isinstance(item, Mapping):
            total += 1
            waiting.extend(item.keys())
            waiting.extend(item.values())
        elif isinstance(item, range):
            total += 6 * len(item)
        elif isinstance(item, list | tuple | set | frozenset | KeysView | ValuesView | ItemsView):
            total += 1
            waiting.extend(item)
        elif isinstance(item, int):
            total += 1 + item.bit_length() // 3
        else:
            total += 1
    return total


def _held(value: Any) -> Any:
    """What a generator gives, as a list, so that it can be measured."""
    return list(value) if isinstance(value, GeneratorType) else value


def _check_table(*given: Any) -> None:
    """Raises SecurityError for what would put too many keys into a table at once."""
    if any(isinstance(arg, Sized) and len(arg) > TABLE for arg in given):
        raise SecurityError("it makes too large a table")


class Bounded(NodeTransformer):
    """Puts a check of the deadline into every body that can repeat, and a measure around everything made in place."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._ticking(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._ticking(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._ticking(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("joined", node.nodes, node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        for operand in node.ops:  # texts take as long as they are, and nothing else here may repeat
            operand.expr = self._call("passed", [operand.expr], node.lineno)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._call("sliced" if isinstance(node.arg, nodes.Slice) else "passed", [node], node.lineno)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return self._call("made", [node], node.lineno)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        _check_table(node.items)
        return self._call("made", [node], node.lineno)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return self._call("made", [node], node.lineno) if node.ctx == "load" else node

    def _ticking(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._call("tick", [], node.lineno), lineno=node.lineno))
        return node

    def _call(self, name: str, args: list[Any], line: int) -> nodes.Expr:
        return nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None, lineno=line)


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks what a model is trained on; here it is what it holds."""

    tags = {"generation"}  # noqa: RUF012  (so says Jinja)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_held"), [], [], body).set_lineno(line)

    def _held(self, caller: Macro) -> str:
        return caller()


class PlainDict:
    """`dict(...)` without the type, whose attributes lead elsewhere."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        _check_table(*args)
        return dict(*args, **kwargs)


class PlainNamespace(Namespace):
    """`namespace(...)` that holds no name with an underscore in front."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        _check_table(*rest)
        held = dict(*rest, **kwargs)
        for name in held:
            PlainNamespace._check(name)
        Namespace.__init__(self, held)

    def __setitem__(self, name: str, value: Any) -> None:
        PlainNamespace._check(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:  # not what it holds: namespaces in namespaces are small until they are printed
        return "<Namespace>"

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace may not hold {name!r}")


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    if len(form) > FORM:
        raise SecurityError("it writes the time in too long a form")
    return datetime.now().strftime(form)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:  # fmt: skip
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Sandbox(ImmutableSandboxedEnvironment):
    """What transformers gives chat templates, with every step paid for."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def __init__(self) -> None:
        self.meter = Meter()
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[GenerationTag, loopcontrols],
            finalize=self._printed,
        )  # fmt: skip
        self.filters["tojson"] = tojson
        self.filters = {name: self._paid(name, self.filters[name]) for name in FILTERS}
        self.tests = {name: self._paid(name, function) for name, function in self.tests.items()}
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now, "dict": PlainDict(),
                         "namespace": PlainNamespace}  # fmt: skip
        self.concat = self.joined_list  # type: ignore[method-assign]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        parsed = super()._parse(source, name, filename)
        if sum(1 for _ in parsed.find_all(nodes.Stmt)) > STATEMENTS:
            raise SecurityError("it has too many statements")
        tree: nodes.Template = Bounded().visit(parsed)
        return tree

    # What the transformed tree calls.

    def tick(self) -> str:
        return self.meter.tick()

    def made(self, value: Any) -> Any:
        self.meter.spend(size(value))
        return value

    def passed(self, value: Any) -> Any:
        self.meter.tick()
        return value

    def sliced(self, value: Any) -> Any:
        self.meter.spend(len(value) if isinstance(value, Sized) else 1)
        return value

    def joined(self, *parts: Any) -> str:
        self.meter.spend(size(parts))
        return "".join(map(str, parts))

    def joined_list(self, parts: Iterable[str]) -> str:
        held = list(parts)
        self.meter.spend(size(held))
        return "".join(held)

    def _printed(self, value: Any) -> Any:
        if not isinstance(value, str | Undefined):
            self.meter.spend(size(value))
        return value

    # What Jinja calls.

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        known = next((names for kind, names in METHODS.items() if isinstance(obj, kind)), None)
        if callable(value) and known is not None and attr not in known:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            self._check_growth("format", (left, right), {})
        if isinstance(left, int) and isinstance(right, int):  # division takes the square of their lengths
            bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > NUMBER_BITS:
                raise SecurityError("it computes with numbers that are too large")
        elif operator == "*" and (isinstance(left, int) or isinstance(right, int)):
            times, held = (left, right) if isinstance(left, int) else (right, left)
            self.meter.spend(max(times, 0) * size(held))
        elif operator == "+":
            self.meter.spend(size((left, right)))
        result = super().call_binop(context, operator, left, right)
        self.meter.tick()
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        self = __self
        bound = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(bound, "__self__", None)
        if isinstance(owner, Sandbox):
            return __obj(*args)  # what Jinja adds about loops is for its own
        args = tuple(map(_held, args))
        if isinstance(owner, str):
            self._check_growth(bound.__name__, (owner, *args), kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        self.meter.spend(size(result))
        return result

    def _paid(self, name: str, function: Any) -> Callable[..., Any]:
        """A filter or test that is refused where its result would be too long, and paid for."""

        def paid(*args: Any, **kwargs: Any) -> Any:
            args = tuple(map(_held, args))
            self._check_growth(name, args, kwargs)
            result = function(*args, **kwargs)
            self._check_numbers(result)
            self.meter.spend(size(result))
            return result

        if hasattr(function, "jinja_pass_arg"):
            paid.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        if hasattr(function, "jinja_async_variant"):
            paid.jinja_async_variant = True  # type: ignore[attr-defined]
        return paid

    def _check_numbers(self, *given: Any) -> None:
        if any(isinstance(arg, int) and arg.bit_length() > NUMBER_BITS for arg in given):
            raise SecurityError("it computes with numbers that are too large")

    def _check_growth(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._check_numbers(*args, *kwargs.values())
        if name == "round" and any(isinstance(arg, int) and abs(arg) > DIGITS for arg in (*args[1:], *kwargs.values())):
            raise SecurityError("it computes with numbers that are too large")
        if name == "sum":  # lists are joined one by one, and each time all that came before is copied
            held = next((arg for arg in args if isinstance(arg, list | tuple)), ())
            self.meter.spend(len(held) * sum(len(item) for item in held if isinstance(item, list | tuple)) // 16)
        given = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, SIZED) and not isinstance(arg, Context)]
        if not given:
            return
        subject, *rest = given
        if name == "unique":
            _check_table(subject)
        if name in SEEKING:
            self.meter.spend(size(subject) * max(map(size, rest), default=0) // 16)
        if name in WALKING and isinstance(subject, Sized):
            if len(subject) > ITEMS:
                raise SecurityError("it goes through too many items")
            self.meter.spend(len(subject) * sum(map(size, rest)) // 16)
        if name not in MULTIPLYING:
            return
        if name == "format" and isinstance(subject, str):
            if WIDTH.search(subject):
                raise SecurityError("it formats with a width that is too large")
            for number in NUMBER.finditer(subject):  # widths and precisions, and in passing what else has digits
                self.meter.spend(int(number[0]))
        largest = max((abs(int(arg)) if isinstance(arg, int | float) else size(arg) for arg in rest), default=1)
        amount = size(subject) * max(largest, 1)
        if amount > WORK:
            raise SecurityError("it makes too much text")
        self.meter.spend(amount // 16)
