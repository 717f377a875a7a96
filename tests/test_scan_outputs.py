"""What `shrew scan` prints and writes: always valid, never more than text, and the same for the same scan."""

import dataclasses
import json
import os
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scanned import FIND, RUN, TRICKS, alert, example, report, reports, tricked

from shrew.scan import alerts, baseline, cwe, sarif, show
from shrew.scan.alerts import Alert, Report
from shrew.scan.functions import Source, functions
from shrew.scan.page import page
from shrew.scan.rules import Finding

SCHEMA = json.loads((Path(__file__).parent / "sarif" / "sarif-2.1.0.json").read_text("utf-8"))
VALIDATOR = jsonschema.validators.validator_for(SCHEMA)(SCHEMA)


def results(text: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(text)["runs"][0]["results"]
    return found


def prints(text: str) -> list[str]:
    return [item["partialFingerprints"]["shrewFunction/v1"] for item in results(text)]


# --- weaknesses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelling",
    ["CWE-89", "cwe-089", "CWE89", "CWE-89: SQL Injection", "external/cwe/cwe-089", "CWE_89", "x/CWE-89", "089", 89],
)
def test_every_spelling_of_a_cwe_is_understood(spelling: str | int) -> None:
    assert cwe.normal(spelling) == "CWE-89"
    assert cwe.family(spelling) == "sql-injection"


@pytest.mark.parametrize("spelling", ["", "CWE-0", "CWE-", "B608", "CWE-٣", "CWE-12345678", "-89", 0, "NVD-CWE-noinfo"])
def test_what_names_no_cwe_is_unknown(spelling: str | int) -> None:
    assert (cwe.normal(spelling), cwe.family(spelling)) == ("", "unknown")


def test_the_weaknesses_that_matter_have_rows_of_their_own() -> None:
    wanted = [
        *(22, 78, 79, 89, 94, 119, 125, 190, 200, 276, 287, 306, 352, 377, 400, 416, 434, 476, 502, 601, 611, 643, 732),
        *(787, 798, 862, 863, 918, 943, 20, 77, 269, 362, 401, 264, 327, 681, 915, 295, 326, 116, 338, 916, 676),
    ]
    assert [number for number in wanted if cwe.weakness(number).number != number] == []
    assert cwe.weakness("CWE-614").family == "transport-security"  # by its kin
    assert {number for number in cwe.KIN.values() if number not in cwe.TABLE} == set()
    assert set(cwe.KIN) & set(cwe.TABLE) == set()


def test_the_table_is_sound() -> None:
    for row in cwe.TABLE.values():
        assert 0 < row.score <= 10 and row.severity in cwe.SEVERITIES
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", row.family) and re.fullmatch(r"[A-Z][^\n]*[.?]", row.help)
        head = cwe.FAMILIES[row.family][0]
        assert head.score >= row.score - 1.3, f"{row.id} is far worse than what its family is told as"
    assert [cwe.weakness(n).severity for n in (89, 79, 476, 117)] == ["high", "medium", "medium", "medium"]


# --- alerts ----------------------------------------------------------------------------------------------------------


def test_shades_are_told_beside_the_median_line() -> None:
    assert alert(FIND, lines=(0.0, 0.0, 0.0, 4.0, 2.0, 0.0)).shades() == [0, 0, 0, 1, 0.5, 0]
    assert alert(FIND, lines=(1.0,) * 6).shades() == [0] * 6
    assert alert(FIND).shades() == [0] * 6
    assert alert("a\n\nb", lines=(1.0, 9.0, 2.0)).shades() == [0, 0, 1]  # a blank line is never the one


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12), st.integers(1, 9))
def test_shades_keep_the_order_and_the_first_line_is_the_highest(scores: list[float], start: int) -> None:
    found = alert("\n".join("x" * len(scores)), lines=tuple(scores), start=start)
    shades = found.shades()
    assert len(shades) == len(scores) and all(0 <= shade <= 1 for shade in shades)
    assert all(one >= other for one, a in zip(shades, scores, strict=True)
               for other, b in zip(shades, scores, strict=True) if a >= b)  # fmt: skip
    assert start <= found.first_line() < start + len(scores)
    if max(shades) > 0:
        assert max(shades) == 1 and scores[found.first_line() - start] == pytest.approx(max(scores))


