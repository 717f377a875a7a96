"""The baseline: what was known when somebody decided to look at new alerts only.

A JSON file with one line an alert, sorted, without line numbers or dates, so that it can be committed and its diffs are
read. Alerts are matched by fingerprint and *counted*: a function that moves, in its file or to another, stays known; a
further copy of a known function is new.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from shrew import files
from shrew.errors import DataError
from shrew.scan.alerts import BASELINE, Alert, Report, ordered
from shrew.scan.sarif import clean, rule_id

VERSION = 1
LARGEST = 64 * 2**20  # bytes; what is larger is no baseline


@dataclass(frozen=True)
class Known:
    """Alerts of one fingerprint in one file. `name` and `rule` are for readers; matching takes the rest."""

    fingerprint: Annotated[str, Meta(min_length=1, max_length=200)]
    path: str
    name: str = ""
    rule: str = ""
    count: Annotated[int, Meta(ge=1, le=10**9)] = 1


@dataclass(frozen=True)
class _File:
    version: int
    alerts: list[Known]


@dataclass(frozen=True)
class _Head:
    version: int


def text(report: Report) -> str:
    """The file that makes everything in this report known, and keeps what was."""
    known = [alert for alert in report.suppressed if alert.suppressed == BASELINE]
    counts: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], Alert] = {}
    for alert in [*report.alerts, *known]:
        key = clean(alert.path, 4096), alert.fingerprint
        counts[key] += 1
        first[key] = min(first.get(key, alert), alert, key=lambda item: item.function.name)
    lines = []
    for key in sorted(counts):
        path, fingerprint = key
        entry: dict[str, Any] = {"path": path, "name": clean(first[key].function.name, 300),
                                 "rule": rule_id(first[key].cwe), "fingerprint": fingerprint}  # fmt: skip
        lines.append(json.dumps(entry | ({"count": counts[key]} if counts[key] > 1 else {})))
    body = ",\n".join(f"    {line}" for line in lines)
    return f'{{\n  "version": {VERSION},\n  "alerts": [' + (f"\n{body}\n  " if lines else "") + "]\n}\n"


def write(path: Path, report: Report) -> None:
    files.write_text(path, text(report))


def read(path: Path) -> list[Known]:
    """The entries of a file. DataError, in one sentence, for what is missing, damaged or of a newer Shrew."""
    again = "write it again from a scan of a state that you trust"
    try:
        content = files.read_whole(path, LARGEST, again)
    except FileNotFoundError:
        raise DataError(f"{path}: no such baseline; make one from a state that you trust: shrew scan PATH "
                        f"--write-baseline {path}") from None  # fmt: skip
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        version = msgspec.json.decode(content, type=_Head).version
        if version > VERSION:
            raise DataError(f"{path} was written by a newer Shrew (version {version} of the file, {VERSION} is the "
                            "newest known here); update Shrew.")  # fmt: skip
        if version != VERSION:
            raise DataError(f"{path}: version {version} of a baseline is unknown; {again}.")
        return msgspec.json.decode(content, type=_File).alerts
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is no baseline or a damaged one ({error}); {again}.") from None


def split(alerts: Iterable[Alert], known: Iterable[Known]) -> tuple[list[Alert], list[Alert]]:
    """(new, known) alerts, the worst first; the known ones with `suppressed` set.

    First the alerts of files that the baseline names are matched, then those of any file against what is left: where a
    copy was made, the copy is new and not the original.
    """
    left: Counter[tuple[str, str]] = Counter()
    for entry in known:
        left[entry.fingerprint, entry.path] += entry.count
    waiting, matched = [], []
    for alert in ordered(alerts):
        key = alert.fingerprint, clean(alert.path, 4096)
        if left[key] > 0:
            left[key] -= 1
            matched.append(alert)
        else:
            waiting.append(alert)
    anywhere: Counter[str] = Counter()
    for (fingerprint, _), count in left.items():
        anywhere[fingerprint] += count
    new = []
    for alert in waiting:
        if anywhere[alert.fingerprint] > 0:
            anywhere[alert.fingerprint] -= 1
            matched.append(alert)
        else:
            new.append(alert)
    return new, ordered(replace(alert, suppressed=BASELINE) for alert in matched)


def apply(report: Report, known: Iterable[Known]) -> Report:
    """The report of what is new; what was known is held back."""
    new, old = split(report.alerts, known)
    return replace(report, alerts=new, suppressed=[*report.suppressed, *old], compared=True)
