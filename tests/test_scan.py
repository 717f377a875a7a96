"""`shrew scan` from the command line: what is found, held back, cached, and what counts as changed."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shrew.__main__ import main
from shrew.scan import ScanSpec, pipeline, scan
from shrew.scan.cache import Score
from shrew.scan.functions import LANGUAGES, MODULE, Function, Source, cut, functions, normalise
from shrew.scan.judge import Judge, Point

BAD = 'def find(db, name):\n    return db.execute("SELECT * FROM t WHERE n = \'%s\'" % name)\n'
GOOD = 'def add(a, b):\n    """Sum."""\n    return a + b\n'
SHELL = 'def run(x):\n    import os\n    os.system("ls " + x)\n'
pytestmark = pytest.mark.usefixtures("place")


def write(files: dict[str, str], old: bool = True) -> None:
    """Files in this folder, as if they had been there for an hour."""
    for name, content in files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        if old:
            os.utime(path, (time.time() - 3600, time.time() - 3600))


Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Scan with rules alone and give exit code and JSON."""

    def go(*words: str) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = main(["scan", *words, "--format", "json", "--detector", "none"])
        return code, json.loads(capsys.readouterr().out)

    return go


def names(report: dict[str, Any], what: str = "alerts") -> list[str]:
    return sorted(f"{alert['path']}:{alert['name']}" for alert in report[what])


# --- functions -------------------------------------------------------------------------------------------------------

SAMPLES = {
    "python": ("class A:\n    @d\n    def m(self):\n        def inner(): pass\n        return 1\n\n"
               "async def f(): pass\nx = f()\n",
               [("A.m", 2, 5), ("f", 7, 7), (MODULE, 1, 8)]),
    "c": ("#include <a.h>\nint g;\nstatic char *const *f(int a)\n{\n  return 0;\n}\n", [("f", 3, 6)]),
    "cpp": ("namespace n { struct K { int m() { return 1; } K() = default; }; }\n"
            "template <class T>\nT g(T a) { return a; }\nint n::K::q() { return 2; }\n",
            [("n.K.m", 1, 1), ("g", 2, 3), ("n.K.q", 4, 4)]),
    "javascript": ("const a = require('b');\nconst g = (x) => { return x; };\nclass C { m() {} }\n"
                   "exports.z = function () {};\n",
                   [("g", 2, 2), ("C.m", 3, 3), ("exports.z", 4, 4)]),
    "go": ("package m\nfunc F() {}\nfunc (s *Srv[T]) M() {}\n", [("F", 2, 2), ("Srv.M", 3, 3)]),
    "ruby": ("require 'a'\nmodule M\n  class K\n    def m\n      1\n    end\n  end\nend\nputs `ls`\n",
             [("M.K.m", 4, 6), (MODULE, 1, 9)]),
    "java": ("class K {\n  @A\n  int m() { return 1; }\n  K() {}\n  abstract void no();\n}\n",
             [("K.m", 2, 3), ("K.K", 4, 4)]),
}  # fmt: skip


def source(text: str, language: str) -> Source:
    return Source("x", language, text.encode(), text)


@pytest.mark.parametrize("language", LANGUAGES)
def test_functions_of_each_language(language: str) -> None:
    text, expected = SAMPLES[language]
    found = functions(source(text, language))
    assert [(item.name, item.start, item.end) for item in found] == expected
    lines = text.split("\n")
    for item in found:
        own = item.text.split("\n")
        assert len(own) == item.end - item.start + 1
        # line i of the text is line start + i of the file, less what belongs to other functions
        assert all(line.strip() in lines[item.start - 1 + at] for at, line in enumerate(own))
        assert cut(item.source.data, item.spans) == item.text


def test_a_method_is_dedented_and_code_outside_keeps_its_lines() -> None:
    method, module = functions(source("class A:\n    def m(self):\n        return 1\n    x = 2\nprint(3)\n", "python"))
    assert method.text == "def m(self):\n    return 1"
    assert (module.start, module.text) == (1, "class A:\n\n\n    x = 2\nprint(3)")


