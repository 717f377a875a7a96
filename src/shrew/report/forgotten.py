"""What was forgotten, as tables of words: the same for the page and for the terminal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shrew.record import Record
from shrew.report import plot, words
from shrew.report.view import ORIGINAL, View, split_of
from shrew.report.words import escape

TITLE = "What was forgotten"
NAME = 24  # characters of a document's name that are shown, from its end
CUT = 48  # characters of a text that the terminal shows
SHOWN = 6  # rows of long tables that are shown at once; the terminal shows no others


@dataclass(frozen=True)
class Block:
    """A table: its heads, rows of words, and (on the page) bars for the old and the new value of each row."""

    title: str
    note: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    bars: list[tuple[float, float]] | None = None
    long: bool = False  # cells hold texts, and few rows are enough to begin with


def blocks(view: View) -> list[Block]:
    """Everything that the records say was forgotten: of the model that the page is about, else of every one."""
    models = [view.best] if view.best else [model for model in view.columns if model != ORIGINAL] or view.columns
    found = []
    for model, task in dict.fromkeys((item.model, item.task) for item in view.records if item.model in models):
        here = [item for item in view.records if (item.model, item.task) == (model, task)]
        for part in (_bands, _tail, _documents, _flips, _changed, _classes, _bias, _kinds):
            block = part(view, here)
            if block is not None and block.rows:
                found.append((f": {view.name(model)}, {task}", block))
    several = len({where for where, _ in found}) > 1
    return [replace(block, title=block.title + where) if several else block for where, block in found]


def _of(records: list[Record], metric: str) -> list[Record]:
    return [item for item in records if item.metric == metric]


def _text(record: Record, key: str) -> str:
    return words.text_in(record.detail.get(key))


def _number(record: Record, key: str) -> float | None:
    return words.number_in(record.detail.get(key))


def _told(value: float | None, told: Callable[[float], str] = words.number) -> str:
    return "–" if value is None else told(value)


def _points(value: float) -> str:
    return f"{100 * value:.1f}"


def _change(record: Record, told: Callable[[float], str] = words.number) -> str:
    """'+0.12 (+0.05 to +0.20)' of a record's difference, '' where there is none."""
    value, low, high = (_number(record, f"difference{end}") for end in ("", "_low", "_high"))
    return _ranged(value, low, high, told)


def _ranged(value: float | None, low: float | None, high: float | None, told: Callable[[float], str]) -> str:
    if value is None:
        return ""
    ends = f" ({words.signed(low, told)} to {words.signed(high, told)})" if low is not None and high is not None else ""
    return words.signed(value, told) + ends


def _bands(view: View, here: list[Record]) -> Block | None:
    """Loss of each tenth of the tokens, the rarest first."""
    found = {place: item for item in _of(here, "band") if (place := _number(item, "band")) is not None}
    rows, bars = [], []
    for place, item in sorted(found.items()):
        old = next((other for other in reversed(view.of("band")) if other.task == item.task
                    and other.model == ORIGINAL and _number(other, "band") == place), None)  # fmt: skip
        was = _number(item, "before")
        was = words.number_in(old.value) if was is None and old else was
        now = words.number_in(item.value)
        if now is None or (was is None and len(view.columns) > 1):
            continue
        label = _text(item, "label") or words.value_of(item.detail.get("band"))
        many = f"{item.n:,} tokens" if item.n else ""
        percent = f"{words.signed(now / was - 1, _points)}{words.SPACE}%" if was and was > 0 else ""
        loss = words.number(now) if was is None else f"{words.number(was)} → {words.number(now)}"
        rows.append((label, many, loss, percent, _change(item)))
        bars.append((was or 0.0, now))
    if not rows:
        return None
    first = next(iter(found.values()))
    unit = f" in {first.unit}" if first.unit else ""
    where = f", measured on the {split_of(first)} split" if split_of(first) else ""
    note = f"What the rare words lost: loss{unit}{where}, less is better; tokens are ranked by how often they stand in "
    note += "that text. Each interval of a change is paired by document and holds with 95 % confidence on its own."
    return Block("Loss by token frequency", note, ("Tokens", "", "Loss", "", "Change"), rows, bars)


