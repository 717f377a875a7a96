"""A GGUF file as a model folder: `shrew pack FILE.gguf --to folder --out FOLDER`.

Tensors are computed by gguf's own arithmetic, and nothing is rounded: weights of block types that are grids of Shrew
stay packed, others are kept in the smallest of bf16, f16 and f32 that holds them exactly.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, dequantize
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from shrew import files, folder
from shrew.errors import FolderError
from shrew.folder import Loaded
from shrew.folder.check import quiet
from shrew.folder.grids import Steps
from shrew.folder.packed import Packed
from shrew.packers.gguf import blocks, tokens
from shrew.packers.gguf.architectures import ARCHITECTURES
from shrew.packers.gguf.common import Architecture, Values
from shrew.packers.gguf.header import Header, read_header
from shrew.packers.gguf.rows import Row, plan

# Keys that change nothing here: read elsewhere, or of no effect on causal models with RMS norms.
UNUSED = {"tied", "attention.causal", "attention.layer_norm_epsilon", "attention.recurrent_layers"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Nothing can be chosen."""


def pack(name: str, out: Path, options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Write a GGUF file as a model folder and return what it holds. Raises FolderError for a file that is wrong."""
    files.check_writable_target(out, folder.LINEAGE)
    path = Path(name).expanduser()
    if not path.is_file():
        raise FolderError(f"{path} is no file; --to folder reads a GGUF file.")
    files.check_apart(out, [path])
    loaded, architecture = read(path)
    loaded.lineage = {"parent": {"name": path.name, "sha256": files.sha256(path)}, "moves": []}
    folder.save(loaded, out)
    listed = [vars(item) | {"shape": list(item.shape)} for item in folder.tensors(out)]
    return {"architecture": architecture, "bytes": sum(item["bytes"] for item in listed), "tensors": listed}


def read(path: Path) -> tuple[Loaded, str]:
    """The model of a GGUF file, float32, and the name of its architecture."""
    header = read_header(path)
    architecture, values = _meaning(header)
    with quiet(), np.errstate(all="ignore"):
        try:
            config = architecture.config(values)
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(config)
        except FolderError:
            raise
        except Exception as error:  # transformers raises what it likes for sizes that do not fit together
            text = " ".join(str(error).split())[:200]
            raise FolderError(f"{path} describes no model that transformers can build ({text}).") from None
        _agree(values, architecture.values(config))
        rows = plan(architecture.arch, config.num_hidden_layers, dict(empty.named_parameters()),
                    architecture.changes(config))  # fmt: skip
        _check(header, empty, rows, set(architecture.extra(config)))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        dtypes = {row.source: _fill(header, row, model.get_parameter(row.source)) for row in rows}
        packed = {row.source: item for row in rows
                  if (item := _packed(header, row, model.get_parameter(row.source))) is not None}  # fmt: skip
    tokenizer = tokens.rebuild(str(path), header.values)
    for key in ("bos", "eos", "pad"):
        setattr(config, f"{key}_token_id", getattr(tokenizer, f"{key}_token_id"))
    model.config, model.generation_config = config, GenerationConfig.from_model_config(config)
    sizes: Counter[torch.dtype] = Counter()
    for name, dtype in dtypes.items():
        sizes[dtype] += 0 if name in packed else model.get_parameter(name).numel()
    common = sizes.most_common(1)[0][0]
    stored = {name: dtype for name, dtype in dtypes.items() if dtype != common}
    return Loaded(model.eval(), tokenizer, packed=packed, dtype=common, stored=stored), architecture.name


def _meaning(header: Header) -> tuple[Architecture, Values]:
    path, name = str(header.path), header.values.get("general.architecture")
    found = next((one for one in ARCHITECTURES if isinstance(name, str) and one.name == name), None)
    if found is None:
        known = ", ".join(one.name for one in ARCHITECTURES)
        raise FolderError(f"{path} holds a model of the architecture {str(name)[:60]!r}, and Shrew reads {known}.")
    words = header.values.get(tokens.PREFIX + "tokens")
    if not isinstance(words, list) or "token_embd.weight" not in header.tensors:
        raise FolderError(f"{path} has no tokens or no embeddings; it holds no whole model.")
    values = {key.removeprefix(f"{name}."): value for key, value in header.values.items() if key.startswith(f"{name}.")}
    values.setdefault("vocab_size", len(words))
    values["tied"] = _tied(header)
    freqs = {"rope_freqs.weight": header} if "rope_freqs.weight" in header.tensors else {}
    tensors = dict.fromkeys(header.tensors) | {key: _numbers(header, key) for key in freqs}
    return found, Values(path, values, tensors)


def _tied(header: Header) -> bool:
    """Whether the head is the embedding: not there, or byte for byte the same."""
    head, embedding = (header.tensors.get(name) for name in ("output.weight", "token_embd.weight"))
    if head is None or embedding is None:
        return head is None
    if (head.type, head.shape) != (embedding.type, embedding.shape):
        return False
    return bool(np.array_equal(header.data(head.name), header.data(embedding.name)))


def _agree(values: Values, again: dict[str, Any]) -> None:
    """Compare what the file says with what would be written of the config, so that no setting is passed over."""
    for key, value in values.found.items():
        known = again.get(key)
        if isinstance(value, np.ndarray) or isinstance(known, list) or key in UNUSED or not value or value == "none":
            continue
        if known is None:
            raise FolderError(f"{values.where} sets {key!r}, which Shrew does not read in this architecture.")
        same = np.float32(value) == np.float32(known) if isinstance(known, float) else value == known
        if not same:
            raise FolderError(f"{values.where} says {str(value)[:40]} for {key!r}, and Shrew reads only {known} there.")


def _check(header: Header, empty: Any, rows: list[Row], extra: set[str]) -> None:
    """Compare names and shapes with what the config asks for, before any memory is taken."""
    wanted: dict[str, tuple[int, ...]] = {}
    for row in rows:
        pieces = row.change.out(empty.get_parameter(row.source))
        wanted |= {target: tuple(piece.shape) for target, piece in zip(row.targets, pieces, strict=True)}
    tied = empty.config.tie_word_embeddings and "output.weight" not in wanted
    spare = extra | ({"output.weight"} if tied else set())
    for name, shape in wanted.items():
        entry = header.tensors.get(name)
        if entry is None:
            raise FolderError(f"{header.path} lacks tensor {name!r}, which its metadata ask for; fetch it again.")
        if entry.shape != shape:
            raise FolderError(f"{header.path}: tensor {name!r} has the shape {list(entry.shape)} and by the metadata "
                              f"{list(shape)}; the two do not belong together.")  # fmt: skip
    for name in header.tensors:
        if name not in wanted and name not in spare:
            raise FolderError(f"{header.path}: tensor {name[:200]!r} has no place in the model that its metadata "
                              "describe.")  # fmt: skip


def _numbers(header: Header, name: str) -> np.ndarray:
    """A tensor as float32, in torch's order."""
    entry = header.tensors[name]
    try:
        numbers = dequantize(header.data(name), entry.type)
    except (NotImplementedError, ValueError):
        raise FolderError(f"{header.path}: tensor {name!r} is {entry.type.name}, which gguf cannot compute.") from None
    return np.array(numbers, np.float32).reshape(entry.shape)


def _fill(header: Header, row: Row, parameter: Tensor) -> torch.dtype:
    """Set a weight from the file, and return the smallest dtype that holds it exactly."""
    weight = row.change.back(*(torch.from_numpy(_numbers(header, target)) for target in row.targets))
    if not torch.isfinite(weight).all():
        raise FolderError(f"{header.path}: {row.targets[0]!r} contains NaN or infinite weights; use another copy.")
    if not row.change.whole_rows:
        weight = _settled(weight, row)
    with torch.no_grad():
        parameter.copy_(weight)
    kinds = {header.tensors[target].type for target in row.targets}
    if kinds == {GGMLQuantizationType.F16}:
        return torch.float16
    return blocks.FLOATS[blocks.float_type(weight, None)]


def _packed(header: Header, row: Row, parameter: Tensor) -> Packed | None:
    """The codes of a weight whose tensors are all blocks of one type; None for others."""
    kinds = {header.tensors[target].type for target in row.targets}
    grid = blocks.grid_for(kinds.pop())
    if kinds or grid is None or not row.change.whole_rows:
        return None
    found = [blocks.decode(header.tensors[target].type, header.data(target)) for target in row.targets]
    codes = row.change.back(*(codes for codes, _ in found)).flatten(0, -2)
    parts = {}
    for name, extent in grid.shapes(*codes.shape).items():
        if name != "codes":
            parts[name] = row.change.back(*(steps.parts()[name] for _, steps in found)).reshape(extent)
    item = Packed(codes, Steps(**parts), grid, tuple(parameter.shape))
    return item if torch.equal(item.dense(), parameter.detach()) else None


def _settled(weight: Tensor, row: Row) -> Tensor:
    """Weights that arithmetic was undone on, rounded to bf16 where that gives the tensors of the file again."""
    near = weight.bfloat16().float()
    same = all(torch.equal(a, b) for a, b in zip(row.change.out(near), row.change.out(weight), strict=True))
    return near if same else weight