def test_a_rule_says_where_to_look_before_the_model_does() -> None:
    said = Finding("r", "CWE-89", "high", "m", "app/db.py", 15, 15)
    outside = dataclasses.replace(said, start=99, end=99)
    assert alert(FIND, lines=(0, 0, 9, 0, 0, 0), findings=(said,)).first_line() == 15
    assert alert(FIND, lines=(0, 0, 9, 0, 0, 0), findings=(outside,)).first_line() == 14


def test_a_fingerprint_is_of_the_function_and_the_family() -> None:
    one = alert(FIND)
    assert re.fullmatch("[0-9a-f]{32}", one.fingerprint)
    assert alert(FIND, path="b/c.py", start=90, probability=0.1, cwe="cwe-564").fingerprint == one.fingerprint
    assert alert(FIND, cwe="CWE-79").fingerprint != one.fingerprint
    assert alert(FIND + " ").fingerprint != one.fingerprint
    assert alert(FIND, fingerprint="mine").fingerprint == "mine"


# --- SARIF -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suppressed", [False, True])
def test_the_log_is_valid_and_says_what_was_found(suppressed: bool) -> None:
    text = sarif.sarif(example(), suppressed)
    log = json.loads(text)
    assert list(VALIDATOR.iter_errors(log)) == []
    run = log["runs"][0]
    rules = run["tool"]["driver"]["rules"]
    assert [item["ruleId"] for item in run["results"]] == [rules[item["ruleIndex"]]["id"] for item in run["results"]]
    assert run["results"][0]["ruleId"] == "shrew/sql-injection"
    place = run["results"][0]["locations"][0]["physicalLocation"]
    assert place["artifactLocation"] == {"uri": "app/db.py", "uriBaseId": "%SRCROOT%"}
    assert place["region"]["startLine"] == 15 and place["region"]["startColumn"] == 13
    assert place["region"]["snippet"]["text"] == FIND.split("\n")[3][12:]
    assert place["contextRegion"] == {"startLine": 12, "endLine": 17}
    assert any("bandit B608" in item["message"]["text"] for item in run["results"][0]["relatedLocations"])
    told = run["invocations"][0]["toolExecutionNotifications"]
    assert [item["message"]["text"] for item in told if item["level"] == "warning"] == ["binary", "larger than 4 MB"]
    assert ("suppressions" in text) == suppressed
    if suppressed:
        assert [item["suppressions"] for item in run["results"]][:5] == [[]] * 5
        assert run["results"][5]["suppressions"][0]["kind"] == "inSource"


def test_a_wrong_log_would_be_refused() -> None:
    log = json.loads(sarif.sarif(example()))
    log["runs"][0]["results"][0]["level"] = "bad"
    assert not VALIDATOR.is_valid(log)


def test_rules_are_the_same_whatever_was_found() -> None:
    rules = json.loads(sarif.sarif(example()))["runs"][0]["tool"]["driver"]["rules"]
    assert rules == json.loads(sarif.sarif(report()))["runs"][0]["tool"]["driver"]["rules"]
    found = {rule["id"]: rule for rule in rules}
    assert len(found) == len(rules)
    for rule in rules:
        assert 0 < float(rule["properties"]["security-severity"]) <= 10
        assert rule["help"]["text"] and rule["help"]["markdown"] and rule["fullDescription"]["text"]
        assert rule["properties"]["tags"][0] == "security" and len(rule["properties"]["tags"]) <= 20
    assert "external/cwe/cwe-089" in found["shrew/sql-injection"]["properties"]["tags"]
    assert found["shrew/sql-injection"]["defaultConfiguration"]["level"] == "error"


def test_edits_elsewhere_keep_every_fingerprint() -> None:
    """Code above, another alert in the file, other scores: nothing of it is in the fingerprints."""
    twins = [alert(FIND, start=10), alert(FIND, start=40), alert(RUN, cwe="CWE-787", path="run.c", language="c")]
    before = prints(sarif.sarif(report(*twins)))
    assert len(set(before)) == 3
    moved = [alert(FIND, start=110, probability=0.5), alert(FIND, start=140, lines=(1.0, 2.0, 3.0)), twins[2],
             alert("def other(): pass", start=2)]  # fmt: skip
    assert set(before) <= set(prints(sarif.sarif(report(*moved))))
    held = [dataclasses.replace(twins[0], suppressed="inline")]
    assert set(prints(sarif.sarif(report(*twins[1:], suppressed=held)))) == set(before) - {before[0]}


