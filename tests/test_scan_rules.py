"""Rules: what each reports and leaves alone, the queries against tree-sitter's own, hostile rules and hostile code."""

import re
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_sitter import Query, QueryCursor

from shrew.errors import SpecError
from shrew.scan.cwe import SEVERITIES, TABLE, weakness
from shrew.scan.functions import LANGUAGES, Source, parse
from shrew.scan.rules import Finding, Rules, expressions, load_rules, query
from shrew.scan.rules.query import Steps

ROOT = Path(__file__).parents[1]
EXAMPLES: dict[str, dict[str, str]] = tomllib.loads((ROOT / "tests" / "rule_examples.toml").read_text("utf-8"))
RULES = load_rules()
SHIPPED = {stated.written.id: stated.written for stated in RULES.own}


def source(text: str, language: str = "python") -> Source:
    return Source("a/b", language, text.encode(), text)


def found(text: str, language: str = "python", rules: Rules = RULES) -> list[Finding]:
    code = source(text, language)
    return rules.match(code, parse(code))


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text, "utf-8")
    return path


def rule(**keys: Any) -> str:
    """A rule file with one rule, sound but for `keys`; a key of None is left out."""
    values = {"id": "mine", "languages": ["python"], "cwe": "CWE-1", "severity": "low", "message": "m", "origin": "o",
              "calls": ["f"]} | keys  # fmt: skip
    lines = [f"{key} = {value!r}" for key, value in values.items() if value is not None]
    return "[[rule]]\n" + "\n".join(lines).replace("True", "true")


# --- the rules that ship ---------------------------------------------------------------------------------------------


def test_every_rule_has_an_example_an_origin_and_a_known_weakness() -> None:
    assert set(EXAMPLES) == set(SHIPPED)
    for written in SHIPPED.values():
        assert re.search(r"CWE-\d+|CERT", written.origin), written.id
        assert weakness(written.cwe).number, f"{written.id}: {written.cwe} is not among the {len(TABLE)} known"


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_a_rule_reports_its_bad_example_and_not_the_good_one(name: str) -> None:
    for language in SHIPPED[name].languages:
        for kind, text in EXAMPLES[name].items():
            code = source(text, language)
            assert not parse(code).root_node.has_error, (language, kind)
            hits = [item for item in RULES.match(code, parse(code)) if item.rule == name]
            assert bool(hits) is (kind == "bad"), (language, kind)


def test_a_finding_says_where_and_what() -> None:
    text = "import os\n\n\ndef f(name):\n    é = 'é'; os.system(\n        'rm ' + name)\n"
    assert found(text) == [
        Finding("python-os-system", "CWE-78", "high", SHIPPED["python-os-system"].message, "a/b", 5, 6, 14)
    ]


def test_the_worst_of_one_weakness_in_one_place_is_told() -> None:
    hits = found('def f(request, c):\n    c.execute("SELECT " + request.GET["a"])\n')
    assert [item.rule for item in hits] == ["python-sql-built-outside"]
    assert SEVERITIES == ("low", "medium", "high")


@pytest.mark.parametrize(
    ("lines", "hit"),
    [
        ("q = f'select {n}'", True),
        ("q = f'select {n}'\nq = 'select 1'", False),  # overwritten
        ("q = 'select 1'\nif n:\n    q = f'select {n}'", True),  # on one way
        ("q = 'select 1'\nq += ' where a = ' + n", True),
        ("parts = ['select 1']\nparts.append('where a = ' + n)\nq = ' '.join(parts)", True),
        ("m = n\nq = 'select %s' % m", True),
        ("q = 'select %d' % n", False),
        ("n = int(n)\nq = 'select %s' % n", False),
        ("q = 'select {}'.format(n)", True),
        ("q = 'select ' + TABLE", False),  # by its case a constant
        ("q, r = 'select 1', f'select {n}'", False),
        ("r, q = 'select 1', f'select {n}'", True),
        ("with f'select {n}' as q:\n    pass", True),
        ("q = (f'select {n}' if n else 'select 1')", True),
        ("q = 'select ' + ', '.join(['?'] * 3)", False),
    ],
)
def test_values_are_followed_by_name(lines: str, hit: bool) -> None:
    body = "\n".join("    " + line for line in lines.splitlines())
    assert bool(found(f"def f(c, n):\n{body}\n    c.execute(q)\n")) is hit


