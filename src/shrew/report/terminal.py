"""What a run came out as, for the terminal."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shrew.report import forgotten, tables, words
from shrew.report.view import CHOSEN, ORIGINAL, View, sentence


def summary(view: View) -> RenderableType:
    """The verdict and a table of the models of a run."""
    columns = view.columns
    parts: list[RenderableType] = []
    if columns:
        table = Table(box=None, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("")
        for model in columns:
            style = "bold" if view.met and model == CHOSEN else ""
            table.add_column(_text(view.name(model)), justify="right", style=style)
        smaller = [_smaller(view, model) for model in columns]
        for group in tables.groups(view, columns):
            if group.title:
                table.add_row()
                table.add_row(Text(words.plain(group.title), style="dim"))
            for row in group.rows:
                table.add_row(_text(row.metric.label), *[_text(cell.text if cell else "–") for cell in row.cells])
                if row.metric.label == tables.METRICS["bytes"].label and any(smaller):
                    table.add_row("Times smaller", *map(_text, smaller))
                if row.metric.label == tables.METRICS["retention"].label and group.split == "final":
                    table.add_row("  at least", *[_text(_least(view, model)) for model in columns])
        parts += [table, Text("")]
    if (lost := forgotten.printed(view)) is not None:
        parts += [lost, Text("")]
    if told := sentence(view):
        parts.append(Text(words.plain(told), style="bold"))
    return Group(*parts)


def _text(text: str) -> Text:
    """Text that the terminal shows as it is: no markup is read from it and no control character survives."""
    return Text(words.plain(text))


def _smaller(view: View, model: str) -> str:
    old, new = view.value(ORIGINAL, "bytes"), view.value(model, "bytes")
    return words.times(old / new) if old and new and model != ORIGINAL else ""


def _least(view: View, model: str) -> str:
    kept = view.find(model, "retention", "final")
    bound = words.number_in(kept.detail.get("lower_bound")) if kept else None
    return "–" if bound is None else words.percent_at_least(bound)
