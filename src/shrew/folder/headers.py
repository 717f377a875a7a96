"""Safetensors headers, read strictly: nothing is believed before it has been compared with the file's own size.

The format (https://huggingface.co/docs/safetensors): 8 bytes of header length, a JSON header that names each tensor's
dtype, shape and byte range, then the bytes themselves, contiguous and without holes.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shrew.errors import FolderError

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
LARGEST_HEADER = 100_000_000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """One tensor as a file's header states it; `start` counts bytes from the beginning of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or a FolderError that says what is wrong with it."""
    _check_plain(path)
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise FolderError(f"{path} is missing; {path.parent} is no complete model folder.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FolderError(f"{path} is no readable JSON ({_short(error)}); fetch the model again.") from None
    if not isinstance(value, dict):
        raise FolderError(f"{path} holds no JSON object; fetch the model again.")
    return value


def _check_plain(path: Path) -> None:
    """A pipe or a device would be read for ever."""
    if path.exists() and not path.is_file():
        raise FolderError(f"{path} is no plain file; fetch the model again.")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of one safetensors file by name, after all checks; raises FolderError."""
    _check_plain(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            first = stream.read(8)
            if len(first) < 8:
                raise FolderError(f"{path} is truncated: it has {size} bytes, not even a header; fetch it again.")
            length = struct.unpack("<Q", first)[0]
            if length > LARGEST_HEADER:
                raise FolderError(f"{path} claims a header of {length} bytes; it is no safetensors file, or hostile.")
            if length > size - 8:
                raise FolderError(f"{path} is truncated: its header needs {length} bytes; fetch it again.")
            raw = stream.read(length)
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{path} has a header that is no JSON ({_short(error)}); fetch it again.") from None
    if not isinstance(header, dict):
        raise FolderError(f"{path} has a header that is no JSON object; fetch it again.")
    _check_metadata(path, header.pop("__metadata__", {}))
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    _check_layout(path, entries, 8 + length, size)
    return entries


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FolderError(f"{path} has metadata that is no table of texts; fetch it again.")


def _entry(path: Path, name: str, value: Any, data: int) -> Entry:
    def wrong(what: str) -> FolderError:
        return FolderError(f"{path}: tensor {name[:200]!r} {what}; fetch the file again.")

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise wrong("does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise wrong(f"has the unknown dtype {str(dtype)[:40]!r}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise wrong("has a shape or offsets that are no list of counts")
    if len(offsets) != 2 or offsets[1] < offsets[0]:
        raise wrong("has offsets that run backwards")
    if math.prod(shape) * BITS[dtype] != (offsets[1] - offsets[0]) * 8:
        raise wrong(f"takes {offsets[1] - offsets[0]} bytes, which is not its shape {shape} in {dtype}")
    return Entry(path, dtype, tuple(shape), data + offsets[0], offsets[1] - offsets[0])


def _check_layout(path: Path, entries: dict[str, Entry], data: int, size: int) -> None:
    at = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].bytes)):
        if entry.start != at:
            what = "overlaps another tensor" if entry.start < at else "leaves a hole before it"
            raise FolderError(f"{path}: tensor {name[:200]!r} {what}; the file is damaged or hostile, fetch it again.")
        at += entry.bytes
    if at > size:
        raise FolderError(f"{path} is truncated: {at} bytes expected, {size} found; fetch it again.")
    if at < size:
        raise FolderError(f"{path} is oversized: {at} bytes expected, {size} found; fetch it again.")


def convert_command(path: Path, classifier: bool) -> str:
    """The shell line that turns a folder of pickle weights into safetensors."""
    auto = "AutoModelForSequenceClassification" if classifier else "AutoModelForCausalLM"
    source, target = str(path), f"{str(path).rstrip('/')}-safetensors"
    return (f'python -c "from transformers import {auto} as M, AutoTokenizer as T; '
            f"M.from_pretrained({source!r}).save_pretrained({target!r}); "
            f'T.from_pretrained({source!r}).save_pretrained({target!r})"')  # fmt: skip


def read_headers(folder: Path, classifier: bool = False) -> dict[str, Entry]:
    """Every tensor of a model folder, single file or sharded, by its name in the file; raises FolderError."""
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).exists():
        if pickles := sorted(item.name for suffix in ("*.bin", "*.pt", "*.pth") for item in folder.glob(suffix)):
            raise FolderError(
                f"{folder} holds pickle weights ({pickles[0]}), which can run code when they are read; if you trust "
                f"them, convert them with: {convert_command(folder, classifier)}"
            )
        raise FolderError(f"{folder} has no weights: neither {SINGLE} nor {INDEX} is there.")
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise FolderError(f"{folder / INDEX} has no weight_map from tensors to files; fetch the model again.")
    entries: dict[str, Entry] = {}
    for file in sorted(set(places.values())):
        if file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file or not file.endswith(".safetensors"):
            raise FolderError(f"{folder / INDEX} points at {file[:200]!r}, which is no safetensors file in it.")
        if not (folder / file).exists():
            raise FolderError(f"{folder / file} is missing, though the index names it; fetch the model again.")
        for name, entry in read_header(folder / file).items():
            if name in entries:
                raise FolderError(f"{folder}: tensor {name[:200]!r} is in two files; fetch the model again.")
            entries[name] = entry
    for name, file in places.items():
        if name not in entries or entries[name].file.name != file:
            raise FolderError(f"{folder / file} lacks tensor {name[:200]!r}, though the index says so; fetch it again.")
    return entries