@pytest.mark.parametrize(
    ("call", "cwe"),
    [
        ("pickle.loads(request.data)", "CWE-502"),
        ("pickle.loads(flask.request.data)", "CWE-502"),
        ("pickle.loads(base64.b64decode(request.cookies['cart']))", "CWE-502"),
        ("pickle.load(request.files['f'])", "CWE-502"),
        ("yaml.load(request.data)", "CWE-502"),
        ("yaml.load(request.data, Loader=yaml.Loader)", "CWE-502"),
        ("yaml.safe_load(request.data)", ""),
        ("json.loads(request.data)", ""),
        ("pickle.loads(BUILT_IN)", ""),
        ("db.execute(request.args['q'])", "CWE-89"),
        ("db.execute(request.args.get('q', ''))", "CWE-89"),
        ("db.execute(flask.request.values['q'] + ' limit 10')", "CWE-89"),
        ("cursor.execute(request.form['q'])", "CWE-89"),
        ("sqlite3.connect('a').execute(request.form['q'])", "CWE-89"),
        ("connection.cursor().execute(request.form['q'])", "CWE-89"),
        ("db.session.execute(text(request.form['q']))", "CWE-89"),
        ("db.session.execute(text('SELECT ' + request.form['q']))", "CWE-89"),
        ("cursor.execute(QUERIES[request.form['q']])", ""),
        ("cursor.execute('SELECT 1 WHERE a = ?', [request.form['q']])", ""),
        ("cursor.execute('SELECT %d' % int(request.form['q']))", ""),
        ("schema.execute(request.json['query'])", ""),
        ("db.session.execute(select(T).where(T.a == request.form['q']))", ""),
        ("db.execute(sql.SQL('SELECT {}').format(sql.Identifier(request.form['q'])))", ""),
        ("Markup(request.args['a'])", "CWE-79"),
        ("Markup('<b>' + request.args['a'])", "CWE-79"),
        ("Markup('<b>' + escape(request.args['a']))", ""),
        ("lxml.etree.fromstring(request.data)", "CWE-611"),
        ("ldap.search_s('dc=a', 2, '(uid=' + request.args['a'] + ')')", "CWE-90"),
        ("ssh.exec_command('ls ' + request.args['a'])", "CWE-78"),
    ],
)
def test_what_a_request_brings_is_from_outside_also_where_the_request_is_imported(call: str, cwe: str) -> None:
    head = "import base64, flask, json, lxml.etree, pickle, sqlite3, yaml\nfrom flask import request\n"
    head += "from markupsafe import Markup, escape\nfrom psycopg2 import sql\nfrom sqlalchemy import select, text\n"
    assert {item.cwe for item in found(f"{head}def f():\n    return {call}\n")} == {cwe} - {""}


HANDLER = "class A({}):\n    {}def {}(self, n):\n        return open(n)\n"


@pytest.mark.parametrize(
    ("text", "serves"),
    [
        ("@app.get('/x')\ndef f(n):\n    return open(n)\n", True),
        ("@get('/x')\ndef f(n):\n    return open(n)\n", True),
        ("@cherrypy.expose\ndef f(n):\n    return open(n)\n", True),
        ("@app.listener('x')\ndef f(n):\n    return open(n)\n", False),
        ("def f(request, n):\n    return open(n)\n", True),
        (HANDLER.format("web.RequestHandler", "", "get"), True),
        (HANDLER.format("Base, Resource", "@login\n    ", "post"), True),
        (HANDLER.format("web.RequestHandler", "", "prepare"), False),
        (HANDLER.format("HandlerTable", "", "get"), False),
        (HANDLER.format("", "", "get"), False),
        ("def get(self, n):\n    return open(n)\n", False),
    ],
)
def test_what_answers_requests_gets_data_from_outside(text: str, serves: bool) -> None:
    assert ("python-path-outside" in [item.rule for item in found(text)]) is serves


