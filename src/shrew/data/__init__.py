"""Text in, batches out: documents from files, disjoint splits, packed token streams; seeded and resumable.

A batch is a pure function of (stream, seed, step), so resuming at a step needs no state.
"""

import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from shrew import files
from shrew.data import python
from shrew.data.bytes import byte_tokenizer, reads_bytes
from shrew.data.middle import MARKS, Middle, fill_in_the_middle, rearranged
from shrew.errors import DataError

__all__ = ["MARKS", "Batches", "Document", "Labelled", "Middle", "Stream", "byte_tokenizer", "documents", "encode",
           "fill_in_the_middle", "read_jsonl", "reads_bytes", "split_documents", "tokenize"]  # fmt: skip

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".text"}


@dataclass(frozen=True)
class Document:
    id: str
    text: str


def documents(sources: Sequence[str], field: str = "text") -> list[Document]:
    """Every document that the sources name, in a stable order, without exact duplicates.

    A source is a text file (one document), a JSONL or parquet file (one document a row, column `field`), a folder or
    glob of those, `python:train` or `python:evaluation` (Python source of the running interpreter and its
    packages), or, where none of these exists, a name for `datasets.load_dataset` ("name" or "name:split").
    """
    found: dict[str, Document] = {}
    for source in sources:
        for document in _read(source, field):
            if document.text.strip():
                found.setdefault(_mark(document), document)
    if not found:
        raise DataError(f"{', '.join(map(str, sources)) or 'no source'}: no text in it; give at least one document.")
    return list(found.values())


def _mark(document: Document) -> str:
    try:
        return hashlib.sha256(document.text.encode()).hexdigest()
    except UnicodeEncodeError:  # JSON can write what no text can hold
        raise DataError(f"{document.id}: half of a surrogate pair (a lone \\ud8xx) in the text; remove it.") from None


def _read(source: str, field: str) -> Iterator[Document]:
    if not source:
        raise DataError("a text without a name was asked for; name a file, a folder or a glob.")
    if source.startswith("python:"):
        yield from (Document(id, text) for id, text in python.corpus(source.removeprefix("python:")))
        return
    path = Path(source)
    if path.is_dir():
        known = TEXT_SUFFIXES | {".jsonl", ".parquet"}
        paths = sorted(item for item in path.rglob("*") if item.is_file() and item.suffix in known)
        if not paths:
            raise DataError(f"{source}: no text, JSONL or parquet file in this folder.")
    elif path.exists():
        paths = [path]
    elif names := sorted(glob.glob(source, recursive=True)):  # noqa: PTH207 - Path.glob takes no absolute pattern
        paths = [path for path in map(Path, names) if path.is_file()]
    elif path.suffix or source.startswith((".", "/", "~")) or os.environ.get("HF_HUB_OFFLINE") == "1":
        raise DataError(f"{source}: no such file, folder or glob.")
    else:
        yield from _read_dataset(source, field)
        return
    for item in paths:
        yield from _read_file(item, field)


def _read_file(path: Path, field: str) -> Iterator[Document]:
    if path.suffix == ".parquet":
        yield from _read_parquet(path, field)
    elif path.suffix == ".jsonl":
        for number, row in read_jsonl(path):
            if not isinstance(row.get(field), str):
                raise DataError(f"{path}, line {number}: no text under '{field}'.")
            yield Document(f"{path}:{number}", row[field])
    else:
        yield Document(str(path), read_text(path))


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; anything else is refused with the place of the first bad byte."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start}); convert it, for example: iconv -f latin1 -t utf-8."
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank."""
    # splitlines() would also split inside strings, at U+2028 or U+0085
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: no JSON ({error.msg} at column {error.colno}).") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise DataError(f"{path}, line {number}: JSON that cannot be read ({error}).") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}.")
        yield number, row


def _read_parquet(path: Path, field: str) -> Iterator[Document]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        if field not in table.schema_arrow.names:
            raise DataError(f"{path}: no column '{field}'; it has {', '.join(table.schema_arrow.names)}.")
        number = 0
        for batch in table.iter_batches(columns=[field]):
            for text in batch.column(0).to_pylist():
                number += 1
                if isinstance(text, str):
                    yield Document(f"{path}:{number}", text)
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise DataError(f"{path} is no readable parquet file: {error}.") from None


def _read_dataset(name: str, field: str) -> Iterator[Document]:
    import datasets

    name, _, split = name.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        for number, row in enumerate(rows):
            yield Document(f"{name}:{number}", row[field])
    except (OSError, ValueError, KeyError, ConnectionError) as error:
        raise DataError(f"{name}: neither a file nor a data set that could be read ({error}).") from None


def split_documents(items: Sequence[Document], shares: dict[str, float], salt: str) -> dict[str, list[Document]]:
    """Deal documents into named parts by a hash of their text, so that equal texts never straddle two parts.

    Documents are ordered by hash and cut at the cumulative shares of the total length: the parts have the wanted
    sizes as nearly as whole documents allow, and each part gets at least one document where there are enough.
    """
    def key(document: Document) -> bytes:
        return hashlib.sha256(salt.encode() + b"\0" + document.text.encode()).digest()

    ordered = sorted({key(item): item for item in items}.items())
    parts: dict[str, list[Document]] = {name: [] for name in shares}
    total = sum(len(item.text) for _, item in ordered)
    names, goal, seen = list(shares), 0.0, 0
    for position, name in enumerate(names):
        goal += shares[name] / sum(shares.values()) * total
        last = position == len(names) - 1
        while ordered and (last or not parts[name] or seen + len(ordered[0][1].text) / 2 <= goal):
            if not last and parts[name] and len(ordered) <= len(names) - position - 1:
                break
            seen += len(ordered[0][1].text)
            parts[name].append(ordered.pop(0)[1])
    return parts


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text: the tokenizer's begin token first where it has one, its end token last.

    One token that serves as both (GPT-2's) stands at the beginning alone: as the start of the next document it is
    also the end of this one.
    """
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    head = [] if begin is None else [begin]
    tail = [] if end is None or end == begin else [end]
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    return [head + row + tail for row in rows]