def _tail(view: View, here: list[Record]) -> Block | None:
    rows = []
    for item in _of(here, "tail"):
        place = f"…{_text(item, 'left')[-20:]}⟦{_text(item, 'token')}⟧{_text(item, 'right')[:16]}…"
        bits = f"{_told(_number(item, 'before'))} → {_told(_number(item, 'after'))}"
        rows.append((repr(_text(item, "token")), bits, place, _text(item, "id")))
    note = "Of the rarest tenth of the tokens, those that cost most more bits. They are the worst of many, so no "
    return Block("Rare words that lost most", note + "measure of the whole.", ("Token", "Bits", "Place", "Document"),
                 rows, long=True)  # fmt: skip


def _documents(view: View, here: list[Record]) -> Block | None:
    rows = []
    for item in _of(here, "document"):
        change = words.number_in(item.value)
        bits = f"{_told(_number(item, 'before'))} → {_told(_number(item, 'after'))}"
        if change is not None and _number(item, "before") is not None:
            name = _text(item, "id")
            name = name if len(name) <= NAME else f"…{name[-NAME:]}"
            rows.append((name, bits, words.signed(change, words.number), _text(item, "text")))
    note = "The largest changes in bits per byte, either way; single documents have no interval."
    return Block("Documents that changed most", note, ("Document", "Bits per byte", "Change", "Text"), rows, long=True)


def _flips(view: View, here: list[Record]) -> Block | None:
    rows = []
    for item in _of(here, "flips"):
        counts = words.table_in(item.detail.get("counts"))
        rows += [(words.plain(way), f"{many:,.0f}") for way in counts
                 if (many := words.number_in(counts[way])) is not None]  # fmt: skip
        net = [words.number_in(value) for value in (item.value, item.low, item.high)]
        if net[0] is not None:
            rows.append((f"net of {item.n or 0:,} answers, in points", _ranged(net[0], net[1], net[2], _points)))
    note = "An average hides answers that trade places. The net, right answers won less those lost, is paired."
    return Block("Answers that changed", note, ("Way", "Answers"), rows)


def _changed(view: View, here: list[Record]) -> Block | None:
    rows = [
        (_text(item, "text"), _text(item, "wanted"), f"{_text(item, 'before')} → {_text(item, 'after')}",
         _text(item, "way"), _text(item, "id"))
        for item in _of(here, "changed")
    ]  # fmt: skip
    return Block("Examples whose answer changed", "", ("Text", "Right", "Answer", "Way", "Example"), rows, long=True)


def _classes(view: View, here: list[Record]) -> Block | None:
    return _grouped(here, "class", "By class", "Class", "The share of a class’s own examples that was answered right.")


def _bias(view: View, here: list[Record]) -> Block | None:
    rows = []
    for item in here:
        how = {"stereotype_share": "by total likelihood", "stereotype_share_per_token": "by likelihood per token"}
        after, change = words.number_in(item.value), _number(item, "difference")
        if item.metric not in how or after is None or change is None:
            continue
        flips = [_told(_number(item, key), "{:.0f}".format) for key in ("to_stereotype", "from_stereotype")]
        rows.append((how[item.metric], _gap(after - change), _gap(after), _change(item, _points), *flips))
    note = "How far the share of pairs whose more stereotyping text is likelier lies from one half, in points; 0 is no "
    note += "preference. Such pairs have been criticised as unclear (Blodgett et al. 2021): they compare a model with "
    note += "itself, before and after."
    head = ("Preference", "Gap before", "Gap after", "Change", "Flipped to the stereotype", "Flipped away")
    return Block("Bias", note, head, rows)


def _gap(share: float) -> str:
    return words.signed(share - 0.5, _points)


def _kinds(view: View, here: list[Record]) -> Block | None:
    note = "The share of pairs whose more stereotyping text is likelier."
    return _grouped(here, "bias", "Bias by kind", "Kind", note)


