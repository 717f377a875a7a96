"""A scan as text for people and as JSON for programs.

`text` is one line an alert, the worst first, aligned, with places written path:line as editors and terminals find them:

    app/db.py:41      high    CWE-89   0.97  Users.find: SQL put together from parts of text

The JSON has a version of its own, which grows when a field changes its meaning or goes; fields may be added:

    version           1
    shrew             the version that wrote it
    point             name of the operating point; alerts_per_1000: what it costs on ordinary code, null when unknown
    files, functions, seconds, detector ("" for rules alone), notes [text]
    counts            {"high": 1, ...} of alerts
    alerts            the worst first: path, start, end, line (where to look first), name, language, cwe ("" unknown),
                      weakness (its name), rule (as in SARIF), severity, probability, message, help, fingerprint,
                      findings [{tool, rule, cwe, severity, message, path, start, end, column}],
                      lines [{line, score, shade}]: shade is 0 to 1, the score beside the function's other lines;
                      suppressed: "" or why it is held back
    suppressed        as alerts
    skipped           [{path, why}]
"""

import importlib.metadata
import json
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from shrew.report import words
from shrew.scan import cwe as weaknesses
from shrew.scan.alerts import Alert, Report, by_severity, ordered
from shrew.scan.sarif import MOST_TEXT, clean, rule_id

if TYPE_CHECKING:
    from rich.text import Text

Part = tuple[str, str]  # text and its style, as rich names it

STYLES = {"low": "cyan", "medium": "yellow", "high": "bold red"}
WIDEST_PLACE, WIDEST_LINE, MOST_SKIPPED, MOST_FINDINGS = 56, 160, 20, 20
HOT = 0.5  # the shade from which a line is said to matter

# Besides what `words.plain` marks: characters that are not seen at all, and one more that reorders text.
_UNSEEN = re.compile("[\u00ad\u061c\u180e\u200b-\u200d\u2028\u2029\u2060-\u2064\ufeff\U000e0000-\U000e007f]")


def visible(text: str) -> str:
    """Code as it is, with everything that would hide or reorder it on screen made visible."""
    return words.plain(_UNSEEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text))


def one_line(text: str, most: int) -> str:
    """Visible text without line breaks or runs of spaces, cut at `most` characters."""
    told = visible(" ".join(text[: 4 * most].split()))
    return told if len(told) <= most and len(text) <= 4 * most else told[: most - 1] + "…"


def count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def shown_lines(alert: Alert, hot: int = 3) -> list[tuple[int, str, str]]:
    """The lines that matter, in order: number, code, and what marks it ("score", or the rule that speaks of it)."""
    texts, shades, start = alert.function.text.split("\n"), alert.shades(), alert.function.start
    best = sorted(range(len(texts)), key=lambda at: -shades[at])[:hot]
    marks = {at: ["score"] for at in best if shades[at] >= HOT}
    for item in alert.findings[:MOST_FINDINGS]:
        if 0 <= item.start - start < len(texts):
            who = item.rule if item.tool == "shrew" else f"{item.tool} {item.rule}"
            marks.setdefault(item.start - start, []).append(who)
    return [(start + at, texts[at], ", ".join(dict.fromkeys(marks[at]))) for at in sorted(marks)]


def summary(report: Report) -> str:
    """'3 new alerts (1 high, 2 medium) in 12 files, 340 functions, 1.2 s.'"""
    kinds = ", ".join(f"{number:,} {severity}" for severity, number in by_severity(report.alerts).items())
    new = "new " if report.compared else ""
    alerts = count(len(report.alerts), f"{new}alert") if report.alerts else f"no {new}alerts"
    where = f"{count(report.files, 'file')}, {count(report.functions, 'function')}, {words.duration(report.seconds)}"
    held = f" {count(len(report.suppressed), 'alert')} held back." if report.suppressed else ""
    told = f"{alerts}{f' ({kinds})' if kinds else ''} in {where}.{held}"
    return (told[0].upper() + told[1:]).replace(words.SPACE, " ")


def operating_point(report: Report) -> str:
    """What the point means, in alerts: "Point 'balanced': some 5 alerts per 1,000 functions of ordinary code."."""
    if not report.point:
        return ""
    name = one_line(report.point, 60)
    if report.alerts_per_1000 is None:
        return f"Point '{name}'."
    return f"Point '{name}': some {report.alerts_per_1000:.3g} alerts per 1,000 functions of ordinary code."