@pytest.mark.parametrize(
    ("broken", "wanted"),
    [
        ("def a(:\n    x = (1\n\ndef b(y):\n    return y\n", "b"),
        ("class A:\n    def m(self): return 1\n\nx = [1, 2\n\ndef after(): pass\n", "after"),
    ],
)
def test_a_broken_file_still_gives_functions(broken: str, wanted: str) -> None:
    assert wanted in [item.name.rpartition(".")[2] for item in functions(source(broken, "python"))]


SAME = [
    ("python", "def f(a):\n  '''doc'''\n  if a:\n    return 'x  y'  # why\n",
     "def f( a ):\n\n    if a:\n        return 'x  y'"),
    ("c", "int f(void) { /* no */ return 1; } // x", "int f(void)\n{\n  return 1;\n}"),
    ("javascript", "function f() { return `a ${b}` } // x", "function f(){return `a ${b}`}"),
    ("ruby", "def f\n  1 # x\nend", "def f\n\n 1\nend"),
]
OTHER = [
    ("python", "if a:\n  b()\nc()", "if a:\n  b()\n  c()"),
    ("python", "x = 'a b'", "x = 'a  b'"),
    ("python", "x = 'a\\n  b'", "x = 'a\\n b'"),
    ("go", "func f() { g(`a  b`) }", "func f() { g(`a b`) }"),
]


@pytest.mark.parametrize(("language", "one", "two"), SAME)
def test_comments_and_blanks_do_not_count(language: str, one: str, two: str) -> None:
    assert normalise(one, language) == normalise(two, language)


@pytest.mark.parametrize(("language", "one", "two"), OTHER)
def test_what_code_means_does_count(language: str, one: str, two: str) -> None:
    assert normalise(one, language) != normalise(two, language)


@settings(max_examples=60)
@given(st.text(alphabet="def class(){}[]:;'\"`#/*\\\n \tx=é\x0c\r@", max_size=60), st.sampled_from(LANGUAGES))
def test_any_text_gives_functions_inside_it(text: str, language: str) -> None:
    found: list[Function] = functions(source(text, language))
    for item in found:
        assert 1 <= item.start <= item.end <= text.count("\n") + 1
        assert item.end - item.start == item.text.count("\n")
        assert cut(item.source.data, item.spans) == item.text
    normalise(text, language)


# --- the verb --------------------------------------------------------------------------------------------------------


def test_alerts_and_exit_codes(run: Run) -> None:
    write({"a.py": BAD, "pkg/b.py": GOOD})
    code, report = run(".")
    assert (code, names(report), report["functions"], report["files"]) == (1, ["a.py:find"], 2, 2)
    assert report["alerts"][0]["cwe"] == "CWE-89"
    severity = report["alerts"][0]["severity"]
    order = ["any", "low", "medium", "high", "none"]
    assert [run(".", "--fail-on", gate)[0] for gate in order] == [int(order.index(severity) >= at) for at in range(5)]
    assert run("pkg")[0] == 0
    assert main(["scan", "--diff"]) == 2
    assert main(["scan"]) == 2
    assert main(["scan", "nowhere"]) == 2


def test_tests_and_vendored_code_are_left_out(run: Run) -> None:
    write({f"{name}.py": BAD for name in ("a", "tests/b", "c_test", "node_modules/d", "e_pb2", "deep/vendor/f/g")})
    assert names(run(".")[1]) == ["a.py:find"]
    _, report = run(".", "--include-tests")
    assert names(report) == ["a.py:find", "c_test.py:find", "tests/b.py:find"]
    assert len(names(run(".", "--include-tests", "--include-vendored")[1])) == 6
    assert names(run("tests")[1]) == ["tests/b.py:find"], "what is named is scanned"
    assert names(run(".", "--exclude", "a.*")[1]) == []


