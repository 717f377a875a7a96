"""Tasks: how quality is measured. `read` turns a user's file into one, split into four disjoint parts."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shrew.data import Document, documents, read_jsonl, split_documents
from shrew.errors import DataError
from shrew.tasks.choice import Choice, Question
from shrew.tasks.completion import Completion, Prompt
from shrew.tasks.fairness import Fairness, pair, read_csv
from shrew.tasks.labels import Labelled, Labels
from shrew.tasks.scores import Scores
from shrew.tasks.split import SALT, SHARES, deal, unique
from shrew.tasks.text import Text
from shrew.tasks.vulnerability import Vulnerability, in_groups, twins

__all__ = ["KEYS", "SALT", "SHARES", "TASKS", "Scores", "Task", "read", "read_text_task"]

Task = Text | Labels | Choice | Completion | Fairness | Vulnerability
TASKS: dict[str, type[Task]] = {"text": Text, "labels": Labels, "choice": Choice, "completion": Completion,
                                "fairness": Fairness, "vulnerability": Vulnerability}  # fmt: skip
KEYS = {  # what a JSONL line holds, and the task that it therefore is
    "labels": ("text", "label"),
    "choice": ("question", "options", "answer"),
    "completion": ("prompt", "completion"),
    "fairness": ("more", "less"),
    "vulnerability": ("before", "after"),
    "text": ("text",),
}
FEW, PASSAGE = 20, 4000  # with fewer documents than this, long ones are cut into passages of about so many characters


def read(path: str | Path, name: str = "", shares: dict[str, float] | None = None) -> Task:
    """The task that a file holds, told by the keys of its first line; CSV holds pairs for bias; any
    other file is text.

    Exact duplicates are dropped and counted; the rest is dealt into calibration, healing, search and final parts by a
    hash of its text, so that equal texts never stand in two parts. Raises DataError for what cannot be used.
    """
    if str(path) == "python":
        return read_python()
    source = Path(path)
    if source.suffix == ".csv":
        return read_pairs(source, name)
    if source.suffix not in (".jsonl", ".json", ".ndjson"):
        return read_text_task([str(path)], name, shares)
    if not source.exists():
        raise DataError(f"{path}: no such file.")
    rows = [(number, row) for number, row in read_jsonl(source)]
    if not rows:
        raise DataError(f"{path} is empty; a task needs at least 2 lines of JSON, and 100 or more to prove much.")
    kind = next((kind for kind, keys in KEYS.items() if all(key in rows[0][1] for key in keys)), None)
    if kind is None:
        shapes = "; ".join(f"{', '.join(keys)} ({kind})" for kind, keys in KEYS.items())
        raise DataError(f"{path}, line {rows[0][0]}: no known task has the keys {', '.join(rows[0][1])}; use {shapes}.")
    if kind == "text":
        return read_text_task([str(path)], name, shares)
    if kind == "fairness":
        return read_pairs(source, name)
    found, dropped = unique([PARSERS[kind](row, f"{path}, line {number}", number) for number, row in rows])
    if kind == "vulnerability":
        parts = deal(in_groups(found), "group", shares or SHARES, str(path))
        return Vulnerability(name=name or source.stem, splits=parts, dropped=dropped)
    splits = deal(found, KEYS[kind][0], shares or SHARES, str(path))
    name = name or source.stem
    if kind == "labels":
        labels = tuple(sorted({item.label for item in found}, key=lambda label: (isinstance(label, str), label)))
        if len(labels) < 2:
            raise DataError(f"{path}: every line has the label '{labels[0]}'; a labels task needs at least 2 labels.")
        return Labels(name=name, splits=splits, dropped=dropped, labels=labels)
    if kind == "choice":
        return Choice(name=name, splits=splits, dropped=dropped)
    return Completion(name=name, splits=splits, dropped=dropped)


def read_pairs(path: Path, name: str = "") -> Fairness:
    """Pairs for bias from JSONL ({"more", "less", "kind"}) or CSV with CrowS-Pairs' columns."""
    rows = read_csv(path) if path.suffix == ".csv" else read_jsonl(path)
    found, dropped = unique([pair(row, f"{path}, line {number}", number) for number, row in rows])
    if len(found) < 2:
        raise DataError(f"{path} has {len(found)} pair; bias needs at least 2, and hundreds to show much.")
    return Fairness(name=name or path.stem, splits={"final": found}, dropped=dropped)