def test_names_are_followed_through_imports() -> None:
    calls = {
        "import pickle as p": "p.loads(x)",
        "from pickle import loads": "loads(x)",
        "from pickle import loads as l": "l(x)",
        "import os.path, pickle": "pickle.loads(x)",
    }
    for line, call in calls.items():
        assert [item.cwe for item in found(f"{line}\ndef f(x):\n    return {call}\n")] == ["CWE-502"], line
    assert found("from mine import loads\ndef f(x):\n    return loads(x)\n") == []


def test_a_large_file_gives_what_a_small_one_does() -> None:
    text = "import os\ndef f(x):\n    os.system('rm ' + x)\n"
    large = found(text + "# " + "x" * 200_000 + "\n")
    assert large == found(text) and large


FORMS = ["''.join()", "fetch()", "(yield)", "[]", "f''", "not x", "lambda: x", "x if x else y", "*x"]


@pytest.mark.parametrize("call", FORMS)
def test_a_value_of_any_form_is_looked_at(call: str) -> None:
    assert found(f"def f(c):\n    c.execute({call})\n    c.execute()\n") == []


def test_broken_code_is_matched_as_far_as_it_goes() -> None:
    text = "def f(x):\n    return x +* 3\n\ndef g(y):\n    eval(y)\n)("
    assert [item.rule for item in found(text)] == ["python-eval"]


def test_planted_bugs_are_as_their_card_says() -> None:
    cases = [
        case | {"cwe": page["cwe"]}
        for path in sorted((ROOT / "benchmarks" / "planted").glob("*.toml"))
        for page in [tomllib.loads(path.read_text("utf-8"))]
        for case in page["case"]
    ]
    assert len({case["cwe"] for case in cases}) == 15
    assert sum(case["language"] == "python" for case in cases) == 36
    assert len({case["id"] for case in cases}) == len(cases) == 60
    for case in cases:
        lines = case["vulnerable"].splitlines()
        assert 5 <= len(lines) <= 40 and case["vulnerable"] != case["fixed"], case["id"]
        assert case["lines"] and all(lines[line - 1].strip() for line in case["lines"]), case["id"]
        for kind in ("vulnerable", "fixed"):
            code = source(case[kind], case["language"])
            assert not parse(code).root_node.has_error, case["id"]


# --- rules of one's own ----------------------------------------------------------------------------------------------


def test_rules_of_ones_own_stand_beside_those_that_ship(tmp_path: Path) -> None:
    text = '[lists]\nbad = ["danger", "*.risk"]\n' + rule(calls=["@bad"], where=None)
    rules = load_rules([written(tmp_path, text)])
    assert len(rules) == len(RULES) + 1
    assert [(item.rule, item.start) for item in found("danger()\na.b().risk()\neval(x)\n", rules=rules)] == [
        ("mine", 1), ("mine", 2), ("python-eval-unknown", 3)
    ]  # fmt: skip


