"""Codes of the parts of a model that a move has finished, on disk: a run that was killed goes on behind them."""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from shrew import files
from shrew.folder.packed import Packed, from_parts, to_entry, to_parts


def finish(work: Path | None, made: dict[str, Packed]) -> None:
    """Keep a part's codes, all of them or none; without a folder nothing."""
    if work is None:
        return
    parts = {key: value for name, item in made.items() for key, value in to_parts(name, item).items()}
    entries = {name: to_entry(item) for name, item in made.items()}
    with files.new_file(_place(work, made)) as temporary:
        save_file(parts, temporary, metadata={"entries": json.dumps(entries)})


def finished(work: Path | None, names: Collection[str]) -> dict[str, Packed]:
    """The codes of the part that has just these weights; empty when it is not finished."""
    if work is None or not (place := _place(work, names)).exists():
        return {}
    with safe_open(place, framework="pt") as stream:
        entries = json.loads(stream.metadata()["entries"])
        return {
            name: from_parts({key.removeprefix(name): stream.get_tensor(key).clone()
                              for key in stream.keys() if key.startswith(f"{name}:")}, entry)  # noqa: SIM118 - no dict
            for name, entry in entries.items()
        }  # fmt: skip


def _place(work: Path, names: Collection[str]) -> Path:
    return work / f"{hashlib.sha256(json.dumps(sorted(names)).encode()).hexdigest()[:32]}.safetensors"