def read_text_task(
    sources: Sequence[str], name: str = "", shares: dict[str, float] | None = None, cut: int | None = None
) -> Text:
    """A text task from files, folders, globs or data sets, in the parts that `shares` names.

    Documents are cut into passages of about `cut` characters if that is given; fewer than 20 documents always are, so
    that a single long file can be split and resampled too.
    """
    found = documents(sources)
    if cut is not None or len(found) < FEW:
        found = [part for item in found for part in passages(item, cut or PASSAGE)]
    found, dropped = unique(found)
    stem = Path(sources[0].replace(":", "-")).stem
    name = name or (stem if re.fullmatch(r"[\w.-]+", stem) else "text")
    return Text(name=name, splits=deal(found, "text", shares or SHARES, ", ".join(sources)), dropped=dropped)


HEAD = 8000


def read_python() -> Text:
    """The starter's own task: evaluation modules of the running interpreter's standard library, the other modules to
    calibrate and heal on. The evaluation modules were never trained on, see `shrew.data.python`. Of each the first
    HEAD characters count, so that a few long modules do not decide."""
    heads = [Document(item.id, passages(item, HEAD)[0].text) for item in documents(["python:evaluation"])]
    held = split_documents(heads, {"search": 0.35, "final": 0.65}, SALT)
    rest = split_documents(documents(["python:stdlib"]), {"calibration": 0.1, "healing": 0.9}, SALT)
    return Text(name="python", splits=rest | held)


def passages(document: Document, size: int = PASSAGE) -> list[Document]:
    """A document cut at line ends into parts of about `size` characters; nothing is lost: they join to the original."""
    parts, part, length = [], [], 0
    for line in document.text.splitlines(keepends=True):
        part.append(line)
        length += len(line)
        if length >= size:
            parts.append("".join(part))
            part, length = [], 0
    if part:
        parts.append("".join(part))
    if len(parts) == 1:
        return [document]
    return [Document(f"{document.id}#{number}", text) for number, text in enumerate(parts, 1) if text.strip()]


def _string(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise DataError(f"{where}: '{key}' must be a text, and it is {_shown(row, key)}.")
    return value


def _shown(row: dict[str, Any], key: str) -> str:
    return f"{row[key]!r}" if key in row else "missing"


def _labelled(row: dict[str, Any], where: str, number: int) -> Labelled:
    text, label = _string(row, "text", where), row.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise DataError(f"{where}: 'label' must be a text or a whole number, and it is {_shown(row, 'label')}.")
    return Labelled(f"line {number}", text, label)


def _question(row: dict[str, Any], where: str, number: int) -> Question:
    question, options, answer = _string(row, "question", where), row.get("options"), row.get("answer")
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(item, str) and item for item in options):
        raise DataError(f"{where}: 'options' must be a list of at least 2 texts, and it is {_shown(row, 'options')}.")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(options):
        raise DataError(
            f"{where}: 'answer' must be the number of the right option, 0 to {len(options) - 1}, "
            f"and it is {_shown(row, 'answer')}."
        )
    return Question(f"line {number}", question, tuple(options), answer)


def _prompt(row: dict[str, Any], where: str, number: int) -> Prompt:
    prompt, completion = _string(row, "prompt", where), _string(row, "completion", where)
    if not completion.strip():
        raise DataError(f"{where}: 'completion' is empty; there is nothing to match.")
    return Prompt(f"line {number}", prompt, completion)


PARSERS: dict[str, Callable[[dict[str, Any], str, int], Any]] = {
    "labels": _labelled,
    "choice": _question,
    "completion": _prompt,
    "vulnerability": twins,
}
