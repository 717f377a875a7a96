"""Findings of other tools: SARIF 2.1.0 of any, and what bandit, semgrep, flawfinder and cppcheck write themselves.

Which it is shows in the file. Nothing in it is believed before it is checked, and what is shown is cut to one line.
"""

import csv
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit
from xml.parsers import expat

import msgspec

from shrew import files
from shrew.errors import DataError
from shrew.scan import cwe as weaknesses
from shrew.scan.rules import Finding

__all__ = ["read_findings"]

LARGEST, MOST = 256 << 20, 1_000_000  # bytes of a file, findings in it
WORDS = 500  # characters of a message
LINES = 1 << 30
_CWE = re.compile(r"(?i)\bcwe[-_:/ ]{0,2}(?:id[-_:/ ])?0{0,4}([1-9][0-9]{0,4})\b")
_LEVELS = {
    "error": "high", "warning": "medium", "note": "low", "none": "low", "info": "low", "critical": "high",
    "high": "high", "medium": "medium", "low": "low", "style": "low", "performance": "low", "portability": "low",
}  # fmt: skip
_FORMS = "SARIF 2.1.0, or the JSON of bandit or semgrep, the CSV of flawfinder, the XML of cppcheck (version 2)"


def read_findings(path: Path | str, say: Callable[[str], None] = lambda line: None) -> list[Finding]:
    """The findings of a file that another tool wrote, in its order, without those that it says are none.

    Paths are as the tool gave them, with / between parts, of a file: address its path. Findings that name no file that
    can be, such as one of a damaged address, are left out, and `say` is told how many. Raises DataError for a file that
    is none of these.
    """
    path = Path(path)
    try:
        text = files.read_whole(path, LARGEST, "give findings of fewer files at a time").decode("utf-8-sig")
    except OSError:
        raise DataError(f"{path} cannot be read; give a file of findings: {_FORMS}.") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is no UTF-8; write the findings as {_FORMS}.") from None
    begin = text[:200].lstrip()
    try:
        if begin.startswith("<"):
            found = _cppcheck(text)
        elif begin.startswith("{"):
            found = _json(msgspec.json.decode(text))
        elif begin.lower().startswith("file,line,column"):
            found = _flawfinder(text)
        else:
            raise ValueError("its beginning is that of none of the forms that are known")
        items = [item for _, item in zip(range(MOST), found, strict=False)]
    except (ValueError, RecursionError, expat.ExpatError, csv.Error) as error:
        raise DataError(f"{path} holds no findings that can be read ({_plain(str(error))}); give {_FORMS}.") from None
    placed = [item for item in items if item.path]
    if lost := len(items) - len(placed):
        say(f"{path}: {lost:,} of {len(items):,} findings left out, since they name no file that can be.")
    return placed


def _json(raw: Any) -> Iterator[Finding]:
    if isinstance(raw, dict):
        if isinstance(raw.get("runs"), list):
            return _sarif(raw["runs"])
        results = raw.get("results")
        if isinstance(results, list):
            own = "check_id" if any(isinstance(item, dict) and "check_id" in item for item in results) else "test_id"
            return _semgrep(results) if own == "check_id" else _bandit(results)
    raise ValueError("there are neither runs nor results in it")


# --- SARIF ---


def _sarif(runs: list[Any]) -> Iterator[Finding]:
    for run in _tables(runs):
        driver = _table(_table(run, "tool"), "driver")
        tool = (_plain(driver.get("name")).split() or ["unknown"])[0].lower()[:40]
        extensions = _tables(_table(run, "tool").get("extensions"))
        lists = [_tables(part.get("rules"), keep=True) for part in (driver, *extensions)]
        rules = {item.get("id"): item for rules in reversed(lists) for item in rules if isinstance(item.get("id"), str)}
        bases = {name: _plain(_table(_table(run, "originalUriBaseIds"), name).get("uri"), 4096)
                 for name in _table(run, "originalUriBaseIds")}  # fmt: skip
        for result in _tables(run.get("results")):
            if result.get("kind", "fail") in ("fail", "open", "review") and not _held_back(result):
                yield from _result(result, tool, rules, lists[0], bases)