def test_comments_and_settings_hold_alerts_back(run: Run) -> None:
    held = BAD.replace("name)\n", "name)  # shrew: ignore[CWE-89]\n")
    other = BAD.replace("name)\n", "name)  # shrew: ignore[CWE-78]\n")
    write({"held.py": held, "other.py": other, "old/x.py": BAD, "sql/y.py": BAD,
           "web.py": "@web.route(\n    '/x')\n" + BAD.replace("name):", "name):  # shrew: ignore"),
           "family.py": BAD.replace("def", "# shrew: ignore[sql-injection]\ndef"),
           ".shrew.toml": '[scan]\nignore = [{path = "old/*"}, {path = "sql/*", cwe = ["89"]}]\n'})  # fmt: skip
    code, report = run(".")
    assert (code, names(report)) == (1, ["other.py:find"])
    whys = {alert["path"]: alert["suppressed"] for alert in report["suppressed"]}
    inline = dict.fromkeys(["held.py", "family.py", "web.py"], "inline")
    assert whys == inline | {"old/x.py": "path", "sql/y.py": "cwe"}


@pytest.mark.parametrize(
    ("name", "text", "held"),
    [
        ("a.py", 'import os\ndef f(x):\n    os.system("ls " + x + "# shrew: ignore")\n', False),
        ("a.py", 'import os\ndef f(x):\n    os.system("ls " + x + f"# shrew: ignore {x}")\n', False),
        ("a.py", 'import os\ndef f(x):\n    """\n    # shrew: ignore\n    """; os.system("ls " + x)\n', False),
        ("a.py", 'import os\ndef f(x):\n    os.system("# ls " + x)  # why; shrew: ignore\n', True),
        ("a.js", "function f(x) {\n  eval(x + '// shrew: ignore');\n}\n", False),
        ("a.js", "function f(x) {\n  eval(x + `/* shrew: ignore */`);\n}\n", False),
        ("a.js", "function f(x) {\n  eval(x + 'http://a'); // shrew: ignore\n}\n", True),
        ("a.js", "function f(x) {\n  /* known:\n     shrew: ignore */\n  eval(x + 'a');\n}\n", True),
        ("a.c", '#include <stdlib.h>\nvoid f(char *x) {\n  gets(x); puts("// shrew: ignore");\n}\n', False),
        ("a.c", "#include <stdlib.h>\nvoid f(char *x) {\n  gets(x); /* shrew: ignore */\n}\n", True),
        ("a.rb", 'def f(x)\n  eval("#{x} # shrew: ignore")\nend\n', False),
        ("a.rb", 'def f(x)\n=begin\nshrew: ignore\n=end\n  eval("#{x} 1")\nend\n', True),
    ],
)
def test_only_a_comment_holds_an_alert_back_and_no_text_that_looks_like_one(
    run: Run, name: str, text: str, held: bool
) -> None:
    write({name: text})
    _, report = run(".")
    assert (names(report), names(report, "suppressed")) == (([], [f"{name}:f"]) if held else ([f"{name}:f"], []))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[scan]\nignored = 1\n", "unknown key 'ignored'; did you mean 'ignore'?"),
        ("[scan]\nout = 'x'\n", "unknown key 'out'"),
        ("[scan]\npoint = 'loud'\n", "point"),
        ("[scan]\nignore = [{}]\n", "path, a cwe or both"),
        ("[scan]\nignore = [{cwe = ['CWE-x']}]\n", "'CWE-x' is no CWE"),
        ("[other]\n", "unknown table 'other'"),
        ("[scan", "no readable TOML"),
    ],
)
def test_wrong_settings_are_refused(text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    write({".shrew.toml": text, "a.py": BAD})
    assert main(["scan", "."]) == 2
    assert words in capsys.readouterr().err


def test_settings_may_stand_in_pyproject_and_flags_go_before(run: Run) -> None:
    write({"pyproject.toml": '[tool.shrew.scan]\nfail_on = "none"\nexclude = ["b.py"]\n', "a.py": BAD, "b.py": BAD})
    assert (run(".")[0], names(run(".")[1])) == (0, ["a.py:find"])
    assert run(".", "--fail-on", "any")[0] == 1


def test_a_baseline_leaves_new_alerts(run: Run) -> None:
    write({"a.py": BAD})
    assert run(".", "--write-baseline", "known.json")[0] == 0
    assert run(".", "--baseline", "known.json")[0] == 0
    write({"b.py": SHELL})
    code, report = run(".", "--baseline", "known.json")
    assert (code, names(report)) == (1, ["b.py:run"])


def test_a_hook_sees_of_named_files_what_a_scan_of_the_project_sees(run: Run) -> None:
    files = ["a.py", "legacy/u.py", "src/tests/t.py", "src/b_test.py", "vendor/v.py", "env/lib/e.py", "src/b_pb2.py"]
    write(dict.fromkeys(files, BAD) | {"env/pyvenv.cfg": "", ".shrew.toml": '[scan]\nexclude = ["legacy"]\n'})
    assert len(run(*files)[1]["alerts"]) == len(files), "what is named is scanned, unless"
    for more, most in (((), 1), (("--include-tests",), 3), (("--include-vendored",), 4)):
        whole, named = run(".", *more), run("--force-exclude", *more, *files)
        assert names(whole[1]) == names(named[1]) and len(named[1]["alerts"]) == most
    assert run("--force-exclude", "legacy/u.py", "src/tests")[0] == 0


def test_a_report_is_not_written_over_code(capsys: pytest.CaptureFixture[str]) -> None:
    write({"a.py": BAD, "b.py": GOOD, "run": BAD})
    code = "is a file with code"
    for paths, out, said in ((".", "b.py", code), ("a.py", "a.py", code), ("a.py", "b.py", code),
                             ("run", "./run", "which is read")):  # fmt: skip
        for flag in ("--out", "--write-baseline"):
            assert main(["scan", paths, flag, out, "--detector", "none"]) == 2
            assert said in capsys.readouterr().err
    assert [Path(name).read_text() for name in ("a.py", "b.py", "run")] == [BAD, GOOD, BAD]


def test_the_name_of_a_report_says_its_format(capsys: pytest.CaptureFixture[str]) -> None:
    write({"a.py": BAD})
    for name, kind in (("r.sarif", "sarif"), ("r.HTML", "html"), ("r.json", "json")):
        assert main(["scan", ".", "--out", name, "--detector", "none"]) == 2
        assert f"add --format {kind}" in capsys.readouterr().err and not Path(name).exists()
        assert main(["scan", ".", "--out", name, "--format", kind, "--detector", "none"]) == 1
    assert main(["scan", ".", "--out", "r.sarif", "--json", "--detector", "none"]) == 2
    assert main(["scan", ".", "--out", "r.json", "--format", "gitlab", "--detector", "none"]) == 1


def test_json_is_a_flag_as_with_every_verb(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    write({"a.py": BAD})
    assert main(["scan", ".", "--json", "--detector", "none"]) == 1
    assert json.loads(capsys.readouterr().out)["alerts"] == run(".")[1]["alerts"] != []
    assert main(["scan", ".", "--json", "--format", "sarif"]) == 2
    assert "--json and --format sarif exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["text", "json", "sarif", "gitlab", "html"])
def test_reports_are_written(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    write({"a.py": BAD})
    assert main(["scan", ".", "--format", kind, "--out", "report", "--detector", "none"]) == 1
    assert "1 alert" in capsys.readouterr().out
    assert "a.py" in Path("report").read_text()


def test_findings_of_other_tools_are_joined(run: Run) -> None:
    bandit = {"results": [{"test_id": "B999", "issue_severity": "HIGH", "issue_confidence": "HIGH", "line_number": 3,
                           "issue_cwe": {"id": 22}, "issue_text": "odd sum", "filename": f"./{name}", "code": "",
                           "line_range": [3], "test_name": "x"} for name in ("b.py", "gone.py")]}  # fmt: skip
    write({"b.py": GOOD, "f.json": json.dumps(bandit)})
    for _ in range(2):  # the second time with a cache that knows nothing of bandit
        code, report = run("b.py", "--findings", "f.json")
        assert (code, names(report), report["alerts"][0]["cwe"]) == (1, ["b.py:add"], "CWE-22")
        assert any("1 finding" in note and "gone.py" in note for note in report["notes"])
    assert run("b.py")[0] == 0


# --- what changed ----------------------------------------------------------------------------------------------------


def git(*words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *words], check=True, capture_output=True)


def test_a_diff_takes_the_functions_that_changed(run: Run, place: Path) -> None:
    write({"a.py": BAD + "\n" + SHELL, "b.py": BAD, "crlf.py": BAD})
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    # nothing that a repository may configure is run
    for name in ("core.fsmonitor", "core.sshCommand", "diff.external", "filter.x.clean", "filter.x.process"):
        git("config", name, f"touch {place}/ran; cat")
    write({".gitattributes": "* filter=x diff=x\n"})
    assert run("--diff", "HEAD")[1]["functions"] == 0
    write({"a.py": "import os\n\n\n" + BAD + "\n" + SHELL.replace("ls ", "ls -l "), "new.py": BAD})
    write({"crlf.py": BAD.replace("\n", "\r\n")})
    code, report = run("--diff", "HEAD")
    assert (code, names(report), report["functions"]) == (1, ["a.py:run", "new.py:find"], 2)
    assert not (place / "ran").exists()


def test_what_did_not_change_is_not_parsed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write({"a.py": BAD, "b.py": GOOD, "c.py": SHELL})
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    write({"b.py": BAD})
    analyse, seen = pipeline.analyse, list[str]()

    def watched(data: bytes, hash: bytes, language: str, path: str, *rest: Any) -> Any:
        seen.append(path)
        return analyse(data, hash, language, path, *rest)

    monkeypatch.setattr(pipeline, "analyse", watched)
    assert (names(run("--diff", "HEAD")[1]), seen) == (["b.py:find"], ["b.py"])


def test_code_outside_functions_changed_only_if_it_did(run: Run) -> None:
    inside = "func f() {\n  g()\n}\n"
    config = 'package a\nimport "crypto/tls"\nvar c = &tls.Config{InsecureSkipVerify: true}\n'
    query = "import os, sys\n\n{}\nos.system('ls ' + sys.argv[1])\n"
    write({"a.go": config + inside, "a.py": query.format("def f():\n    g()\n")})
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    assert names(run(".")[1]) == ["a.go:<module>", "a.py:<module>"]
    write({"a.go": config + inside.replace("g()", "g()\n  h()")})
    write({"a.py": query.format("def f():\n    g()\n\n    h()\n")})
    report = run("--diff", "HEAD")[1]
    assert (report["functions"], names(report)) == (2, []), "f of both"
    write({"a.py": query.format("import re")})
    assert names(run("--diff", "HEAD")[1]) == ["a.py:<module>"]


@pytest.mark.parametrize("rev", ["nowhere", "--output=x", "-h", ""])
def test_a_revision_that_is_none(rev: str, capsys: pytest.CaptureFixture[str]) -> None:
    write({"a.py": BAD})
    git("init", "-q")
    assert main(["scan", ".", f"--diff={rev}"]) == 2
    assert "git knows no revision" in capsys.readouterr().err
    assert not Path("x").exists()


def test_no_repository(capsys: pytest.CaptureFixture[str]) -> None:
    write({"a.py": BAD})
    assert main(["scan", ".", "--diff", "HEAD"]) == 2
    assert "git repository" in capsys.readouterr().err


# --- model and cache -------------------------------------------------------------------------------------------------


@dataclass
class Model(Judge):
    """A judge that finds what says 'evil', and counts what it is asked."""

    floor: float = 0.0
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(None)
        self.has_model = self.has_detector = True
        self.ident = self.name = "double"

    def point(self, name: str) -> Point:
        return Point({"quiet": 0.9, "balanced": 0.5, "thorough": 0.1}[name], 7.0)

    def grams(self, texts: Sequence[str], languages: Sequence[str]) -> list[float | None]:
        return [float("evil" in text) for text in texts]

    def passes(self, gram: float | None) -> bool:
        return gram is not None and gram >= self.floor

    def scores(self, texts: Sequence[str], languages: Sequence[str]) -> list[Score]:
        self.asked += texts
        return [Score(text.count("evil") - 0.5, tuple(float(line.count("evil")) for line in text.split("\n")),
                      {"CWE-79": 0.6, "unknown": 0.4}) for text in texts]  # fmt: skip

    def probability(self, score: Score | None, gram: float | None, findings: Sequence[Any]) -> float:
        return 0.2 * len(findings) + (0.6 if score and score.logit > 0 else 0.0)

    def severity(self, probability: float, findings: Sequence[Any]) -> str:
        return "high" if probability >= 0.9 else "medium" if probability >= 0.5 else "low"


EVIL = "def g(x):\n    y = x\n    return evil(y)\n"


def test_the_detector_is_asked_about_few_and_once(place: Path) -> None:
    write({"a.py": BAD + "\n" + GOOD + "\n" + EVIL})
    model = Model(floor=0.5)
    report = scan(["."], judge=model)
    assert sorted(text.split("(")[0] for text in model.asked) == ["def find", "def g"], "a rule's hit, and 'evil'"
    (alert,) = report.alerts
    assert (alert.function.name, alert.cwe, alert.lines, alert.severity) == ("g", "CWE-79", (0.0, 0.0, 1.0), "medium")
    assert alert.function.text == EVIL.rstrip()
    model.asked.clear()
    again = scan(["."], judge=model)
    assert (again.alerts, model.asked) == (report.alerts, [])
    write({"a.py": "# moved\n" + BAD + "\n" + EVIL.replace("y = x", "y = evil(x)")})
    moved = scan(["."], judge=model)
    assert [text.split("(")[0] for text in model.asked] == ["def g"], "only what changed"
    assert [item.function.start for item in moved.alerts] == [5]


def test_what_ones_own_rules_find_is_always_told(place: Path) -> None:
    mine = '[[rule]]\nid = "mine"\nlanguages = ["python"]\ncwe = ""\nseverity = "low"\nmessage = "No."\n'
    write({"mine.toml": mine + 'origin = "ours"\ncalls = ["danger"]\n', "a.py": BAD + "\n\ndef f():\n    danger()\n"})
    model = Model(floor=0.5)
    assert not scan(["a.py"], judge=model).alerts
    (alert,) = scan(["a.py"], ScanSpec(rules=["mine.toml"]), judge=model).alerts
    assert ([item.rule for item in alert.findings], alert.severity, alert.probability) == (["mine"], "low", 0.2)


def test_a_file_that_changes_while_it_is_scanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is scored then is not what the cache would keep it for."""
    analyse = pipeline.analyse

    def change(*words: Any) -> Any:
        facts = analyse(*words)
        write({"a.py": GOOD})
        return facts

    write({"a.py": EVIL})
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "analyse", change)
        scan(["."], judge=Model())
    write({"a.py": EVIL})
    assert [alert.function.name for alert in scan(["."], judge=Model()).alerts] == ["g"]


def test_an_unchanged_file_is_not_even_opened(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write({"a.py": GOOD})
    monkeypatch.setattr("shrew.scan.cache.RACY_NS", -(10**18))  # as if these files had been written long ago
    assert run(".")[1]["functions"] == 1
    monkeypatch.setattr("shrew.scan.pipeline.read", lambda *_: pytest.fail("it was read"))
    assert run(".")[1]["functions"] == 1


def test_a_file_written_within_its_stamp_is_read_again(run: Run) -> None:
    write({"a.py": BAD})
    assert run(".")[0] == 1
    stamp = Path("a.py").stat()
    write({"a.py": BAD.replace("%s", "00").replace("% name", "# name")[: len(BAD)].ljust(len(BAD))})
    os.utime("a.py", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert Path("a.py").stat().st_size == stamp.st_size
    assert run(".")[0] == 0


def test_another_rule_is_another_cache(run: Run) -> None:
    write({"a.py": GOOD, "r.toml": '[[rule]]\nid = "no-add"\ncwe = "CWE-682"\nseverity = "low"\n'
           'languages = ["python"]\n'
           'message = "Adds."\norigin = "a test"\nquery = "(binary_operator)"\n'})  # fmt: skip
    assert run(".")[0] == 0
    code, report = run(".", "--rules", "r.toml")
    assert (code, names(report)) == (1, ["a.py:add"])
    assert run(".")[0] == 0


def test_the_same_report_every_time(run: Run) -> None:
    write({f"{name}/{at}.py": BAD + SHELL for name in "ba" for at in range(3)})
    first, second = run(".")[1], run(".", "--no-cache")[1]
    for report in (first, second):
        del report["seconds"]
    assert first == second


def test_nothing_heavy_is_loaded(place: Path) -> None:
    write({"a.py": BAD})
    heavy = ["torch", "transformers", "pandas", "scipy"]
    script = f"""
import sys
for name in {heavy!r}: sys.modules[name] = None
from shrew.__main__ import main
assert main(["scan", ".", "--detector", "none"]) == 1
print(sorted(m for m in ("numpy", "onnxruntime", "tree_sitter_c", "tokenizers") if m in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr


def test_the_spec_has_a_flag_for_each_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", "--help"]) == 0
    told = capsys.readouterr().out
    fields = set(ScanSpec.__dataclass_fields__) - {"ignore"}
    assert [name for name in fields if f"--{name.replace('_', '-')}" not in told] == []


def test_a_first_stage_from_a_folder(place: Path, tmp_path: Path) -> None:
    """What is packed beside a detector, with a threshold that never wakes the detector itself."""
    from shrew.scan.grams import Grams

    texts = [f"def f{at}(x):\n    return {'evil' if at % 2 else 'good'}(x)\n" for at in range(20)]
    folder = tmp_path / "detector"
    folder.mkdir()
    Grams.fit(texts, [at % 2 for at in range(20)], ["python"] * 20).save(folder / "grams.npz")
    table = {"bias": 0.0, "weights": {"grams": 1.0}}
    points = {name: {"threshold": at, "alerts_per_1000": 3.0} for name, at in
              {"quiet": 0.99, "balanced": 0.5, "thorough": 0.4}.items()}  # fmt: skip
    given = {"combine": {"with": table, "without": table}, "points": points, "first_stage": 99.0, "version": 1}
    (folder / "scan.json").write_text(json.dumps(given))
    write({"a.py": texts[1] + texts[2]})
    judge = Judge(folder)
    evil, good = judge.grams([texts[1], texts[2]], ["python"] * 2)
    assert evil is not None and good is not None and evil > 0 > good
    assert scan(["."], judge=judge).alerts == [], "nothing reaches the detector"
    chance = judge.probability(None, evil, [])
    assert chance == pytest.approx(1 / (1 + math.exp(-evil)), abs=1e-3)
    assert judge.severity(chance, []) == "medium"


POINTS = '"points": {"quiet": {"threshold": 1}, "balanced": {"threshold": 1}, "thorough": {"threshold": 1}}'
TABLE = '{"bias": 0, "weights": {}}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"combine": {}, "points": {}}',
        '{"combine": 1, "points": {}}',
        f'{{"combine": {{}}, {POINTS}}}',
        f'{{"combine": {{"with": {TABLE}}}, {POINTS}}}',
        f'{{"combine": {{"with": {TABLE}, "without": {{"bias": "0", "weights": {{}}}}}}, {POINTS}}}',
        f'{{"combine": {{"with": {TABLE}, "without": {{"bias": 0, "weights": {{"grams": 1e300}}}}}}, {POINTS}}}',
    ],
)
def test_a_damaged_detector_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scan.json").write_text(text)
    write({"a.py": BAD})
    assert main(["scan", ".", "--detector", str(tmp_path)]) == 2
    assert "scan.json" in capsys.readouterr().err


@pytest.mark.parametrize("cached", [False, True])
def test_damaged_weights_end_the_scan(cached: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A scan that could judge nothing must not look like one that found nothing."""
    (tmp_path / "scan.json").write_text(f'{{"combine": {{"with": {TABLE}, "without": {TABLE}}}, {POINTS}}}')
    write({"a.py": BAD})
    words = ["scan", ".", "--detector", str(tmp_path)]
    if cached:
        assert main(words) == 0
    (tmp_path / "grams.npz").write_text("junk")
    assert main(words) == 2
    assert "holds no n-gram weights" in capsys.readouterr().err
