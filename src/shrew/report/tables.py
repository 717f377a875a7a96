"""The tables of models: which metric is shown in which row, in which unit, for the page and for the terminal."""

from collections.abc import Callable
from dataclasses import dataclass

from shrew.record import Record
from shrew.report import words
from shrew.report.view import STRUCTURE, View, split_of, task_of

Format = Callable[[float], str]


@dataclass(frozen=True)
class Metric:
    """How a metric reads: its name, its unit or a hint, and the words for a value."""

    label: str
    hint: str
    words: Format


def _ratio(value: float) -> str:
    return f"{value:,.2f}{words.SPACE}×"


METRICS = {
    "bytes": Metric("Weights on disk", "", words.size),
    "parameters": Metric("Parameters", "", words.count),
    "active_parameters": Metric("Active parameters", "", words.count),
    "retention": Metric("Quality kept", "", words.percent),
    "bits_per_byte": Metric("Bits per byte", "less is better", words.number),
    "macro_f1": Metric("Macro-F1", "", words.percent),
    "accuracy": Metric("Accuracy", "", words.percent),
    "exact_match": Metric("Exact match", "", words.percent),
    "stereotype_share": Metric("Stereotype preferred", "50 % is no preference", words.percent),
    "stereotype_share_per_token": Metric("Stereotype preferred by token", "50 % is no preference", words.percent),
    "auc": Metric("AUC", "one half is chance", words.number),
    "pair_correct": Metric("Only the vulnerable one flagged", "of pairs", words.percent),
    "pair_reversed": Metric("Only the fixed one flagged", "of pairs", words.percent),
    "net": Metric("Net of both", "0 is chance", words.percent),
    "kl": Metric("KL divergence", "from the original, less is better", words.number),
    "top1_agreement": Metric("Same first choice", "as the original", words.percent),
    "prefill_ratio": Metric("Prefill speed", "original = 1", _ratio),
    "decode_ratio": Metric("Decoding speed", "original = 1", _ratio),
    "kv_bytes": Metric("Cache a token", "keys and values", words.size),
    "packed_bytes": Metric("Packed folder", "", words.size),
    "kl_from_exact": Metric("KL of the packed model", "bits, from its exact graph, less is better", words.number),
    "top1_from_exact": Metric("Same first choice", "as its exact graph", words.percent),
    "peak_memory": Metric("Peak memory", "fresh process", words.size),
}


def metric_of(name: str, unit: str) -> Metric:
    """The known reading of a metric, or a plain one made of its name and unit."""
    known = METRICS.get(name)
    if known:
        hint = f"{unit}, {known.hint}" if name == "kl" and unit else known.hint
        return Metric(known.label, hint, known.words)
    if unit == "bytes":
        return Metric(name.replace("_", " ").capitalize(), "", words.size)
    return Metric(name.replace("_", " ").capitalize(), unit, words.number)


@dataclass(frozen=True)
class Cell:
    """A value in words and, below it, its interval or bound."""

    text: str
    small: str = ""


@dataclass(frozen=True)
class Row:
    metric: Metric
    cells: list[Cell | None]


@dataclass(frozen=True)
class Group:
    """Rows that were measured on the same split of the same task ('' for what needs no task)."""

    title: str
    split: str
    rows: list[Row]


def groups(view: View, columns: list[str]) -> list[Group]:
    """The numbers of the models in `columns`: what needs no task first, then the final split, search, the rest."""
    numeric = [item for item in view.records if item.metric not in STRUCTURE and item.model in columns]
    order = {"": 0, "final": 1, "search": 2}
    tasks = sorted({item.task for item in numeric}, key=lambda task: (bool(task), order.get(_split(task), 3), task))
    known = list(METRICS)
    found = []
    for task in tasks:
        here = [item for item in numeric if item.task == task]
        names = sorted({item.metric for item in here} - set(known))
        names = [name for name in known if any(item.metric == name for item in here)] + names
        rows = [row for name in names if (row := _row([item for item in here if item.metric == name], columns))]
        if rows:
            found.append(Group(_title(here), _split(task), rows))
    return found


def _split(task: str) -> str:
    return task.rpartition("/")[2] if "/" in task else ""


def _title(here: list[Record]) -> str:
    first = here[0]
    if not first.task:
        return ""
    split = split_of(first)
    counts = {item.n for item in here if item.n}
    units = next((units for item in here if (units := words.text_in(item.detail.get("units")))), "documents")
    parts = [task_of(first), f"{split} split" if split else ""]
    parts.append(f"{counts.pop():,} {units}" if len(counts) == 1 else "")
    parts.append("never seen by the search" if split == "final" else "")
    return ", ".join(part for part in parts if part)


def _row(records: list[Record], columns: list[str]) -> Row | None:
    metric = metric_of(records[0].metric, records[0].unit)
    last = {item.model: item for item in records}
    cells = [cell(last[model], metric) if model in last else None for model in columns]
    return Row(metric, cells) if any(cells) else None


def cell(record: Record, metric: Metric) -> Cell | None:
    """A record's value with its interval, None when it holds no number."""
    value = words.number_in(record.value)
    if value is None:
        return None
    low, high = words.number_in(record.low), words.number_in(record.high)
    small = words.interval(metric.words(low), metric.words(high)) if low is not None and high is not None else ""
    return Cell(metric.words(value), small)