SOURCE = """class A:
    def get(self, name):
        return self.db.execute("SELECT * FROM t WHERE n = '" + name + "'")

class B:
    def get(self, name):
        return self.db.execute("SELECT * FROM t WHERE n = '" + name + "'")

def other():
    return 1
"""
EDITED = '''# A comment, an import, another function: elsewhere.
import os

def added(x):
    return os.system(x)

class A:
    def get(self, name):
        """Documented now."""
        # and commented
        return self.db.execute(
            "SELECT * FROM t WHERE n = '" + name + "'")

class B:
    def get(self, name):
        return self.db.execute("SELECT * FROM t WHERE n = '" + name + "'")

def other():
    return 2
'''


def test_a_real_file_keeps_its_fingerprints_when_it_is_edited_elsewhere() -> None:
    def scanned(text: str) -> dict[str, str]:
        source = Source("app/db.py", "python", text.encode(), text)
        log = results(sarif.sarif(report(*[Alert(item, 0.9, "CWE-89", "high") for item in functions(source)])))
        places = [item["locations"][0] for item in log]
        for place in [item["physicalLocation"]["region"] for item in places]:
            assert place["snippet"]["text"] == text.split("\n")[place["startLine"] - 1]
        names = [item["logicalLocations"][0]["fullyQualifiedName"] for item in places]
        return {name: item["partialFingerprints"]["shrewFunction/v1"] for name, item in zip(names, log, strict=True)}

    before, after = scanned(SOURCE), scanned(EDITED)
    assert before["A.get"] != before["B.get"] and before["A.get"][:32] == before["B.get"][:32]
    assert {name for name in before if before[name] != after[name]} == {"other"}


def test_the_same_scan_gives_the_same_bytes_in_any_order() -> None:
    whole = example()
    found = list(whole.alerts)
    for seed in range(3):
        random.Random(seed).shuffle(found)
        mixed = dataclasses.replace(whole, alerts=list(found))
        for form in (sarif.sarif, sarif.code_quality, show.text, show.to_json, page, baseline.text):
            assert form(mixed) == form(whole)


def test_new_and_known_are_told_where_a_baseline_was_given() -> None:
    known = dataclasses.replace(alert(RUN), suppressed="baseline")
    found = results(sarif.sarif(report(alert(), suppressed=[known], compared=True), True))
    assert [item["baselineState"] for item in found] == ["new", "unchanged"]
    assert "baselineState" not in sarif.sarif(report(alert()))


@given(st.text(max_size=30), st.lists(st.integers(128, 255), max_size=3))
def test_a_path_survives_as_a_uri(text: str, raw: list[int]) -> None:
    path = (text.encode("utf-8", "replace") + bytes(raw)).replace(b"\0", b"").decode("utf-8", "surrogateescape")
    found = sarif.uri(path)
    assert re.fullmatch(r"(file://(/[A-Za-z]:)?)?(%[0-9A-F]{2}|[\w.~/-])*", found, re.A)
    if not re.match(r"[A-Za-z]:[/\\]", path):
        assert unquote_to_bytes(found.removeprefix("file://")) == os.fsencode(path)


def test_paths_that_are_not_below_the_root() -> None:
    assert sarif.uri("/srv/a b.py") == "file:///srv/a%20b.py"
    assert sarif.uri("C:/x/ä.py") == "file:///C:/x/%C3%A4.py"
    place = results(sarif.sarif(report(alert(path="/srv/x.py"))))[0]["locations"][0]["physicalLocation"]
    assert "uriBaseId" not in place["artifactLocation"]


@settings(max_examples=60)
@given(reports(), st.booleans())
def test_the_log_is_valid_whatever_was_scanned(found: Report, suppressed: bool) -> None:
    log = json.loads(sarif.sarif(found, suppressed))
    assert list(VALIDATOR.iter_errors(log)) == []
    json.dumps(log).encode("utf-8")
    assert "](" not in "".join(item["message"]["text"] for item in log["runs"][0]["results"])
    places = [(item["ruleId"], item["locations"][0]["physicalLocation"]["artifactLocation"]["uri"],
               item["partialFingerprints"]["shrewFunction/v1"]) for item in log["runs"][0]["results"]]  # fmt: skip
    assert len(set(places)) == len(places)


