"""The compressed-tensors layout (pack-quantized), which plain transformers, vLLM and others read.

Codes lie in the same little-endian bit stream as ours, with rows padded to whole int32 words; zero points are packed
down the columns. The package itself is not needed here: tests hold these bytes against its own reader.
"""

import struct
from typing import Any

import torch
from torch import Tensor, nn

from shrew.errors import FolderError
from shrew.folder.grids import Steps, Uniform
from shrew.folder.headers import Entry
from shrew.folder.packed import Packed, pack_bits, unpack_bits

METHOD = "compressed-tensors"
WIDTHS = (4, 8)
PARTS = (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point")


def obstacle(model: Any, packed: dict[str, Packed]) -> str:
    """Why these weights cannot be written in this layout; empty when they can."""
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    shared -= {name for name, _ in model.named_parameters()}
    aliases = {id(model.get_parameter(name)) for name in shared}
    for name, item in packed.items():
        module = model.get_submodule(name.rpartition(".")[0])
        if item.rank:
            return f"{name} has a low-rank correction"
        if not isinstance(item.grid, Uniform):
            return f"{name} is {item.grid.label()}"
        if item.grid.bits not in WIDTHS:
            return f"{name} has {item.grid.bits} bits"
        if type(module) is not nn.Linear or not name.endswith(".weight"):
            return f"{name} belongs to {type(module).__name__}, not to a plain Linear"
        if id(model.get_parameter(name)) in aliases:
            return f"{name} is tied to another weight"
        if not item.grid.symmetric:
            return f"{name} has zero points"
        if item.grid.group and item.codes.shape[1] % item.grid.group:
            return f"{name} has rows of {item.codes.shape[1]}, which groups of {item.grid.group} do not divide"
    return _trips_transformers(model, packed)


def _trips_transformers(model: Any, packed: dict[str, Packed]) -> str:
    """Whether transformers' own loader would fail: some models (ModernBERT) reach for `weight` to initialise it, which
    a compressed layer does not have at that moment. Tried on an empty copy, which takes no memory."""
    with torch.device("meta"):
        empty = type(model)(model.config)
    for name in packed:
        del empty.get_submodule(name.rpartition(".")[0]).weight
    try:
        empty.initialize_weights()
    except AttributeError:
        return f"transformers cannot load compressed layers of {type(model).__name__}"
    return ""


def to_config(packed: dict[str, Packed]) -> dict[str, Any]:
    """The `quantization_config` of config.json: one group for each grid, its modules by name."""
    targets: dict[Any, list[str]] = {}
    for name, item in sorted(packed.items()):
        targets.setdefault(item.grid, []).append(name.removesuffix(".weight"))
    groups = {
        f"group_{number}": {
            "targets": names,
            "weights": {
                "num_bits": grid.bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group" if grid.group else "channel",
                "group_size": grid.group or None,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
        for number, (grid, names) in enumerate(targets.items())
    }
    return {"quant_method": METHOD, "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": groups, "ignore": []}  # fmt: skip


def to_parts(name: str, packed: Packed) -> dict[str, Tensor]:
    """The tensors that a file holds for the weight `name`."""
    module = name.removesuffix(".weight")
    return {
        module + ".weight_packed": pack_bits(packed.codes, packed.grid.bits, align=4).view(torch.int32),
        module + ".weight_scale": packed.steps.scales.contiguous(),
        module + ".weight_shape": torch.tensor(packed.shape, dtype=torch.int64),
    }


def read_entries(where: str, stated: dict[str, Any], entries: dict[str, Entry]) -> dict[str, dict[str, Any]]:
    """What the file really holds for each packed weight, by parameter name; raises FolderError.

    Widths and groups are computed from the sizes of the tensors and then compared with what config.json claims.
    """
    claimed = _claimed_widths(where, stated)
    found = {}
    for part, entry in entries.items():
        if not part.endswith(".weight_packed"):
            continue
        module = part.removesuffix(".weight_packed")
        scale, shape = entries.get(module + ".weight_scale"), entries.get(module + ".weight_shape")
        if scale is None or shape is None or (shape.dtype, shape.shape) != ("I64", (2,)):
            raise FolderError(f"{where}: '{part}' has no matching weight_scale and weight_shape; fetch it again.")
        rows, cols = _read_shape(shape)
        right = entry.dtype == "I32" and len(entry.shape) == 2 and len(scale.shape) == 2 and rows > 0 and cols > 0
        right = right and entry.shape[0] == scale.shape[0] == rows and scale.dtype in ("BF16", "F16", "F32")
        bits = next((width for width in claimed if right and -(-cols * width // 32) == entry.shape[1]), 0)
        if not bits or not scale.shape[1] or cols % scale.shape[1]:
            raise FolderError(f"{where}: '{part}' {list(entry.shape)} does not fit its shape {[rows, cols]} and scales "
                              f"{list(scale.shape)} at {' or '.join(map(str, claimed))} bits.")  # fmt: skip
        group = 0 if scale.shape[1] == 1 else cols // scale.shape[1]
        zeros = entries.get(module + ".weight_zero_point")
        symmetric = zeros is None
        if zeros is not None and (zeros.dtype, zeros.shape) != ("I32", (-(-rows * bits // 32), scale.shape[1])):
            raise FolderError(f"{where}: '{module}.weight_zero_point' does not fit the scales; fetch the model again.")
        found[module + ".weight"] = {"bits": bits, "group": group, "symmetric": symmetric, "shape": [rows, cols],
                                     "transposed": False}  # fmt: skip
    return found


def _claimed_widths(where: str, stated: dict[str, Any]) -> list[int]:
    groups = stated.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    widths: set[int] = set()
    for group in groups:
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or weights.get("type", "int") != "int" or group.get("input_activations"):
            raise FolderError(f"{where} is compressed in a way that Shrew does not read (only integer weights); "
                              "start from the model it was made from.")  # fmt: skip
        bits = weights.get("num_bits")
        widths.add(bits if type(bits) is int else 0)
    if stated.get("format") != "pack-quantized" or not widths or not widths <= set(range(2, 9)):
        raise FolderError(f"{where} is compressed as '{stated.get('format')}', and Shrew reads only pack-quantized "
                          "integers; start from the model it was made from.")  # fmt: skip
    return sorted(widths)


def _read_shape(entry: Entry) -> tuple[int, int]:
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        rows, cols = struct.unpack("<qq", stream.read(16))
    return rows, cols


def from_parts(parts: dict[str, Tensor], entry: dict[str, Any]) -> Packed:
    """A Packed from the tensors of a file, keyed by the last part of their names."""
    grid, cols = Uniform(entry["bits"], entry["group"], entry["symmetric"]), entry["shape"][1]
    codes = unpack_bits(parts["weight_packed"].view(torch.uint8), grid.bits, cols)
    scales, zeros = parts["weight_scale"], None
    if not grid.symmetric:
        words = parts["weight_zero_point"].T.contiguous().view(torch.uint8)
        zeros = unpack_bits(words, grid.bits, entry["shape"][0]).T.contiguous()
    return Packed(codes, Steps(scales, zeros), grid, tuple(entry["shape"]))