def _grouped(here: list[Record], metric: str, title: str, what: str, note: str) -> Block | None:
    rows = []
    for item in _of(here, metric):
        before, after, change = _number(item, "before"), words.number_in(item.value), _change(item, _points)
        if before is not None and after is not None and change:
            name = _text(item, "label") or "(none)"
            rows.append((name, f"{item.n or 0:,}", words.percent(before), words.percent(after), change))
    correction = next((told for item in _of(here, metric) if (told := _text(item, "correction"))), "")
    if correction:
        note += f" The intervals of the changes, in points, hold together with 95 % confidence ({correction})."
    return Block(title, note, (what, "n", "Before", "After", "Change"), rows)


# -- the two forms ----------------------------------------------------------------------------------------------------


def section(view: View) -> str:
    """The section of the page, '' without records."""
    parts = []
    for block in blocks(view):
        body = _bars(view, block) if block.bars else _table(block, block.rows[: SHOWN if block.long else None])
        if block.long and len(block.rows) > SHOWN:
            more = _table(block, block.rows[SHOWN:])
            body += f"<details>\n<summary>{len(block.rows) - SHOWN} more</summary>\n{more}</details>\n"
        note = f'<p class="note">{escape(block.note)}</p>\n' if block.note else ""
        parts.append(f"<h3>{escape(block.title)}</h3>\n{note}{body}")
    return f"<section>\n<h2>{TITLE}</h2>\n{''.join(parts)}</section>\n" if parts else ""


def _table(block: Block, rows: Sequence[tuple[str, ...]]) -> str:
    look = "" if block.long else "num"
    head = "".join(f'<th scope="col" class="{look if place else ""}">{escape(text)}</th>'
                   for place, text in enumerate(block.head))  # fmt: skip
    body = "".join("<tr>" + "".join(f'<td class="{look if place else ""}">{escape(cell)}</td>'
                                    for place, cell in enumerate(row)) + "</tr>\n" for row in rows)  # fmt: skip
    table = f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(block.title)}">{table}</div>\n'


def _bars(view: View, block: Block) -> str:
    assert block.bars is not None
    most = max(value for pair in block.bars for value in pair)
    most = most if most > 0 else 1.0
    rows = []
    for (label, many, loss, percent, change), (was, now) in zip(block.rows, block.bars, strict=True):
        small = f"<small>{escape(many)}</small>" if many else ""
        told = f"{escape(loss)}{f' ({escape(percent)})' if percent else ''}"
        told += f"<small>{escape(change)}</small>" if change else ""
        drawn = plot.bars([(was / most, "was"), (now / most, "now")])
        rows.append(f'<li><div>{escape(label)}{small}</div>{drawn}<div class="num">{told}</div></li>\n')
    keys = '<p class="note"><span class="swatch was"></span>original (above), <span class="swatch"></span>'
    return f'{keys}{escape(view.name(view.best) if view.best else "new")} (below)</p>\n<ul class="rows">\n' \
           f'{"".join(rows)}</ul>\n'  # fmt: skip


def _cut(text: str) -> str:
    """One line of a text, short enough for a column of the terminal."""
    line = words.plain(" ".join(text.split()))
    return line if len(line) <= CUT else f"{line[: CUT - 1]}…"


def printed(view: View) -> RenderableType | None:
    """The same for the terminal, long tables cut; None without records."""
    parts: list[RenderableType] = []
    for block in blocks(view):
        table = Table(box=None, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        rows = [tuple(_cut(cell) if block.long else words.plain(cell) for cell in row)
                for row in block.rows[: SHOWN if block.long else None]]  # fmt: skip
        for place, text in enumerate(block.head):
            narrow = max(len(row[place]) for row in rows) <= CUT // 2
            table.add_column(text, justify="right" if place and not block.long else "left", no_wrap=narrow)
        for row in rows:
            table.add_row(*[Text(cell, overflow="fold") for cell in row])
        title = words.plain(f"{TITLE}: {block.title[:1].lower()}{block.title[1:]}")
        parts += [Text(""), Text(title, style="bold"), table]
    return Group(*parts) if parts else None
