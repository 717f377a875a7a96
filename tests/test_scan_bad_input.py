"""`shrew scan` on what nobody should have: scanned as far as possible, told in a line each, never a traceback."""

import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shrew.__main__ import main
from shrew.errors import DataError
from shrew.scan import ScanSpec, scan
from shrew.scan.config import comments
from shrew.scan.functions import PARSE_SECONDS, Source, functions, normalise, parse
from shrew.scan.judge import Judge
from shrew.scan.pipeline import analyse
from shrew.scan.rules import load_rules
from shrew.scan.sources import decode

RULES, NOBODY = load_rules(), Judge(None)
BAD = 'def find(db, name):\n    return db.execute("SELECT * FROM t WHERE n = \'%s\'" % name)\n'


@pytest.fixture(autouse=True)
def planted(place: Path) -> None:
    (place / "bad.py").write_text(BAD)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """The JSON of a scan that finds bad.py whatever stands beside it, and what it says on the side."""

    def go(*words: str) -> dict[str, Any]:
        capfd.readouterr()
        code = main(["scan", ".", "--format", "json", "--detector", "none", *words])
        out, err = capfd.readouterr()
        report: dict[str, Any] = json.loads(out)
        assert "Traceback" not in err
        assert (code, "bad.py" in [alert["path"] for alert in report["alerts"]]) == (1, True)
        return report | {"said": err, "why": {item["path"]: item["why"] for item in report["skipped"]}}

    return go


Run = Callable[..., dict[str, Any]]


def binary() -> None:
    Path("x.py").write_bytes(bytes(range(256)) * 20)


def huge() -> None:
    with Path("x.py").open("wb") as stream:
        stream.truncate(1 << 40)  # a hole: no bytes on the disk


def dangling() -> None:
    Path("x.py").symlink_to("nowhere.py")


def circle() -> None:
    Path("x.py").symlink_to("y.py")
    Path("y.py").symlink_to("x.py")


def up() -> None:
    Path("x.py").symlink_to("../x.py")
    Path("../x.py").write_text(BAD)


def out() -> None:
    Path("x.py").symlink_to("/etc")


def loop() -> None:
    Path("d").mkdir()
    Path("x.py").symlink_to(".")


def pipe() -> None:
    os.mkfifo("x.py")


def endpoint() -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("x.py")


def closed() -> None:
    Path("x.py").write_text(BAD)
    Path("x.py").chmod(0)


SKIPPED = {
    binary: "a binary file",
    huge: "larger than 2,000,000 bytes",
    dangling: "leads nowhere",
    circle: "in a circle",
    up: "out of the tree",
    out: "out of the tree",
    loop: "a folder that it is in",
    pipe: "no regular file",
    endpoint: "no regular file",
    closed: "cannot be read",
}


@pytest.mark.parametrize("make", SKIPPED, ids=lambda make: make.__name__)
def test_what_cannot_be_scanned_is_told(make: Callable[[], None], run: Run) -> None:
    if make is closed and os.geteuid() == 0:
        pytest.skip("root may read everything")
    make()
    assert SKIPPED[make] in run()["why"]["x.py"]


def test_a_folder_that_cannot_be_entered(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("shut").mkdir()
    enter = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", path)
        return enter(path)

    monkeypatch.setattr("shrew.scan.sources.os.scandir", scandir)
    assert run()["why"] == {"shut": "cannot be entered (Permission denied)"}


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (b"", ""),
        (b"\n\n\n", ""),
        (b"\xef\xbb\xbf" + BAD.encode(), ""),
        (BAD.replace("\n", "\r\n").encode(), ""),
        ("# é\n".encode("latin-1") + BAD.encode(), "not UTF-8, read as Latin-1"),
        (BAD.encode("utf-16"), "read as UTF-16"),
        (BAD.encode("utf-32"), "read as UTF-32"),
        (b"# " + b"x" * 200 + b"\0\n" + BAD.encode(), "null bytes in it"),
        (b"import os\0\n" + BAD.encode(), "null bytes in it"),
        (b"x = 1\0\0\n" + BAD.encode(), "null bytes in it"),
        (b"\x01\x02" + BAD.encode(), ""),
    ],
)
def test_odd_files_are_scanned_all_the_same(content: bytes, note: str, run: Run) -> None:
    Path("odd.py").write_bytes(content)
    report = run()
    assert report["why"] == {}
    assert [note in line for line in report["notes"] if "odd.py" in line] == [True] * bool(note)
    if len(content) > 10:
        assert "odd.py" in [alert["path"] for alert in report["alerts"]]


