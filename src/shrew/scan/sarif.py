"""A scan as SARIF 2.1.0 (OASIS, errata 01), and as the Code Quality report of GitLab.

A rule is a CWE family; its id, index and tags are the same in every file, whatever was found. `partialFingerprints`
hold `shrewFunction/v1`, the alert's fingerprint and its number among equal functions of the file: nothing in it moves
when other code does. `primaryLocationLineHash` is left to the uploader, which makes it itself and warns of others.
GitHub shows suppressed results as open ones, so they are left out unless asked for.
"""

import importlib.metadata
import json
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from shrew.scan import cwe as weaknesses
from shrew.scan.alerts import BASELINE, Alert, Report, numbered, ordered
from shrew.scan.cwe import FAMILIES, UNKNOWN, Weakness

if TYPE_CHECKING:
    from shrew.scan.rules import Finding

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
ROOT = "%SRCROOT%"
FINGERPRINT = "shrewFunction/v1"
NOTIFICATIONS = {"shrew/skipped": "A file that was not scanned.", "shrew/note": "How the scan was done."}
LEVELS = {"low": "note", "medium": "warning", "high": "error"}
MOST_NOTIFICATIONS, MOST_RELATED, MOST_TEXT, MOST_SNIPPET = 1000, 50, 1000, 2000
REASONS = {
    "inline": "a comment in the code",
    "path": "the file's path is left out",
    "cwe": "this weakness is left out",
    BASELINE: "known from the baseline",
}


def sarif(report: Report, suppressed: bool = False) -> str:
    """The log file as text. `suppressed`: with what is held back, marked so; else without."""
    alerts = ordered(report.alerts) + (ordered(report.suppressed) if suppressed else [])
    numbers = {id(alert): number for alert, number in numbered([*report.alerts, *report.suppressed])}
    results = []
    texts: dict[str, list[str]] = {}  # the lines of each file, split once
    for alert in alerts:
        if alert.path not in texts:
            texts[alert.path] = alert.function.source.text.split("\n")
        found = _result(alert, numbers[id(alert)], texts[alert.path])
        if suppressed:  # on every result or on none, as the standard has it
            found["suppressions"] = [_suppression(alert)] if alert.suppressed else []
        if report.compared:
            found["baselineState"] = "unchanged" if alert.suppressed == BASELINE else "new"
        results.append(found)
    version = importlib.metadata.version("shrew")
    driver = {"name": "shrew", "fullName": f"shrew scan {version}", "version": version, "semanticVersion": version,
              "rules": [_rule(family) for family in FAMILIES],
              "notifications": [{"id": id, "name": _pascal(id), "shortDescription": {"text": text},
                                 "fullDescription": {"text": text}, "help": {"text": text}}
                                for id, text in NOTIFICATIONS.items()]}  # fmt: skip
    point = {"operatingPoint": clean(report.point), "alertsPer1000Functions": report.alerts_per_1000}
    counts = {"files": report.files, "functions": report.functions, "detector": clean(report.detector)}
    run = {
        "tool": {"driver": driver},
        "invocations": [{"executionSuccessful": True, "toolExecutionNotifications": _notifications(report)}],
        "originalUriBaseIds": {ROOT: {"description": {"text": "The folder that the scan was started in."}}},
        "columnKind": "unicodeCodePoints",
        "results": results,
        "properties": point | counts,
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1, allow_nan=False) + "\n"


def rule_id(cwe: str) -> str:
    return f"shrew/{weaknesses.family(cwe)}"


