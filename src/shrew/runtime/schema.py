"""JSON Schemas made finite: checked, bounded where they leave something open, and what their parts cost to finish.

A grammar promises a prefix, not an end: a small model that may write `[[[[` or a number of any length writes it until
its tokens are gone. So whatever a schema leaves open is bounded here, and the least that any part of it needs is
counted, in bytes, so that an answer can be brought to its end in time (shrew.runtime.constrain).
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shrew.errors import RequestError
from shrew.runtime.closing import literals
from shrew.runtime.expression import read


class ConstraintError(RequestError):
    """A schema, expression or grammar that cannot be used, or that no answer of that length fits."""


# What an open schema is bounded to.
CHARACTERS = 1024  # of a string
ITEMS = 64  # of an array, and properties of an object that names none
DIGITS = 15  # of a number before the point
STEP = 1e-6  # of a number that is no integer
ANY_DEPTH = 3  # of a value about which nothing is said

PATTERN = 10_000  # characters of an expression
BYTES, NODES, DEPTH, CHOICES, CHAIN = 200_000, 5_000, 40, 5_000, 100  # of a schema; more is refused

WHERE = ("allOf", "anyOf", "oneOf")
ABOUT = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema",
         "$id", "$defs", "definitions", "strict", "discriminator"}  # fmt: skip
OF_TYPE = {
    "object": {"properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"pattern", "format", "minLength", "maxLength"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}
OF_TYPE["integer"] = OF_TYPE["number"]
ANY = "any-value-"
FORMAT_BYTES = 64  # no format needs more to be brought to its end
NUMBER_BYTES = 2 * DIGITS
NEVER = 10**9
LONG, PIECES = 4000, 64  # bytes of an answer that is written out, and answers that are


Costs = dict[int | str, int]  # bytes: of nodes by their id, of expressions by their text


@dataclass(frozen=True)
class Bounded:
    """A finite schema. In bytes: `least` for an answer, `jump` that one choice may add to what is left at most, and
    `content` that a piece of text within a string or a number may add. `shortest`: answers as short as they get, of
    the whole (first) and of its larger parts; not all of them need be right. `within`: what a string or a name that
    must match an expression may have to go on with, from wherever it is, with its closing quote or without."""

    schema: dict[str, Any]
    shortest: tuple[bytes, ...]
    within: tuple[bytes, ...]
    least: int
    jump: int
    content: int


def bound(schema: Any, solve: Callable[[dict[str, Any]], bytes | None]) -> Bounded:
    """The finite form of a JSON Schema. Raises ConstraintError for one that is too large, refers to nothing or has no
    finite answer; keywords that cannot be held are refused later, by llguidance. `solve` finds a short string for the
    schema of one with a pattern or a format."""
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise ConstraintError("the JSON Schema is no object.")
    _check_size(schema)
    root = _Bounder().root(schema)
    return _measure(root, solve)


def _check_size(schema: dict[str, Any]) -> None:
    nodes = 0
    waiting: list[tuple[Any, int]] = [(schema, 0)]
    while waiting:
        value, depth = waiting.pop()
        nodes += 1
        if depth > DEPTH:
            raise ConstraintError(f"the JSON Schema is nested more than {DEPTH} deep.")
        if nodes > 4 * NODES:
            raise ConstraintError("the JSON Schema is too large; ask for less at once.")
        if isinstance(value, dict):
            if isinstance(value.get("enum"), list) and len(value["enum"]) > CHOICES:
                raise ConstraintError(f"the JSON Schema has an enum of more than {CHOICES:,} values.")
            waiting.extend((item, depth + 1) for item in value.values())
        elif isinstance(value, list):
            if len(value) > 4 * NODES:
                raise ConstraintError("the JSON Schema is too large; ask for less at once.")
            waiting.extend((item, depth + 1) for item in value)
    if len(json.dumps(schema)) > BYTES:
        raise ConstraintError(f"the JSON Schema is larger than {BYTES:,} bytes.")


class _Bounder:
    """Writes a schema anew with bounds. Where several schemas hold of one value (`open`), none of them may close it."""

    def root(self, schema: dict[str, Any]) -> dict[str, Any]:
        done: dict[str, Any] = self.node(schema, False)
        for table in ("$defs", "definitions"):
            if isinstance(schema.get(table), dict):
                done[table] = {name: self.node(item, False) for name, item in schema[table].items()}
        done["$defs"] = {**done.get("$defs", {}), **_any_values()}
        return done

    def node(self, schema: Any, open_: bool) -> Any:
        if schema is True:
            schema = {}
        if schema is False:
            return False
        if not isinstance(schema, dict):
            raise ConstraintError(f"the JSON Schema has {json.dumps(schema)[:40]} where a schema should be.")
        done = {key: item for key, item in schema.items() if key not in ABOUT and key != "x-guidance"}
        _check_form(done)
        inner = [key for key in (*WHERE, "$ref") if key in done]
        if "not" in done and done["not"] is False:
            del done["not"]
        if "const" in done or "enum" in done:
            return done
        said = [key for key in done if key not in inner]
        if not said and not inner:
            return done if open_ else {"$ref": f"#/$defs/{ANY}{ANY_DEPTH}"}
        alone = not open_ and len(inner) == (0 if said else 1) and "allOf" not in done
        for key in WHERE:
            if key in done:
                done[key] = [self.node(item, not alone) for item in done[key]]
        if inner and not said:
            return done
        return self._typed(done, open_=not alone)

    def _typed(self, done: dict[str, Any], open_: bool) -> dict[str, Any]:
        kinds = done.get("type")
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if kinds is None:
            kinds = [kind for kind, keys in OF_TYPE.items() if kind != "integer" and keys & done.keys()]
            if not kinds or (open_ and len(done) == 1):
                return done
            if len(kinds) == 1:
                done["type"] = kinds[0]
        if "object" in kinds:
            self._object(done, open_)
        if "array" in kinds:
            for key in ("items", "additionalItems"):
                if key in done and isinstance(done[key], dict | bool):
                    done[key] = self.node(done[key], open_)
            if isinstance(done.get("prefixItems"), list):
                done["prefixItems"] = [self.node(item, open_) for item in done["prefixItems"]]
            if "items" not in done and not open_:
                done["items"] = self.node({}, open_)
            least = _number(done, "minItems")
            if done.get("items") is not False:
                done.setdefault("maxItems", max(ITEMS, least))
        if "string" in kinds and "format" not in done and "pattern" not in done:
            done.setdefault("maxLength", max(CHARACTERS, _number(done, "minLength")))
        if "number" in kinds or "integer" in kinds:
            _bound_number(done, "number" in kinds)
        return done

    def _object(self, done: dict[str, Any], open_: bool) -> None:
        for key in ("properties", "patternProperties"):
            if key in done:
                done[key] = {name: self.node(item, open_) for name, item in done[key].items()}
        required = done.get("required", [])
        named = done.get("properties", {})
        if "additionalProperties" in done:
            done["additionalProperties"] = self.node(done["additionalProperties"], open_)
        elif not open_:
            loose = not named or any(name not in named for name in required)
            done["additionalProperties"] = self.node({}, open_) if loose and "patternProperties" not in done else False
        more = done.get("additionalProperties") is not False or "patternProperties" in done
        if more and named.keys() <= set(required):  # llguidance counts them only then
            most = max(ITEMS // 4, _number(done, "minProperties"), len(required))
            done.setdefault("maxProperties", len(named) + most)


def _check_form(node: dict[str, Any]) -> None:
    """Refuse keywords whose values are no JSON Schema, wherever they stand: what follows relies on them."""
    for key in WHERE:
        if key in node and (not isinstance(node[key], list) or not node[key]):
            raise ConstraintError(f"the JSON Schema has a '{key}' that is no list of schemas.")
    for key in ("properties", "patternProperties"):
        if not isinstance(node.get(key, {}), dict):
            raise ConstraintError(f"the JSON Schema has '{key}' that is no object of schemas.")
    if not isinstance(node.get("prefixItems", []), list):
        raise ConstraintError("the JSON Schema has 'prefixItems' that is no list of schemas.")
    if not _are_names(node.get("required", [])):
        raise ConstraintError("the JSON Schema has a 'required' that is no list of names.")
    kinds = node.get("type", "any")
    if not isinstance(kinds, str) and not (kinds and _are_names(kinds)):
        raise ConstraintError("the JSON Schema has a 'type' that is no name of a type.")
    for key in OF_TYPE["number"] & node.keys():
        value = node[key]
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < float("inf"):
            raise ConstraintError(f"the JSON Schema has a '{key}' that is no number.")


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _number(schema: dict[str, Any], key: str) -> int:
    value = schema.get(key, 0)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 10**6:
        raise ConstraintError(f"the JSON Schema has {key} {json.dumps(value)[:20]}, which is no size up to a million.")
    return int(value)


def _bound_number(done: dict[str, Any], fraction: bool) -> None:
    most = 10**DIGITS - 1
    lows = [done[key] for key in ("minimum", "exclusiveMinimum") if key in done]
    highs = [done[key] for key in ("maximum", "exclusiveMaximum") if key in done]
    if not lows:
        done["minimum"] = min([-most, *(high - most for high in highs)])
    if not highs:
        done["maximum"] = max([most, *(low + most for low in lows)])
    if fraction and "multipleOf" not in done and not any(0 < abs(edge) < 1000 * STEP for edge in (*lows, *highs)):
        done["multipleOf"] = STEP


def _any_values() -> dict[str, Any]:
    plain: list[dict[str, Any]] = [
        {"type": "null"}, {"type": "boolean"}, {"type": "string", "maxLength": CHARACTERS},
        {"type": "number", "minimum": -(10**DIGITS) + 1, "maximum": 10**DIGITS - 1, "multipleOf": STEP},
    ]  # fmt: skip
    values: dict[str, Any] = {f"{ANY}0": {"anyOf": plain}}
    for depth in range(1, ANY_DEPTH + 1):
        inner = {"$ref": f"#/$defs/{ANY}{depth - 1}"}
        values[f"{ANY}{depth}"] = {"anyOf": [
            *plain, {"type": "array", "items": inner, "maxItems": ITEMS},
            {"type": "object", "additionalProperties": inner, "maxProperties": ITEMS // 4},
        ]}  # fmt: skip
    return values


# --- costs -----------------------------------------------------------------------------------------------------------


def _measure(root: dict[str, Any], solve: Callable[[dict[str, Any]], bytes | None]) -> Bounded:
    """Costs of every node: the least that finishes it, by iteration, since schemas may refer to themselves."""
    nodes: list[dict[str, Any]] = []
    waiting: list[Any] = [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            _check_form(node)  # also of parts that were left as they stood
            nodes.append(node)
            waiting.extend(_parts(node))
    if len(nodes) > NODES:
        raise ConstraintError(f"the JSON Schema has more than {NODES:,} parts; ask for less at once.")
    least: Costs = {id(node): NEVER for node in nodes}
    for _ in range(CHAIN):
        changed = False
        for node in reversed(nodes):
            cost = min(_least(node, root, least), NEVER)
            if cost < least[id(node)]:
                least[id(node)], changed = cost, True
        if not changed:
            break
    else:
        raise ConstraintError(f"the JSON Schema refers to itself through more than {CHAIN} parts.")
    if least[id(root)] >= NEVER:
        raise ConstraintError("the JSON Schema has no finite answer: a part of it always holds another of its kind.")
    jumps = [_jump(node, root, least) for node in nodes]
    contents = [_content(node, root, least) for node in nodes]
    shortest = _Shortest(root, least, solve)
    parts = {shortest.of(node) for node in nodes if LONG > least[id(node)] > 8 or node is root}
    longest = sorted((text for text in parts if text), key=len, reverse=True)[:PIECES]
    whole = [text for text in [shortest.of(root)] if text]
    texts = tuple(dict.fromkeys(whole + longest))
    return Bounded(root, texts, _within(nodes, shortest), least[id(root)], max(jumps), max(contents) + 6)


def _within(nodes: list[dict[str, Any]], shortest: "_Shortest") -> tuple[bytes, ...]:
    """Ends of strings that match: where an expression may begin anywhere, every character may come next, and a search
    that tries a few of them does not find the one that leads on."""
    answers = [shortest.of(node) for node in nodes if ("pattern" in node or "format" in node) and "type" in node]
    strings = [text[1:] for text in answers if text and text[:1] == b'"']
    names = [name for node in nodes for name in node.get("patternProperties", {})]
    whole = [_json(text)[1:-1] for text in (read(name)[0] for name in names) if text]
    sources = dict.fromkeys([*(str(node["pattern"]) for node in nodes if "pattern" in node), *names])
    parts = [_json(text.decode())[1:-1] for source in sources for text in literals(source)]
    return tuple([*dict.fromkeys(strings + whole)][:PIECES] + [*dict.fromkeys(parts)][:PIECES])


def _parts(node: dict[str, Any]) -> list[Any]:
    found: list[Any] = []
    for key in ("$defs", "definitions", "properties", "patternProperties"):
        if isinstance(node.get(key), dict):
            found += node[key].values()
    for key in (*WHERE, "prefixItems"):
        if isinstance(node.get(key), list):
            found += node[key]
    return [*found, *(node[key] for key in ("items", "additionalProperties") if isinstance(node.get(key), dict))]


def _of(node: Any, least: Costs) -> int:
    if isinstance(node, dict) and id(node) not in least:
        raise ConstraintError("the JSON Schema refers to a part of it that is no schema.")
    return least[id(node)] if isinstance(node, dict) else NEVER if node is False else 4


def _target(reference: Any, root: dict[str, Any]) -> Any:
    if not isinstance(reference, str) or not reference.startswith("#"):
        where = str(reference)[:60]
        raise ConstraintError(f"the JSON Schema refers to {where}; only '#...' within it can be followed.")
    found: Any = root
    for part in reference[1:].split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and key.isascii() and key.isdigit() and int(key) < len(found):
            found = found[int(key)]
        elif isinstance(found, dict) and key in found:
            found = found[key]
        else:
            raise ConstraintError(f"the JSON Schema refers to '{reference[:60]}', which is not in it.")
    return found


def _expression(pattern: Any, least: Costs) -> int:
    """Bytes that an expression may need, read once: costs are found in many rounds."""
    text = str(pattern)
    if len(text) > PATTERN:
        raise ConstraintError(f"the JSON Schema has a pattern of more than {PATTERN:,} characters.")
    if text not in least:
        least[text] = read(text)[1]
    return least[text]


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _text(value: Any) -> int:
    return len(_json(value))


def _least(node: dict[str, Any], root: dict[str, Any], least: Costs) -> int:
    """Bytes that finish a node at most; where several schemas hold of one value, the sum of them."""
    if "const" in node:
        return _text(node["const"])
    if "enum" in node:
        if not isinstance(node["enum"], list) or not node["enum"]:
            raise ConstraintError("the JSON Schema has an 'enum' without values.")
        return min(map(_text, node["enum"]))
    total = 0
    if "$ref" in node:
        total += _of(_target(node["$ref"], root), least) + 1  # so that a reference to itself is never the shortest
    for key in ("anyOf", "oneOf"):
        if key in node:
            total += min(_of(item, least) for item in node[key])
    total += sum(_of(item, least) for item in node.get("allOf", ()))
    kinds = node.get("type")
    if kinds is not None:
        total += min(_least_of_type(kind, node, least) for kind in ([kinds] if isinstance(kinds, str) else kinds))
    elif node.keys() & OF_TYPE["object"]:
        total += _least_of_type("object", node, least)
    elif node.keys() & OF_TYPE["string"]:
        total += _least_of_type("string", node, least)
    return max(total, 1)


def _least_of_type(kind: str, node: dict[str, Any], least: Costs) -> int:
    if kind == "object":
        named = node.get("properties", {})
        required = dict.fromkeys(node.get("required", ()))
        rest = node.get("additionalProperties", True)
        cost = 2 + sum(_text(name) + 2 + _of(named.get(name, rest), least) for name in required)
        missing = _number(node, "minProperties") - len(required)
        return cost + max(missing, 0) * (_dearest(node, least) + 10)
    if kind == "array":
        first = node.get("prefixItems", [])
        count = _number(node, "minItems")
        cost = 2 + sum(_of(item, least) + 1 for item in first[:count])
        return cost + max(count - len(first), 0) * (_of(node.get("items", True), least) + 1)
    if kind == "string":
        if "pattern" in node:
            return 2 + _expression(node["pattern"], least) + _number(node, "minLength")
        return FORMAT_BYTES if "format" in node else 2 + _number(node, "minLength")
    if kind in ("number", "integer"):
        if node.get("minimum", 0) <= 0 <= node.get("maximum", 0) and not any(
            node.get(key) == 0 for key in ("exclusiveMinimum", "exclusiveMaximum")
        ):
            return 1
        edges = [value for key, value in node.items() if key in OF_TYPE["number"] and isinstance(value, int | float)]
        return 1 if not edges else max(NUMBER_BYTES, *(len(str(edge)) + DIGITS for edge in edges))
    return 5


def _dearest(node: dict[str, Any], least: Costs) -> int:
    """The most that one more property or item of a node may cost, name included."""
    named = [_text(name) + 2 + _of(item, least) for name, item in node.get("properties", {}).items()]
    others = list(node.get("patternProperties", {}).values())
    others += [node[key] for key in ("additionalProperties", "items") if key in node]
    others += node.get("prefixItems", [])
    costs = [cost for cost in (*named, *(_of(item, least) + 6 for item in others)) if cost < NEVER]
    return max(costs, default=0) + sum(_expression(name, least) for name in node.get("patternProperties", {}))


class _Shortest:
    """Writes the shortest answers; None where schemas that hold at once make that hard."""

    def __init__(self, root: dict[str, Any], least: Costs, solve: Callable[[dict[str, Any]], bytes | None]):
        self._root, self._least, self._solve = root, least, solve
        self._known: dict[int, bytes | None] = {}

    def of(self, node: Any) -> bytes | None:
        if not isinstance(node, dict) or not node:
            return b"0" if node is not False else None
        if id(node) not in self._known:
            self._known[id(node)] = self._made(node) if self._least[id(node)] < LONG else None
        return self._known[id(node)]

    def _made(self, node: dict[str, Any]) -> bytes | None:
        if "const" in node or "enum" in node:
            return min((_json(value) for value in node.get("enum", [node.get("const")])), key=len)
        inner = [key for key in (*WHERE, "$ref") if key in node]
        if len(inner) + ("type" in node) != 1 or "allOf" in node:
            return None
        if "$ref" in node:
            return self.of(_target(node["$ref"], self._root))
        if inner:
            return self.of(min(node[inner[0]], key=lambda item: _of(item, self._least)))
        kinds = [node["type"]] if isinstance(node["type"], str) else node["type"]
        kind = min(kinds, key=lambda each: _least_of_type(each, node, self._least))
        if kind == "object":
            return self._object(node)
        if kind == "array":
            first, count = node.get("prefixItems", []), _number(node, "minItems")
            items = [self.of(item) for item in first[:count]]
            items += [self.of(node.get("items", True))] * (count - len(items))
            return None if None in items else b"[" + b",".join(item or b"" for item in items) + b"]"
        if kind == "string":
            if "pattern" in node or "format" in node:
                return self._solve({key: item for key, item in node.items() if key != "type"} | {"type": "string"})
            return b'"' + b"a" * _number(node, "minLength") + b'"'
        if kind in ("number", "integer"):
            low, high = node.get("minimum", node.get("exclusiveMinimum", 0)), node.get("maximum", 0)
            return _json(0 if low <= 0 <= high else math.ceil(low) if low > 0 else math.floor(high))
        return b"null" if kind == "null" else b"true"

    def _object(self, node: dict[str, Any]) -> bytes | None:
        named, required = node.get("properties", {}), dict.fromkeys(node.get("required", ()))
        names = [*(name for name in named if name in required), *(name for name in required if name not in named)]
        items = [self.of(named.get(name, node.get("additionalProperties", True))) for name in names]
        if None in items:
            return None
        pairs = (_json(name) + b":" + (item or b"") for name, item in zip(names, items, strict=True))
        return b"{" + b",".join(pairs) + b"}"


def _jump(node: dict[str, Any], root: dict[str, Any], least: Costs) -> int:
    own = least[id(node)] if least[id(node)] < NEVER else 0
    choices = [_of(item, least) for key in ("anyOf", "oneOf") for item in node.get(key, ())]
    choices = [cost for cost in choices if cost < NEVER]
    own = 0 if node.get("properties") else own
    return max(own, *choices, _dearest(node, least), _content(node, root, least), 6)


def _content(node: dict[str, Any], root: dict[str, Any], least: Costs) -> int:
    if "const" in node:
        return _text(node["const"])
    if "enum" in node:
        return max(map(_text, node["enum"]))
    kinds = node.get("type", ())
    found = 0
    if "pattern" in node:
        found = _expression(node["pattern"], least) + _number(node, "minLength")
    elif "format" in node:
        found = FORMAT_BYTES
    if "number" in kinds or "integer" in kinds:
        found = max(found, NUMBER_BYTES)
    for key in ("additionalProperties", "patternProperties"):
        if isinstance(node.get(key), dict):
            found = max(found, min(_dearest(node, least), NEVER))
    return found
