"""From the parts that quantizers store to codes and to the numbers they stand for, in float32; one weight at a time.

What a code means is each project's own arithmetic: GPTQ scale * (code - zero), where files of version 1 store zero - 1;
AWQ the same without that, its outputs in the order of ORDER in each word; bitsandbytes a table times the largest value
of a block, which may itself be a code; fp4 (E2M1) times a scale in E4M3 (NVFP4) or a power of two (MX).
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shrew.audit.layouts import Parts, Weight, quant_state
from shrew.folder.headers import Entry
from shrew.folder.packed import unpack_bits

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the outputs in a word of AWQ, from the lowest bits on
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TABLE = torch.tensor([*FP4, *(-value for value in FP4)])
CHUNK = 1 << 22  # weights decoded at once
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def tensor(entry: Entry) -> Tensor:
    """A part as it is stored."""
    raw = np.fromfile(entry.file, np.uint8, entry.bytes, offset=entry.start)
    return torch.from_numpy(raw).view(DTYPES[entry.dtype]).reshape(entry.shape)


def mapped(entry: Entry) -> np.ndarray:
    """A part's bytes [rows, bytes of a row], mapped and not read."""
    flat = np.memmap(entry.file, np.uint8, "r", entry.start, (entry.bytes,))
    return flat.reshape(math.prod(entry.shape[:-1]), -1) if len(entry.shape) > 1 else flat.reshape(1, -1)