@dataclass(frozen=True)
class Stream:
    """All tokens of a corpus in one line: `tokens` [n] and the offsets at which documents start."""

    tokens: np.ndarray
    starts: np.ndarray
    text_bytes: int

    def windows(self, length: int) -> int:
        return max((len(self.tokens) - 1) // length, 0)

    def window(self, index: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [length + 1] of a window and the document number [length + 1] of each."""
        low = index * length
        span = self.tokens[low : low + length + 1].astype(np.int64)
        where = np.searchsorted(self.starts, np.arange(low, low + length + 1), side="right")
        return span, where - where[0]


def tokenize(items: Iterable[Document], tokenizer: Any, cache: Path | None = None, batch: int = 256) -> Stream:
    """The stream of these documents. With `cache`, a folder, it is kept there under its hash and memory-mapped."""
    items = list(items)
    folder = None
    if cache is not None and tokenizer.is_fast:  # a slow tokenizer has no text that says all of it
        mark = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
        mark.update(f"{tokenizer.bos_token_id} {tokenizer.eos_token_id} {len(tokenizer)}".encode())
        for item in items:
            mark.update(hashlib.sha256(item.text.encode()).digest())
        folder = cache / "streams" / mark.hexdigest()[:24]
    if folder is not None and (folder / "stream.json").exists():
        size = json.loads((folder / "stream.json").read_text())["text_bytes"]
        return Stream(np.load(folder / "tokens.npy", mmap_mode="r"), np.load(folder / "starts.npy"), size)
    kind: Any = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    parts: list[np.ndarray] = []
    for low in range(0, len(items), batch):
        rows = encode(tokenizer, [item.text for item in items[low : low + batch]])
        parts += [np.array(row, dtype=kind) for row in rows if row]
    starts = np.cumsum([0] + [len(part) for part in parts[:-1]])
    tokens = np.concatenate(parts or [np.empty(0, kind)])
    stream = Stream(tokens, starts, sum(len(item.text.encode()) for item in items))
    if folder is not None:
        with files.new_folder(folder, "stream.json") as temporary:
            np.save(temporary / "tokens.npy", stream.tokens)
            np.save(temporary / "starts.npy", stream.starts)
            (temporary / "stream.json").write_text(json.dumps({"text_bytes": stream.text_bytes}))
    return stream


@dataclass(frozen=True)
class Batches:
    """Packed training batches: every window once an epoch in a seeded order, dealt to `world` processes."""

    stream: Stream
    length: int
    rows: int
    seed: int
    rank: int = 0
    world: int = 1
    middle: Middle | None = None  # fill-in-the-middle, drawn anew each time that a window comes up

    def __post_init__(self) -> None:
        if self.stream.windows(self.length) < 1:
            count = len(self.stream.tokens)
            raise DataError(f"the text has {count} tokens, fewer than one window of {self.length}; give more text or a "
                            "shorter length.")  # fmt: skip

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs [rows, length], targets [rows, length] (-100 across documents) and document numbers."""
        first = (number * self.world + self.rank) * self.rows
        spans, owners = zip(*(self._window(place) for place in range(first, first + self.rows)), strict=True)
        tokens, owner = np.stack(spans), np.stack(owners)
        targets = tokens[:, 1:].copy()
        ends = owner[:, 1:] != owner[:, :-1]
        # A start token that is also the end token is worth predicting; any other start is not predictable.
        if not self._one_token_ends():
            targets[ends] = -100
        return tokens[:, :-1], targets, owner[:, :-1]

    def _window(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        count = self.stream.windows(self.length)
        index = int(_order(count, self.seed, place // count)[place % count])
        tokens, owner = self.stream.window(index, self.length)
        if self.middle is None:
            return tokens, owner
        return rearranged(tokens, owner, self.middle, np.random.default_rng([self.seed, place, 2]))

    def _one_token_ends(self) -> bool:
        starts = self.stream.starts
        return bool(np.unique(self.stream.tokens[starts[: min(len(starts), 64)]]).size == 1)


@dataclass(frozen=True)
class Labelled:
    """Labelled texts as batches for a sequence classifier, in the shape of `Batches`."""

    texts: list[list[int]]
    labels: list[int]
    pad: int
    rows: int
    seed: int
    rank: int = 0
    world: int = 1

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens [rows, T], labels [rows], mask [rows, T]."""
        first = (number * self.world + self.rank) * self.rows
        orders: dict[int, np.ndarray] = {}
        picked = []
        for place in range(first, first + self.rows):
            epoch = place // len(self.texts)
            if epoch not in orders:
                orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(len(self.texts))
            picked.append(int(orders[epoch][place % len(self.texts)]))
        width = max(len(self.texts[index]) for index in picked)
        tokens = np.full((self.rows, width), self.pad)
        mask = np.zeros((self.rows, width), dtype=np.int64)
        for row, index in enumerate(picked):
            tokens[row, : len(self.texts[index])] = self.texts[index]
            mask[row, : len(self.texts[index])] = 1
        return tokens, np.array([self.labels[index] for index in picked]), mask


@lru_cache(maxsize=2)  # long, and a batch seldom touches a third epoch
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)
