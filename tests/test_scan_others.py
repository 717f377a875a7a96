"""Findings of other tools: what bandit, flawfinder, cppcheck and semgrep wrote about planted bugs; what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shrew.__main__ import main
from shrew.errors import DataError
from shrew.scan.others import read_findings
from shrew.scan.rules import Finding

FILES = Path(__file__).parent / "findings"


def written(tmp_path: Path, content: Any, name: str = "x.json") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def sarif(*results: Any, rules: Any = (), **run: Any) -> dict[str, Any]:
    tool = {"driver": {"name": "T x", "rules": list(rules)}}
    return {"version": "2.1.0", "runs": [{"tool": tool, "results": results} | run]}


def result(uri: Any = "a.py", **keys: Any) -> dict[str, Any]:
    place = {"physicalLocation": {"artifactLocation": {"uri": uri}, "region": {"startLine": 3, "startColumn": 2}}}
    return {"ruleId": "r", "message": {"text": "m"}, "locations": [place]} | keys


@pytest.mark.parametrize(
    ("name", "tool", "count", "first"),
    [
        ("bandit.json", "bandit", 5, ("B403", "CWE-502", "low", "src/cart.py", 2, 1)),
        ("bandit.sarif", "bandit", 5, ("B403", "CWE-502", "low", "src/cart.py", 2, 1)),
        ("flawfinder.csv", "flawfinder", 4, ("FF1001", "CWE-120", "high", "src/path.c", 10, 5)),
        ("flawfinder.sarif", "flawfinder", 4, ("FF1013", "CWE-119", "low", "src/path.c", 7, 5)),
        ("cppcheck.xml", "cppcheck", 11, ("arrayIndexOutOfBounds", "CWE-788", "high", "src/entry.c", 24, 6)),
        ("semgrep.json", "semgrep", 1, ("cursor-execute", "CWE-89", "high", "src/users.py", 9, 9)),
        ("semgrep.sarif", "semgrep", 1, ("cursor-execute", "CWE-89", "high", "src/users.py", 9, 9)),
    ],
)
def test_what_a_tool_wrote_is_read(name: str, tool: str, count: int, first: tuple[Any, ...]) -> None:
    found = read_findings(FILES / name)
    item = found[0]
    assert (item.rule, item.cwe, item.severity, item.path, item.start, item.column) == first
    assert len(found) == count and {each.tool for each in found} == {tool}
    assert all(each.message and each.start <= each.end for each in found)


@pytest.mark.parametrize("name", ["bandit", "flawfinder", "semgrep"])
def test_both_forms_of_a_tool_say_the_same(name: str) -> None:
    def places(path: Path) -> list[tuple[Any, ...]]:
        return sorted((item.rule, item.cwe, item.path, item.start, item.column) for item in read_findings(path))

    own = next(path for path in FILES.glob(f"{name}.*") if path.suffix != ".sarif")
    assert places(own) == places(FILES / f"{name}.sarif")


@pytest.mark.parametrize(
    ("keys", "rule", "cwe", "severity"),
    [
        ({}, {}, "", "medium"),
        ({"level": "error"}, {}, "", "high"),
        ({}, {"defaultConfiguration": {"level": "note"}}, "", "low"),
        ({}, {"properties": {"security-severity": "9", "tags": ["external/cwe/cwe-089"]}}, "CWE-89", "high"),
        ({"properties": {"security-severity": 3.0, "cwe": "CWE-22: Path"}}, {}, "CWE-22", "low"),
        ({"taxa": [{"id": "78", "toolComponent": {"name": "CWE"}}]}, {}, "CWE-78", "medium"),
        ({"message": {"text": "bad (CWE-79)"}}, {}, "CWE-79", "medium"),
        ({}, {"relationships": [{"target": {"id": "CWE-416"}}]}, "CWE-416", "medium"),
        ({"level": "odd", "properties": {"security-severity": "x"}}, {"id": 3}, "", "medium"),
    ],
)
def test_severity_and_weakness_of_sarif(
    tmp_path: Path, keys: dict[str, Any], rule: dict[str, Any], cwe: str, severity: str
) -> None:
    path = written(tmp_path, sarif(result(ruleIndex=0, **keys), rules=[{"id": "r"} | rule]))
    [item] = read_findings(path)
    assert (item.cwe, item.severity, item.tool) == (cwe, severity, "t")


def test_what_the_tool_holds_back_is_left_out(tmp_path: Path) -> None:
    kept = [{}, {"kind": "fail"}, {"suppressions": []}, {"suppressions": [{"status": "rejected"}]}]
    out = [{"kind": "pass"}, {"suppressions": [{"kind": "inSource"}]}, {"baselineState": "absent"}, {"locations": []}]
    path = written(tmp_path, sarif(*(result(**keys) for keys in [*kept, *out])))
    assert len(read_findings(path)) == len(kept)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("src/a%20b.py", "src/a b.py"),
        ("./src//a.py", "src/a.py"),
        ("src\\a.c", "src/a.c"),
        ("file:///home/x/a.py", "/home/x/a.py"),
        ("file:///C:/x/a.py", "C:/x/a.py"),
        ("file:a.py", "a.py"),
        ("file://[::1/a.py", None),
        ("file:%2F%2F[::1/a.py", "//[::1/a.py"),
        ("http://[/a.py", None),
        ("https://x/a.py", None),
        ("", None),
        (3, None),
        ("a\u001b[2Jb", None),
        ("a%00b", None),
        ("x" * 5000, None),
    ],
)
def test_paths_are_made_plain(tmp_path: Path, uri: Any, shown: str | None) -> None:
    told: list[str] = []
    found = read_findings(written(tmp_path, sarif(result("b.py"), result(uri))), told.append)
    assert [item.path for item in found] == ["b.py"] + ([] if shown is None else [shown])
    assert ["1 of 2 findings left out" in line and "x.json" in line for line in told] == [True] * (shown is None)


def test_a_base_of_the_run_is_put_before(tmp_path: Path) -> None:
    item = result()
    item["locations"][0]["physicalLocation"]["artifactLocation"]["uriBaseId"] = "%SRCROOT%"
    path = written(tmp_path, sarif(item, originalUriBaseIds={"%SRCROOT%": {"uri": "file:///home/me/"}}))
    assert read_findings(path)[0].path == "/home/me/a.py"


def test_what_is_shown_cannot_command_a_terminal(tmp_path: Path) -> None:
    item = result(message={"text": "a\nb\u001b[31m" + "x" * 5000}, ruleId="r\u0007")
    [found] = read_findings(written(tmp_path, sarif(item)))
    assert found.message.startswith("a b?[31mx") and len(found.message) == 500 and found.rule == "r?"


@pytest.mark.parametrize("line", [-1, 0, 1 << 40, "3", None, True, 1.5, [], "99999999999999999999"])
def test_lines_that_cannot_be_are_the_first(tmp_path: Path, line: Any) -> None:
    item = result()
    item["locations"][0]["physicalLocation"]["region"] = {"startLine": line, "endLine": line}
    [found] = read_findings(written(tmp_path, sarif(item)))
    assert found.start == found.end == (3 if line == "3" else 1)


BOMB = b'<?xml version="1.0"?><!DOCTYPE r [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><results><cppcheck/>&b;</results>'
FILE = b'<!DOCTYPE r [<!ENTITY a SYSTEM "file:///etc/passwd">]><results><cppcheck/><error msg="&a;"/></results>'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "none of the forms"),
        (b"hello", "none of the forms"),
        (b"\xff\xfe\x00", "no UTF-8"),
        (b"[]", "none of the forms"),
        (b"{", "cannot|no findings"),
        (b"{}", "neither runs nor results"),
        (b'{"runs": 3}', "neither runs nor results"),
        (b'{"runs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "no findings"),
        (b"<results", "no findings"),
        (b"<html></html>", "not of cppcheck"),
        (BOMB, "document type"),
        (FILE, "document type"),
    ],
)
def test_a_file_that_is_none_of_these_is_refused_in_a_sentence(tmp_path: Path, content: bytes, words: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(DataError, match=words) as caught:
        read_findings(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            read_findings(path)


def test_findings_below_the_point_are_counted_by_tool(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "a.py").write_text("def f(a):\n    b = a + 1\n    return b  # shrew: ignore\n")
    lines = [{"startLine": number} for number in (1, 2, 3)]
    found = [{"physicalLocation": {"artifactLocation": {"uri": "a.py"}, "region": line}} for line in lines]
    path = written(place, sarif(*(result(locations=[item]) for item in found)))
    bandit = written(place, {"results": [{"test_id": "B1", "filename": "a.py", "line_number": 2}]}, "y.json")

    def notes(*words: str) -> list[str]:
        capsys.readouterr()
        main(["scan", "a.py", "--findings", str(path), "--findings", str(bandit), "--json", *words])
        told: list[str] = json.loads(capsys.readouterr().out)["notes"]
        return [line for line in told if "below the point" in line]

    [quiet] = notes("--point", "quiet")
    assert "point 'quiet'" in quiet and "(1 of bandit, 2 of t)" in quiet, "without the one that is held back"
    assert "--point thorough shows more" in quiet and "--detector none shows all" in quiet
    [thorough] = notes("--point", "thorough")
    assert "--point thorough" not in thorough
    assert notes("--detector", "none") == []
    main(["scan", "a.py", "--findings", str(path)])
    assert "(2 of t)" in capsys.readouterr().out


def test_a_file_with_nothing_found_is_read(tmp_path: Path) -> None:
    for content in (sarif(), {"results": [], "errors": []}, {"runs": []}):
        assert read_findings(written(tmp_path, content)) == []
    assert read_findings(written(tmp_path, b'<results version="2"><cppcheck version="2"/><errors/></results>')) == []


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.just("CWE-79"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["runs", "results", "tool", "driver", "rules", "id", "ruleId", "ruleIndex", "message", "text", "locations",
         "physicalLocation", "artifactLocation", "uri", "region", "startLine", "properties", "tags", "taxa", "level",
         "suppressions", "check_id", "test_id", "filename", "path", "extra", "metadata", "cwe", "line_range", "start"]),
        inner, max_size=6),
    max_leaves=25,
)  # fmt: skip


@given(JUNK, st.sampled_from(["runs", "results"]))
@example({"runs": None, "test_id": None, "line_range": True}, "results")
@settings(max_examples=300)
def test_any_json_gives_findings_or_is_refused(tmp_path_factory: pytest.TempPathFactory, junk: Any, key: str) -> None:
    path = written(tmp_path_factory.mktemp("x"), {key: [junk, result() | {"locations": junk}]})
    try:
        found = read_findings(path)
    except DataError:
        return
    for item in found:
        assert isinstance(item, Finding) and item.path and 1 <= item.start <= item.end
        assert item.severity in ("low", "medium", "high")
