"""What is known of files and functions from earlier scans, so that only what changed is looked at again.

An SQLite file for each engine (version, detector, rules, grammars: `engine`), which holds no code: of a file the places
and hashes of its functions, of a function its scores. A file is known by its stamp without being opened, else by its
content. Whatever is wrong with the cache costs a line and time, never the scan.
"""

import hashlib
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from shrew.scan.sources import Entry

__all__ = ["Cache", "Fact", "Facts", "Score"]

SCHEMA = 1
KEEP = 4  # engines whose caches are kept
LARGEST = 1 << 30  # bytes of one cache, which is then begun anew
GATHER = 2000  # rows that are written at once
RACY_NS = 2 * 10**9  # a file written to so shortly before it was read may be written to again under the same stamp

Rows = list[tuple[str, str, str, str, int, int, int]]  # rule, CWE, severity, message, start, end, column


class Fact(msgspec.Struct, array_like=True, frozen=True):
    """A function without its text, which `functions.cut` gives again from the source and `spans`."""

    name: str
    start: int
    end: int
    key: str
    spans: Annotated[tuple[tuple[int, int], ...], Meta(min_length=1)]
    digest: bytes  # SHA-256 of language and text: what a score is known by
    gram: float | None  # logit of the first stage
    findings: Rows = []  # of the rules


class Facts(msgspec.Struct, array_like=True, frozen=True):
    """What one file's content says."""

    hash: bytes  # SHA-256 of language and content
    language: str
    functions: list[Fact]
    ignores: list[tuple[int, list[str]]] = []  # line and CWEs of comments that hold alerts back
    odd: str = ""


class Score(msgspec.Struct, array_like=True, frozen=True):
    """What the detector said of a function."""

    logit: float
    lines: tuple[float, ...]
    families: dict[str, float]


T = TypeVar("T", Facts, Score)
_ENCODE = msgspec.msgpack.Encoder()
_DECODERS: dict[Any, Any] = {kind: msgspec.msgpack.Decoder(kind) for kind in (Facts, Score)}
_TABLES = """
CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, stamp BLOB NOT NULL, hash BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (hash BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS scores (hash BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
"""
_INSERTS = {
    "files": "INSERT OR REPLACE INTO files VALUES (?, ?, ?)",
    "facts": "INSERT OR REPLACE INTO facts VALUES (?, ?)",
    "scores": "INSERT OR REPLACE INTO scores VALUES (?, ?)",
}
_DAMAGE = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_ERROR", "SQLITE_MISMATCH", "SQLITE_FORMAT", "SQLITE_CONSTRAINT")


class Cache:
    """`folder` None is no cache: nothing is known and nothing kept. Close it, also after Ctrl-C: what was learnt
    stays."""

    def __init__(self, folder: Path | None, engine: str, say: Callable[[str], None]) -> None:
        self._say = say
        self._file = folder / f"{hashlib.sha256(engine.encode()).hexdigest()[:16]}.sqlite" if folder else None
        self._base: sqlite3.Connection | None = None
        self._waiting: dict[str, list[tuple[Any, ...]]] = {name: [] for name in _INSERTS}
        self._began = time.time_ns()
        self._damaged = False
        if self._file is not None:
            self._open(self._file)

    def _open(self, file: Path) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            others = sorted(file.parent.glob("*.sqlite"), key=lambda path: path.stat().st_mtime, reverse=True)
            for old in [path for path in others if path != file][KEEP - 1 :]:
                _remove(old)
            if file.exists() and file.stat().st_size > LARGEST:
                _remove(file)
            self._base = sqlite3.connect(file, timeout=5, isolation_level=None)
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute("PRAGMA synchronous = NORMAL")
            self._base.execute("PRAGMA trusted_schema = OFF")
            (version,) = self._base.execute("PRAGMA user_version").fetchone()
            if version not in (0, SCHEMA):
                raise msgspec.ValidationError(f"schema {version}")
            self._base.executescript(_TABLES)
            self._base.execute(f"PRAGMA user_version = {SCHEMA}")
        except (OSError, sqlite3.Error, msgspec.MsgspecError) as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        """Go on with a new cache where the old one is damaged, else without one."""
        if self._base is not None:
            with suppress(sqlite3.Error):
                self._base.close()
            self._base = None
        file, name = self._file, getattr(error, "sqlite_errorname", "")
        damaged = isinstance(error, msgspec.MsgspecError) or name.startswith(_DAMAGE)
        if file is None or self._damaged or not damaged:
            self._say(f"no cache, so the next scan takes as long ({error}).")
            return
        self._damaged = True
        self._say(f"the cache {file} was damaged ({error}); it is thrown away and made anew.")
        try:
            _remove(file)
        except OSError as reason:
            self._say(f"no cache, so the next scan takes as long ({reason}).")
            return
        self._open(file)

    def _get(self, kind: type[T], query: str, *keys: Any) -> T | None:
        if self._base is None:
            return None
        try:
            row = self._base.execute(query, keys).fetchone()
            return None if row is None else _DECODERS[kind].decode(row[0])
        except (sqlite3.Error, msgspec.MsgspecError, TypeError, ValueError) as error:  # ValueError: text that is none
            known = isinstance(error, (sqlite3.Error, msgspec.MsgspecError))
            self._failed(error if known else msgspec.ValidationError(str(error)))
            return None

    def _put(self, table: str, *row: Any) -> None:
        if self._base is not None:
            rows = self._waiting[table]
            rows.append(row)
            if len(rows) >= GATHER:
                self.flush()

    def file(self, entry: Entry) -> Facts | None:
        """What is known of a file that looks as it did, unopened."""
        query = "SELECT value FROM files JOIN facts USING (hash) WHERE path = ? AND stamp = ?"
        return self._get(Facts, query, _path(entry), _stamp(entry))

    def content(self, hash: bytes) -> Facts | None:
        return self._get(Facts, "SELECT value FROM facts WHERE hash = ?", hash)

    def score(self, digest: bytes) -> Score | None:
        return self._get(Score, "SELECT value FROM scores WHERE hash = ?", digest)

    def keep_file(self, entry: Entry, facts: Facts, new: bool) -> None:
        """Keep what a file was found to hold. Not new: its content was known already."""
        if max(entry.stamp[1:3]) < self._began - RACY_NS:
            self._put("files", _path(entry), _stamp(entry), facts.hash)
        if new:
            self._put("facts", facts.hash, _ENCODE.encode(facts))

    def keep_score(self, digest: bytes, score: Score) -> None:
        self._put("scores", digest, _ENCODE.encode(score))

    def flush(self) -> None:
        """Write what was gathered, in one short transaction."""
        if self._base is None or not any(self._waiting.values()):
            return
        waiting, self._waiting = self._waiting, {name: [] for name in _INSERTS}
        try:
            self._base.execute("BEGIN IMMEDIATE")
            for table, rows in waiting.items():
                self._base.executemany(_INSERTS[table], rows)
            self._base.execute("COMMIT")
        except sqlite3.Error as error:
            self._failed(error)

    def close(self) -> None:
        self.flush()
        if self._base is not None:
            with suppress(sqlite3.Error):
                self._base.close()
            self._base = None


def _path(entry: Entry) -> bytes:
    return entry.path.encode("utf-8", "surrogateescape")


def _stamp(entry: Entry) -> bytes:
    return f"{entry.language} {entry.stamp}".encode()


def _remove(file: Path) -> None:
    for name in (file, file.with_name(file.name + "-wal"), file.with_name(file.name + "-shm")):
        name.unlink(missing_ok=True)
