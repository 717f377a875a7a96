"""GGUF, the format of llama.cpp: `shrew pack MODEL --to gguf --out FILE.gguf`.

Nothing is rounded here. A dense weight is written in the type that the model folder has it in; a packed one as blocks
where a block type holds exactly the values of its codes, else in the smallest float type that does, and said so.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.constants import GGML_QUANT_VERSION
from torch import Tensor

from shrew import files, folder
from shrew.blocks.model import ModelSpec, ShrewForCausalLM
from shrew.blocks.stock import adapter_of, restated, stock
from shrew.errors import ShrewError, UnsupportedError, UsageError
from shrew.folder import Loaded, Packed, sparse
from shrew.folder.grids import Steps
from shrew.packers.carry import carry, refuse_corrections
from shrew.packers.gguf import blocks, tokens
from shrew.packers.gguf.architectures import for_config
from shrew.packers.gguf.common import Architecture
from shrew.packers.gguf.header import ALIGNMENT, MAGIC
from shrew.packers.gguf.rows import Change, Row, always_float32, plan
from shrew.spec import doc

LARGEST_FLOAT = 3.4e38  # of 32 bits

FILE_TYPES = {item.name.removeprefix("MOSTLY_").removeprefix("ALL_"): item for item in LlamaFileType}
DTYPES = {"f16": torch.float16, "f32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What can be chosen."""

    dense: Literal["stored", "f16", "f32"] = doc(
        "type of weights that are not packed; one that it does not hold exactly is f32", "stored"
    )


@dataclass(frozen=True)
class Part:
    """One tensor of the file: `shape` in torch's order, `content` gives its bytes a piece at a time."""

    name: str
    source: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    content: Callable[[], Iterator[bytes]]

    @property
    def row_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block * size

    @property
    def bytes(self) -> int:
        count = self.row_bytes
        for extent in self.shape[:-1]:
            count *= extent
        return count


