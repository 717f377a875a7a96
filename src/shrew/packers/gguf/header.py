"""GGUF headers, read strictly: no count or offset is believed before it has been compared with the file's size.

The format (ggml's docs/gguf.md): magic, version, number of tensors and of values, little-endian throughout; the values,
each a name, a type and its bytes; one entry for each tensor; padding; the tensors, aligned.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from shrew.errors import FolderError

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT, DIMENSIONS = 32, 4
NUMBERS = {
    GGUFValueType.UINT8: "<u1", GGUFValueType.INT8: "<i1", GGUFValueType.UINT16: "<u2", GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4", GGUFValueType.INT32: "<i4", GGUFValueType.FLOAT32: "<f4", GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8", GGUFValueType.INT64: "<i8", GGUFValueType.FLOAT64: "<f8",
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the header states it: `shape` in torch's order, `start` counts bytes from the file's beginning."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True)
class Header:
    """Arrays of numbers in `values` are numpy arrays, arrays of texts are lists."""

    path: Path
    values: dict[str, Any]
    tensors: dict[str, TensorEntry]

    def data(self, name: str) -> np.ndarray:
        """The bytes of a tensor, mapped and not read: uint8 [..., bytes of a row]."""
        entry = self.tensors[name]
        flat = np.memmap(self.path, np.uint8, "r", entry.start, (entry.bytes,))
        return flat.reshape(*entry.shape[:-1], -1)


class _Cursor:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int, what: str) -> bytes:
        if count > self.left():
            raise FolderError(f"{self.path} is truncated: {what} needs {count} bytes at {self.at}, and the file has "
                              f"{self.left()} left; fetch it again.")  # fmt: skip
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str, what: str) -> int:
        return int(struct.unpack("<" + code, self.take(struct.calcsize(code), what))[0])

    def text(self, what: str) -> str:
        try:
            return self.take(self.number("Q", what), what).decode("utf-8")
        except UnicodeDecodeError:
            raise FolderError(f"{self.path}: {what} is no UTF-8 text; the file is damaged, fetch it again.") from None

    def value(self, kind: int, what: str, nested: bool = False) -> Any:
        if kind not in GGUFValueType._value2member_map_:
            raise FolderError(f"{self.path}: {what} has the unknown type {kind}; the file is damaged, or newer.")
        if kind == GGUFValueType.STRING:
            return self.text(what)
        if kind != GGUFValueType.ARRAY:
            dtype = np.dtype(NUMBERS[GGUFValueType(kind)])
            return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()
        inner, count = self.number("I", what), self.number("Q", what)
        if nested or inner == GGUFValueType.ARRAY:
            raise FolderError(f"{self.path}: {what} is a list of lists, which no model needs; the file is hostile.")
        if inner in NUMBERS:
            dtype = np.dtype(NUMBERS[GGUFValueType(inner)])
            return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
        if count > self.left() // 8:
            raise FolderError(f"{self.path} is truncated: {what} claims {count} items, and {self.left()} bytes are "
                              "left; fetch it again.")  # fmt: skip
        return [self.value(inner, what, nested=True) for _ in range(count)]


def read_header(path: Path) -> Header:
    """Everything before the tensors' data, after all checks; raises FolderError."""
    try:
        with path.open("rb") as stream:
            if stream.read(4) != MAGIC:
                raise FolderError(f"{path} is no GGUF file: it does not begin with 'GGUF'.")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(_Cursor(path, data))
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror}.") from None


def _read(cursor: _Cursor) -> Header:
    path = cursor.path
    cursor.at = 4
    version = cursor.number("I", "the version")
    if version & 0xFFFF == 0 and version:
        raise FolderError(f"{path} is a big-endian GGUF file, which Shrew does not read; convert it with gguf's "
                          "gguf-convert-endian.")  # fmt: skip
    if version not in VERSIONS:
        raise FolderError(f"{path} is GGUF version {version}, and Shrew reads {VERSIONS[0]} and {VERSIONS[1]}.")
    tensor_count, value_count = cursor.number("Q", "the header"), cursor.number("Q", "the header")
    for count, least, what in ((value_count, 13, "values"), (tensor_count, 33, "tensors")):
        if count > cursor.left() // least:
            raise FolderError(f"{path} claims {count} {what} and has {cursor.left()} bytes; it is truncated or "
                              "hostile, fetch it again.")  # fmt: skip
    values: dict[str, Any] = {}
    for _ in range(value_count):
        name = cursor.text("the name of a value")
        if name in values:
            raise FolderError(f"{path}: the value {name[:200]!r} appears twice; the file is damaged, fetch it again.")
        values[name] = cursor.value(cursor.number("I", "a type"), f"the value {name[:200]!r}")
    raw = [_entry(cursor) for _ in range(tensor_count)]
    align = values.get("general.alignment", ALIGNMENT)
    if type(align) is not int or not 0 < align <= 1 << 20 or align & (align - 1):
        raise FolderError(f"{path}: an alignment of {align} is no power of two; the file is damaged, fetch it again.")
    parts = values.get("split.count", 1)
    if not isinstance(parts, int) or parts not in (0, 1):
        raise FolderError(f"{path} is one part of a split model; join the parts with `llama-gguf-split --merge`.")
    return Header(path, values, _placed(cursor, raw, align))


def _entry(cursor: _Cursor) -> TensorEntry:
    """The entry with `start` still counted from the beginning of the data."""
    path, name = cursor.path, cursor.text("the name of a tensor")
    what = f"tensor {name[:200]!r}"
    dimensions = cursor.number("I", what)
    if not 1 <= dimensions <= DIMENSIONS:
        raise FolderError(f"{path}: {what} has {dimensions} dimensions; the file is damaged, fetch it again.")
    shape = tuple(cursor.number("Q", what) for _ in range(dimensions))[::-1]
    kind, start = cursor.number("I", what), cursor.number("Q", what)
    if kind not in GGMLQuantizationType._value2member_map_:
        raise FolderError(f"{path}: {what} has the unknown type {kind}; the file is damaged, or newer than gguf.")
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if not all(shape) or shape[-1] % block:
        raise FolderError(f"{path}: {what} of shape {list(shape)} cannot be {GGMLQuantizationType(kind).name}, whose "
                          f"blocks have {block} weights; the file is damaged, fetch it again.")  # fmt: skip
    return TensorEntry(name, GGMLQuantizationType(kind), shape, start, math.prod(shape) // block * size)


def _placed(cursor: _Cursor, raw: list[TensorEntry], align: int) -> dict[str, TensorEntry]:
    path, size, data = cursor.path, len(cursor.data), -(-cursor.at // align) * align
    found: dict[str, TensorEntry] = {}
    end = data
    for entry in sorted(raw, key=lambda item: item.start):
        start, what = data + entry.start, f"{path}: tensor {entry.name[:200]!r}"
        if entry.name in found:
            raise FolderError(f"{what} appears twice; the file is damaged, fetch it again.")
        if entry.start % align or start < end:
            raise FolderError(f"{what} begins inside another or off the alignment; the file is damaged or hostile.")
        if start + entry.bytes > size:
            raise FolderError(f"{what} ends at {start + entry.bytes} and the file at {size}; it is truncated, "
                              "fetch it again.")  # fmt: skip
        end = start + entry.bytes
        found[entry.name] = TensorEntry(entry.name, entry.type, entry.shape, start, entry.bytes)
    return found