def _parts(report: Report, explain: bool) -> Iterator[Part]:
    alerts = ordered(report.alerts)
    places = [f"{one_line(alert.path, 4096)}:{alert.first_line()}" for alert in alerts]
    wide = max((len(place) for place in places if len(place) <= WIDEST_PLACE), default=0)
    severe = max((len(alert.severity) for alert in alerts), default=0)
    ids = max((len(_short(alert)) for alert in alerts), default=0)
    for alert, place in zip(alerts, places, strict=True):
        yield f"{place:<{wide}}", "bold"
        yield f"  {alert.severity:<{severe}}", STYLES[alert.severity]
        yield f"  {_short(alert):<{ids}}  {alert.probability:.2f}  ", ""
        yield f"{one_line(alert.function.name, 80)}: ", "bold"
        yield f"{one_line(alert.told, 240)}\n", ""
        if explain:
            yield from _explained(alert)
    if alerts:
        yield "\n", ""
    for path, why in report.skipped[:MOST_SKIPPED]:
        yield f"not scanned: {one_line(path, 4096)}: {one_line(why, 240)}\n", "dim"
    if len(report.skipped) > MOST_SKIPPED:
        yield f"not scanned: {len(report.skipped) - MOST_SKIPPED:,} more\n", "dim"
    for note in report.notes:
        yield one_line(note, MOST_TEXT) + "\n", "dim"
    yield summary(report) + "\n", "bold"
    if point := operating_point(report):
        yield point + "\n", "dim"


def _short(alert: Alert) -> str:
    return weaknesses.normal(alert.cwe) or "CWE ?"


def _explained(alert: Alert) -> Iterator[Part]:
    """The lines that matter, and what to do."""
    found = shown_lines(alert)
    width = len(str(found[-1][0])) if found else 0
    cut = [visible(code[: 4 * WIDEST_LINE].expandtabs(4).rstrip()) for _, code, _ in found]
    cut = [code if len(code) <= WIDEST_LINE else code[: WIDEST_LINE - 1] + "…" for code in cut]
    room = max(map(len, cut), default=0)
    for (number, _, mark), code in zip(found, cut, strict=True):
        yield f"    {number:>{width}} │ ", "dim"
        yield f"{code:<{room}}", ""
        yield f"  ◂ {one_line(mark, 80)}\n", "dim"
    yield f"    {alert.weakness.help}\n", "italic"


def text(report: Report, explain: bool = False) -> str:
    """Plain text. `explain`: below each alert the lines that moved its score or that a rule speaks of."""
    return "".join(part for part, _ in _parts(report, explain))


def styled(report: Report, explain: bool = False) -> "Text":
    """The same text in colours, for a rich console."""
    from rich.text import Text

    return Text.assemble(*_parts(report, explain), no_wrap=True, overflow="ignore", end="")


def show(report: Report, explain: bool = False) -> None:
    """Print to the standard output: coloured in a terminal, plain in a pipe or file."""
    if not sys.stdout.isatty():
        print(text(report, explain), end="")
        return
    from rich.console import Console

    Console(highlight=False, soft_wrap=True).print(styled(report, explain), end="")


def plain(report: Report) -> dict[str, Any]:
    """The values of the JSON."""
    return {
        "version": 1,
        "shrew": importlib.metadata.version("shrew"),
        "point": clean(report.point),
        "alerts_per_1000": report.alerts_per_1000,
        "detector": clean(report.detector),
        "files": report.files,
        "functions": report.functions,
        "seconds": round(report.seconds, 3),
        "counts": by_severity(report.alerts),
        "notes": [clean(note) for note in report.notes],
        "alerts": [_plain(alert) for alert in ordered(report.alerts)],
        "suppressed": [_plain(alert) for alert in ordered(report.suppressed)],
        "skipped": [{"path": clean(path, 4096), "why": clean(why)} for path, why in report.skipped],
    }


def _plain(alert: Alert) -> dict[str, Any]:
    function = alert.function
    scores = zip(alert.lines, alert.shades(), strict=False)
    return {
        "path": clean(alert.path, 4096),
        "start": function.start,
        "end": function.end,
        "line": alert.first_line(),
        "name": clean(function.name),
        "language": function.source.language,
        "cwe": weaknesses.normal(alert.cwe),
        "weakness": alert.weakness.name,
        "rule": rule_id(alert.cwe),
        "severity": alert.severity,
        "probability": round(alert.probability, 6),
        "message": clean(alert.told),
        "help": alert.weakness.help,
        "fingerprint": alert.fingerprint,
        "suppressed": alert.suppressed,
        "findings": [{"tool": clean(item.tool), "rule": clean(item.rule), "cwe": weaknesses.normal(item.cwe),
                      "severity": clean(item.severity), "message": clean(item.message), "path": clean(item.path, 4096),
                      "start": item.start, "end": item.end, "column": item.column} for item in alert.findings],
        "lines": [{"line": function.start + at, "score": _finite(score), "shade": round(shade, 4)}
                  for at, (score, shade) in enumerate(scores)],
    }  # fmt: skip


def _finite(score: float) -> float | None:
    value = words.number_in(float(score))
    return None if value is None else round(value, 4)


def to_json(report: Report) -> str:
    return json.dumps(plain(report), allow_nan=False) + "\n"
