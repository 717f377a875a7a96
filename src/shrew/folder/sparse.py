"""Dense weights with many zeros, as a file holds them: one bit a weight that says where it is not zero, then those.

Bit i of the bitmap, in a little-endian stream, is weight i of the tensor in row-major order. Half of the weights of
bf16 gone leaves 9 bits a weight; below one zero in sixteen the bitmap costs more than it saves, and the weight is
stored as it is.
"""

import math
from typing import Any

import torch
from torch import Tensor

from shrew.errors import FolderError
from shrew.folder.grids import FLOATS
from shrew.folder.headers import Entry
from shrew.folder.packed import pack_bits, unpack_bits

PARTS = (":bitmap", ":values")
DENSE_NOTE = "pruned weights are written with their zeros: this form has no bitmaps, so they take as much as before"


def pays(tensor: Tensor) -> bool:
    """Whether a weight takes fewer bytes so."""
    if tensor.ndim < 2 or not tensor.is_floating_point():
        return False
    kept = int(tensor.count_nonzero())
    return kept * tensor.element_size() + -(-tensor.numel() // 8) < tensor.numel() * tensor.element_size()


def to_parts(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors that a file holds for the weight `name`: bitmap uint8 [ceil(n / 8)], values [kept]."""
    here = tensor != 0
    bitmap = pack_bits(here.reshape(1, -1).to(torch.uint8), 1)[0]
    return dict(zip((name + part for part in PARTS), (bitmap, tensor[here].contiguous()), strict=True))


def to_entry(tensor: Tensor) -> dict[str, Any]:
    """What config.json says of it."""
    return {"shape": list(tensor.shape), "values": int(tensor.count_nonzero())}


def from_parts(parts: dict[str, Tensor], entry: dict[str, Any]) -> Tensor:
    """The weight, in the dtype of its values."""
    dense = torch.zeros(math.prod(entry["shape"]), dtype=parts[":values"].dtype)
    dense[unpack_bits(parts[":bitmap"][None], 1, len(dense))[0].bool()] = parts[":values"]
    return dense.reshape(entry["shape"])


def check_bitmap(where: str, name: str, bitmap: Tensor, entry: dict[str, Any]) -> None:
    """Raises FolderError for a bitmap that has not one bit for each value, or has bits behind its end."""
    bits = unpack_bits(bitmap[None], 1, 8 * len(bitmap))[0]
    if int(bits.sum()) != entry["values"] or bits[math.prod(entry["shape"]) :].any():
        raise FolderError(f"{where}: the bitmap of '{name}' does not mark its {entry['values']} values; fetch the "
                          "model again.")  # fmt: skip


def check_entries(where: str, stated: Any, entries: dict[str, Entry]) -> dict[str, dict[str, Any]]:
    """The sparse weights that config.json states by name, after a comparison with what the file holds; raises
    FolderError."""
    table = stated.get("sparse", {})
    if not isinstance(table, dict):
        raise FolderError(f"{where}: quantization_config has no table of sparse weights; fetch the model again.")
    for name, entry in table.items():
        shape, kept = _shape_and_count(where, name, entry)
        wanted = ((("U8",), (-(-math.prod(shape) // 8),)), (FLOATS, (kept,)))
        for part, (dtypes, extent) in zip(PARTS, wanted, strict=True):
            found = entries.get(name + part)
            if found is None or found.dtype not in dtypes or found.shape != extent:
                got = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
                raise FolderError(f"{where}: config.json says {kept} of {math.prod(shape)} weights for '{name}', so "
                                  f"'{name + part}' should be {dtypes[0]} {list(extent)}, but the file has {got}."
                                  )  # fmt: skip
    for name in entries:
        if name.endswith(PARTS) and name.rpartition(":")[0] not in table:
            raise FolderError(f"{where}: the file holds '{name}', which config.json does not mention.")
    return table


def _shape_and_count(where: str, name: str, entry: Any) -> tuple[tuple[int, ...], int]:
    try:
        shape, kept = tuple(entry["shape"]), entry["values"]
        known = set(entry) == {"shape", "values"} and all(type(n) is int and n >= 0 for n in (*shape, kept))
        if known and kept <= math.prod(shape):
            return shape, kept
    except (KeyError, TypeError):
        pass
    raise FolderError(f"{where}: quantization_config says nothing usable of '{name}'; fetch the model again.")