DEEP = {
    "brackets.py": "x = " + "(" * 50_000 + ")" * 50_000,
    "open.c": "int f() { return " + "(" * 20_000,
    "blocks.js": "function f() {" + "{" * 20_000,
    "classes.py": "".join(" " * at + f"class A{at}:\n" for at in range(500)) + " " * 500 + "def f(): pass\n",
    "line.js": "function f(a) { g(" + "a + " * 100_000 + "1); }",
    "data.py": "X = [" + "1, " * 60_000 + "]\n",
    "quotes.rb": "'" * 100_001,
    "templates.cpp": "a<" * 15_000,
    "else.java": "class A { void f() { " + "if (a) {} else " * 20_000 + "{} } }",
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_and_long_files(name: str, run: Run) -> None:
    Path(name).write_text(DEEP[name])
    began = time.monotonic()
    report = run()
    assert report["why"].get(name, "not parsed within").startswith("not parsed within")
    assert time.monotonic() - began < 3 * PARSE_SECONDS


SLOW = [
    *((language, opening * 60_000) for language, opening in (
        ("python", "("), ("python", "["), ("python", "{"), ("c", "("), ("c", "{"), ("javascript", "{"), ("go", "("),
        ("java", "{"), ("ruby", "["), ("cpp", "("))),
    ("c", "int f() { return " + "(" * 60_000),
    ("java", "A<" * 30_000),
    ("ruby", "%w(" * 20_000),
    ("python", "x" + "()" * 30_000),
    ("python", "x" + ".a" * 30_000),
    ("python", "def f(x):\n    x" + ".execute(q)" * 5500),
    ("python", "def f(x):\n    y = " + "(" * 25_000 + "(z:=x)," * 1000 + "(w:=eval(y))" + ")" * 25_000),
    ("javascript", "x" + ".then(() => eval(y))" * 3000),
    ("c", "void f(char *p) { " + "{" * 20_000 + "free(p);" * 500 + "}" * 20_000 + "}"),
]  # fmt: skip


@pytest.mark.parametrize("at", range(len(SLOW)))
def test_small_files_made_to_be_slow_are_not(at: int) -> None:
    """Most took seconds once, some minutes."""
    language, text = SLOW[at]
    began = time.process_time()
    with suppress(DataError):  # not parsed within its time
        analyse(text.encode(), b"", language, "x", RULES, NOBODY)
    assert time.process_time() - began < 2


def test_nesting_is_no_recursion() -> None:
    for language, text in (("python", "(" * 30_000 + ")" * 30_000), ("javascript", "x = " + "[" * 30_000)):
        normalise(text, language)
        functions(Source("x", language, text.encode(), text))


def test_a_file_that_takes_too_long(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("long.c").write_text("int f() { return " + "a + " * 100_000 + "1; }")
    monkeypatch.setattr("shrew.scan.functions.PARSE_SECONDS", -1.0)
    assert run()["why"] == {"long.c": "not parsed within -1 seconds"}
    monkeypatch.undo()


@pytest.mark.parametrize(("text", "language"), [("(function () { x })", "javascript"), ("@a\n", "python")])
def test_the_time_of_a_file_grows_with_its_length(text: str, language: str) -> None:
    def seconds(count: int) -> float:
        whole = "a" + text * count
        began = time.process_time()
        functions(Source("x", language, whole.encode(), whole))
        return time.process_time() - began

    seconds(1)
    assert seconds(16000) < 8 * seconds(4000) + 0.1


@pytest.mark.parametrize("line", ["#" * 10**6, "# shrew: " * 10**5, "# shrew: ignore[" * 10**4, " shrew:" * 10**5])
def test_comments_are_found_in_no_time(line: str) -> None:
    text = f"# shrew: ignore\n{line}\n" + "# shrew: ignore\n" * 10**4
    source = Source("a.py", "python", text.encode(), text)
    tree = parse(source)
    began = time.process_time()
    comments(source, tree)
    assert time.process_time() - began < 2


def devices() -> list[str]:
    os.mkfifo("pipe")
    with Path("hole").open("wb") as stream:
        stream.truncate(1 << 40)
    return ["/dev/zero", "pipe", "hole"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes by name here")
@pytest.mark.parametrize("flag", ["--rules", "--findings", "--baseline"])
def test_what_has_no_end_is_refused_and_not_read(flag: str, capfd: pytest.CaptureFixture[str]) -> None:
    for name in devices():
        assert main(["scan", "bad.py", "--detector", "none", flag, name]) == 2
        told = capfd.readouterr().err
        assert told.count("\n") == 1 and f"{name} is " in told and told.endswith(".\n"), told
        assert ("larger than" if name == "hole" else "no regular file") in told


def test_settings_without_end_are_refused_and_those_of_others_left_alone(capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("pyproject.toml", ".shrew.toml"):
        with Path(name).open("wb") as stream:
            stream.truncate(1 << 40)
        assert main(["scan", "bad.py", "--detector", "none"]) == (2 if name == ".shrew.toml" else 1)
    assert "larger than 16 MB" in capfd.readouterr().err


def test_settings_nested_without_end(capfd: pytest.CaptureFixture[str]) -> None:
    for name in (".shrew.toml", "rules.toml"):
        Path(name).write_text("x = " + "[" * 10**5)
        assert main(["scan", ".", "--rules", name]) == 2
        told = capfd.readouterr().err
        assert "no readable TOML" in told and "Traceback" not in told
        Path(name).unlink()


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.symlink_to("nowhere"), os.mkfifo])
def test_settings_that_are_no_file(make: Callable[[Path], None], capfd: pytest.CaptureFixture[str]) -> None:
    make(Path(".shrew.toml"))
    assert main(["scan", "."]) == 2
    told = capfd.readouterr().err
    assert ".shrew.toml is no file" in told and len(told.splitlines()) == 1


def test_names_with_anything_in_them(run: Run) -> None:
    for name in (b"\xff\xfe.py", b"a\nb.py", b"\x1b[31m.py", "‮é.py".encode(), b"-rf.py"):
        Path(os.fsdecode(name)).write_text(BAD)
    assert len(run()["alerts"]) == 6
    for kind in ("text", "sarif", "gitlab", "html"):
        assert main(["scan", ".", "--format", kind, "--out", f"../{kind}", "--detector", "none"]) == 1


@pytest.mark.parametrize("form", ["text", "json", "sarif", "html", "gitlab"])
def test_an_output_that_knows_few_signs(form: str) -> None:
    Path("\u202e\u65e5\udcff.py").write_text(BAD.replace("find", "f\u00fcnde"))
    command = [sys.executable, "-m", "shrew", "scan", ".", "--explain", "--detector", "none", "--format", form]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=False)
    assert (done.returncode, b"Traceback" in done.stderr) == (1, False)
    assert ("f\u00fcnde" if form == "html" else "nde") in done.stdout.decode()


def test_many_small_files(run: Run) -> None:
    for at in range(30):
        Path(f"d{at}").mkdir()
        for each in range(30):
            Path(f"d{at}/{each}.py").write_text("")
    began = time.monotonic()
    assert run()["files"] == 901
    assert time.monotonic() - began < 10


def test_a_very_deep_tree(run: Run) -> None:
    here = Path.cwd()
    for _ in range(60):  # beyond the longest path that a system call takes
        Path("d" * 100).mkdir()
        os.chdir("d" * 100)
    os.chdir(here)
    assert [why for why in run()["why"].values() if "cannot be entered" in why]


def test_nothing_scanned_is_run(run: Run) -> None:
    trap = "import pathlib\npathlib.Path('ran').touch()\n"
    for name in ("conftest.py", "sitecustomize.py", "shrew.py", "setup.py", "tree_sitter.py", "__init__.py"):
        Path(name).write_text(trap)
    run("--include-tests")
    assert not Path("ran").exists()


# --- the cache -------------------------------------------------------------------------------------------------------


def caches() -> list[Path]:
    return sorted((Path(os.environ["SHREW_CACHE"]) / "scan").glob("*.sqlite"))


def garbage(path: Path) -> None:
    path.write_bytes(b"no database" * 1000)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def other_tables(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as base:
        base.execute("CREATE TABLE facts (x)")
        base.execute("CREATE TABLE files (x)")
        base.execute("CREATE TABLE scores (x)")
        base.execute("PRAGMA user_version = 1")
    base.close()


def wrong_values(path: Path) -> None:
    with sqlite3.connect(path) as base:
        base.execute("UPDATE facts SET value = ?", (b"\x93\x01\x02\x03",))
    base.close()


def newer(path: Path) -> None:
    with sqlite3.connect(path) as base:
        base.execute("PRAGMA user_version = 99")
    base.close()


@pytest.mark.parametrize("damage", [garbage, cut_short, other_tables, wrong_values, newer])
def test_a_damaged_cache_is_thrown_away(damage: Callable[[Path], None], run: Run) -> None:
    before = run()["alerts"]
    (cache,) = caches()
    damage(cache)
    after = run()
    assert after["alerts"] == before
    assert after["said"].count("was damaged") == 1 and len(after["said"].splitlines()) == 1
    assert run()["said"] == ""


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 60_000), noise=st.binary(min_size=1, max_size=400))
def test_noise_in_the_cache_changes_nothing(at: int, noise: bytes) -> None:
    spec = ScanSpec(detector="none")
    before = scan(["."], spec).alerts
    cache = caches()[-1]
    with cache.open("r+b") as stream:
        stream.seek(at % cache.stat().st_size)
        stream.write(noise)
    assert [item.fingerprint for item in scan(["."], spec).alerts] == [item.fingerprint for item in before]


