"""A scan as one self-contained HTML page: nothing is fetched, nothing runs, and what was scanned is only ever text.

Everything is bounded: the worst alerts are shown with their code, more of them in a table, the rest are counted.
"""

from collections import Counter
from collections.abc import Sequence

from shrew.report.frame import document, scroll, section, table
from shrew.report.words import escape
from shrew.scan import cwe as weaknesses
from shrew.scan import show
from shrew.scan.alerts import Alert, Report, by_file, by_severity, ordered
from shrew.scan.cwe import FAMILIES, SEVERITIES
from shrew.scan.sarif import REASONS

MOST_SHOWN = 200  # alerts with their code
MOST_FOLDED = 3_000_000  # letters after which long functions are no longer given whole
MOST_ROWS = 2000  # of any table
MOST_LINES = 400  # of one function
MOST_LETTERS = 400  # of one line
SHORT = 24  # a function of so many lines is shown whole
AROUND = 3  # lines shown before and after one that matters

STYLE = """
:root{--high:#b3261e;--medium:#875300;--low:#51606b;--heat:214,120,20}
@media (prefers-color-scheme:dark){:root{--high:#ff8a7d;--medium:#e8b04a;--low:#a7b4bf;--heat:232,150,50}}
main,footer{max-width:60rem}
.facts{grid-template-columns:repeat(auto-fit,minmax(7.5rem,1fr))}
.counted th:first-child{width:99%}.counted .todo{min-width:24rem}
.sev{font-weight:650;white-space:nowrap}
.sev.high{color:var(--high)}.sev.medium{color:var(--medium)}.sev.low{color:var(--low)}
a{color:var(--accent);text-decoration-thickness:1px;text-underline-offset:3px}
article{margin:1.5rem 0 2.75rem;scroll-margin-top:1rem}
article h3{margin:0;font-size:1.0625rem;line-height:1.4}
article h3 .name{font-size:.9375rem;font-weight:600}
.where{margin:.1rem 0 .5rem;color:var(--soft);font-size:.8125rem}
article p{margin:.25rem 0;font-size:.9375rem}
.help{color:var(--soft)}
.said{margin:.6rem 0;padding:0;list-style:none;font-size:.875rem}
.said li{padding:.15rem 0 .15rem .75rem;border-left:2px solid var(--line)}
.said .who{color:var(--soft)}
h2.file{margin-top:3rem;padding-bottom:.35rem;border-bottom:1px solid var(--line);
font-family:var(--mono);font-size:1rem;scroll-margin-top:1rem}
.code{margin:.75rem 0;padding:.4rem 0;background:var(--wash);border-radius:6px;direction:ltr;
font:.8125rem/1.5 var(--mono)}
.code div{display:grid;grid-template-columns:4rem 1fr}
.code .n{padding-right:.9rem;color:var(--soft);text-align:right;user-select:none;-webkit-user-select:none}
.code code{padding-right:.75rem;font-size:inherit;white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4;
unicode-bidi:isolate;min-width:0}
.code .gap{color:var(--soft)}
.s1{background:rgba(var(--heat),.10)}.s2{background:rgba(var(--heat),.20)}.s3{background:rgba(var(--heat),.32)}
.rule .n{box-shadow:inset 3px 0 var(--accent);color:var(--ink);font-weight:650}
.code+details,.code+.code{margin-top:-.25rem}
details .code{margin-top:0}
.scale{display:inline-flex;gap:2px;vertical-align:-1px;margin:0 .3rem}.scale i{width:1.1rem;height:.8rem;display:block}
.bar{display:flex;height:.5rem;margin:.9rem 0 0;border-radius:3px;overflow:hidden;gap:2px}
.bar i{display:block;min-width:3px}.bar .high{background:var(--high)}.bar .medium{background:var(--medium)}
.bar .low{background:var(--low)}
@media (max-width:40rem){.todo{display:none}.code div{grid-template-columns:3rem 1fr}.code .n{padding-right:.55rem}
.code{margin-inline:-.5rem}}
@media print{:root{--high:#8f1f18;--medium:#6b4200;--low:#444;--heat:214,120,20}.code{border:1px solid var(--line)}
.code div{break-inside:avoid}article h3,.where,h2.file{break-after:avoid}}
"""


