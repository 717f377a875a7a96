"""Model folders: everything Shrew reads or writes is a Hugging Face folder plus `shrew.json`, its lineage.

`load` checks before transformers sees a file: the layout of the weights, their header, and what config.json says of
them. `save` writes what the moves chose, with packed weights really packed, in one step.
"""

import copy
import hashlib
import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from shrew import files
from shrew.errors import FolderError, ShrewError
from shrew.folder import compressed, packed, sparse
from shrew.folder.check import TORCH_DTYPES, common_dtype, describe, fetch, quiet, read_model, read_packed
from shrew.folder.grids import Grid, Product, Steps, Uniform
from shrew.folder.headers import INDEX, SINGLE, Entry, read_headers, read_json
from shrew.folder.packed import Packed, register

__all__ = [
    "LINEAGE", "Grid", "Loaded", "Packed", "Steps", "TensorInfo", "Uniform", "identity", "load", "register", "save",
    "tensors",
]  # fmt: skip

LINEAGE = "shrew.json"
SHARD = 4_000_000_000  # bytes
COMPANIONS = (".json", ".jinja", ".txt", ".model")
_PARTS = packed.PARTS + compressed.PARTS


@dataclass
class Loaded:
    """A model in memory with what is known about it.

    `model` holds float32 weights (of packed tensors: exactly the values that the file's codes stand for), in eval mode.
    `packed` maps parameter names to their chosen codes; `save` writes those codes, nothing is rounded a second time.
    `untouched` names every weight a move left as it was, with the reason. `lineage` is the content of `shrew.json`.
    `dtype` is what dense weights are stored in; `stored` names the tensors of the file that had another one. Where
    `sparse`, matrices with zeros are stored as a bitmap and the other values wherever that is smaller.
    """

    model: Any
    tokenizer: Any
    path: Path | None = None
    packed: dict[str, Packed] = field(default_factory=dict)
    untouched: dict[str, str] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    stored: dict[str, torch.dtype] = field(default_factory=dict)
    sparse: bool = False

    @property
    def is_classifier(self) -> bool:
        return type(self.model).__name__.endswith("ForSequenceClassification")

    def weight(self, name: str) -> Tensor:
        """A parameter as it now is, float32."""
        found: Tensor = self.model.get_parameter(name).detach().float()
        return found

    def keep(self, name: str, item: Packed) -> None:
        """Make `item` the parameter of this name."""
        self.packed[name] = item
        with torch.no_grad():
            self.model.get_parameter(name).copy_(item.dense())

    def content(self) -> tuple[dict[str, Tensor], dict[str, Packed]]:
        """What a file holds by name, tied weights once: dense tensors, and codes."""
        state = remove_tied_weights_from_state_dict(dict(self.model.state_dict()), self.model)
        kept = {tensor.data_ptr(): name for name, tensor in state.items()}
        chosen = {kept[self.model.get_parameter(name).data_ptr()]: item for name, item in self.packed.items()}
        return {name: tensor for name, tensor in state.items() if name not in chosen}, chosen