def pack(name: str, out: Path, options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Write a model folder as a GGUF file and return what it holds, tensor by tensor."""
    check_target(out)
    return write(folder.load(name), out, options, say, Path(name).name)


def check_target(out: Path) -> None:
    """Refuse early to replace something that is no GGUF file."""
    if out.is_dir():
        raise UsageError(f"{out} is a folder; give the file to write, like --out {out / 'model.gguf'}.")
    if out.exists():
        with out.open("rb") as stream:
            if stream.read(len(MAGIC)) != MAGIC:
                raise UsageError(f"{out} is another kind of file; choose another output file.")


def write(
    loaded: Loaded, out: Path, options: Options, say: Callable[[str], None], title: str = "model"
) -> dict[str, Any]:
    """Write a loaded model, `title` being what the file calls it."""
    if loaded.is_classifier:
        raise UnsupportedError("classifiers are not written to GGUF; llama.cpp runs causal language models.")
    refuse_corrections(loaded.packed, "GGUF")
    if isinstance(loaded.model, ShrewForCausalLM):
        loaded = as_stock(loaded)
    config = loaded.model.config
    architecture = for_config(config)
    generation = getattr(loaded.model, "generation_config", None)
    ids = {key: _first(getattr(generation, f"{key}_token_id", None), getattr(config, f"{key}_token_id", None))
           for key in ("bos", "eos", "pad")}  # fmt: skip
    words, notes = tokens.describe(loaded.tokenizer, config.vocab_size, ids)
    notes += [sparse.DENSE_NOTE] if loaded.sparse else []
    parts, misfits = _parts(loaded, architecture, options)
    for note in notes:
        say(f"Note: {note}.")
    if misfits:
        notes.append(_said(misfits))
        say(notes[-1])
    values = _values(title, architecture, config, parts) | words
    try:
        _save(out, architecture, values, parts)
    except OSError as error:
        raise ShrewError(f"{out} could not be written ({error}); make room and run again.") from None
    listed = [{"name": part.name, "source": part.source, "type": part.type.name, "shape": list(part.shape),
               "bytes": part.bytes} for part in parts]  # fmt: skip
    return {"architecture": architecture.name, "bytes": out.stat().st_size, "notes": notes, "misfits": misfits,
            "tensors": listed}  # fmt: skip


def _first(*given: Any) -> int | None:
    """The first number among values that may be numbers, lists of them, or nothing."""
    flat = [one for value in given for one in (value if isinstance(value, list) else [value])]
    return next((int(one) for one in flat if one is not None), None)


def _values(title: str, architecture: Architecture, config: Any, parts: list[Part]) -> dict[str, Any]:
    blocky = {part.type for part in parts} - set(blocks.FLOATS)
    common = {"general.type": "model", "general.name": title, "general.file_type": int(_file_type(parts))}
    if blocky:
        common["general.quantization_version"] = GGML_QUANT_VERSION
    return common | {f"{architecture.name}.{key}": value for key, value in architecture.values(config).items()}


def _file_type(parts: list[Part]) -> LlamaFileType:
    """What llama.cpp calls a file: by the type that most weights have, and of K types S where all blocks are of it,
    else M (which is also what a mixture by llama.cpp's own rules is called)."""
    counts: Counter[GGMLQuantizationType] = Counter()
    for part in parts:
        counts[part.type] += math.prod(part.shape)
    most = counts.most_common(1)[0][0]
    names = [f"{most.name}_S", f"{most.name}_M", most.name, f"{most.name}_MOE"]
    if set(counts) - set(blocks.FLOATS) - {most}:
        names = names[1:]
    return next(FILE_TYPES[name] for name in names if name in FILE_TYPES)


# --- tensors ----------------------------------------------------------------------------------------------------------


def _parts(loaded: Loaded, architecture: Architecture, options: Options) -> tuple[list[Part], dict[str, str]]:
    """Every tensor of the file, and the packed weights that no block type holds with the reason."""
    model, config = loaded.model, loaded.model.config
    weights = dict(model.named_parameters())  # a tied head once, under the name of the embedding
    weights |= {name: value for name, value in model.named_buffers() if name in model.state_dict()}
    changes = architecture.changes(config)
    parts, misfits = [], {}
    for row in plan(architecture.arch, config.num_hidden_layers, weights, changes):
        packed = loaded.packed.get(row.source)
        if packed is not None:
            made, reason = _packed_parts(row, packed)
            parts += made
            if not reason:
                continue
            misfits[row.source] = reason
        wanted = DTYPES.get(options.dense, loaded.stored.get(row.source, loaded.dtype))
        parts += _dense_parts(row, weights[row.source].detach(), None if packed is not None else wanted)
    for name, value in architecture.extra(config).items():
        extra = Row(name, (name,), Change(lambda w: (w,), lambda w: w))
        parts += _dense_parts(extra, value, torch.float32)
    return parts, misfits


def _dense_parts(row: Row, weight: Tensor, wanted: torch.dtype | None) -> list[Part]:
    """The tensors of a weight in the type `wanted`, or without one in the smallest exact one."""
    parts = []
    for number, target in enumerate(row.targets):
        piece = row.change.out(weight)[number]
        kind = GGMLQuantizationType.F32
        if not always_float32(target, tuple(piece.shape)):
            kind = blocks.float_type(piece, wanted)

        def content(number: int = number, kind: GGMLQuantizationType = kind) -> Iterator[bytes]:
            return blocks.floats(kind, row.change.out(weight)[number])

        parts.append(Part(target, row.source, kind, tuple(piece.shape), content))
    return parts


def _packed_parts(row: Row, packed: Packed) -> tuple[list[Part], str]:
    """The tensors of a packed weight as blocks; or none and the reason."""
    if packed.transposed or not row.change.whole_rows:
        return [], "its rows are stored as columns" if packed.transposed else "llama.cpp stores it otherwise"
    parts = []
    for number, target in enumerate(row.targets):
        shape, codes, steps = _piece(row.change, packed, number)
        if always_float32(target, shape):
            return [], "llama.cpp takes it as F32 alone"
        kind, reason = blocks.choose(codes, steps, packed.grid)
        if kind is None:
            return [], reason

        def content(number: int = number, kind: GGMLQuantizationType = kind) -> Iterator[bytes]:
            return blocks.encode(kind, *_piece(row.change, packed, number)[1:], packed.grid)

        parts.append(Part(target, row.source, kind, shape, content))
    return parts, ""


def _piece(change: Change, packed: Packed, number: int) -> tuple[tuple[int, ...], Tensor, Steps]:
    """The shape of one tensor of a packed weight, and its codes and steps as rows."""
    lead = packed.shape[:-1]

    def moved(values: Tensor) -> Tensor:
        """Whatever a row has of them goes with it, as one vector."""
        return change.out(values.reshape(*lead, -1))[number]

    codes = moved(packed.codes)
    steps = packed.steps.map(lambda values: moved(values).reshape(-1, *values.shape[1:]))
    return tuple(codes.shape), codes.flatten(0, -2), steps


def _said(misfits: dict[str, str]) -> str:
    reasons = Counter(misfits.values())
    why = "; ".join(f"{count} because {reason}" for reason, count in reasons.most_common())
    names = sorted(misfits)
    named = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return (f"{len(misfits)} packed weights fit no block type of GGUF exactly and are written as floats, which takes "
            f"more bytes ({why}): {named}. Weights quantized with --bits 4 --group 32 (or 64, or 128) "
            "fit.")  # fmt: skip


# --- the file ---------------------------------------------------------------------------------------------------------


def _save(out: Path, architecture: Architecture, values: dict[str, Any], parts: list[Part]) -> None:
    """Header first, then one tensor after the other; `out` appears when all is on disk."""
    with files.new_file(out) as temporary:
        writer = GGUFWriter(temporary, architecture.name)
        for key, value in values.items():
            _add(writer, key, value)
        for part in parts:
            byte_shape = (*part.shape[:-1], part.row_bytes)
            writer.add_tensor_info(part.name, byte_shape, np.dtype(np.uint8), part.bytes,
                                   raw_dtype=part.type)  # fmt: skip
        writer.write_header_to_file(path=temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with temporary.open("ab") as stream:
            for part in parts:
                stream.write(bytes(-stream.tell() % ALIGNMENT))
                for piece in part.content():
                    stream.write(piece)
            stream.write(bytes(-stream.tell() % ALIGNMENT))


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int() | float() if not 0 <= value <= (2**32 - 1 if isinstance(value, int) else LARGEST_FLOAT):
            raise UnsupportedError(f"GGUF has no room for {key} = {value:.6g}; is config.json right?")
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


# --- our own models ---------------------------------------------------------------------------------------------------


def as_stock(loaded: Loaded) -> Loaded:
    """A model of our own type as the stock type that says the same, its codes with it. Raises UnsupportedError."""
    model, spec = loaded.model, loaded.model.spec
    adapter = adapter_of(spec)
    if adapter is None:
        raise UnsupportedError(f"llama.cpp has no architecture for this model: {misfit(spec)}.")
    same, state = stock(model), model.state_dict()
    packed = carry(loaded.packed, state, functools.partial(restated, adapter, spec))
    weights = dict(same.named_parameters())
    kept = {name: item for name, item in packed.items()
            if name in weights and torch.equal(item.dense(), weights[name].detach().float())}  # fmt: skip
    return replace(loaded, model=same, packed=kept, stored={}, untouched={})


def misfit(spec: ModelSpec) -> str:
    """What keeps every stock type from saying a spec: settings that, put back one at a time, would let one."""
    kept = ("pattern", "mixers", "ffn")
    found = [f"{key} = {value}" for key, value, default in _chosen(spec)
             if key not in kept and _says(spec, **{key: default})]  # fmt: skip
    for letter, mixer in spec.mixers.items():
        for key, value, default in _chosen(mixer):
            if _says(spec, mixers=spec.mixers | {letter: replace(mixer, **{key: default})}):
                found.append(f"{key} = {value} of mixer {letter}")
    for key, value, default in _chosen(spec.ffn):
        if _says(spec, ffn=replace(spec.ffn, **{key: default})):
            found.append(f"{key} = {value} of the ffn")
    kinds = sorted({spec.mixer(layer).kind for layer in range(spec.layers)})
    return ", ".join(found) or f"it mixes by {' and '.join(kinds)}, with a feed-forward of kind {spec.ffn.kind}"


def _chosen(part: Any) -> list[tuple[str, Any, Any]]:
    """Settings other than the defaults: name, value, default."""
    values = ((item.name, getattr(part, item.name), item.default_factory() if callable(item.default_factory)
               else item.default) for item in fields(part))  # fmt: skip
    return [(key, value, default) for key, value, default in values if value != default and key != "kind"]


def _says(spec: ModelSpec, **changed: Any) -> bool:
    try:
        return adapter_of(replace(spec, **changed)) is not None
    except (ShrewError, ValueError, TypeError, ZeroDivisionError):  # a setting that makes no sense alone
        return False