HOSTILE = {
    "rule = 3": "mine.toml: 'rule' is no list",
    "wrong = 3": "mine.toml: unknown key 'wrong'",
    "lists = 3": "'lists' holds names",
    "[[rule": "no readable TOML",
    "\x00": "no readable TOML",
    rule(severity="bad"): "mine.toml: rule 'mine': severity",
    rule(message=None): "rule 'mine': Object missing required field message",
    rule(mesage="m"): "rule 'mine': unknown key 'mesage'; did you mean 'message'?",
    rule(id="Not An Id"): "rule 'Not An Id': id",
    rule(id=3): "rule 1: id: Expected str",
    rule(id="python-eval"): "another rule has this name",
    rule() + "\n" + rule(): "two rules are called 'mine'",
    rule(languages=["cobol"]): "unknown language 'cobol'",
    rule(languages=[]): "languages",
    rule(cwe="89"): "cwe",
    rule(calls=["a b(c)*"]): "is no name",
    rule(calls=["@none"]): "'@none' stands for a list of names, but .* 'none'; this file has no table \\[lists\\]",
    "[lists]\nnine = ['f']\n" + rule(calls=["@none"]): "did you mean 'nine'",
    rule(calls=None): "give calls, or query, or first and then",
    rule(query="(call)"): "give calls, or query, or first and then",
    rule(calls=None, first="(call) @name"): "give calls, or query, or first and then",
    rule(calls=None, query="(call"): "query for python: the query ends too early",
    rule(calls=None, query="(cal)"): "query for python: there is no node 'cal'",
    rule(calls=None, query="(call fun: (_))"): "there is no field 'fun'",
    rule(calls=None, query="(_ (_) @a (_) @b)"): "say of which kind the outermost one is",
    rule(calls=None, query='"+"'): "say of which kind the outermost one is",
    rule(calls=None, query="(call)*"): "the query has '*'",
    rule(calls=None, query="(call) (call)"): "more than one pattern",
    rule(calls=None, query="(" * 50 + "call"): "stands where a node should|no node|ends too early|nested|predicates",
    rule(calls=None, query="(call " + "(_ " * 40 + ")" * 41): "nested more than",
    rule(calls=None, query='((call) @a (#match? @a "(x+x+)+y"))'): "what is repeated holds repetitions",
    rule(calls=None, query='((call) @a (#odd? @a "x"))'): "#odd\\? is not known",
    rule(calls=None, query='((call) (#eq? @a "x"))'): "@a, which is not captured",
    rule(calls=None, first="(call)", then="(call) @name"): "first for python: @name is not captured",
    rule(where=[]) + '\nunless = ["(cal)"]': "unless for python: there is no node 'cal'",
    rule() + '\nwhere = [{ argument = 0, says = "(a|aa)+" }]': "what is repeated holds",
    rule() + '\nwhere = [{ argument = 0, says = "(" }]': "no regular expression",
    rule() + '\nwhere = [{ argument = 0, says = "' + "a?" * 60 + '" }]': "may take very long",
    rule() + '\nwhere = [{ argument = 0, matches = "(a)\\\\1" }]': "looks around or back",
    rule() + '\nwhere = [{ argument = 0, matches = "' + "a" * 999 + "b" * 99 + '" }]': "length",
    rule() + "\nwhere = [{ argument = 0 }]": "say what must hold",
    rule() + "\nwhere = [{ missing = true }]": "say which argument",
    rule() + "\nwhere = [{ argument = -1, missing = true }]": "argument",
    rule() + '\nwhere = [{ argument = 0, labels = ["tainted"] }]': "labels",
    rule() + "\nwhere = 3": "where",
    rule(calls=None, query="(call) @c") + '\nwhere = [{ capture = "d", matches = "x" }]': "@d is not captured",
    rule() + '\nwhere = [{ capture = "d", matches = "x" }]': "of a query, give a capture",
    "a = " + "[" * 5000 + "]" * 5000: "nested too deep|no readable TOML",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_rule_file_is_refused_in_a_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(SpecError, match=HOSTILE[text]) as caught:
        load_rules([written(tmp_path, text)])
    assert "mine.toml" in str(caught.value)
    assert "\n" not in str(caught.value) or "readable TOML" in str(caught.value)


def test_files_that_are_too_large_or_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="larger than 1 MB"):
        load_rules([written(tmp_path, "#" * (1 << 20) + "\n")])
    with pytest.raises(SpecError, match="more than 1000"):
        load_rules([written(tmp_path, "[[rule]]\n" * 1001)])
    with pytest.raises(SpecError, match="no such file"):
        load_rules([tmp_path / "none.toml"])