@dataclass(frozen=True)
class TensorInfo:
    """One weight as the file holds it. `effective` is read from sizes on disk: "int4 g64 sym", "bf16", ..."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    bits_per_weight: float
    effective: str
    file: str


def load(name: str | Path, trust_remote_code: bool = False) -> Loaded:
    """The model of a folder or of a Hub name ("starter" is the one that ships), float32 and in eval mode.

    Raises FolderError, in one sentence, for everything that is wrong with the folder.
    """
    path = fetch(name)
    entries, stated = describe(path, trust_remote_code)
    model, tokenizer = read_model(path, entries, stated, trust_remote_code)
    codes = read_packed(model, entries, stated)
    return Loaded(model, tokenizer, path, codes, sparse=bool(stated.sparse), **known(path, entries))


def known(path: Path, entries: dict[str, Entry]) -> dict[str, Any]:
    """What a folder says of a model besides its weights: fields of `Loaded`."""
    dtype = common_dtype(entries)
    stored = {
        key.removesuffix(sparse.PARTS[1]): TORCH_DTYPES[entry.dtype]
        for key, entry in entries.items()
        if entry.dtype in TORCH_DTYPES and TORCH_DTYPES[entry.dtype] != dtype and not key.endswith(_PARTS)
    }
    lineage = _lineage(path / LINEAGE) if (path / LINEAGE).exists() else {}
    untouched = lineage.pop("untouched", {})
    return {"untouched": untouched, "lineage": lineage, "dtype": dtype, "stored": stored}


def _lineage(path: Path) -> dict[str, Any]:
    lineage = read_json(path)
    recipe = lineage.get("recipe")
    held = {"recipe.train": recipe.get("train", {})} if isinstance(recipe, dict) else {}
    for key, value in (lineage | held).items():
        tables = value if isinstance(value, list) and key in ("moves", "twins") else [value]
        if key in _LINEAGE and not all(isinstance(table, dict) for table in tables):
            raise FolderError(f"{path}: '{key}' is not what Shrew writes there; remove the file, which says how "
                              "the model was made.")  # fmt: skip
    return lineage


_LINEAGE = ("moves", "twins", "untouched", "recipe", "recipe.train")


def save(loaded: Loaded, path: Path, same: bool = False) -> str:
    """Write a model folder in one step and return its layout: "dense", "compressed-tensors" or "shrew (reason)".

    Weights in `loaded.packed` are written as their codes; the others in the dtype that the original had. A weight that
    was changed after it was packed is refused, because its codes would no longer be the model. `loaded` stays as it is.
    Raises ShrewError when the disk refuses; an older folder at `path` is then untouched.
    """
    _check_codes(loaded)
    state, chosen = loaded.content()
    for name in loaded.model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    zeros = _sparse(loaded, state)
    reason = compressed.obstacle(loaded.model, loaded.packed) if chosen else ""
    if zeros:
        reason = f"{next(iter(zeros))} is sparse"
    dense = {name: tensor for name, tensor in state.items() if name not in zeros}
    dense = revert_weight_conversion(loaded.model, dense)
    content = {name: _as_stored(loaded, name, tensor) for name, tensor in dense.items()}
    config = _config(loaded)
    layout = "dense"
    if chosen or zeros:
        layout = f"shrew ({reason})" if reason else "compressed-tensors"
        write = packed.to_parts if reason else compressed.to_parts
        for name, item in chosen.items():
            content |= write(name, item)
        for name, tensor in zeros.items():
            content |= sparse.to_parts(name, tensor)
        tables = {name: packed.to_entry(item) for name, item in chosen.items()}
        config["quantization_config"] = (
            {"quant_method": packed.METHOD, "tensors": tables} if reason else compressed.to_config(chosen)
        )
        if zeros:
            config["quantization_config"]["sparse"] = {name: sparse.to_entry(item) for name, item in zeros.items()}
    lineage = loaded.lineage | {"format": 1, "layout": layout, "versions": versions()}
    if loaded.untouched:
        lineage["untouched"] = loaded.untouched
    try:
        with files.new_folder(Path(path), LINEAGE, same) as temporary, quiet():
            _write_weights(temporary, content)
            if loaded.model.can_generate():  # not its own save_pretrained, which refuses settings that others shipped
                loaded.model.generation_config.to_json_file(temporary / "generation_config.json")
            if loaded.tokenizer is not None:
                loaded.tokenizer.save_pretrained(temporary)
            (temporary / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
            (temporary / LINEAGE).write_text(json.dumps(lineage, indent=1) + "\n", "utf-8")
    except (OSError, SafetensorError) as error:
        raise ShrewError(f"{path} could not be written ({error}); make room and run again.") from None
    return layout


def _check_codes(loaded: Loaded) -> None:
    current = {name for name, _ in loaded.model.named_parameters(remove_duplicate=False)}
    for name, item in loaded.packed.items():
        if name not in current or not torch.equal(loaded.weight(name), item.dense()):
            raise ShrewError(f"'{name}' was changed after it was quantized; quantize last, or drop its codes first.")


def _sparse(loaded: Loaded, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights to be stored as a bitmap and values, in the dtype of the file."""
    if not loaded.sparse:
        return {}
    found = {name: _as_stored(loaded, name, tensor) for name, tensor in state.items()}
    return {name: tensor for name, tensor in found.items() if sparse.pays(tensor)}


def _as_stored(loaded: Loaded, name: str, tensor: Tensor) -> Tensor:
    dtype = loaded.stored.get(name, loaded.dtype) if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype).contiguous()


