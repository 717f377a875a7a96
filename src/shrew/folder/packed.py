"""Packed weights: what they are, how their bits lie in a file, and how transformers turns them back into numbers.

Codes lie in a file as a stream of so many bits each, or coded by their entropy (`Packed.coded`), which costs time when
the file is read and nothing afterwards: in memory they are the same codes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from shrew import entropy
from shrew.errors import FolderError
from shrew.folder.grids import FLOATS, KINDS, Grid, Steps, Uniform, dequantize
from shrew.folder.headers import Entry

METHOD = "shrew"
PARTS = (":codes", ":scales", ":zeros", ":supers", ":columns", ":left", ":right")
PLACES = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8)
# What coded tensors may claim to hold together: a model stands no less than a fraction of a bit a weight.
CODES_A_BYTE, CODES_AT_LEAST = 64, 1 << 24
CHUNK = 1 << 22  # elements unpacked at once; bounds the memory that single bits need


@dataclass(frozen=True)
class Packed:
    """One weight as codes uint8 [rows, cols] with the steps of their grid.

    Scales of folders that others wrote may be fp16 or fp32. `shape` is the parameter's; `transposed` says that its last
    dimension is the output (Conv1D), so that rows are columns of the parameter. Leading dimensions (experts) are folded
    into rows. `coded`: a file holds the codes coded by their entropy.

    `low` is a low-rank correction that is added to what the codes stand for, as two bf16 factors: left [rows, r] and
    right [r, cols], or [experts * r, cols] with factors of each expert's own.
    """

    codes: Tensor
    steps: Steps
    grid: Grid
    shape: tuple[int, ...]
    transposed: bool = False
    low: tuple[Tensor, Tensor] | None = None
    coded: bool = False

    @property
    def rank(self) -> int:
        """Of the low-rank correction; 0 without one."""
        return 0 if self.low is None else self.low[0].shape[1]

    def label(self) -> str:
        return label(self.grid, self.rank, self.coded)

    def correction(self) -> Tensor:
        """The low-rank correction in rows, float32. In float64, where sums of products of bf16 do not depend on their
        order, so that it is the same wherever it is computed."""
        if self.low is None:
            return torch.zeros(self.codes.shape)
        left, right = (item.double() for item in self.low)
        count = math.prod(self.shape[:-2])
        product = left.reshape(count, -1, self.rank) @ right.reshape(count, self.rank, -1)
        return product.reshape(self.codes.shape).float()

    def parts(self) -> dict[str, Tensor]:
        """All that is stored of it, by name."""
        low = {} if self.low is None else {"left": self.low[0], "right": self.low[1]}
        return {"codes": self.codes} | self.steps.parts() | low

    def dense(self) -> Tensor:
        """The parameter that codes and correction stand for, float32 of `shape`."""
        rows = dequantize(self.codes, self.steps, self.grid)
        return from_rows(rows if self.low is None else rows + self.correction(), self.shape, self.transposed)


def label(grid: Grid, rank: int, coded: bool) -> str:
    """What a packed weight is called: its grid, the rank of its correction, and whether its codes are coded."""
    return grid.label() + (f" + rank {rank}" if rank else "") + (" coded" if coded else "")


def to_rows(weight: Tensor, transposed: bool) -> Tensor:
    """[..., out, in] (or [..., in, out] when `transposed`) -> [rows, in]."""
    weight = weight.transpose(-1, -2) if transposed else weight
    return weight.reshape(-1, weight.shape[-1])


def from_rows(rows: Tensor, shape: tuple[int, ...], transposed: bool) -> Tensor:
    """The inverse of `to_rows`."""
    if not transposed:
        return rows.reshape(shape)
    return rows.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2).contiguous()


def pack_bits(codes: Tensor, bits: int | Fraction, align: int = 1) -> Tensor:
    """uint8 codes [rows, cols] below 2^bits -> uint8 [rows, bytes]; each row is padded to `align` bytes.

    Code i of a row takes bits [i * bits, (i + 1) * bits) of a little-endian stream. Where five codes share a byte
    (`bits` is 8 / 5), they are its digits to base 3, the lowest first.
    """
    rows, cols = codes.shape
    if isinstance(bits, Fraction):
        five = torch.nn.functional.pad(codes, (0, -cols % 5)).reshape(rows, -1, 5)
        return (five * PLACES).sum(2, dtype=torch.uint8)
    width = -(-cols * bits // (8 * align)) * align
    packed = np.zeros((rows, width), np.uint8)
    step = max(1, CHUNK // max(cols, 1))
    for at in range(0, rows, step):
        part = codes[at : at + step].numpy()[..., None]
        single = np.unpackbits(part, axis=-1, count=bits, bitorder="little").reshape(len(part), cols * bits)
        row = np.packbits(single, axis=-1, bitorder="little")
        packed[at : at + step, : row.shape[1]] = row
    return torch.from_numpy(packed)


def unpack_bits(packed: Tensor, bits: int | Fraction, cols: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 [rows, bytes] -> uint8 codes [rows, cols]."""
    rows = packed.shape[0]
    if isinstance(bits, Fraction):
        return (packed[..., None] // PLACES % 3).flatten(1)[:, :cols].contiguous()
    codes = np.empty((rows, cols), np.uint8)
    step = max(1, CHUNK // max(cols, 1))
    for at in range(0, rows, step):
        part = packed[at : at + step].numpy()
        single = np.unpackbits(part, axis=-1, count=cols * bits, bitorder="little").reshape(len(part), cols, bits)
        codes[at : at + step] = np.packbits(single, axis=-1, bitorder="little")[..., 0]
    return torch.from_numpy(codes)


def to_parts(name: str, packed: Packed) -> dict[str, Tensor]:
    """The tensors that a file holds for the weight `name`."""
    widths = packed.grid.widths

    def stored(part: str, value: Tensor) -> Tensor:
        if part not in widths:
            return value.contiguous()
        if packed.coded:
            return torch.from_numpy(entropy.encode(value.numpy()))
        return pack_bits(value, widths[part])

    return {f"{name}:{part}": stored(part, value) for part, value in packed.parts().items()}


def from_parts(parts: dict[str, Tensor], entry: dict[str, Any]) -> Packed:
    """A Packed from the tensors of a file (keys ":codes", ":scales", ...) and its entry in config.json."""
    grid, shape, transposed = grid_of(entry), tuple(entry["shape"]), entry["transposed"]
    coded, found = entry.get("coded", False), {}
    for part, extent in grid.shapes(*_rows_and_cols(shape, transposed)).items():
        value = parts[":" + part]
        if part in grid.widths:
            value = _codes(value, grid.widths[part], extent, coded)
        found[part] = value
    low = (parts[":left"], parts[":right"]) if entry.get("rank") else None
    return Packed(found.pop("codes"), Steps(**found), grid, shape, transposed, low, coded)


def _codes(stored: Tensor, bits: int | Fraction, extent: tuple[int, ...], coded: bool) -> Tensor:
    if not coded:
        return unpack_bits(stored, bits, extent[1])
    codes = torch.from_numpy(entropy.decode(stored.numpy(), extent[0], extent[1]))
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise FolderError(f"A coded tensor holds {int(codes.max())}, which has more than {bits} bits; "
                          "fetch the model again.")  # fmt: skip
    return codes


def to_entry(packed: Packed) -> dict[str, Any]:
    """What config.json says of one packed weight."""
    grid: Any = packed.grid
    kind = {} if isinstance(grid, Uniform) else {"kind": grid.kind}
    more: dict[str, Any] = {"rank": packed.rank} if packed.rank else {}
    more |= {"coded": True} if packed.coded else {}
    return {**kind, **vars(grid), **more, "shape": list(packed.shape), "transposed": packed.transposed}


def grid_of(entry: dict[str, Any]) -> Grid:
    """The grid that an entry of config.json names. Raises KeyError, TypeError or ValueError for what is none."""
    kind = KINDS[entry.get("kind", Uniform.kind)]
    known = {item.name: item.type for item in fields(kind)}
    others = ("kind", "shape", "transposed", "rank", "coded")
    given = {key: value for key, value in entry.items() if key in known or key not in others}
    if set(given) != set(known) or any(type(given[key]) is not known[key] for key in known):
        raise ValueError("unknown settings of a grid")
    grid: Grid = kind(**given)
    return grid


def _rows_and_cols(shape: tuple[int, ...], transposed: bool) -> tuple[int, int]:
    *lead, rows, cols = shape
    rows, cols = (cols, rows) if transposed else (rows, cols)
    for count in lead:
        rows *= count
    return rows, cols


def check_entries(where: str, stated: Any, entries: dict[str, Entry]) -> None:
    """Compare what config.json says of every packed weight with what the file holds; raises FolderError."""
    tensors = stated.get("tensors") if isinstance(stated, dict) else None
    if not isinstance(tensors, dict):
        raise FolderError(f"{where}: quantization_config has no table of tensors; fetch the model again.")
    expected: set[str] = set()
    codes = stored = 0
    for name, entry in tensors.items():
        label, parts = _expected_parts(where, name, entry)
        for part, (dtypes, shape) in parts.items():
            found = entries.get(name + part)
            if entry.get("coded") and dtypes == ("U8",) and found is not None and len(found.shape) == 1:
                shape = _stream(where, name + part, shape, found)
            if found is None or found.dtype not in dtypes or found.shape != shape:
                got = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
                raise FolderError(f"{where}: config.json says {label} for '{name}', so '{name + part}' "
                                  f"should be {dtypes[0]} {list(shape)}, but the file has {got}.")  # fmt: skip
        expected |= {name + part for part in parts}
        if entry.get("coded"):
            codes, stored = codes + math.prod(entry["shape"]), stored + entries[f"{name}:codes"].bytes
    if codes > max(CODES_A_BYTE * stored, CODES_AT_LEAST):
        raise FolderError(f"{where}: config.json says {codes} coded weights, and the file has {stored} bytes of them; "
                          "the two do not belong together.")  # fmt: skip
    for name in entries:
        if name.endswith(PARTS) and name not in expected:
            raise FolderError(f"{where}: the file holds '{name}', which config.json does not mention.")


def _stream(where: str, name: str, extent: tuple[int, ...], found: Entry) -> tuple[int, ...]:
    """The shape that a coded part has; raises FolderError where it is too short for what it should hold."""
    if math.prod(extent) > entropy.possible(found.bytes):
        raise FolderError(f"{where}: '{name}' has {found.bytes} bytes, which cannot hold {list(extent)} codes; "
                          "fetch the model again.")  # fmt: skip
    return found.shape


def _expected_parts(
    where: str, name: str, entry: Any
) -> tuple[str, dict[str, tuple[tuple[str, ...], tuple[int, ...]]]]:
    """The grid's label, and dtypes and shape of every tensor that the file should hold for it."""
    try:
        shape, transposed = tuple(entry["shape"]), entry["transposed"]
        grid, rank, coded = grid_of(entry), entry.get("rank", 0), entry.get("coded", False)
        if type(rank) is not int or rank < 0 or ("rank" in entry and not rank):
            raise ValueError("no rank")
        if len(shape) < 2 or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError("no shape")
        if type(transposed) is not bool or type(coded) is not bool:
            raise ValueError("neither yes nor no")
        shapes = grid.shapes(*_rows_and_cols(shape, transposed))
    except (KeyError, TypeError, ValueError):
        raise FolderError(
            f"{where}: quantization_config says nothing usable of '{name}'; fetch the model again."
        ) from None
    parts: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}
    for part, extent in shapes.items():
        width = grid.widths.get(part)
        if width is None:
            parts[":" + part] = FLOATS, extent
        else:  # of what is coded, the codes; the bytes of their stream only the file knows
            parts[":" + part] = ("U8",), (extent[0], extent[1] if coded else -(-extent[1] * width // 8))
    if rank:
        rows, cols = _rows_and_cols(shape, transposed)
        parts |= {":left": (("BF16",), (rows, rank)), ":right": (("BF16",), (math.prod(shape[:-2]) * rank, cols))}
    return label(grid, rank, coded), parts


class ShrewConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed folder; `tensors` maps parameter names to what their codes mean, `sparse` to
    how many of their weights are not zero."""

    def __init__(
        self, tensors: dict[str, Any] | None = None, sparse: dict[str, Any] | None = None, layout: str = METHOD,
        **_: Any,
    ) -> None:  # fmt: skip
        self.quant_method: Any = METHOD
        self.tensors, self.sparse = tensors or {}, sparse or {}
        self.layout = layout
        self.dequantize = True  # the loaded model is an ordinary dense one; transformers then forgets the packing


class Unpack(ConversionOps):
    """One weight's parts -> the dense weight, computed in float32 and then cast to the model's dtype."""

    def __init__(self, hf_quantizer: "ShrewQuantizer", tensors: dict[str, Any], read: Callable[..., Tensor]) -> None:
        self.hf_quantizer = hf_quantizer  # its presence tells transformers not to cast the parts
        self.tensors, self.read = tensors, read

    def __deepcopy__(self, _: Any) -> "Unpack":
        return self  # transformers copies the operation for every weight; the table of tensors need not follow

    def convert(self, input_dict: dict[str, Any], *_: Any, **known: Any) -> dict[str, Any]:
        full_layer_name, model = known["full_layer_name"], known["model"]
        parts = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        device = next(iter(parts.values())).device
        parts = {key: value.cpu() for key, value in parts.items()}  # bits are unpacked there
        tensors = self.tensors
        prefix = f"{model.base_model_prefix}."  # a bare base model drops it from its names
        entry = tensors.get(full_layer_name) or tensors.get(prefix + full_layer_name)
        if entry is None:
            entry = tensors[full_layer_name.removeprefix(prefix)]
        dtype = model.get_parameter(full_layer_name).dtype
        return {full_layer_name: self.read(parts, entry).to(device, dtype)}


class ShrewQuantizer(HfQuantizer):
    quantization_config: ShrewConfig

    def get_weight_conversions(self) -> list[WeightConverter]:
        from shrew.folder import compressed, sparse  # they build on this file

        config = self.quantization_config
        if config.layout == compressed.METHOD:
            names = [part.lstrip(".") for part in compressed.PARTS]
            read = Unpack(self, config.tensors, lambda *given: compressed.from_parts(*given).dense())
            return [WeightConverter(names, "weight", [read])]
        codes = Unpack(self, config.tensors, lambda *given: from_parts(*given).dense())
        values = Unpack(self, config.sparse, sparse.from_parts)
        return [WeightConverter(list(PARTS), "", [codes]), WeightConverter(list(sparse.PARTS), "", [values])]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        # Nothing is left to undo when this model is saved: its weights are dense now.
        model._weight_conversions = [
            item
            for item in model._weight_conversions or []
            if not any(isinstance(step, Unpack) for step in getattr(item, "operations", ()))
        ]
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


@cache
def register() -> None:
    """Teach transformers to read packed folders with plain `from_pretrained`; calling it again does nothing."""
    register_quantization_config(METHOD)(ShrewConfig)
    register_quantizer(METHOD)(ShrewQuantizer)