def _held_back(result: dict[str, Any]) -> bool:
    """Whether the tool says that the finding was accepted, or is gone."""
    suppressions = _tables(result.get("suppressions"))
    accepted = [item for item in suppressions if item.get("status", "accepted") == "accepted"]
    return bool(accepted) or result.get("baselineState") == "absent"


def _result(
    result: dict[str, Any],
    tool: str,
    rules: dict[Any, dict[str, Any]],
    listed: list[dict[str, Any]],
    bases: dict[str, str],
) -> Iterator[Finding]:
    pointer = _table(result, "rule")
    name = _plain(result.get("ruleId") or pointer.get("id"), 200)
    index = result.get("ruleIndex", pointer.get("index"))
    rule = rules.get(name) or rules.get(name.rpartition("/")[0]) or {}
    if not rule and isinstance(index, int) and 0 <= index < len(listed):
        rule = listed[index]
        name = name or _plain(rule.get("id"), 200)
    message = _plain(_table(result, "message").get("text")) or _plain(_table(rule, "shortDescription").get("text"))
    level = result.get("level") or _table(rule, "defaultConfiguration").get("level") or "warning"
    scores = [_table(part, "properties").get("security-severity") for part in (result, rule)]
    severity = next((found for found in map(_by_score, scores) if found), _LEVELS.get(str(level).lower(), "medium"))
    cwe = _sarif_cwe(result, rule, message)
    for location in _tables(result.get("locations"))[:1]:
        physical = _table(location, "physicalLocation")
        artifact, region = _table(physical, "artifactLocation"), _table(physical, "region")
        where = _path(artifact.get("uri"), bases.get(str(artifact.get("uriBaseId")), ""))
        start = _line(region.get("startLine"), 1)
        end = _line(region.get("endLine"), start)
        column = _line(region.get("startColumn"), 1)
        yield Finding(name, cwe, severity, message, where, start, max(start, end), column, tool)


def _sarif_cwe(result: dict[str, Any], rule: dict[str, Any], message: str) -> str:
    """From the nearest place that names one: properties and taxa of the result, of the rule, then the texts."""
    for part in (result, rule):
        properties = _table(part, "properties")
        words = [properties.get("cwe"), properties.get("tags"), part.get("taxa")]
        words += [_table(item, "target").get("id") for item in _tables(part.get("relationships"))]
        if found := _cwe(words):
            return found
    return _cwe([message, rule.get("shortDescription"), rule.get("fullDescription"), rule.get("id")])


def _by_score(score: Any) -> str:
    """Of CVSS's 0 to 10."""
    try:
        value = float(score)
    except (TypeError, ValueError):
        return ""
    return "high" if value >= 7 else "medium" if value >= 4 else "low"


# --- tools of their own ---


def _bandit(results: list[Any]) -> Iterator[Finding]:
    for item in _tables(results):
        if "test_id" not in item:
            continue
        where = _path(item.get("filename"))
        start = _line(item.get("line_number"), 1)
        lines = item.get("line_range")
        lines = [line for line in lines if isinstance(line, int)] if isinstance(lines, list) else []
        number = _table(item, "issue_cwe").get("id")
        yield Finding(
            _plain(item.get("test_id"), 200), weaknesses.normal(number) if isinstance(number, int) else "",
            _level(item.get("issue_severity")), _plain(item.get("issue_text")), where, start,
            _line(max([start, *lines]), start), _line(item.get("col_offset"), 0) + 1, "bandit",
        )  # fmt: skip


def _semgrep(results: list[Any]) -> Iterator[Finding]:
    for item in _tables(results):
        where, extra = _path(item.get("path")), _table(item, "extra")
        if extra.get("is_ignored") is True:
            continue
        start = _line(_table(item, "start").get("line"), 1)
        end = _line(_table(item, "end").get("line"), start)
        message = _plain(extra.get("message"))
        yield Finding(
            _plain(item.get("check_id"), 200), _cwe([_table(extra, "metadata").get("cwe"), message]),
            _level(extra.get("severity")), message, where, start, max(start, end),
            _line(_table(item, "start").get("col"), 1), "semgrep",
        )  # fmt: skip


