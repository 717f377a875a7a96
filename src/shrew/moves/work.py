"""Codes of the parts of a model that a move has finished, on disk: a run that was killed goes on behind them."""

import hashlib
import json
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from shrew import files
from shrew.folder.packed import Packed, from_parts, to_entry, to_parts


def finish(work: Path | None, made: dict[str, Packed]) -> None:
    """Keep a part's codes, all of them or none; without a folder nothing.

    Where it cannot be written, or another process that made the same has just removed it, only a way to go on is lost.
    """
    if work is None:
        return
    parts = {key: value for name, item in made.items() for key, value in to_parts(name, item).items()}
    entries = {name: to_entry(item) for name, item in made.items()}
    with suppress(OSError, SafetensorError), files.new_file(_place(work, made)) as temporary:
        save_file(parts, temporary, metadata={"entries": json.dumps(entries)})


def finished(work: Path | None, names: Collection[str]) -> dict[str, Packed]:
    """The codes of the part that has just these weights; empty when it is not finished."""
    if work is None:
        return {}
    with suppress(FileNotFoundError), safe_open(_place(work, names), framework="pt") as stream:
        entries = json.loads(stream.metadata()["entries"])
        return {
            name: from_parts({key.removeprefix(name): stream.get_tensor(key).clone()
                              for key in stream.keys() if key.startswith(f"{name}:")}, entry)  # noqa: SIM118 - no dict
            for name, entry in entries.items()
        }  # fmt: skip
    return {}


def _place(work: Path, names: Collection[str]) -> Path:
    return work / f"{hashlib.sha256(json.dumps(sorted(names)).encode()).hexdigest()[:32]}.safetensors"