def test_the_code_quality_report_of_gitlab() -> None:
    found = json.loads(sarif.code_quality(example()))
    assert found[0] | {"fingerprint": ""} == {
        "description": "A query is put together from parts of text (in Users.find).",
        "check_name": "shrew/sql-injection", "fingerprint": "", "severity": "critical",
        "location": {"path": "app/db.py", "lines": {"begin": 15}},
    }  # fmt: skip
    assert len({item["fingerprint"] for item in found}) == len(found) == 5


# --- text and JSON ---------------------------------------------------------------------------------------------------


def test_the_text_is_one_aligned_line_an_alert() -> None:
    lines = show.text(example()).split("\n")
    assert lines[0] == (
        "app/db.py:15           high    CWE-89   0.91  Users.find: A query is put together from parts of text."
    )
    assert {line.index("CWE") for line in lines[:5]} == {31} and lines[5] == ""
    assert lines[-4:-1] == [
        "2 rule files were read.",
        "5 alerts (2 high, 2 medium, 1 low) in 48 files, 913 functions, 6.4 s. 1 alert held back.",
        "Point 'balanced': some 5 alerts per 1,000 functions of ordinary code.",
    ]


def test_explain_shows_the_lines_that_matter() -> None:
    text = show.text(example(), explain=True)
    line = FIND.split("\n")[3]
    assert f"    15 │ {line}  ◂ score, python-sql-built, bandit B608\n" in text
    assert "261 │     return pickle.loads(data)" in text and "step_40" not in text
    assert cwe.weakness(89).help in text


def test_no_alerts_and_one() -> None:
    assert show.text(report(point="")) == "No alerts in 3 files, 40 functions, 1.25 s.\n"
    assert show.summary(report(alert(), compared=True)).startswith("1 new alert (1 high) in 3 files")
    assert show.summary(report(files=1, functions=1, compared=True)).startswith("No new alerts in 1 file, 1 function")


