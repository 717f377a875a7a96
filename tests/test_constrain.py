"""Constrained output: the hardest model is a random one, and what it writes is always whole, valid and in time."""

import json
import math
import re
import time
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from shrew.errors import RequestError
from shrew.runtime import schema as schemas
from shrew.runtime import tools
from shrew.runtime.constrain import ConstraintError, Grammars

PIECES = ['{"', '":', '","', '"}', '":"', "[]", "{}", "00", "12", "true", "null", "the", " the", "ab", "é", "你",
          "\\n", '"],"', "}}", "--", "e", "value", "name", "0.", ', "', "🙂", "xyz" * 5, ":::", ",,"]  # fmt: skip


@cache
def grammars(kind: str = "bytes") -> Grammars:
    """A small vocabulary, byte-level or with byte fallback: all single bytes and some longer pieces."""
    alphabet = dict(_alphabet())
    if kind == "bytes":
        words = ["<eos>", *alphabet.values(), *("".join(alphabet[byte] for byte in each.encode()) for each in PIECES)]
    else:
        words = ["<eos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefgh,:{}[]\"'0123456789-."]
        words += PIECES
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE(vocabulary, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True), AddedToken("<|tool|>", special=True)])
    size = tokenizer.get_vocab_size()
    return Grammars(tokenizer, size + 5, [0])  # a model may have more outputs than its tokenizer has tokens