def page(report: Report) -> str:
    """The whole HTML document."""
    told = show.summary(report)
    alerts = ordered(report.alerts)
    body = _header(report, told.partition(" in ")[0].partition(" (")[0]) + _weaknesses(alerts) + _files(alerts)
    body += _alerts(alerts) + _rest(alerts[MOST_SHOWN:]) + _held(report) + _skipped(report) + _method(report)
    footer = f"<footer>Made by shrew scan. {escape(told)}</footer>\n"
    return document(told, f"<main>\n{body}</main>\n{footer}", STYLE)


def _text(value: str, most: int = 400) -> str:
    """One line of foreign text, escaped and bounded."""
    return escape(show.one_line(value, most))


def _header(report: Report, title: str) -> str:
    where = [text for text in (report.detector, report.point and f"point “{report.point}”") if text]
    counts = by_severity(report.alerts)
    figures = [(f"{counts[severity]:,}", severity) for severity in counts]
    figures += [(f"{len(by_file(report.alerts)):,} of {report.files:,}", "files with alerts"),
                (f"{report.functions:,}", "functions")]  # fmt: skip
    if report.functions:
        figures.append((f"{1000 * len(report.alerts) / report.functions:.3g}", "alerts per 1,000 functions"))
    facts = "".join(
        f'<div><dt>{escape(name)}</dt><dd{f""" class="sev {name}" """.rstrip() if name in SEVERITIES else ""}>'
        f"{escape(figure)}</dd></div>"
        for figure, name in figures
    )
    parts = "".join(f'<i class="{severity}" style="flex:{counts[severity]}"></i>' for severity in counts)
    bar = f'<div class="bar" aria-hidden="true">{parts}</div>' if parts else ""
    notes = "".join(f'<p class="note">{_text(note, 1000)}</p>\n' for note in report.notes[:20])
    eyebrow = " · ".join(["shrew scan", *(_text(text, 120) for text in where)])
    return (f'<header>\n<p class="eyebrow">{eyebrow}</p>\n<h1>{escape(title)}</h1>\n{bar}{notes}'
            f'<dl class="facts">{facts}</dl>\n</header>\n')  # fmt: skip


def _severity(severity: str) -> str:
    return f'<span class="sev {severity}">{severity}</span>'


def _counts(alerts: Sequence[Alert]) -> str:
    counts = Counter(alert.severity for alert in alerts)
    return "".join(f'<td class="num">{counts[severity] or "–"}</td>' for severity in reversed(SEVERITIES))


SEVERITY_HEADS = [("num", severity.capitalize()) for severity in reversed(SEVERITIES)]


def _weaknesses(alerts: Sequence[Alert]) -> str:
    rows = []
    found: dict[str, list[Alert]] = {}
    for alert in alerts:
        found.setdefault(alert.weakness.family, []).append(alert)
    for family, here in found.items():  # the worst first, as the alerts are
        head = FAMILIES[family][0]
        ids = ", ".join(sorted({weaknesses.normal(alert.cwe) for alert in here if alert.cwe})[:6])
        rows.append(f'<tr><th scope="row">{escape(head.name)}<small>{escape(ids)}</small></th>{_counts(here)}'
                    f'<td class="todo">{escape(head.help)}</td></tr>\n')  # fmt: skip
    head_row = [("", "Weakness"), *SEVERITY_HEADS, ("todo", "What to do")]
    return section("By weakness", "", scroll("Weaknesses", table(head_row, rows, "counted"))) if rows else ""


def _files(alerts: Sequence[Alert]) -> str:
    groups = by_file(alerts)
    shown = set(by_file(alerts[:MOST_SHOWN]))
    rows = []
    for number, (path, here) in enumerate(groups.items()):
        if number == MOST_ROWS:
            break
        name = f'<a href="#f{number}">{_text(path)}</a>' if path in shown else _text(path)
        rows.append(f'<tr><th scope="row" class="name">{name}</th>{_counts(here)}</tr>\n')
    more = f" The table has the first {MOST_ROWS:,}." if len(groups) > MOST_ROWS else ""
    note = f"{show.count(len(groups), 'file')}{', the worst first' * (len(groups) > 1)}.{more}"
    body = scroll("Files", table([("", "File"), *SEVERITY_HEADS], rows, "counted"))
    if len(groups) > 12:
        body = f"<details>\n<summary>{show.count(len(groups), 'file')}</summary>\n{body}</details>\n"
    return section("By file", note, body) if rows else ""


