"""Weights out of the parts that quantizers store in safetensors files. Everything is read off shapes and dtypes.

A layout is a row of LAYOUTS: the part that betrays it, the parts that may stand beside it, and a reader. The formats
are described where they come from: AutoGPTQ and GPTQModel (qweight int32 [inputs * bits / 32, outputs]), AutoAWQ
(qweight int32 [inputs, outputs * bits / 32]), bitsandbytes (4 bits: two codes a byte, flat; 8 bits: SCB), and
compressed-tensors (weight_packed, or weight with weight_scale).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shrew.audit.held import DENSE, Held, Span, count, printable
from shrew.errors import FolderError
from shrew.folder.headers import BITS, Entry

FP8 = {"F8_E4M3": "fp8_e4m3", "F8_E5M2": "fp8_e5m2"}
HQQ = ("scale", "zero", "shape", "nbits", "group_size", "axis", "packing", "channel_wise", "compute_dtype",
       "encoded_state_dict", "offload_meta", "optimize", "quant_scale", "quant_zero", "round_zero",
       "stores_quant_config", "unpack_view_dtype", "view_as_float")  # fmt: skip
LARGEST_STATE = 1 << 20  # bytes of a quant_state of bitsandbytes, which is a few numbers as JSON


@dataclass(frozen=True)
class Parts:
    """The tensors that make up one weight, by the end of their names."""

    stem: str
    found: dict[str, Entry]

    def __getitem__(self, end: str) -> Entry:
        return self.found[end]

    def get(self, end: str) -> Entry | None:
        return self.found.get(end)

    def spans(self) -> tuple[Span, ...]:
        return tuple(Span(item.file, item.start, item.bytes) for item in self.found.values())

    def wrong(self, why: str) -> FolderError:
        shapes = ", ".join(f"{end.lstrip('.')} {item.dtype} {list(item.shape)}" for end, item in self.found.items())
        return FolderError(f"'{printable(self.stem)}': {why} ({shapes[:300]}); fetch the model again.")


@dataclass(frozen=True)
class Layout:
    mark: str
    others: tuple[str, ...]
    read: Callable[[Parts], "Weight"]


@dataclass(frozen=True)
class Weight:
    """What a layout makes of its parts: see `Held`. `kind` names the layout to those who decode it."""

    kind: str
    shape: tuple[int, ...]
    effective: str
    code: float
    group: int | None = None
    quantized: bool = True


def packed_weight(parts: Parts) -> Weight:
    """GPTQ's or AWQ's integers: bits and groups by the shapes of scales and zeros."""
    codes, scales, zeros = parts[".qweight"], parts.get(".scales"), parts.get(".qzeros")
    if scales is None or zeros is None:
        raise parts.wrong("has codes without scales and zeros")
    if codes.dtype != "I32" or not len(codes.shape) == len(scales.shape) == len(zeros.shape) == 2:
        raise parts.wrong("has parts that are no matrices of GPTQ or AWQ")
    groups, outputs = scales.shape
    width = zeros.shape[1]
    bits = 32 * width // outputs if outputs else 0
    if bits not in range(2, 9) or 32 * width != bits * outputs or zeros.shape[0] != groups or not groups:
        raise parts.wrong("has zeros that do not fit its scales")
    if codes.shape[1] == width and width != outputs:
        kind, inputs = "awq", codes.shape[0]
    elif codes.shape[1] == outputs and 32 * codes.shape[0] % bits == 0:
        kind, inputs = "gptq", 32 * codes.shape[0] // bits
    else:
        raise parts.wrong("has codes that do not fit its scales")
    if groups > max(inputs, 1):
        raise parts.wrong("has more groups than inputs")
    group = 0 if groups == 1 else _group(inputs, groups)
    return Weight(kind, (outputs, inputs), f"int{bits} g{group or 'row'}", float(bits), group)


def _group(inputs: int, groups: int) -> int:
    """The weights that share a scale; of lengths that would give so many groups, the one that divides or a power of
    two, because the last group may be short."""
    if inputs % groups == 0:
        return inputs // groups
    fitting = [1 << power for power in range(1, 16) if -(-inputs // (1 << power)) == groups]
    return fitting[0] if fitting else -(-inputs // groups)


def compressed_weight(parts: Parts) -> Weight:
    """compressed-tensors' packed weights: int32 words of integers, or bytes of two fp4 codes."""
    codes, scales, shape = parts[".weight_packed"], parts.get(".weight_scale"), parts.get(".weight_shape")
    if scales is None or len(codes.shape) < 2 or len(scales.shape) != len(codes.shape):
        raise parts.wrong("has packed codes without matching scales")
    *lead, width = codes.shape
    if codes.dtype == "U8":
        return _pairs(parts, codes, scales)
    if codes.dtype != "I32" or shape is None or shape.dtype not in ("I64", "I32") or shape.shape != (len(codes.shape),):
        raise parts.wrong("is packed in a way that is not known")
    dims = _numbers(shape)
    inputs = dims[-1]
    bits = next((bits for bits in range(8, 0, -1) if inputs > 0 and -(-inputs * bits // 32) == width), 0)
    kind = "packed"
    if not bits and inputs > 0:  # releases before 0.13 kept 3, 5, 6 and 7 bits whole in their words
        bits, kind = next((bits for bits in (3, 5, 6, 7) if -(-inputs // (32 // bits)) == width), 0), "words"
    if not bits or tuple(dims[:-1]) != tuple(lead):
        raise parts.wrong(f"does not fit its own shape {dims}")
    if count(dims) >= 2**63 or not 0 < scales.shape[-1] <= inputs:
        raise parts.wrong("has scales that do not fit")
    group = 0 if scales.shape[-1] == 1 else _group(inputs, scales.shape[-1])
    zeros = "asym" if parts.get(".weight_zero_point") else "sym"
    return Weight(kind, tuple(dims), f"int{bits} g{group or 'row'} {zeros}", float(bits), group)


def _pairs(parts: Parts, codes: Entry, scales: Entry) -> Weight:
    """Two fp4 codes a byte, with a scale in E4M3 (NVFP4) or an exponent (MXFP4) for each group of a row."""
    *lead, width = codes.shape
    right = len(scales.shape) == len(codes.shape) and scales.shape[:-1] == tuple(lead) and scales.shape[-1] > 0
    if scales.dtype not in ("F8_E4M3", "U8") or not right or 2 * width % scales.shape[-1]:
        raise parts.wrong("has two codes a byte and scales that do not fit")
    name, group = "nvfp4" if scales.dtype == "F8_E4M3" else "mxfp4", 2 * width // scales.shape[-1]
    return Weight(name, (*lead, 2 * width), f"{name} g{group}", 4.0, group)


def _numbers(entry: Entry) -> list[int]:
    width = BITS[entry.dtype] // 8
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        raw = stream.read(entry.bytes)
    return [int.from_bytes(raw[at : at + width], "little", signed=True) for at in range(0, len(raw), width)]


def scaled_weight(parts: Parts) -> Weight:
    """A weight of whole bytes with a scale for the tensor, a row, a group or a square block."""
    codes = parts[".weight"]
    scales = parts.get(".weight_scale") or parts.get(".weight_scale_inv")
    if scales is None or len(codes.shape) < 2:
        raise parts.wrong("has scales of no matrix")
    if codes.dtype in DENSE:  # scales that nothing uses: the weight beside them was never quantized
        return Weight("dense", codes.shape, DENSE[codes.dtype], BITS[codes.dtype], quantized=False)
    inputs = codes.shape[-1]
    if codes.dtype == "U8":  # as ModelOpt stores them
        return _pairs(parts, codes, scales)
    if codes.dtype not in ("I8", *FP8):
        raise parts.wrong("is stored in a type that is not known")
    name = FP8.get(codes.dtype, "int8")
    if count(scales.shape) == 1:
        return Weight("scaled", codes.shape, f"{name} tensor", 8.0, None)
    if len(scales.shape) == 1 or scales.shape[-1] == 1:
        return Weight("scaled", codes.shape, f"{name} grow", 8.0, 0)
    if scales.shape[-2] == codes.shape[-2]:
        group = _group(inputs, scales.shape[-1])
        return Weight("scaled", codes.shape, f"{'mxfp8' if scales.dtype == 'U8' else name} g{group}", 8.0, group)
    tall, wide = _group(codes.shape[-2], max(scales.shape[-2], 1)), _group(inputs, max(scales.shape[-1], 1))
    return Weight("blocks", codes.shape, f"{name} {tall}x{wide}", 8.0, wide)


def four_bit_weight(parts: Parts, name: str) -> Weight:
    """bitsandbytes' nf4 and fp4: what the quant_state says, compared with the sizes of the parts."""
    state = quant_state(parts, name)
    codes, scales = parts.get(".weight"), parts.get(".weight.absmax")
    shape, block = tuple(state["shape"]), state["blocksize"]
    if codes is None or scales is None or codes.dtype != "U8" or codes.bytes != -(-count(shape) // 2):
        raise parts.wrong(f"has no codes and scales of {list(shape)} weights in 4 bits")
    if count(scales.shape) != -(-count(shape) // block):
        raise parts.wrong(f"has scales that do not fit blocks of {block}")
    nested = parts.get(".weight.nested_absmax") is not None
    return Weight("bnb4", shape, f"{name} g{block}{' double' if nested else ''}", 4.0, block)


def quant_state(parts: Parts, name: str) -> dict[str, Any]:
    """bitsandbytes' own notes on a weight, checked."""
    entry = parts[f".weight.quant_state.bitsandbytes__{name}"]
    if entry.bytes > LARGEST_STATE:
        raise parts.wrong("has a quant_state that is no short JSON")
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        raw = stream.read(entry.bytes)
    try:
        state = json.loads(raw)
        shape, block = state["shape"], state["blocksize"]
        right = isinstance(shape, list) and all(type(extent) is int and 0 < extent < 2**40 for extent in shape)
        right = right and 0 < len(shape) < 5 and type(block) is int and 0 < block < 2**40
    except (ValueError, RecursionError, KeyError, TypeError):
        right = False
    if not right:
        raise parts.wrong("has a quant_state that cannot be read")
    found: dict[str, Any] = state
    return found


def eight_bit_weight(parts: Parts) -> Weight:
    """bitsandbytes' LLM.int8(): one scale an output."""
    codes = parts.get(".weight")
    if codes is None or codes.dtype != "I8" or len(codes.shape) != 2 or count(parts[".SCB"].shape) != codes.shape[0]:
        raise parts.wrong("has an SCB without codes that fit")
    return Weight("bnb8", codes.shape, "int8 grow sym", 8.0, 0)


def block_weight(parts: Parts) -> Weight:
    """MXFP4 of experts, as gpt-oss stores it: blocks uint8 [..., groups, 16], scales uint8 [..., groups]."""
    codes, scales = parts["_blocks"], parts.get("_scales")
    if scales is None or codes.dtype != "U8" or scales.dtype != "U8" or codes.shape[:-1] != scales.shape:
        raise parts.wrong("has blocks without matching scales")
    *lead, groups, width = codes.shape
    return Weight("mxfp4", (*lead, groups * width * 2), f"mxfp4 g{2 * width}", 4.0, 2 * width)


def half_quadratic_weight(parts: Parts) -> Weight:
    """HQQ: codes with scales and zero points in float, and its settings as tensors beside them."""
    codes, scales, shape, nbits = (parts.get(end) for end in (".W_q", ".scale", ".shape", ".nbits"))
    if codes is None or scales is None or shape is None or nbits is None or nbits.shape or len(shape.shape) != 1:
        raise parts.wrong("has codes of HQQ without their settings")
    if shape.dtype != "I64" or nbits.dtype not in ("I32", "I64") or not 0 < shape.shape[0] < 5:
        raise parts.wrong("has settings of HQQ that are no numbers")
    dims, bits = tuple(_numbers(shape)), _numbers(nbits)[0]
    weights = count(dims)
    if not 0 < bits <= 8 or min(dims) < 1 or weights >= 2**63 or 8 * codes.bytes < bits * weights:
        raise parts.wrong(f"has no codes of {list(dims)} weights in {bits} bits")
    group = weights // max(count(scales.shape), 1)
    return Weight("hqq", dims, f"int{bits} g{group} asym", float(bits), group)


STATES = tuple(f".weight.quant_state.bitsandbytes__{name}" for name in ("nf4", "fp4"))
NESTED = (".weight", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map")
SCALED = (".weight", ".weight_scale_2", ".weight_zero_point", ".weight_global_scale", ".input_scale",
          ".input_zero_point", ".input_global_scale", ".weight_g_idx")  # fmt: skip
LAYOUTS = (
    Layout(".qweight", (".scales", ".qzeros", ".g_idx"), packed_weight),
    Layout(".weight_packed", (".weight_scale", ".weight_shape", *SCALED[1:]), compressed_weight),
    Layout(STATES[0], NESTED, lambda parts: four_bit_weight(parts, "nf4")),
    Layout(STATES[1], NESTED, lambda parts: four_bit_weight(parts, "fp4")),
    Layout(".SCB", (".weight", ".weight_format"), eight_bit_weight),
    Layout(".weight_scale", SCALED, scaled_weight),
    Layout(".weight_scale_inv", SCALED, scaled_weight),
    Layout("_blocks", ("_scales",), block_weight),
    Layout(".W_q", tuple(f".{name}" for name in HQQ), half_quadratic_weight),
)


def assemble(entries: dict[str, Entry]) -> tuple[dict[str, tuple[Parts, Weight]], dict[str, Entry]]:
    """Quantized weights by name with their parts, and the tensors that stand for themselves."""
    found: dict[str, tuple[Parts, Weight]] = {}
    used: set[str] = set()
    for layout in LAYOUTS:
        for name in entries:
            if not name.endswith(layout.mark) or name in used:
                continue
            stem = name.removesuffix(layout.mark)
            ends = [end for end in (layout.mark, *layout.others) if stem + end in entries and stem + end not in used]
            parts = Parts(stem, {end: entries[stem + end] for end in ends})
            if layout.mark in (".weight_scale", ".weight_scale_inv") and ".weight" not in ends:
                continue
            weight = layout.read(parts)
            if not 0 < count(weight.shape) < 2**63 or not parts[layout.mark].bytes:
                raise parts.wrong("has a size that no weight has")
            used |= {stem + end for end in ends}
            found[stem + ("" if layout.mark == "_blocks" else ".weight")] = parts, weight
    return found, {name: entry for name, entry in entries.items() if name not in used}


def plain(name: str, entry: Entry) -> Held:
    """A tensor that stands for itself."""
    kind = DENSE.get(entry.dtype) or FP8.get(entry.dtype) or entry.dtype.lower()
    bits = BITS[entry.dtype]
    quantized = entry.dtype not in DENSE and len(entry.shape) > 1 and bits <= 8
    return Held(printable(name), entry.shape, kind, bits, (Span(entry.file, entry.start, entry.bytes),), quantized)