def _config(loaded: Loaded) -> dict[str, Any]:
    config = copy.deepcopy(loaded.model.config)
    config.dtype = loaded.dtype
    config.architectures = [type(loaded.model).__name__]
    content: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    content.pop("quantization_config", None)
    return content


def _write_weights(folder: Path, content: dict[str, Tensor]) -> None:
    split = split_torch_state_dict_into_shards(content, max_shard_size=SHARD)
    for file, names in split.filename_to_tensors.items():
        save_file({name: content[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", "utf-8")


def versions() -> dict[str, str]:
    try:
        own = version("shrew")
    except PackageNotFoundError:
        own = "source"
    return {"shrew": own, "torch": str(torch.__version__), "transformers": transformers.__version__,
            "python": platform.python_version()}  # fmt: skip


def weight_files(path: Path) -> list[Path]:
    """The files that hold a folder's weights, in order."""
    if (path / SINGLE).exists():
        return [path / SINGLE]
    return [path / name for name in sorted(set(read_json(path / INDEX)["weight_map"].values()))]


def identity(path: str | Path) -> str:
    """SHA-256 over config.json and the weights: the hash that lineage and caches use."""
    path = Path(path)
    digest = hashlib.sha256()
    read_json(path / "config.json")
    read_headers(path)
    for file in [path / "config.json", *weight_files(path)]:
        digest.update(f"{file.name} {files.sha256(file)}\n".encode())
    return digest.hexdigest()


def companions(path: str | Path) -> str:
    """SHA-256 over the small files beside config.json and the weights, which what is made of a folder takes over: its
    tokenizer, templates, generation settings and lineage."""
    path = Path(path)
    digest = hashlib.sha256()
    for file in sorted([*path.iterdir(), *path.glob("*/*.jinja")]):
        if file.suffix in COMPANIONS and file.name not in ("config.json", INDEX) and file.is_file():
            digest.update(f"{file.relative_to(path)} {files.sha256(file)}\n".encode())
    return digest.hexdigest()


def tensors(path: str | Path) -> list[TensorInfo]:
    """Every weight of a folder with its effective type, read from the files' own headers without loading a weight."""
    path = Path(path)
    entries, stated = describe(path, trust_remote_code=True)
    table, suffixes = stated.tensors, _PARTS + sparse.PARTS
    listed = [
        TensorInfo(name, entry.dtype, entry.shape, entry.bytes, _per_weight(entry.bytes, entry.shape),
                   _SHORT.get(entry.dtype, entry.dtype.lower()), entry.file.name)
        for name, entry in entries.items()
        if not ((table or stated.sparse) and name.endswith(suffixes))
    ]  # fmt: skip
    for name, meaning in stated.sparse.items():
        bitmap, values = (entries[name + part] for part in sparse.PARTS)
        shape, size = tuple(meaning["shape"]), bitmap.bytes + values.bytes
        kept = f"{_SHORT[values.dtype]}, {1 - meaning['values'] / max(8 * bitmap.bytes, 1):.0%} zeros in a bitmap"
        listed.append(TensorInfo(name, values.dtype, shape, size, _per_weight(size, shape), kept,
                                 _files([bitmap, values])))  # fmt: skip
    for name, meaning in table.items():
        parts = [entries[name.removesuffix(stated.stem) + part] for part in stated.parts
                 if name.removesuffix(stated.stem) + part in entries]  # fmt: skip
        shape, size = tuple(meaning["shape"]), sum(part.bytes for part in parts)
        grid = packed.grid_of(meaning)
        dtype = f"INT{grid.bits}" if isinstance(grid, (Uniform, Product)) else grid.label().partition(" ")[0].upper()
        label = packed.label(grid, meaning.get("rank", 0), meaning.get("coded", False))
        listed.append(TensorInfo(name, dtype, shape, size, _per_weight(size, shape), label,
                                 _files(parts)))  # fmt: skip
    return sorted(listed, key=lambda item: item.name)


_SHORT = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64"}


def _per_weight(size: int, shape: Iterable[int]) -> float:
    count = 1
    for extent in shape:
        count *= extent
    return 8 * size / count if count else 0.0


def _files(parts: list[Entry]) -> str:
    return ", ".join(sorted({part.file.name for part in parts}))