def _alerts(alerts: Sequence[Alert]) -> str:
    """The worst alerts with their code, by file."""
    if not alerts:
        return ""
    places = {path: number for number, path in enumerate(by_file(alerts))}
    body = ""
    for path, here in by_file(alerts[:MOST_SHOWN]).items():
        body += f'<h2 class="file" id="f{places[path]}">{_text(path)}</h2>\n'
        for alert in here:
            body += _alert(alert, whole=len(body) < MOST_FOLDED)
    scale = '<span class="scale" aria-hidden="true"><i class="s1"></i><i class="s2"></i><i class="s3"></i></span>'
    shaded = any(max(alert.shades(), default=0) > 0 for alert in alerts[:MOST_SHOWN])
    ruled = any(alert.findings for alert in alerts[:MOST_SHOWN])
    notes = [f"Shaded lines {scale} moved the score most, beside the other lines of their function." if shaded else "",
             "A bar beside the number marks lines that a rule speaks of." if ruled else "",
             f"The worst {MOST_SHOWN:,} of {len(alerts):,}." if len(alerts) > MOST_SHOWN else ""]  # fmt: skip
    return section("The alerts", " ".join(note for note in notes if note), body)


def _alert(alert: Alert, whole: bool) -> str:
    function = alert.function
    cwe = weaknesses.normal(alert.cwe)
    kind = alert.weakness.name
    link = f'<a href="https://cwe.mitre.org/data/definitions/{cwe[4:]}.html">{cwe}</a>' if cwe else "no CWE"
    span = f"lines {function.start:,} to {function.end:,}" if function.end > function.start else "one line"
    said = {kind, *(item.message for item in alert.findings)}
    message = "" if alert.told in said else f"<p>{_text(alert.told, 1000)}</p>\n"
    return (
        f'<article>\n<h3>{_severity(alert.severity)} {escape(kind)} in <span class="name">{_text(function.name, 160)}'
        f'</span></h3>\n<p class="where">{_text(alert.path)}:{alert.first_line()} · {span} · {link} · probability '
        f"{alert.probability:.2f}</p>\n{message}{_said(alert)}{_code(alert, whole)}"
        f'<p class="help">{escape(alert.weakness.help)}</p>\n</article>\n'
    )


def _said(alert: Alert) -> str:
    items = [
        f'<li><span class="who">{_text(item.tool, 40)} {_text(item.rule, 120)}, line {item.start:,}:</span> '
        f"{_text(item.message, 500)}</li>\n"
        for item in alert.findings[:20]
    ]
    if len(alert.findings) > 20:
        items.append(f"<li>and {len(alert.findings) - 20:,} more</li>\n")
    return f'<ul class="said">\n{"".join(items)}</ul>\n' if items else ""


def _code(alert: Alert, whole: bool) -> str:
    """The function, whole where it is short; else the lines around those that matter, and the whole folded."""
    texts = alert.function.text.rstrip("\n").split("\n")
    shades, start = alert.shades(), alert.function.start
    ruled = {item.start - start + step for item in alert.findings
             for step in range(min(max(item.end - item.start, 0), 20) + 1)}  # fmt: skip

    def line(at: int) -> str:
        return _line(start + at, texts[at], shades[at], at in ruled)

    if len(texts) <= SHORT:
        return _box("".join(map(line, range(len(texts)))))
    matter = {number - start for number, *_ in show.shown_lines(alert, 4)} or {0}
    near = sorted({at for place in matter for at in range(place - AROUND, place + AROUND + 1) if 0 <= at < len(texts)})
    if 0 not in near:
        near.insert(0, 0)  # what the function is called and given
    part, last = "", -1
    for at in near[:60]:
        if at > last + 1:
            part += _gap(f"{show.count(at - last - 1, 'line')}")
        part += line(at)
        last = at
    if last < len(texts) - 1:
        part += _gap(show.count(len(texts) - 1 - last, "line"))
    if not whole:
        return _box(part)
    lines = "".join(map(line, range(min(len(texts), MOST_LINES))))
    if len(texts) > MOST_LINES:
        lines += _gap(f"{len(texts) - MOST_LINES:,} more lines")
    folded = f"<summary>The whole function, {len(texts):,} lines</summary>\n{_box(lines)}"
    return f"{_box(part)}<details>\n{folded}</details>\n"