def _flawfinder(text: str) -> Iterator[Finding]:
    for row in csv.DictReader(io.StringIO(text, newline="")):
        where = _path(row.get("File"))
        start, level = _line(row.get("Line"), 1), _line(row.get("Level"), 1)
        yield Finding(
            _plain(row.get("RuleId") or row.get("Name"), 200), _cwe([row.get("CWEs"), row.get("Warning")]),
            "high" if level >= 4 else "medium" if level == 3 else "low", _plain(row.get("Warning")),
            where, start, start, _line(row.get("Column"), 1), "flawfinder",
        )  # fmt: skip


def _cppcheck(text: str) -> Iterator[Finding]:
    """Only what is asked for is kept of the XML, and a document type, with which entities would come, ends it."""
    found: list[Finding] = []
    error: dict[str, str] = {}
    seen = False

    def refuse(*_: object) -> None:
        raise ValueError("it has a document type, which the files of cppcheck do not")

    def start(name: str, values: dict[str, str]) -> None:
        nonlocal error, seen
        seen |= name == "cppcheck"
        if name == "error":
            error = values
        elif name == "location" and error and error.get("severity") != "information":
            where, line = _path(values.get("file")), _line(values.get("line"), 1)
            if len(found) < MOST:
                number = error.get("cwe", "")
                found.append(Finding(
                    _plain(error.get("id"), 200), weaknesses.normal(number) if number.isdecimal() else "",
                    _level(error.get("severity")), _plain(error.get("msg")), where, line, line,
                    max(1, _line(values.get("column"), 1)), "cppcheck",
                ))  # fmt: skip
            error = {}  # the first location is where it is, the others how it came

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler = start
    parser.Parse(text, True)
    if not seen:
        raise ValueError("it is XML, but not of cppcheck")
    return iter(found)


# --- what is believed ---


def _table(values: Any, key: str) -> dict[str, Any]:
    inner = values.get(key) if isinstance(values, dict) else None
    return inner if isinstance(inner, dict) else {}


def _tables(values: Any, keep: bool = False) -> list[dict[str, Any]]:
    """The tables of a list; with `keep` others stay as empty ones, so that places in it still count."""
    items = values if isinstance(values, list) else []
    return [item if isinstance(item, dict) else {} for item in items if keep or isinstance(item, dict)]


def _plain(text: Any, most: int = WORDS) -> str:
    """A text on one line, without what a terminal would obey."""
    words = " ".join(text.split()) if isinstance(text, str) else ""
    return "".join(letter if letter.isprintable() else "?" for letter in words[:most])


def _line(value: Any, default: int) -> int:
    """A line or column that can be: from `default` up to LINES."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 12:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not default <= value <= LINES:
        return default
    return value


def _level(word: Any) -> str:
    return _LEVELS.get(word.lower() if isinstance(word, str) else "", "medium")


def _cwe(words: Any, depth: int = 0) -> str:
    """The first CWE named in texts, lists of texts, or tables with an id."""
    if isinstance(words, str):
        match = _CWE.search(words[: 4 * WORDS])
        return weaknesses.normal(match[1]) if match else ""
    if isinstance(words, dict):
        taxonomy = _table(words, "toolComponent").get("name")
        prefix = "CWE-" if isinstance(taxonomy, str) and taxonomy.upper() == "CWE" else ""
        identity = words.get("id")
        if prefix and isinstance(identity, str) and identity.isdecimal():
            return weaknesses.normal(identity)
        words = [identity, words.get("text")]
    if isinstance(words, list) and depth < 4:
        return next((found for item in words[:100] if (found := _cwe(item, depth + 1))), "")
    return ""


def _path(text: Any, base: str = "") -> str:
    """A path with / between its parts; of a file: address its path, below `base` where that is one. "" for what is no
    place of a file here."""
    if not isinstance(text, str) or not text or len(text) > 4096 or not text.isprintable():
        return ""
    if base and not re.match(r"[A-Za-z][A-Za-z0-9+.-]+:|/", text):
        text = base.rstrip("/") + "/" + text
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/|file:", text):
        try:
            parts = urlsplit(text)
        except ValueError:  # such as a bracket that is not closed
            return ""
        if parts.scheme != "file":
            return ""
        text = re.sub(r"^/([A-Za-z]:)", r"\1", unquote(parts.path))
    elif "%" in text:
        text = unquote(text)
    plain = PurePosixPath(text.replace("\\", "/")).as_posix()
    return "" if "\0" in plain or plain == "." else plain