def clean(text: str, most: int = MOST_TEXT) -> str:
    """Text that every reader of JSON takes: lone surrogates replaced, cut at `most` characters."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text if len(text) <= most else text[: most - 1] + "…")


def uri(path: str) -> str:
    """A posix path as a URI reference: everything but unreserved characters and slashes percent-encoded, bytes that
    are no UTF-8 as they are on disk."""
    try:
        raw = path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raw = path.encode("utf-8", "replace")
    if re.match(r"[A-Za-z]:[/\\]", path):
        return "file:///" + path[0] + ":" + quote(raw[2:].replace(b"\\", b"/"))
    return ("file://" if path.startswith("/") else "") + quote(raw)


def _place(path: str, start: int, end: int, column: int = 1) -> dict[str, Any]:
    where = {"uri": uri(path)}
    if not where["uri"].startswith("file:"):
        where["uriBaseId"] = ROOT
    first = max(start, 1)
    region = {"startLine": first, "endLine": max(end, first)} | ({"startColumn": column} if column > 1 else {})
    return {"artifactLocation": where, "region": region}


def _result(alert: Alert, number: int, lines: list[str]) -> dict[str, Any]:
    function, at = alert.function, alert.first_line()
    primary = next((item for item in alert.findings if item.start == at), None)
    if primary:
        place = _place(alert.path, at, min(primary.end, function.end), primary.column)
    else:
        place = _place(alert.path, at, at)
    region = place["region"]
    code = "\n".join(lines[region["startLine"] - 1 : region["endLine"]]).removesuffix("\r")
    if region.get("startColumn", 1) > len(code.partition("\n")[0]):
        region.pop("startColumn", None)
    code = code[region.get("startColumn", 1) - 1 :]
    if code and len(code) <= MOST_SNIPPET:
        region["snippet"] = {"text": clean(code, MOST_SNIPPET)}
    if function.start <= region["startLine"] and region["endLine"] <= function.end:
        place["contextRegion"] = {"startLine": max(function.start, 1), "endLine": max(function.end, 1)}
    name = clean(function.name, 300) or "?"
    logical = {"name": name.rpartition(".")[2] or name, "fullyQualifiedName": name, "kind": "function"}
    family = alert.weakness.family
    return {
        "ruleId": f"shrew/{family}",
        "ruleIndex": list(FAMILIES).index(family),
        "level": LEVELS[alert.severity],
        "message": {"text": _sentence(f"{alert.told.rstrip('.')} (in {function.name}).")},
        "locations": [{"physicalLocation": place, "logicalLocations": [logical]}],
        "relatedLocations": _related(alert, primary, at),
        "partialFingerprints": {FINGERPRINT: f"{alert.fingerprint}:{number}"},
        "rank": round(100 * min(max(alert.probability, 0.0), 1.0), 2),
        "properties": {"cwe": weaknesses.normal(alert.cwe), "probability": round(alert.probability, 6),
                       "security-severity": f"{alert.weakness.score:.1f}"},
    }  # fmt: skip


def _sentence(text: str) -> str:
    """A message without what SARIF reads as a link: '[text](target)'."""
    return clean(text).replace("](", "] (")


def _related(alert: Alert, primary: "Finding | None", at: int) -> list[dict[str, Any]]:
    """What rules and other tools said, and the lines that moved the score."""
    found = []
    foreign = [primary] if primary and primary.tool != "shrew" else []
    for item in [*foreign, *(item for item in alert.findings if item is not primary)]:
        said = f"{item.tool} {item.rule}: {item.message}"
        found.append((_place(item.path, item.start, item.end, item.column), said))
    start, shades = alert.function.start, alert.shades()
    hot = sorted(range(len(shades)), key=lambda line: -shades[line])[:3]
    for line in sorted(hot):
        if shades[line] > 0.5 and start + line != at and start + line <= alert.function.end:
            found.append((_place(alert.path, start + line, start + line), "This line raised the score."))
    return [{"id": number, "physicalLocation": place, "message": {"text": _sentence(said)}}
            for number, (place, said) in enumerate(found[:MOST_RELATED], 1)]  # fmt: skip


def _suppression(alert: Alert) -> dict[str, str]:
    kind = "inSource" if alert.suppressed == "inline" else "external"
    return {"kind": kind, "status": "accepted", "justification": clean(REASONS.get(alert.suppressed, alert.suppressed))}


def _notifications(report: Report) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = [
        {"descriptor": {"id": "shrew/note"}, "level": "note", "message": {"text": _sentence(note)}}
        for note in report.notes
    ]
    for path, why in report.skipped[:MOST_NOTIFICATIONS]:
        where = _place(path, 1, 1)["artifactLocation"]
        told.append({"descriptor": {"id": "shrew/skipped"}, "level": "warning", "message": {"text": _sentence(why)},
                     "locations": [{"physicalLocation": {"artifactLocation": where}}]})  # fmt: skip
    if len(report.skipped) > MOST_NOTIFICATIONS:
        text = f"{len(report.skipped) - MOST_NOTIFICATIONS:,} more files were not scanned."
        told.append({"descriptor": {"id": "shrew/skipped"}, "level": "warning", "message": {"text": text}})
    return told


def _rule(family: str) -> dict[str, Any]:
    """The description of a family, the same in every file."""
    members = FAMILIES[family]
    head = members[0]
    links = [f"[{item.id}](https://cwe.mitre.org/data/definitions/{item.number}.html) {item.name}: {item.help}"
             for item in members if item.number]  # fmt: skip
    unsure = ("The model found this function to be like vulnerable ones, and could not say in which way."
              if family == UNKNOWN else f"The code resembles, or matches a rule for: {head.name.lower()}.")  # fmt: skip
    found = {
        "id": f"shrew/{family}",
        "name": _pascal(family),
        "shortDescription": {"text": head.name + "."},
        "fullDescription": {"text": f"{unsure} {head.help}"},
        "help": {"text": "\n".join([unsure, *(_plain_help(item) for item in members)]),
                 "markdown": "\n".join([unsure, "", *(f"- {link}" for link in links or [head.help])])},
        "defaultConfiguration": {"level": LEVELS[head.severity]},
        "properties": {
            "tags": ["security", *(f"external/cwe/cwe-{item.number:03d}" for item in members if item.number)],
            "precision": "medium",
            "problem.severity": LEVELS[head.severity].replace("note", "recommendation"),
            "security-severity": f"{head.score:.1f}",
        },
    }  # fmt: skip
    if head.number:
        found["helpUri"] = f"https://cwe.mitre.org/data/definitions/{head.number}.html"
    return found


def _pascal(name: str) -> str:
    return "".join(word.capitalize() for word in name.rpartition("/")[2].split("-"))


def _plain_help(item: Weakness) -> str:
    return f"{item.id} {item.name}: {item.help}" if item.number else item.help


def code_quality(report: Report) -> str:
    """GitLab's Code Quality report, which merge requests show at every tier: a list of alerts, the worst first."""
    words = {"low": "minor", "medium": "major", "high": "critical"}
    numbers = {id(alert): number for alert, number in numbered([*report.alerts, *report.suppressed])}
    found = []
    for alert in ordered(report.alerts):
        at = max(alert.first_line(), 1)
        path = clean(alert.path, 4096)
        unique = f"{alert.fingerprint}:{numbers[id(alert)]}:{uri(alert.path)}"  # or GitLab drops one of two
        found.append({"description": clean(f"{alert.told.rstrip('.')} (in {alert.function.name})."),
                      "check_name": rule_id(alert.cwe), "fingerprint": unique, "severity": words[alert.severity],
                      "location": {"path": path, "lines": {"begin": at}}})  # fmt: skip
    return json.dumps(found, indent=1) + "\n"


__all__ = ["code_quality", "rule_id", "sarif", "uri"]