def rows_of_codes(parts: Parts, weight: Weight) -> Iterator[Tensor]:
    """uint8 codes [outputs, inputs], some outputs at a time and in order; of bitsandbytes' 4 bits [n, block]. int8 and
    fp8 weights come as their bytes."""
    inputs, bits = weight.shape[-1], int(weight.code)
    step = max(1, CHUNK // max(inputs, 1))
    if weight.kind in ("gptq", "awq"):
        words = mapped(parts[".qweight"]).view(np.int32)
        step = max(32, step // 32 * 32)
        for at in range(0, weight.shape[0], step):
            if weight.kind == "gptq":
                yield _stream(words[:, at : at + step].T, bits, inputs)
            else:
                some = words[:, at * bits // 32 : (at + step) * bits // 32]
                yield _ordered(_stream(some, bits, some.shape[1] * 32 // bits), bits).T.contiguous()
        return
    if weight.kind == "bnb4":
        flat = mapped(parts[".weight"]).reshape(-1)
        block = weight.group or 1
        step = max(1, CHUNK // block) * block // 2 if block % 2 == 0 else len(flat)
        for at in range(0, len(flat), max(step, 1)):
            both = torch.from_numpy(np.array(flat[at : at + step]))
            codes = torch.stack([both >> 4, both & 15], -1).reshape(-1)
            whole = len(codes) // block * block
            yield codes[:whole].reshape(-1, block)
            if whole < len(codes):
                yield codes[whole:].reshape(1, -1)
        return
    if weight.kind == "hqq":  # the codes of each byte stand so many rows apart, the first in the highest bits
        both = tensor(parts[".W_q"])
        if both.dtype != torch.uint8 or bits not in (1, 2, 4, 8):
            raise parts.wrong("is packed in a way that is not read")
        yield torch.cat([(both >> shift) & (2**bits - 1) for shift in range(8 - bits, -1, -bits)])
        return
    part = next(parts[end] for end in (".weight_packed", ".weight", "_blocks") if end in parts.found)
    data = mapped(part) if part.dtype != "I32" or weight.kind != "words" else mapped(part).view(np.int32)
    data = data.reshape(math.prod(weight.shape[:-1]), -1)
    for at in range(0, len(data), step):
        some = np.array(data[at : at + step], order="C")
        if weight.kind == "words":
            each = 32 // bits
            codes = (some[..., None] >> (np.arange(each) * bits)) & (2**bits - 1)
            yield torch.from_numpy(codes.astype(np.uint8).reshape(len(some), -1)[:, :inputs])
        elif weight.kind in ("packed", "nvfp4", "mxfp4"):
            yield unpack_bits(torch.from_numpy(some), bits, inputs)
        else:
            yield torch.from_numpy(some)


def groups(parts: Parts, weight: Weight) -> Iterator[np.ndarray]:
    """The same codes as [n, group], for a scan; a group that is shorter than the others is left out."""
    for codes in rows_of_codes(parts, weight):
        size = weight.group if weight.group and weight.group <= codes.shape[1] else codes.shape[1]
        whole = codes.shape[1] // size * size
        yield codes[:, :whole].reshape(-1, size).numpy()


def numbers(entry: Entry) -> Iterator[np.ndarray]:
    """A dense tensor's numbers, float32 [n, columns], some rows at a time."""
    data, dtype = mapped(entry), DTYPES[entry.dtype]
    width = entry.shape[-1] if entry.shape else 1
    step = max(1, CHUNK // max(width, 1))
    for at in range(0, len(data), step):
        yield torch.from_numpy(np.array(data[at : at + step])).view(dtype).float().numpy()


def _stream(words: np.ndarray, bits: int, cols: int) -> Tensor:
    """int32 words [rows, n] -> the codes in them [rows, cols]: a little-endian stream of bits along each row."""
    return unpack_bits(torch.from_numpy(np.array(words, np.int32, order="C").view(np.uint8)), bits, cols)


def _ordered(codes: Tensor, bits: int) -> Tensor:
    """Codes [n, outputs] out of AWQ's words, in the order of the outputs."""
    if bits != 4:
        return codes
    found = torch.empty_like(codes).unflatten(1, (-1, 8))
    found[..., list(ORDER)] = codes.unflatten(1, (-1, 8))
    return found.flatten(1)


def dense(parts: Parts, weight: Weight, stated: dict[str, Any]) -> Tensor:
    """The numbers that a weight stands for, float32 of its shape. `stated` is the folder's quantization_config. Raises
    FolderError for parts that do not fit together."""
    try:
        found = _dense(parts, weight, stated)
    except (RuntimeError, IndexError, ValueError, KeyError):  # torch's, for shapes that do not fit
        raise parts.wrong("has parts that do not fit together") from None
    if found.shape != weight.shape:
        raise parts.wrong("has parts that do not fit together")
    return found


def _dense(parts: Parts, weight: Weight, stated: dict[str, Any]) -> Tensor:
    if weight.kind in ("gptq", "awq"):
        return _grouped_integers(parts, weight, stated)
    if weight.kind == "bnb4":
        return _table(parts, weight)
    if weight.kind == "bnb8":
        return tensor(parts[".weight"]).float() * (tensor(parts[".SCB"]).float() / 127)[:, None]
    if weight.kind == "hqq":
        codes, zero = next(rows_of_codes(parts, weight)).float(), parts.get(".zero")
        scales = tensor(parts[".scale"]).float()
        if zero is None or scales.dim() != 2 or codes.numel() != math.prod(weight.shape):
            raise parts.wrong("has codes and scales that do not fit")
        return ((codes - tensor(zero).float()) * scales).reshape(weight.shape)
    if weight.kind == "dense":
        return tensor(parts[".weight"]).float()
    if weight.kind in ("packed", "words"):
        return _packed_integers(parts, weight)
    if weight.kind in ("nvfp4", "mxfp4"):
        return _four_bit_floats(parts, weight)
    return _scaled(parts, weight)


def _grouped_integers(parts: Parts, weight: Weight, stated: dict[str, Any]) -> Tensor:
    bits, (outputs, inputs) = int(weight.code), weight.shape
    scales = tensor(parts[".scales"]).float()  # [groups, outputs]
    zeros = _stream(tensor(parts[".qzeros"]).numpy(), bits, outputs)
    if weight.kind == "awq":
        zeros = _ordered(zeros, bits)
    elif zero_offset(zeros, bits, stated):
        zeros = (zeros + 1) & (2**bits - 1)
    which = torch.arange(inputs) // (weight.group or inputs)
    if (order := parts.get(".g_idx")) is not None and order.shape == (inputs,):
        which = tensor(order).long()
        if not 0 <= int(which.min()) <= int(which.max()) < len(scales):
            raise parts.wrong("has a g_idx that names groups which are not there")
    codes = torch.cat(list(rows_of_codes(parts, weight)))
    return (codes.float() - zeros.float().T[:, which]) * scales.T[:, which]


def zero_offset(zeros: Tensor, bits: int, stated: dict[str, Any]) -> bool:
    """Whether a file of GPTQ's layout stores each zero point less one. AutoGPTQ's (version 1) do; GPTQModel's version 2
    and AutoRound's own packing do not. Where the weights are said to be symmetric, the zeros themselves decide."""
    middle = 2 ** (bits - 1)
    if stated.get("sym") is True and zeros.numel() and bool((zeros == zeros.flatten()[0]).all()):
        value = int(zeros.flatten()[0])
        if value in (middle, middle - 1):
            return value == middle - 1
    if stated.get("checkpoint_format") == "gptq_v2":
        return False
    packing = stated.get("packing_format")
    if "round" in str(stated.get("quant_method")) and isinstance(packing, str):
        return "gptq" in packing
    return True


def _table(parts: Parts, weight: Weight) -> Tensor:
    name = weight.effective.partition(" ")[0]
    state, block = quant_state(parts, name), weight.group or 1
    scales = tensor(parts[".weight.absmax"])
    if (outer := parts.get(".weight.nested_absmax")) is not None:
        size, offset = state.get("nested_blocksize"), state.get("nested_offset")
        inner = parts.get(".weight.nested_quant_map")
        if type(size) is not int or size < 1 or not isinstance(offset, int | float) or inner is None:
            raise parts.wrong("has double quantization without its settings")
        which = torch.arange(scales.numel()) // size
        if scales.dtype != torch.uint8 or inner.shape != (256,) or int(which.max()) >= math.prod(outer.shape):
            raise parts.wrong("has double quantization that does not fit")
        scales = tensor(inner).float()[scales.long().flatten()] * tensor(outer).float().flatten()[which] + offset
    table = parts.get(".weight.quant_map")
    if table is None or table.shape != (16,):
        raise parts.wrong("has no table of 16 values")
    values = tensor(table).float()
    codes = torch.cat([rows.reshape(-1) for rows in rows_of_codes(parts, weight)])[: math.prod(weight.shape)]
    which = torch.arange(len(codes)) // block
    return (values[codes.long()] * scales.float().flatten()[which]).reshape(weight.shape)


def _packed_integers(parts: Parts, weight: Weight) -> Tensor:
    bits, inputs = int(weight.code), weight.shape[-1]
    scales = tensor(parts[".weight_scale"]).float()
    codes = torch.cat(list(rows_of_codes(parts, weight))).reshape(weight.shape).float()
    zeros = torch.full_like(scales, 2.0 ** (bits - 1))
    if (part := parts.get(".weight_zero_point")) is not None:
        if len(weight.shape) != 2 or weight.kind == "words":
            raise parts.wrong("has zero points that are not read")
        zeros = _stream(tensor(part).T.numpy(), bits, weight.shape[0]).T.float()
    which = torch.arange(inputs) // (weight.group or inputs)
    if (order := parts.get(".weight_g_idx")) is not None and int(tensor(order).min()) >= 0:
        which = tensor(order).long()
    if int(which.max()) >= scales.shape[-1] or zeros.shape != scales.shape:
        raise parts.wrong("has scales that do not fit its groups")
    return (codes - zeros[..., which]) * scales[..., which]


def _powers(scales: Tensor) -> Tensor:
    """MX scales: the exponents of powers of two, 127 for 1."""
    return torch.ldexp(torch.ones(scales.shape), scales.to(torch.int32) - 127)


def _four_bit_floats(parts: Parts, weight: Weight) -> Tensor:
    codes = torch.cat(list(rows_of_codes(parts, weight))).reshape(weight.shape)
    stored = tensor(next(parts[end] for end in (".weight_scale", "_scales") if end in parts.found))
    scales = _powers(stored) if stored.dtype == torch.uint8 else stored.float()
    if (whole := parts.get(".weight_global_scale")) is not None:  # compressed-tensors divides, ModelOpt multiplies
        scales = scales / tensor(whole).float()
    elif (whole := parts.get(".weight_scale_2")) is not None:
        scales = scales * tensor(whole).float()
    return TABLE[codes.long()] * scales.repeat_interleave(weight.group or codes.shape[-1], -1)


def _scaled(parts: Parts, weight: Weight) -> Tensor:
    values = tensor(parts[".weight"]).float()
    stored = tensor(next(parts[end] for end in (".weight_scale", ".weight_scale_inv") if end in parts.found))
    scales = _powers(stored) if stored.dtype == torch.uint8 else stored.float()
    if (part := parts.get(".weight_zero_point")) is not None and parts[".weight"].dtype == "I8":
        values = values - _spread(tensor(part).float(), weight)
    return values * _spread(scales, weight)


def _spread(scales: Tensor, weight: Weight) -> Tensor:
    """Scales of a tensor, of rows, groups or square blocks -> one that fits every weight."""
    if scales.numel() == 1:
        return scales.reshape(())
    if scales.dim() == 1:
        return scales[:, None]
    *_, rows, cols = weight.shape
    if weight.kind == "blocks":
        tall = int(weight.effective.rpartition(" ")[2].partition("x")[0])
        scales = scales.repeat_interleave(tall, -2)[..., :rows, :]
    return scales if scales.shape[-1] == 1 else scales.repeat_interleave(weight.group or cols, -1)[..., :cols]