def test_a_rule_that_tries_for_ever_is_stopped_and_told(tmp_path: Path) -> None:
    steps = "(block " + " ".join(f"(_) @a{i}" for i in range(12)) + ")"
    rules = load_rules([written(tmp_path, rule(calls=None, query=f"({steps} (#eq? @a0 @a1))"))])
    code = source("def f(a):\n" + "".join(f"    g({i})\n" for i in range(3000)) + "    eval(a)\n")
    skipped: list[tuple[str, str]] = []
    begun = time.perf_counter()
    hits = rules.match(code, parse(code), skipped)
    assert time.perf_counter() - begun < 60
    assert [item.rule for item in hits] == ["python-eval"]  # ours are not stopped by theirs
    assert len(skipped) == 1 and skipped[0][0] == "a/b" and "rules of your files stopped" in skipped[0][1]


def test_code_made_to_be_slow_is_not(tmp_path: Path) -> None:
    steps = [f"    a{i + 1} = a{i} + a{i} + 'x'\n    c.execute(a{i + 1})\n" for i in range(500)]
    many = "def f(c, a0):\n" + "".join(steps)
    deep = "def f(c, x):\n    c.execute(" + "(" * 3000 + "x" + ")" * 3000 + ")\n"
    long = "def f(c, x):\n    c.execute('select' + " + " + ".join(["x"] * 3000) + ")\n"
    same = "def f(c, x):\n" + "    x = x + 'select'\n    c.execute(x)\n" * 400
    nested = "".join(" " * i + f"def f{i}(x):\n" for i in range(400)) + " " * 400 + "eval(x)\n"
    for text in (deep, long, many, same, nested):
        begun = time.perf_counter()
        found(text)
        assert time.perf_counter() - begun < 20, text[:40]


# --- queries and expressions -----------------------------------------------------------------------------------------

QUERIES = [
    "(call)  @a",
    "(call function: (identifier) @f) @a",
    "(call function: [(identifier) (attribute)] @f arguments: (argument_list . (_) @first))",
    "(call arguments: (argument_list (_) @last .))",
    "(argument_list (string) @s . (identifier) @n)",
    '(binary_operator left: (_) @l operator: "+" right: (string) @r)',
    '(binary_operator operator: ["+" "%"] @o)',
    "(function_definition !return_type name: (identifier) @n)",
    "(typed_parameter (identifier) @p)",
    '((call function: (identifier) @f) (#any-of? @f "len" "sorted"))',
    '((call function: (identifier) @f) (#not-eq? @f "len"))',
    '((attribute object: (_) @o attribute: (_) @t) (#match? @t "^[a-f]"))',
    "((assignment left: (identifier) @l right: (identifier) @r) (#eq? @l @r))",
    "(assert_statement (comparison_operator (_) @left . (_) @right))",
]


@pytest.mark.parametrize("text", QUERIES)
def test_queries_find_what_tree_sitter_finds(text: str) -> None:
    code = source(Path(__file__).read_text("utf-8") + "\nx = x\ndef untyped():\n    pass\n")
    tree = parse(code)
    expected = {
        tuple(sorted((name, node.start_byte, node.end_byte) for name, nodes in captures.items() for node in nodes))
        for _, captures in QueryCursor(Query(tree.language, text)).matches(tree.root_node)
    }
    own, waiting = set(), [tree.root_node]
    reader = query.parse(text, tree.language)
    while waiting:
        node = waiting.pop()
        waiting += node.children
        for captures in reader.matches(node, Steps(1 << 40)):
            own.add(tuple(sorted((name, item.start_byte, item.end_byte) for name, item in captures.items())))
    assert own == expected and expected