def _box(lines: str) -> str:
    return f'<div class="code">\n{lines}</div>\n'


def _line(number: int, text: str, shade: float, ruled: bool) -> str:
    level = sum(shade >= bound for bound in (0.25, 0.5, 0.8))
    kinds = " ".join([f"s{level}"] * (level > 0) + ["rule"] * ruled)
    code = text.removesuffix("\r")
    more = f"… ({len(code):,} characters)" if len(code) > MOST_LETTERS else ""
    told = escape(show.visible(code[:MOST_LETTERS])) + more
    return f'<div class="{kinds}"><span class="n">{number}</span><code>{told}</code></div>\n'


def _gap(told: str) -> str:
    return f'<div class="gap"><span class="n">⋮</span><span>{told}</span></div>\n'


def _rows(alerts: Sequence[Alert], reason: bool) -> str:
    rows = []
    for alert in alerts[:MOST_ROWS]:
        why = f"<td>{escape(REASONS.get(alert.suppressed, alert.suppressed))}</td>" if reason else ""
        rows.append(f'<tr><th scope="row" class="name">{_text(alert.path)}:{alert.first_line()}</th>'
                    f"<td>{_severity(alert.severity)}</td><td>{escape(alert.weakness.name)}</td>"
                    f'<td class="name">{_text(alert.function.name, 120)}</td>'
                    f'<td class="num">{alert.probability:.2f}</td>{why}</tr>\n')  # fmt: skip
    head = [("", "Place"), ("", "Severity"), ("", "Weakness"), ("", "Function"), ("num", "Probability")]
    return scroll("Alerts", table([*head, ("", "Why")] if reason else head, rows)) + _more(len(alerts))


def _more(number: int) -> str:
    return f'<p class="note">And {number - MOST_ROWS:,} more.</p>\n' if number > MOST_ROWS else ""


def _rest(alerts: Sequence[Alert]) -> str:
    return section(f"{len(alerts):,} further alerts", "Without their code.", _rows(alerts, False)) if alerts else ""


def _held(report: Report) -> str:
    if not report.suppressed:
        return ""
    summary = show.count(len(report.suppressed), "alert")
    body = f"<details>\n<summary>{summary}</summary>\n{_rows(ordered(report.suppressed), True)}</details>\n"
    return section("Held back", "Found, and left out for the reason given.", body)


def _skipped(report: Report) -> str:
    if not report.skipped:
        return ""
    rows = [f'<tr><th scope="row" class="name">{_text(path)}</th><td>{_text(why)}</td></tr>\n'
            for path, why in report.skipped[:MOST_ROWS]]  # fmt: skip
    more = _more(len(report.skipped))
    files = show.count(len(report.skipped), "file")
    body = scroll("Files not scanned", table([("", "File"), ("", "Why")], rows)) + more
    return section("Not scanned", "", f"<details>\n<summary>{files}</summary>\n{body}</details>\n")


def _method(report: Report) -> str:
    """What the numbers mean, and what they do not."""
    points = [
        "The probability is a reason to look, not a proof. " + (
            "It was calibrated on functions of which it is known whether they were repaired." if report.detector else
            "It comes from rules alone here, as no detector was run, and says no more than their severity."),
        "No alert does not mean no weakness.",
    ]
    if report.alerts_per_1000 is not None:
        points.insert(0, f"The operating point gives some {report.alerts_per_1000:.3g} alerts per 1,000 functions of "
                         "ordinary code, measured on packages that the model has not seen.")  # fmt: skip
    return section("How to read this", "", "".join(f"<p>{escape(point)}</p>\n" for point in points))
