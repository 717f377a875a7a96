"""The page: one function a section, each returning '' when its records are missing."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from shrew.record import Record
from shrew.report import forgotten, plot, tables, words
from shrew.report.frame import document, scroll, section, small, table
from shrew.report.view import CHOSEN, ORIGINAL, View, facts, proof_note, sentence, split_of
from shrew.report.words import escape


def page(view: View) -> str:
    """The whole HTML document."""
    told = sentence(view)
    title = told.partition(";")[0] if told else f"Measured: {', '.join(view.columns)}"
    parts = [_frontier, _models, _moves, _orders, _samples, forgotten.section, _tensors, _recipe, _tools, _method]
    body = "".join(part(view) for part in parts)
    return document(title, f"<main>\n{_header(view, told)}{body}</main>\n{_footer(view)}")


def _header(view: View, told: str) -> str:
    state = ""
    if view.verdict is not None:
        mark, text = ("met", "✓ floor met") if view.met else ("missed", "✗ floor not met")
        state = f'<span class="state {mark}">{text}</span>'
    model = words.text_in(view.plan.get("model"))
    where = [escape(text) for text in (model, view.run) if text]
    heading = told or ("Measured: " + ", ".join(view.columns) if view.columns else "Records")
    note = proof_note(view)
    shown = facts(view)
    figures = "".join(f"<div><dt>{escape(text)}</dt><dd>{escape(figure)}</dd></div>" for figure, text in shown)
    return (
        f'<header>\n<p class="eyebrow">{state}{" · ".join(where)}</p>\n<h1>{escape(heading)}</h1>\n'
        + (f'<p class="note">{escape(note)}</p>\n' if note else "")
        + (f'<dl class="facts">{figures}</dl>\n' if figures else "")
        + "</header>\n"
    )


def _frontier(view: View) -> str:
    shown = plot.points(view)
    if not shown:
        return ""
    wide, narrow = plot.frontier(view, shown, 720, "wide"), plot.frontier(view, shown, 340, "narrow")
    keys = "".join(f"<li>{key}{text}</li>" for key, text in plot.legend(shown, view))
    trials = sum(point.kind == "trial" and point.split == "search" for point in shown)
    note = "Further left is smaller, further up is better."
    if trials > 1:
        note += " The line joins the best that the search found at each size."
    pictures = f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
    figure = f'<figure>\n{pictures}<ul class="legend">{keys}</ul></figure>\n'
    return section("Size against quality", note, figure)


def _models(view: View) -> str:
    columns = view.columns
    groups = tables.groups(view, columns)
    body = ""
    if groups:
        head = [("", "")] + [(f"num{' best' if view.met and name == CHOSEN else ''}", escape(view.name(name)))
                             for name in columns]  # fmt: skip
        rows = []
        for group in groups:
            if group.title:
                rows.append(f'<tr class="group"><th colspan="{len(columns) + 1}">{escape(group.title)}</th></tr>\n')
            rows += [_model_row(row) for row in group.rows]
        body = scroll("Models side by side", table(head, rows, "models"))
    trials = _trials(view)
    if not body and not trials:
        return ""
    intervals = any(cell and cell.small for group in groups for row in group.rows for cell in row.cells)
    return section("The numbers", "Below a number stands its 95 % interval." if intervals else "", body + trials)


def _model_row(row: tables.Row) -> str:
    cells = "".join(
        f'<td class="num">{escape(cell.text)}{small(cell.small)}</td>' if cell else '<td class="num">–</td>'
        for cell in row.cells
    )
    return f'<tr><th scope="row">{escape(row.metric.label)}{small(row.metric.hint)}</th>{cells}</tr>\n'


def _trials(view: View) -> str:
    """Every trial in a folded table: what was done, what came out, what it cost."""
    told = {item.model: item for item in view.of("trial")}
    rows, reused = [], 0
    for model in view.trials:
        trial = told.get(model)
        detail = trial.detail if trial else {}
        moves = "; ".join(words.move(move) for move in words.list_in(detail.get("moves")))
        seconds = words.number_in(trial.value) if trial else None
        cost = "–" if seconds is None else words.duration(seconds)
        if detail.get("reused") is True:
            cost, reused = cost + small("reused, not run again"), reused + 1
        total = view.value(model, "bytes")
        name = escape(view.name(model)) + (small("chosen") if view.met and model == view.chosen_trial else "")
        cells = [_kept_cell(view, model, split) for split in ("search", "final")]
        rows.append(
            f'<tr><th scope="row">{name}</th><td>{escape(moves) or "–"}</td>'
            f'<td class="num">{"–" if total is None else words.size(total)}</td>{"".join(cells)}'
            f'<td class="num">{cost}</td></tr>\n'
        )
    if not rows:
        return ""
    head = [("", "Trial"), ("", "Moves"), ("num", "Weights"), ("num", "Kept, search"), ("num", "Kept, final"),
            ("num", "CPU time")]  # fmt: skip
    title = f"All {len(rows)} trials" if len(rows) > 1 else "The one trial"
    title += f", {reused} of them reused from an earlier run" if reused else ""
    return f"<details>\n<summary>{title}</summary>\n{scroll('Trials', table(head, rows))}</details>\n"


def _kept_cell(view: View, model: str, split: str) -> str:
    record = view.find(model, "retention", split)
    cell = tables.cell(record, tables.METRICS["retention"]) if record else None
    if record is None or cell is None:
        return '<td class="num">–</td>'
    passed = {True: "passed", False: "did not pass"}.get(record.detail.get("passed") is True, "")
    if not isinstance(record.detail.get("passed"), bool):
        passed = ""
    return f'<td class="num">{escape(cell.text)}{small(cell.small)}{small(passed)}</td>'


def _moves(view: View) -> str:
    steps = []
    for record in view.of("move"):
        total = words.number_in(record.detail.get("bytes"))
        if total is not None:
            steps.append((record, total))
    if not steps:
        return ""
    steps.sort(key=lambda item: words.number_in(item[0].detail.get("step")) or 0)
    start = view.value(ORIGINAL, "bytes")
    biggest = max([total for _, total in steps] + ([start] if start else [])) or 1.0
    rows, before, kept_before = [], start, None
    if start:
        was = view.find(ORIGINAL, "retention", split_of(steps[0][0]))
        kept_before = words.number_in(was.value) if was else None
        rows.append(_step("Original", start / biggest, start / biggest, words.size(start), _share(kept_before)))
    for record, total in steps:
        share = words.number_in(record.value)
        change = f"{words.signed(total - before, words.size)} → " if before is not None and total != before else ""
        kept = _share(share)
        if share is not None and kept_before is not None:
            kept += f" ({words.signed(100 * (share - kept_before), lambda value: f'{value:.1f}')} points)"
        name = words.move(record.detail.get("move"))
        previous = (before if before is not None else total) / biggest
        rows.append(_step(name, previous, total / biggest, change + words.size(total), kept))
        before, kept_before = total, share if share is not None else kept_before
    note = f"Weights on disk and quality after each move, in the order of the recipe{_on(steps[0][0])}."
    return section("What each move bought", note, f'<ol class="rows">\n{"".join(rows)}</ol>\n')


def _orders(view: View) -> str:
    """What came of each order of moves: a sentence each."""
    told = [(words.text_in(item.detail.get("text")), item) for item in view.of("order")]
    rows = "".join(f"<li>{escape(text)}.</li>\n" for text, _ in told if text)
    if not rows:
        return ""
    note = f"Tried on one candidate with as much healing each, and the best kept{_on(told[0][1])}."
    return section("Which order pays", note, f"<ul>\n{rows}</ul>\n")


def _on(record: Record) -> str:
    split = split_of(record)
    return f", measured on the {escape(split)} split" if split else ""


def _share(value: float | None) -> str:
    return "" if value is None else f"keeps {words.percent(value)}"


def _step(name: str, before: float, after: float, total: str, kept: str) -> str:
    bar = plot.bars([(after, "now")]) if after >= before else (
        '<svg class="bars" viewBox="0 0 1000 10" preserveAspectRatio="none" style="height:10px" aria-hidden="true">'
        f'<rect class="all" x="0" y="0" width="{1000 * min(before, 1.0):.1f}" height="10"/>'
        f'<rect class="now" x="0" y="0" width="{1000 * max(after, 0.0):.1f}" height="10"/></svg>'
    )  # fmt: skip
    return f'<li><div>{escape(name)}</div>{bar}<div class="num">{escape(total)}{small(kept)}</div></li>\n'


def _samples(view: View) -> str:
    pairs = []
    same = 0
    for record in view.of("sample"):
        before, after = (words.text_in(record.detail.get(key)) for key in ("before", "after"))
        if not before and not after:
            continue
        same += before == after
        prompt = words.text_in(record.detail.get("prompt"))
        shown = f'<div class="prompt"><span class="who">Prompt</span><div class="text">{escape(prompt)}</div></div>'
        shared = words.shared_prefix(before, after)
        sides = [("original", before), (f"{view.name(record.model)}{', the same' if before == after else ''}", after)]
        texts = "".join(
            f'<div><span class="who">{escape(who)}</span><div class="text">{escape(text[:shared])}'
            + (f"<mark>{escape(text[shared:])}</mark>" if text[shared:] else "")
            + "</div></div>"
            for who, text in sides
        )
        pairs.append(f'<div class="pair">{shown if prompt else ""}{texts}</div>\n')
    if not pairs:
        return ""
    how = next((how for item in view.of("sample") if (how := words.text_in(item.detail.get("how")))), "")
    note = "Underlined: from the first character that differs." + (f" {escape(how.rstrip('.'))}." if how else "")
    if same:
        note += f" {same} of {len(pairs)} {'is' if same == 1 else 'are'} the same to the last character."
    first, rest = "".join(pairs[:4]), "".join(pairs[4:])
    more = f"<details>\n<summary>{len(pairs) - 4} more</summary>\n{rest}</details>\n" if rest else ""
    return section("The same prompts, before and after", note, first + more)


def _tensors(view: View) -> str:
    found = [
        (words.text_in(item.detail.get("class")) or "other", words.value_of(item.value), item, total)
        for item in view.of("tensor")
        if (total := words.number_in(item.detail.get("bytes"))) is not None
    ]
    if not found:
        return ""
    whole = sum(total for *_, total in found) or 1.0
    rows = []
    for (part, kind), group in groupby(sorted(found, key=lambda item: item[:2]), key=lambda item: item[:2]):
        sizes = [total for *_, total in group]
        rows.append(
            f'<tr><th scope="row">{escape(part)}</th><td>{escape(kind)}</td><td class="num">{len(sizes):,}</td>'
            f'<td class="num">{words.size(sum(sizes))}</td>'
            f'<td class="num">{words.percent(sum(sizes) / whole)}</td></tr>\n'
        )
    head = [("", "Part"), ("", "Type"), ("num", "Tensors"), ("num", "Bytes"), ("num", "Share")]
    body = scroll("Parts of the file", table(head, rows)) + _untouched([item for _, _, item, _ in found])
    every = [
        f'<tr><th scope="row" class="name">{escape(item.detail.get("tensor", ""))}</th><td>{escape(kind)}</td>'
        f"<td>{escape(' × '.join(words.value_of(side) for side in words.list_in(item.detail.get('shape'))))}</td>"
        f'<td class="num">{total:,.0f}</td></tr>\n'
        for _, kind, item, total in found
    ]
    head = [("", "Tensor"), ("", "Type"), ("", "Shape"), ("num", "Bytes")]
    whole_table = scroll("Every tensor", table(head, every, "tight"))
    body += f"<details>\n<summary>Every tensor ({len(every):,})</summary>\n{whole_table}</details>\n"
    return section("What is in the file", "Types as read back from the weights file, not as asked for.", body)


def _untouched(records: Sequence[Record]) -> str:
    reasons: dict[str, list[str]] = {}
    for item in records:
        if reason := words.text_in(item.detail.get("reason")):
            reasons.setdefault(reason, []).append(words.plain(item.detail.get("tensor", "")))
    if not reasons:
        return ""
    rows = [
        f'<tr><td>{escape(reason)}</td><td class="num">{len(names):,}</td>'
        f'<td class="name">{escape(", ".join(names))}</td></tr>\n'
        for reason, names in reasons.items()
    ]
    many = sum(len(names) for names in reasons.values())
    reasons_table = table([("", "Reason"), ("num", "Tensors"), ("", "Names")], rows)
    told = scroll("Untouched tensors", reasons_table)
    return f"<details>\n<summary>Left untouched ({many:,})</summary>\n{told}</details>\n"


def _recipe(view: View) -> str:
    text = next((words.text_in(item.value) for item in reversed(view.of("recipe"))), "")
    if not text:
        return ""
    note = "Run it again with <code>shrew apply</code>: the same machine and versions give the same weights."
    return section("The recipe", note, f"<pre><code>{escape(text)}</code></pre>\n")


def _tools(view: View) -> str:
    rows = []
    for record in view.of("use"):
        for entry in map(words.table_in, words.list_in(record.detail.get("tools"))):
            tool, how, note = (words.text_in(entry.get(key)) for key in ("tool", "how", "note"))
            if tool:
                rows.append(
                    f"<dt>{escape(tool)}</dt><dd>"
                    + (f"<pre><code>{escape(how)}</code></pre>" if how else "")
                    + (f"<p>{escape(note)}</p>" if note else "")
                    + "</dd>\n"
                )
    return section("How to use it", "", f'<dl class="tools">\n{"".join(rows)}</dl>\n') if rows else ""


def _method(view: View) -> str:
    """How it was measured: everything that is needed to judge the numbers, or to get them again."""
    plan, outcome = view.plan, view.outcome
    rows: list[tuple[str, str]] = []
    goals = _goals(view.goals)
    rows += [("Asked for", goals)] if goals else []
    provable = words.number_in(plan.get("provable_keep"))
    if provable is not None:
        rows.append(("Highest floor that this much data can prove", words.percent_at_least(provable)))
    rows += [(f"Split: {name}", _split_words(split)) for name, split in words.table_in(plan.get("splits")).items()]
    rows += [("Tried", text) for text in ["; ".join(map(words.value_of, words.list_in(plan.get("tried"))))] if text]
    rows += [(name, words.value_of(value)) for name, value in words.table_in(plan.get("settings")).items()]
    seeds = sorted({item.seed for item in view.records if item.seed is not None})
    rows += [("Seed" if len(seeds) == 1 else "Seeds", ", ".join(map(str, seeds)))] if seeds else []
    rows += [("Threads", words.value_of(plan["threads"]))] if "threads" in plan else []
    for key, name in (("cpu_seconds", "CPU time of the run"), ("wall_seconds", "Time by the clock")):
        seconds = words.number_in(outcome.get(key))
        rows += [(name, words.duration(seconds))] if seconds is not None else []
    rows += [("Machine", text) for text in sorted({item.machine for item in view.records if item.machine})]
    versions = ", ".join(
        f"{name} {words.value_of(text)}" for name, text in words.table_in(plan.get("versions")).items()
    )
    rows += [("Versions", versions)] if versions else []
    commits = sorted({item.commit for item in view.records if item.commit})
    rows += [("Commit", ", ".join(commits))] if commits else []
    times = sorted({item.time for item in view.records if item.time})
    rows += [("Measured", times[0] if len(times) == 1 else f"{times[0]} to {times[-1]}")] if times else []
    rows += [("Not measured", words.value_of(text)) for text in words.list_in(outcome.get("not_measured"))]
    command = words.text_in(plan.get("command"))
    body = f"<pre><code>{escape(command)}</code></pre>\n" if command else ""
    if not rows and not body:
        return ""
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>\n" for name, text in rows)
    return section("How it was measured", "", body + f'<dl class="pairs">\n{pairs}</dl>\n')


def _goals(goals: dict[str, Any]) -> str:
    """'keep 98 %, at most 16.0 MB, 2 times as fast, within 500 MB of memory'."""
    told = []
    forms: dict[str, tuple[str, Callable[[float], str], str]] = {
        "keep": ("keep ", words.percent_exact, ""),
        "under": ("at most ", words.size_exact, ""),
        "faster": ("", words.value_of, " times as fast"),
        "memory": ("within ", words.size_exact, " of memory"),
    }
    for key, (before, form, after) in forms.items():
        value = words.number_in(goals.get(key))
        if value is not None:
            told.append(before + form(value) + after)
    return ", ".join(told)


def _split_words(split: Any) -> str:
    """{"documents": 40, "bytes": 120000} is '40 documents, 120 kB'."""
    told = []
    for unit, many in words.table_in(split).items():
        value = words.number_in(many)
        if value is not None:
            told.append(words.size(value) if unit == "bytes" else f"{value:,.0f} {unit}")
        else:
            told.append(f"{unit}: {words.value_of(many)}")
    return ", ".join(told) or words.value_of(split)


def _footer(view: View) -> str:
    more = ""
    if view.other_runs:
        runs = "one other run" if view.other_runs == 1 else f"{view.other_runs:,} other runs"
        more = f" The records hold {runs}; this page shows the last one."
    return f"<footer>Made by shrew report from {len(view.records):,} records.{more}</footer>\n"