def _alphabet() -> list[tuple[int, str]]:
    """GPT-2's letters for bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [*((byte, chr(byte)) for byte in plain), *((byte, chr(256 + at)) for at, byte in enumerate(others))]


@pytest.mark.parametrize("grammar", ['start: "a" start', 'start: "a" b\nb: "c" b'])
def test_a_grammar_whose_texts_never_end_is_refused(grammar: str) -> None:
    with pytest.raises(ConstraintError, match="no end that could be found"):
        grammars().lark(grammar, 10)


def walk(held: Any, most: int, seed: int, among: Grammars) -> str:
    """The text of tokens drawn evenly from all that are allowed."""
    draw, tokens = np.random.default_rng(seed), []
    while not held.finished and len(tokens) < most:
        mask = held.mask(most - len(tokens))
        assert mask.shape == (among.vocabulary,) and mask.any(), tokens
        token = int(draw.choice(np.flatnonzero(mask)))
        held.advance(token)
        tokens.append(token)
    text = b"".join(among.texts[token] for token in tokens)
    return text.decode("utf-8")


# --- schemas ---------------------------------------------------------------------------------------------------------


def fits(value: Any, schema: Any, root: Any) -> bool:
    """JSON Schema as far as these tests use it, the slow and plain way."""
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema:
        return any(fits(value, each, root) for each in schema["anyOf"])
    if "enum" in schema:
        return any(value == each and type(value) is type(each) for each in schema["enum"])
    kind = schema.get("type")
    if kind == "object":
        named, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
        return isinstance(value, dict) and all(name in value for name in schema.get("required", ())) and all(
            fits(item, named[name], root) if name in named else rest is not False and (rest is True or
            fits(item, rest, root)) for name, item in value.items())  # fmt: skip
    if kind == "array":
        return (isinstance(value, list) and schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf)
                and all(fits(item, schema.get("items", {}), root) for item in value))  # fmt: skip
    if kind == "string":
        return (isinstance(value, str) and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", math.inf)
                and re.search(schema.get("pattern", ""), value) is not None)  # fmt: skip
    if kind == "integer":
        return isinstance(value, int) and not isinstance(value, bool) and _within(value, schema)
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool) and _within(value, schema)
    return kind is None or (value is None if kind == "null" else isinstance(value, bool))


def _within(value: float, schema: Any) -> bool:
    return schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf)


@st.composite
def _ranges(draw: Any, kind: str) -> dict[str, Any]:
    low, size = draw(st.integers(-1000, 1000)), draw(st.integers(1, 5000))
    return {"type": kind, **draw(st.sampled_from([{}, {"minimum": low}, {"maximum": low},
                                                  {"minimum": low, "maximum": low + size}]))}  # fmt: skip


@st.composite
def _lengths(draw: Any) -> dict[str, Any]:
    least, more = draw(st.integers(0, 6)), draw(st.integers(0, 9))
    return {"type": "string", **draw(st.sampled_from([{}, {"minLength": least}, {"maxLength": more},
                                                      {"minLength": least, "maxLength": least + more}]))}  # fmt: skip


PATTERNS = ["^[a-z]+$", "^[A-Z]{3}-[0-9]{4}$", "^(yes|no|a rather long way to say it)$", "^a*b{5}c?$", "x",
            "^([a-z]{2}[0-9]{12}|[a-z]{3})$"]  # fmt: skip
JSON_VALUES = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.text(max_size=12))
LEAVES = st.one_of(
    st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"type": "number"}, {"type": "integer"}, {}]),
    _ranges("integer"), _ranges("number"), _lengths(),
    st.sampled_from(PATTERNS).map(lambda pattern: {"type": "string", "pattern": pattern}),
    st.lists(JSON_VALUES, min_size=1, max_size=5).map(lambda values: {"enum": values}),
)  # fmt: skip
NAMES = st.text(st.sampled_from('ab"é \\_{'), min_size=1, max_size=6)


def _objects(inner: Any) -> Any:
    @st.composite
    def made(draw: Any) -> dict[str, Any]:
        named = draw(st.dictionaries(NAMES, inner, max_size=4))
        required = [name for name in named if draw(st.booleans())]
        rest = draw(st.sampled_from([{}, False, {"type": "integer"}]))
        more = {} if rest == {} else {"additionalProperties": rest}
        return {"type": "object", "properties": named, "required": required, **more}

    return made()


def _arrays(inner: Any) -> Any:
    @st.composite
    def made(draw: Any) -> dict[str, Any]:
        least = draw(st.integers(0, 3))
        most = draw(st.sampled_from([{}, {"maxItems": least + draw(st.integers(0, 4))}]))
        return {"type": "array", "items": draw(inner), "minItems": least, **most}

    return made()


SCHEMAS = st.recursive(LEAVES, lambda inner: st.one_of(
    _objects(inner), _arrays(inner), st.lists(inner, min_size=1, max_size=3).map(lambda each: {"anyOf": each}),
), max_leaves=8)  # fmt: skip
TREE = {"$defs": {"tree": {"type": "object", "properties": {
    "name": {"type": "string"}, "left": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
    "more": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}, "required": ["name", "left"]}},
    "$ref": "#/$defs/tree"}  # fmt: skip


@settings(max_examples=150, derandomize=True)  # the space is endless: widen it by hand
@given(SCHEMAS, st.integers(0, 9), st.sampled_from(["bytes", "fallback"]), st.sampled_from([0, 1, 3, 10, 60, 250]))
@example(TREE, 0, "bytes", 0)
@example(TREE, 1, "bytes", 40)
@example(TREE, 2, "fallback", 250)
@example({"type": "array", "minItems": 1, "items": {"anyOf": [{"type": "integer", "maximum": -226},
                                                              {"type": "string", "pattern": "x"}]}}, 1, "bytes", 250)
def test_any_walk_within_the_budget_is_whole_and_valid(schema: Any, seed: int, kind: str, spare: int) -> None:
    among = grammars(kind)
    least = among.json_schema(schema, 10_000).needs
    text = walk(among.json_schema(schema, least + spare), least + spare, seed, among)
    assert fits(json.loads(text), schema, schema), text
    assert text == json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":")) or any(
        mark in text for mark in ("\\", ".", "-0"))  # compact, as far as JSON has one way to write it
    if least > 1:
        with pytest.raises(ConstraintError, match=f"takes {least} tokens, and max_tokens is {least - 1}"):
            among.json_schema(schema, least - 1)


STRINGS = {"x": "x", "word": "zebra", "digits": "[0-9]{3}-[0-9]{4}", "end": "^q.*(zebra|yak)w{3}$",
           "escaped": 'z"\\\\\\n', "wide": "你好"}  # fmt: skip


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
@pytest.mark.parametrize("name", STRINGS)
def test_a_string_that_may_match_anywhere_is_brought_to_its_end(name: str, kind: str) -> None:
    """Also where another, shorter answer closed the text before the string was begun, and where what would have closed
    it was written in part and then left."""
    among, string = grammars(kind), {"type": "string", "pattern": STRINGS[name]}
    either = {"anyOf": [{"type": "integer", "maximum": -226}, string]}
    for schema in (string, {"type": "array", "items": either, "minItems": 1},
                   {"type": "object", "properties": {"a": either}, "required": ["a"]}):  # fmt: skip
        least = among.json_schema(schema, 10_000).needs
        for seed in range(4):
            text = walk(among.json_schema(schema, least + 60), least + 60, seed, among)
            assert fits(json.loads(text), schema, schema), text


def test_a_name_that_may_match_anywhere_is_brought_to_its_end() -> None:
    among = grammars()
    schema = {"type": "object", "patternProperties": {"zebra": {"type": "integer"}}, "additionalProperties": False}
    for seed in range(30):
        found = json.loads(walk(among.json_schema(schema, 80), 80, seed, among))
        assert all("zebra" in name and isinstance(value, int) for name, value in found.items())


def test_an_end_that_is_not_found_is_said() -> None:
    """And no token is put forward that the grammar forbids."""
    among = grammars()
    schema = {"anyOf": [{"type": "null"}, {"type": "string", "pattern": r"[\p{Greek}&&[^αβ]]{9}"}]}
    held = among.json_schema(schema, 45)
    held.advance(among.single[b'"'])
    with pytest.raises(ConstraintError, match="no end of the text was found"):
        for left in range(44, 0, -1):
            assert held.mask(left)[among.single[b"."]]
            held.advance(among.single[b"."])


@pytest.mark.parametrize("most", [2, 5, 30, 200])
def test_any_json_object(most: int) -> None:
    for seed in range(5):
        among = grammars()
        assert isinstance(json.loads(walk(among.json_object(most), most, seed, among)), dict)


@pytest.mark.parametrize(
    "pattern",
    ["[a-z]+@[a-z]+[.](com|org)", "(a|aa|aaa)*b{30}", "((a*)*)*b", "(?:[01]?[0-9]|2[0-3]):[0-5][0-9]", ".*",
     "é|你好", "a.*b.*[^c]", r"\d{3}-\w\x41?(?P<n>xyz){2,3}", "(yes|a very long way to say no)",
     "([a-z]{5}[0-9]{40}|[a-z]{6}x)"],
)  # fmt: skip
def test_regular_expressions(pattern: str) -> None:
    among = grammars()
    least = among.regex(pattern, 10_000).needs
    for seed, spare in enumerate([0, 1, 5, 30, 100]):
        text = walk(among.regex(pattern, least + spare), least + spare, seed, among)
        assert re.fullmatch(pattern, text), text


def test_grammars_in_larks_notation() -> None:
    among = grammars()
    text = 'start: sum\nsum: term ("+" term)*\nterm: NUMBER | "(" sum ")"\nNUMBER: /[0-9]+/\n'
    for seed, most in enumerate([2, 3, 10, 40, 120]):
        found = walk(among.lark(text, most), most, seed, among)
        assert isinstance(eval(re.sub(r"\b0+(?=\d)", "", found)), int), found


def test_choices() -> None:
    among, options = grammars(), ["yes", "no", 'it "depends"', "yes and no", "naïve 🙂"]
    found = {walk(among.choice(options, 40), 40, seed, among) for seed in range(40)}
    assert found <= set(options) and len(found) > 2
    assert walk(among.choice(["one"], 3), 3, 0, among) == "one"


def test_special_tokens_never_stand_in_the_text() -> None:
    """Not even where every text is allowed, or their own letters are."""
    among = grammars()
    special = among.texts.index(b"") if b"" in among.texts[1:] else -1
    assert special >= 0
    for held in (among.regex(".*", 50), among.regex("<eos>x", 50)):
        mask = held.mask(50)
        assert mask is not None and not any(mask[at] for at in range(1, among.vocabulary) if not among.texts[at])


def test_the_end_token_comes_only_at_the_end() -> None:
    among = grammars()
    held = among.regex("ab+", 50)
    assert not held.mask(50)[0]
    held.advance(among.single[b"a"])
    with pytest.raises(RequestError, match="token 0 is not allowed"):
        held.advance(0)
    held.advance(among.single[b"b"])
    assert held.mask(50)[0] and not held.finished
    held.advance(0)
    assert held.finished and np.flatnonzero(held.mask(10)).tolist() == [0]


@pytest.mark.parametrize("token", [-1, 10**6, 0])
def test_a_token_that_is_not_allowed_is_refused(token: int) -> None:
    among = grammars()
    held = among.json_object(50)
    with pytest.raises(RequestError, match="not allowed"):
        held.advance(token)


def test_the_same_request_gives_the_same_masks() -> None:
    among = grammars()
    texts = {walk(among.json_schema(TREE, 80), 80, 3, among) for _ in range(3)}
    assert len(texts) == 1


# --- calls of tools --------------------------------------------------------------------------------------------------

TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": {
        "type": "object", "properties": {"at": {"type": "string"}, "far": {"type": "boolean"}}, "required": ["at"]}}},
    {"type": "function", "function": {"name": "wait"}},
    {"type": "function", "function": {"name": "grow", "parameters": TREE}},
]  # fmt: skip


@pytest.mark.parametrize("form", tools.FORMS)
@pytest.mark.parametrize("name", [None, "look", "wait"])
def test_a_demanded_call_is_one_and_is_found(form: str, name: str | None) -> None:
    among = grammars()
    for seed in range(6):
        most = among.tool_call(TOOLS, form, 10_000, name).needs + 40 * seed
        text = walk(among.tool_call(TOOLS, form, most, name), most, seed, among)
        parser = tools.Parser(form, TOOLS)
        calls = (*parser.feed(text).calls, *parser.finish().calls)
        assert len(calls) == 1 and (name is None or calls[0].name == name)
        schema = tools.functions(TOOLS)[calls[0].name]
        assert fits(json.loads(calls[0].arguments), schema, schema)


# --- what is refused -------------------------------------------------------------------------------------------------


def _deep(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def _chain(length: int) -> dict[str, Any]:
    links = {f"d{at}": {"type": "array", "items": {"$ref": f"#/$defs/d{at + 1}"}, "minItems": 9}
             for at in range(length)}  # fmt: skip
    return {"$defs": {**links, f"d{length}": {"type": "null"}}, "$ref": "#/$defs/d0"}


REFUSED = {
    "no object": ([1], "is no object"),
    "false": (False, "is no object"),
    "type": ({"type": "foo"}, "Invalid type: foo"),
    "types": ({"type": 3}, "is no name of a type"),
    "deep": (_deep(100), "nested more than"),
    "very deep": (_deep(900), "nested more than|is no JSON"),
    "wide": ({"properties": {f"p{at}": {"type": "integer"} for at in range(9000)}}, "too large|more than|larger than"),
    "huge enum": ({"enum": [*range(99_999)]}, "more than 5,000 values"),
    "long": ({"const": "x" * 300_000}, "larger than"),
    "loop": ({"$ref": "#"}, "no finite answer"),
    "two loops": ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
                  "no finite answer"),
    "always another": ({"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]}, "no finite answer"),
    "exponential": (_chain(30), "no finite answer|repeats too much"),
    "long chain": (_chain(3000), "too large|through more than|larger than"),
    "elsewhere": ({"$ref": "http://example.org/schema"}, "only '#...' within it"),
    "nowhere": ({"$ref": "#/$defs/missing"}, "which is not in it"),
    "not": ({"not": {"type": "string"}}, 'Unimplemented keys: \\["not"\\]'),
    "look ahead": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "bad pattern": ({"type": "string", "pattern": "("}, "cannot be used"),
    "no number": ({"type": "integer", "minimum": 5, "maximum": 4}, "cannot be used|no text fits"),
    "negative": ({"type": "string", "minLength": -1}, "minLength -1"),
    "long array": ({"type": "array", "minItems": 10**9}, "minItems 1000000000"),
    "empty enum": ({"enum": []}, "without values"),
    "empty union": ({"anyOf": []}, "no list of schemas"),
    "required": ({"type": "object", "required": "a"}, "no list of names"),
    "prefix items": ({"type": "array", "prefixItems": 5}, "no list of schemas"),
    "of another type": ({"type": "string", "properties": 5}, "no object of schemas"),
    "beside an enum": ({"enum": [1], "anyOf": 5}, "no list of schemas"),
    "within an enum": ({"enum": [1], "items": {"type": []}}, "no name of a type"),
    "no types": ({"type": []}, "no name of a type"),
    "no number in a part": ({"allOf": [{"items": {"minimum": "a"}}]}, "no number"),
    "refers to a table": ({"type": "object", "properties": {"a": {"$ref": "#/properties"}}, "required": ["a"]},
                          "no schema"),
    "superscript": ({"anyOf": [{"$ref": "#/anyOf/\u00b2"}]}, "which is not in it"),
    "long pattern": ({"type": "string", "pattern": "a" * 20_000}, "more than 10,000"),
    "impossible": ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "no finite answer"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_schemas_that_are_refused(case: str) -> None:
    schema, words = REFUSED[case]
    with pytest.raises(ConstraintError, match=words) as caught:
        grammars().json_schema(schema, 1000)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("pattern", "words"),
    [("(", "unclosed group"), ("(a{1000}){1000}", "repeats too much"), ("a" * 20_000, "longer than"),
     (r"(a)\1", "cannot be used"), ("((a{99}){99}){99}", "repeats too much"),
     ("[^\\s\\S]", "no text fits|cannot|no end")],
)  # fmt: skip
def test_expressions_that_are_refused(pattern: str, words: str) -> None:
    with pytest.raises(ConstraintError, match=words):
        grammars().regex(pattern, 1000)


@pytest.mark.parametrize(
    "expression", ["[" * 60_000, "[[:a" * 15_000, "(" * 8000 + "a{4000}" * 5000 + ")a" * 8000, "[\\]" * 20_000]
)  # fmt: skip
def test_no_expression_takes_long_to_read(expression: str) -> None:
    begun = time.process_time()
    with pytest.raises(ConstraintError):
        grammars().lark(f"start: /{expression}/", 1000)
    assert time.process_time() - begun < 5


def test_patterns_are_read_once() -> None:
    """Though the cost of each part is found again for every link of a chain."""
    links = {f"d{at}": {"$ref": f"#/$defs/d{at + 1}"} for at in range(90)}
    patterns = {f"p{at}": {"type": "string", "pattern": f"a{at}" * 2000} for at in range(10)}
    begun = time.process_time()
    with pytest.raises(ConstraintError):
        schemas.bound({"$defs": {**links, "d90": {"const": 1}, **patterns}, "$ref": "#/$defs/missing"}, lambda _: None)
    schemas.bound({"$defs": {**links, "d90": {"const": 1}, **patterns}, "$ref": "#/$defs/d0"}, lambda _: None)
    assert time.process_time() - begun < 2


@pytest.mark.parametrize(
    ("grammar", "words"),
    [("", "cannot be used"), ("nothing", "cannot be used"), ('start: start "a"', "no text fits|no end"),
     ("x" * 200_000, "longer than"), ("start: missing", "cannot be used")],
)  # fmt: skip
def test_grammars_that_are_refused(grammar: str, words: str) -> None:
    with pytest.raises(ConstraintError, match=words):
        grammars().lark(grammar, 1000)


@pytest.mark.parametrize("options", [[], [""], ["x"] * 6000])
def test_choices_that_are_refused(options: list[str]) -> None:
    with pytest.raises(ConstraintError):
        grammars().choice(options, 1000)


def test_a_model_without_an_end_is_refused() -> None:
    with pytest.raises(ConstraintError, match="no end token"):
        Grammars(Tokenizer(models.BPE({"a": 0}, [])), 1, [])


@settings(max_examples=60)
@given(st.recursive(JSON_VALUES | st.integers() | st.floats(), lambda inner: st.one_of(
    st.lists(inner, max_size=4),
    st.dictionaries(st.sampled_from(["type", "properties", "items", "enum", "anyOf", "allOf", "required", "minItems",
                                     "pattern", "minimum", "$ref", "$defs", "additionalProperties", "maxLength"]),
                    inner, max_size=4)), max_leaves=10))  # fmt: skip
def test_no_json_makes_it_fail(schema: Any) -> None:
    """Whatever stands where a schema should be: a constraint or a sentence."""
    among = grammars()
    try:
        held = among.json_schema(schema, 200)
    except ConstraintError as error:
        assert "\n" not in str(error)
    else:
        json.loads(walk(held, 200, 0, among))
