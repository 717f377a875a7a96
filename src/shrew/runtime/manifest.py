"""`pack.json`: what a packed folder holds, and the proof that it is whole.

Nothing in it is believed before it is checked: names stay inside the folder, sizes are sane, sizes and hashes are those
of the files. A file that it does not list is none of the pack's, and nobody reads it. Keys that are not known are
passed over, so that a later release may add some without a new format.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from shrew import files
from shrew.errors import FolderError

FORMAT = 1
NAME = "pack.json"
GRAPH = "model.onnx"
DATA, CODED = "model.bin", "model.coded"  # its weights: one or the other
TOKENIZER, SQUEEZED = "tokenizer.json", "tokenizer.json.gz"  # one or the other
CAPACITY = "capacity"  # the dimension of a cache that grows with the text
LARGEST_MANIFEST = 64 << 20  # it lists every weight of the largest models in a few megabytes
LARGEST_STATE = 1 << 31  # bytes of one state of one sequence at full context

Count = Annotated[int, Meta(ge=1, le=1 << 24)]
Id = Annotated[int, Meta(ge=0, lt=1 << 24)]
WIDTHS = {"float32": 4, "int64": 8, "int8": 1, "uint8": 1}


@dataclass(frozen=True)
class File:
    bytes: Annotated[int, Meta(ge=0)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class State:
    """What one layer remembers of one sequence. A cache has a place for each token, a recurrent state does not grow."""

    name: str
    kind: Literal["cache", "recurrent"]
    dtype: Literal["float32", "int64", "int8", "uint8"]
    shape: tuple[Count | Literal["capacity"], ...]  # of one sequence, without the batch

    def sized(self, capacity: int) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else capacity for size in self.shape)

    def bytes(self, capacity: int) -> int:
        return math.prod(self.sized(capacity)) * WIDTHS[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    format: int
    shrew: str
    kind: Literal["causal", "classifier", "detector"]
    name: str
    files: dict[str, File]
    vocabulary: Count
    width: Count
    context: Count
    bos: Id | None = None
    eos: tuple[Id, ...] = ()
    pad: Id | None = None
    chunk: Annotated[int, Meta(ge=1, le=1 << 16)] = 64  # most tokens of one call
    align: Annotated[int, Meta(ge=0, le=1 << 24)] = 0  # no call crosses a multiple of it; 0: free
    states: tuple[State, ...] = ()
    labels: tuple[str, ...] | None = None
    families: tuple[str, ...] | None = None  # of what a detector finds
    comments: bool = False  # whether a detector reads them
    accuracy_level: int | None = None
    exact: dict[str, Any] = field(default_factory=dict)
    shipped: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> int | None:
        """What stands before a text: the begin token, else the end token, which separates texts in training."""
        return self.bos if self.bos is not None else next(iter(self.eos), None)


def read(folder: Path, verify: bool = True) -> Manifest:
    """The manifest of a packed folder whose files are there in full; with `verify` their hashes are checked too.

    Raises FolderError for a folder that is no pack, is newer than this program, truncated, tampered with or insane.
    """
    path = folder / NAME
    if not folder.is_dir():
        hint = f"`shrew pack {folder} --to folder` makes a model folder of it" if folder.suffix == ".gguf" else (
            "give one that `shrew pack` wrote, or a model folder")  # fmt: skip
        raise FolderError(f"{folder} is not a folder; {hint}.")
    if not path.is_file():
        raise FolderError(f"{folder} has no {NAME}: it is not packed; run `shrew pack {folder} --to onnx` first.")
    if path.stat().st_size > LARGEST_MANIFEST:
        raise FolderError(f"{path} is too large to be a manifest; pack the model again.")
    try:
        raw = msgspec.json.decode(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FolderError(f"{path} cannot be read ({error}); pack the model again.") from None
    newest = raw.get("format") if isinstance(raw, dict) else None
    if isinstance(newest, int) and newest > FORMAT:
        raise FolderError(f"{folder} has pack format {newest}, this Shrew reads up to {FORMAT}; update Shrew.")
    try:
        manifest = msgspec.convert(raw, Manifest)
    except msgspec.ValidationError as error:
        raise FolderError(f"{path}: {error}; pack the model again.") from None
    _check_sense(manifest, path)
    _check_files(manifest, folder, verify)
    return manifest


def _check_sense(manifest: Manifest, path: Path) -> None:
    """What types alone do not say."""
    faults = []
    if manifest.format != FORMAT:
        faults.append(f"format {manifest.format} does not exist")
    if (manifest.labels is not None) != (manifest.kind == "classifier") or manifest.labels == ():
        faults.append("labels belong to a classifier, and to each")
    if (manifest.families is not None) != (manifest.kind == "detector") or manifest.families == ():
        faults.append("families belong to a detector, and to each")
    if manifest.kind != "causal" and manifest.states:
        faults.append(f"a {manifest.kind} has no states")
    if not manifest.name.isprintable():  # it is shown in terminals
        faults.append("its name has characters that cannot be shown")
    ids = [*manifest.eos, *(item for item in (manifest.bos, manifest.pad) if item is not None)]
    if any(item >= manifest.vocabulary for item in ids):
        faults.append(f"a special token lies outside the vocabulary of {manifest.vocabulary}")
    names = [state.name for state in manifest.states]
    if len(set(names)) < len(names):
        faults.append("two states have one name")
    for state in manifest.states:
        if state.shape.count(CAPACITY) != (state.kind == "cache"):
            faults.append(f"state '{state.name}' is no {state.kind} by its shape {list(state.shape)}")
        elif state.bytes(manifest.context) > LARGEST_STATE:
            faults.append(f"state '{state.name}' would take {state.bytes(manifest.context):,} bytes a sequence")
    needed = ((GRAPH,), (DATA, CODED), (TOKENIZER, SQUEEZED))
    faults += [f"'{names[0]}' is not listed among its files" for names in needed
               if not manifest.files.keys() & set(names)]  # fmt: skip
    for name in manifest.files:
        if {name} != {PurePosixPath(name).name, PureWindowsPath(name).name} or name in ("", ".", ".."):
            faults.append(f"'{name}' is no plain file name")
    if faults:
        raise FolderError(f"{path}: {faults[0]}; pack the model again.")


def _check_files(manifest: Manifest, folder: Path, verify: bool) -> None:
    for name, file in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise FolderError(f"{path} is missing; pack the model again or copy the folder whole.")
        if (found := path.stat().st_size) != file.bytes:
            raise FolderError(f"{path} has {found:,} bytes instead of {file.bytes:,}; copy the folder again.")
        if verify and files.sha256(path) != file.sha256:
            raise FolderError(f"{path} is not what was packed (its hash differs); copy the folder again.")
