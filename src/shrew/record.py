"""One measured fact, one JSON line. Reports, tables and plots are pure functions of records."""

import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from shrew import files
from shrew.errors import DataError
from shrew.machine import processor


@cache
def commit() -> str:
    """The commit of the checkout that the code runs from, '+' when it has changes, '' outside one."""
    here = Path(__file__).parent
    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "--short=10", "HEAD")
        return head + ("+" if head and git("status", "--porcelain", "--untracked-files=no") else "")
    except OSError:
        return ""


@cache
def machine() -> str:
    """A short description of the machine: processor, cores, memory, system, Python."""
    try:
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (AttributeError, OSError, ValueError):
        memory = ""
    return f"{processor()}, {os.cpu_count()} cores{memory}, {platform.system()}, Python {platform.python_version()}"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was measured, on what, and how sure it is.

    `low` and `high` bound a 95 % interval (two-sided) unless `detail` says otherwise; `n` counts the units that were
    resampled. `detail` holds what a picture needs beyond the number (bands, tensor tables, text samples).
    """

    run: str  # groups the records of one command
    model: str  # label of the model: "original", "healed original", "chosen", "trial 7", a folder name
    metric: str  # "bits_per_byte", "retention", "bytes", "prefill_ratio", ...
    value: float | str | None
    unit: str = ""
    task: str = ""  # "text@1/final"
    n: int | None = None
    low: float | None = None
    high: float | None = None
    seed: int | None = None
    detail: dict[str, Any] = field(default_factory=dict)
    commit: str = field(default_factory=commit)
    machine: str = field(default_factory=machine)
    time: str = field(default_factory=now)


def append(path: Path, records: Iterable[Record]) -> None:
    """Add records to a JSONL file, all or (when the disk is full) none of them."""
    rest = memoryview(lines(records))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as stream:
        size = stream.seek(0, os.SEEK_END)
        try:
            while rest:
                rest = rest[stream.write(rest) :]
            os.fsync(stream.fileno())
        except BaseException:
            stream.truncate(size)
            raise


def write(path: Path, records: Iterable[Record]) -> None:
    """Replace a JSONL file by these records."""
    files.write_bytes(path, lines(records))


def lines(records: Iterable[Record]) -> bytes:
    return b"".join(msgspec.json.encode(item) + b"\n" for item in records)  # NaN, which JSON has not, becomes null


def read(path: Path) -> list[Record]:
    """All records of a JSONL file; a bad line is named by its number."""
    try:
        lines = path.read_text("utf-8").split("\n")  # splitlines() would also split inside strings, at U+2028
    except FileNotFoundError:
        raise DataError(f"{path}: no such records file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}.") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(msgspec.json.decode(line, type=Record))
            except (msgspec.DecodeError, msgspec.ValidationError) as error:
                raise DataError(f"{path}, line {number}: no record ({error}).") from None
    return found