@pytest.mark.parametrize(
    ("text", "fits", "not_in"),
    [
        ('((call function: (identifier) @f) (#any-of? @f "len" "sorted"))', b"x = len(y)", b"x = f(y)"),
        ('((call function: [(identifier) @f (attribute) @g]) (#eq? @f "len"))', b"a.b()", None),
        ('((call function: [(identifier) @f (attribute) @f]) (#eq? @f "a.b"))', b"a.b()", b"a.c()"),
        ('((call function: (identifier) @f) (#not-eq? @f "len"))', b"f()", None),
        ('((assignment left: (deep (identifier) @n)) (#eq? @n "x"))', b"(x, y) = 1", b"y = 1"),
    ],
)
def test_a_file_without_the_words_of_a_query_is_passed_over(text: str, fits: bytes, not_in: bytes | None) -> None:
    reader = query.parse(text, parse(source("")).language)
    assert reader.possible(fits) and reader.possible(b"") is (not_in is None)
    assert not_in is None or not reader.possible(not_in)


@given(st.text(st.sampled_from('()[]"@#.!_:? ;\\\n') | st.sampled_from("acelnoqu-"), max_size=60))
@settings(max_examples=200)
def test_any_text_is_a_query_or_refused(text: str) -> None:
    try:
        query.parse(text, parse(source("")).language)
    except ValueError as error:
        assert str(error)


PARTS = ["a", "[ab]", ".", "a*", "(?:a|b)", "b+?", "(ab)", "(a*)?", "a{2,5}", "^", "$", "|"]


@given(st.lists(st.sampled_from(PARTS), max_size=8))
@settings(max_examples=100)
def test_an_expression_that_is_taken_ends(parts: list[str]) -> None:
    try:
        pattern = expressions.compile_safely("".join(parts) + "c")
    except ValueError:
        return
    begun = time.perf_counter()
    for text in ("a" * 5000, "ab" * 3000, "b" * 400):
        assert expressions.found(pattern, text) == (pattern.search(text[: expressions.LONGEST]) is not None)
    assert time.perf_counter() - begun < 20


ENDLESS = ["(a+)+b", "(a|aa)+b", "(a*)*b", "(?:a?){9}b", r"(?=a)b", r"(a)\1", "(?m)^a", "a*a*a*a*b"]


@pytest.mark.parametrize("text", ENDLESS)
def test_an_expression_that_may_not_end_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"repeat|around|flag|long"):
        expressions.compile_safely(text)


PIECES = [
    "f(", ")", "x", " = ", "'a%s'", "+", "{", "}", ";", "\n", "    ", "def g(x):\n", "import os\n", "os.system(",
    "free(p);", "''.join()", "c.execute(", "if (p) ", "return ", "#{", "`", "params[:a]", "=> ", "new ", ".", "->", "é",
    "\0", '"',
]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=40), st.sampled_from(LANGUAGES))
@settings(max_examples=150)
def test_any_text_is_matched_and_always_the_same(pieces: list[str], language: str) -> None:
    text = "".join(pieces)
    hits = found(text, language)
    assert hits == found(text, language)
    for item in hits:
        assert 1 <= item.start <= item.end <= text.count("\n") + 1 and item.column >= 1


def test_brackets_without_end_take_no_time() -> None:
    text = source("eval(x)\n" + "(" * 200_000)
    tree = parse(text)
    began = time.process_time()
    RULES.match(text, tree)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("language", LANGUAGES)
def test_both_ways_of_looking_find_the_same(language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [each["bad"] for name, each in EXAMPLES.items() if language in SHIPPED[name].languages]
    text = source("\n".join(shown), language)
    quick = RULES.match(text, parse(text))
    monkeypatch.setattr("shrew.scan.rules.AT_ONCE", -1)
    assert RULES.match(text, parse(text)) == quick != []