def test_a_pipe_gets_plain_text_and_a_terminal_the_same_in_colours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    show.show(example())
    assert capsys.readouterr().out == show.text(example())
    assert show.styled(example(), True).plain == show.text(example(), True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    show.show(example())
    out = capsys.readouterr().out
    assert "\x1b[1;31m" in out and re.sub(r"\x1b\[[0-9;]*m", "", out) == show.text(example())


def test_thousands_of_skipped_files_are_counted() -> None:
    text = show.text(report(skipped=[(f"{i}.py", "binary") for i in range(5000)]))
    assert text.count("binary") == 20 and "not scanned: 4,980 more\n" in text


@settings(max_examples=60)
@given(reports(), st.booleans())
def test_the_text_holds_nothing_that_a_terminal_obeys(found: Report, explain: bool) -> None:
    text = show.text(found, explain)
    assert not re.search(HIDDEN, text)
    text.encode("utf-8")
    if not explain:
        lines = len(found.alerts) + bool(found.alerts) + len(found.skipped) + len(found.notes) + 1 + bool(found.point)
        assert text.count("\n") == lines


@settings(max_examples=60)
@given(reports())
def test_the_json_has_the_documented_fields(found: Report) -> None:
    text = show.to_json(found)
    values = json.loads(text)
    assert "\ud800" not in text and values["version"] == 1
    assert len(values["alerts"]) == len(found.alerts) and len(values["suppressed"]) == len(found.suppressed)
    for item in [values, *values["alerts"]]:
        assert [key for key in item if key not in (show.__doc__ or "")] == []


def test_the_json_of_an_alert() -> None:
    found = json.loads(show.to_json(example()))["alerts"][0]
    assert (found["path"], found["line"], found["start"], found["end"]) == ("app/db.py", 15, 12, 17)
    assert found["findings"][1]["tool"] == "bandit" and found["cwe"] == "CWE-89"
    assert found["lines"][3] == {"line": 15, "score": 3.0, "shade": 1.0}


HIDDEN = "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff]"


@pytest.mark.parametrize("trick", TRICKS)
def test_every_trick_in_every_place_is_only_text(trick: str) -> None:
    found = tricked(trick)
    text = page(found)
    Parsed(text)
    for words in (text.replace("\t", ""), show.text(found), show.text(found, explain=True)):
        assert not re.search(HIDDEN, words)
    log = json.loads(sarif.sarif(found, suppressed=True))
    assert list(VALIDATOR.iter_errors(log)) == []
    assert all("](" not in item["message"]["text"] for item in log["runs"][0]["results"])
    assert len(json.loads(show.to_json(found))["alerts"]) == len(json.loads(sarif.code_quality(found))) == 2


# --- the page --------------------------------------------------------------------------------------------------------

TAGS = (
    "html|head|meta|title|style|body|main|header|footer|section|article|p|h1|h2|h3|span|div|dl|dt|dd|ul|li|table|thead|"
    "tbody|tr|th|td|small|details|summary|code|a|i"
)
NAMES = "lang|charset|http-equiv|content|name|class|scope|role|tabindex|aria-label|aria-hidden|style|id|href"
LINKS = r"#f\d+|https://cwe\.mitre\.org/data/definitions/\d+\.html"
VOID = {"meta"}


class Parsed(HTMLParser):
    """The visible text of a page; fails where a tag is not closed or something is not as we write it."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = "".join(self.words).replace("\u00a0", " ")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert re.fullmatch(TAGS, tag)
        for name, value in attrs:
            assert re.fullmatch(NAMES, name)
            assert name != "style" or re.fullmatch(r"flex:\d+", value or "")
            assert name != "href" or re.fullmatch(LINKS, value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def test_the_page_shows_the_scan() -> None:
    text = page(example())
    found = Parsed(text).text
    for words in ("5 alerts", "By weakness", "By file", "SQL injection in Users.find", "bandit B608, line 15",
                  "app/db.py:15", "Held back", "Not scanned", "larger than 4 MB", "CWE-787",
                  "The whole function, 92 lines", "some 5 alerts per 1,000 functions"):  # fmt: skip
        assert words in found
    assert "default-src 'none'" in text and "script" not in text
    line = re.search(r'<div class="s3 rule"><span class="n">15</span><code>([^\n]*)</code>', text)
    assert line and "SELECT" in line[1]


def test_a_page_without_alerts() -> None:
    found = Parsed(page(report())).text
    assert "No alerts" in found and "By file" not in found and "The alerts" not in found


def test_thousands_of_alerts_and_lines_of_a_megabyte_are_bounded() -> None:
    long = "def f(x):\n" + "    y = 'aaaaaaa'\n" * 3000 + "    z = '" + "<" * 1_000_000 + "'"
    scores = tuple([0.0] * 3001 + [5.0])
    many = [alert(long, lines=scores, path=f"{number}.py") for number in range(30)]
    text = page(report(*many, *[alert(start=i) for i in range(1, 3971)], skipped=[("x.py", "binary")] * 10_000))
    assert len(text) < 3_000_000
    found = Parsed(text).text
    assert "4,000 alerts" in found and "3,800 further alerts" in found and "1,000,010 characters" in found
    assert len(show.text(report(*many[:5]), explain=True)) < 20_000
    assert len(sarif.sarif(report(*many[:5]))) - len(sarif.sarif(report())) < 20_000


@settings(max_examples=60)
@given(reports())
def test_whatever_was_scanned_is_only_text_on_the_page(found: Report) -> None:
    text = page(found)
    Parsed(text)
    text.encode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


def test_hidden_and_reordering_characters_are_shown() -> None:
    text = Parsed(page(report(alert("x = '\u202e\u200b\u2066'\x1b[31m", name="f\x00")))).text
    assert "x = '⟨U+202E⟩⟨U+200B⟩⟨U+2066⟩'␛[31m" in text and "f␀" in text


def test_the_order_of_alerts() -> None:
    found = [alert(severity="low", probability=0.9), alert(probability=0.5), alert(probability=0.7), alert(path="a.py")]
    assert [(item.severity, item.probability, item.path) for item in alerts.ordered(found)] == [
        ("high", 0.91, "a.py"), ("high", 0.7, "app/db.py"), ("high", 0.5, "app/db.py"), ("low", 0.9, "app/db.py"),
    ]  # fmt: skip
    assert isinstance(found[0], Alert) and alerts.by_severity(found) == {"high": 3, "low": 1}
