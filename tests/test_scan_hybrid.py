"""The detector that ships beside the linear one and is asked by name: what it says, and what the name means."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shrew.__main__ import main
from shrew.scan import judge

BAD = 'def find(db, name):\n    text = "SELECT * FROM t WHERE n = \'%s\'" % name\n    return db.execute(text)\n'
C = "int f(char *to, const char *from)\n{\n  danger(to, from);\n  return 0;\n}\n"
MINE = '[[rule]]\nid = "mine"\nlanguages = ["python", "c"]\ncwe = ""\nseverity = "low"\nmessage = "No."\n'
ALL = MINE + 'origin = "a test"\ncalls = ["danger"]\n'
FOLDER = judge.BUILT_IN.with_name("scan-hybrid")


@pytest.fixture(autouse=True)
def planted(place: Path) -> None:
    (place / "a.py").write_text(BAD)


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def go(*words: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["scan", ".", *words, "--format", "json", "--fail-on", "none"]) == 0
        report: dict[str, Any] = json.loads(capsys.readouterr().out)
        return report | {"seconds": 0}

    return go


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one sentence or two of a command that is at fault."""
    capsys.readouterr()
    assert main(["scan", ".", *words]) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1
    return err


def test_it_needs_no_torch_and_says_the_same_each_time(run: Run) -> None:
    known = run("--detector", "hybrid")
    assert known["detector"].startswith("scan-hybrid ")
    (alert,) = known["alerts"]
    assert [alert["cwe"], alert["name"], len(alert["lines"])] == ["CWE-89", "find", 3]
    assert run("--detector", "hybrid") == known, "from the cache"
    script = """
import sys
for name in ("torch", "transformers", "pandas", "scipy"): sys.modules[name] = None
from shrew.__main__ import main
main(["scan", ".", "--detector", "hybrid", "--format", "json", "--no-cache"])
"""
    for workers in "1", "2":
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True,
                              env=os.environ | {"OMP_NUM_THREADS": workers})  # fmt: skip
        assert json.loads(done.stdout) | {"seconds": 0} == known


def test_explain_shows_the_lines_that_it_marked(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (alert,) = run("--detector", "hybrid")["alerts"]
    shades = [line["shade"] for line in alert["lines"]]
    assert main(["scan", ".", "--detector", "hybrid", "--explain", "--fail-on", "none"]) == 0
    told = capsys.readouterr().out.splitlines()
    marked = [line.split("│")[0].strip() for line in told if "│" in line and "score" in line.rpartition("◂")[2]]
    assert marked == [str(at) for at, shade in enumerate(shades, 1) if shade >= 0.5] != []


def test_it_speaks_of_the_languages_that_it_learnt(run: Run) -> None:
    Path("a.py").write_text("def f(to, text):\n    danger(to, text)\n    return 0\n")
    Path("a.c").write_text(C)
    Path("rules.toml").write_text(ALL)
    found = {}
    for words in [], ["--detector", "hybrid"]:
        for alert in run("--rules", "rules.toml", *words)["alerts"]:
            found[alert["path"], bool(words)] = alert["probability"], [line["score"] for line in alert["lines"]]
    assert len(found) == 4
    assert found["a.c", False] == found["a.c", True], "as without it"
    assert found["a.py", False][1] != found["a.py", True][1]


def test_what_the_name_means(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'hybrid'?" in refused(capsys, "--detector", "hybird")
    assert "known: hybrid, none." in refused(capsys, "--detector", "linear")
    known = run("--detector", "hybrid")
    Path("hybrid").mkdir()
    assert run("--detector", "hybrid") == known, "a folder of code"
    Path("hybrid/scan.json").write_text("{}")
    assert "./hybrid" in refused(capsys, "--detector", "hybrid")
    assert "is damaged" in refused(capsys, "--detector", "./hybrid")


def test_a_project_may_name_what_ships_alone(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Path(".shrew.toml")
    settings.write_text('[scan]\ndetector = "hybrid"\n')
    assert run()["detector"].startswith("scan-hybrid ")
    assert run("--detector", "none")["detector"] == ""
    for value in '"."', '"./hybrid"', '"hybird"', "1", '["hybrid"]':
        settings.write_text(f"[scan]\ndetector = {value}\n")
        assert ".shrew.toml [scan]" in refused(capsys)


def test_what_ships_is_small_and_has_a_card() -> None:
    card = (FOLDER / "README.md").read_text("utf-8")
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir() if path.name != "README.md"}
    assert sum(sizes.values()) <= 8_000_000
    assert f"{sum(sizes.values()):,} bytes" in card
    assert "Apache-2.0" in card and "MIT" in card and "Off by default" in card


def test_without_it_nothing_changes() -> None:
    """Other languages, and functions that it is not asked about, are judged as by default."""
    ours, default = (json.loads((folder / "scan.json").read_text("utf-8")) for folder in (FOLDER, judge.BUILT_IN))
    assert ours["combine"]["without"] == default["combine"]["without"]
    assert (FOLDER / "grams.npz").read_bytes() == (judge.BUILT_IN / "grams.npz").read_bytes()
    assert ours["languages"] == ["python"]