def test_no_place_for_a_cache(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("../file").write_text("")
    monkeypatch.setenv("SHREW_CACHE", str(Path("../file/cache").absolute()))
    assert "no cache" in run()["said"]


def test_ctrl_c_keeps_what_was_learnt(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from shrew.scan import pipeline

    for at in range(5):
        Path(f"{at}.py").write_text(BAD + f"x = {at}\n")
    analyse, seen = pipeline.analyse, []

    def stop(*words: Any) -> Any:
        seen.append(words)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return analyse(*words)

    monkeypatch.setattr(pipeline, "analyse", stop)
    assert main(["scan", ".", "--detector", "none"]) == 130
    run()
    assert len(seen) == 4 + 3, "three of six were kept"


# --- what is given beside ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["--rules", "nowhere.toml"],
        ["--rules", "bad.py"],
        ["--findings", "nowhere.json"],
        ["--findings", "bad.py"],
        ["--baseline", "nowhere.json"],
        ["--baseline", "bad.py"],
        ["--detector", "nowhere"],
        ["--detector", "."],
        ["--max-file-size", "big"],
        ["--jobs", "0"],
        ["--point", "loud"],
        ["--out", "."],
        ["bad.py", "--out", "bad.py"],
        ["--write-baseline", "."],
        ["--diff", "HEAD", "--write-baseline", "known.json"],
        [""],
    ],
    ids=" ".join,
)
def test_bad_flags(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", ".", *words]) == 2
    told = capfd.readouterr().err
    assert "Traceback" not in told and told.strip()


@given(st.binary(max_size=300))
@example(b"\xff\xfea\0\0\0")
def test_any_bytes_are_text_or_refused(data: bytes) -> None:
    try:
        text, _ = decode(data)
    except DataError:
        return
    assert "\0" not in text
    text.encode()
