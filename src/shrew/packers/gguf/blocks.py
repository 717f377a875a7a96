"""GGUF's block types for weights that are packed: chosen only where blocks hold exactly the values of the codes.

A block is 32 weights of a row with one 16-bit float scale d: Q4_0, Q5_0 and Q8_0 hold d * v for v from -8, -16 or -128
upward, Q4_1 and Q5_1 d * q + m with a second 16-bit float. A group of 64 or 128 becomes blocks of the same scale. Where
zero points make d * q + m inexact, the level v = code - zero itself may fit a type one bit wider.
"""

from collections.abc import Iterator

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from shrew.folder.grids import Grid, Steps, Uniform
from shrew.folder.packed import CHUNK

BLOCK = 32
LEVELS = {GGMLQuantizationType.Q4_0: 8, GGMLQuantizationType.Q5_0: 16, GGMLQuantizationType.Q8_0: 128}
OFFSETS = {GGMLQuantizationType.Q4_1: 16, GGMLQuantizationType.Q5_1: 32}
ORDER = sorted(LEVELS | OFFSETS, key=lambda kind: GGML_QUANT_SIZES[kind])  # smallest first
FLOATS = {GGMLQuantizationType.BF16: torch.bfloat16, GGMLQuantizationType.F16: torch.float16,
          GGMLQuantizationType.F32: torch.float32}  # fmt: skip


def choose(codes: Tensor, steps: Steps, grid: Grid) -> tuple[GGMLQuantizationType | None, str]:
    """The smallest block type that holds codes [rows, cols] exactly; or None and the reason."""
    cols, scales = codes.shape[1], steps.scales
    if not isinstance(grid, Uniform):
        return None, f"{grid.label()} is no block type of GGUF"
    if cols % BLOCK:
        return None, f"rows of {cols} weights are no whole blocks of {BLOCK}"
    if grid.group % BLOCK:
        return None, f"groups of {grid.group} are no whole blocks of {BLOCK}"
    if not torch.equal(scales.half().float(), scales.float()):
        return None, "a scale lies outside of what 16-bit floats hold"
    fits = set(ORDER)
    for part in _parts(codes, steps, grid):
        level, code, scale, zero = part
        low, high = level.amin(1), level.amax(1)
        for kind, half in LEVELS.items():
            if not (_inside(low, high, half) | _inside(-high, -low, half)).all():
                fits.discard(kind)
        offset = zero * scale
        for kind, count in OFFSETS.items():
            if code.max() >= count or not torch.equal(offset.half().float(), offset):
                fits.discard(kind)
    if not fits:
        return None, f"{grid.label()} spans more levels than a block type has"
    return next(kind for kind in ORDER if kind in fits), ""


def _inside(low: Tensor, high: Tensor, half: int) -> Tensor:
    return (low >= -half) & (high < half)


def _parts(codes: Tensor, steps: Steps, grid: Grid) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Some rows at a time, as blocks: levels int16 [n, 32], codes int16 [n, 32], scales and zeros float32 [n]."""
    cols = codes.shape[1]
    group = torch.arange(0, cols, BLOCK) // (grid.group or cols)
    step = max(1, CHUNK // cols)
    for at in range(0, len(codes), step):
        code = codes[at : at + step].to(torch.int16).reshape(-1, BLOCK)
        here = steps.rows(slice(at, at + step))
        scale, zero = (item[:, group].reshape(-1) for item in grid.effective(here))
        yield code - zero.to(torch.int16)[:, None], code, scale, zero


def encode(kind: GGMLQuantizationType, codes: Tensor, steps: Steps, grid: Grid) -> Iterator[bytes]:
    """The bytes of codes [rows, cols] in a type that `choose` gave, some rows at a time."""
    for level, code, scale, zero in _parts(codes, steps, grid):
        if kind in OFFSETS:
            heads, value = [scale, -zero * scale], code
        else:
            half = LEVELS[kind]
            turned = ~_inside(level.amin(1), level.amax(1), half)  # these fit with the opposite scale
            sign = torch.where(turned, -1, 1)
            heads, value = [scale * sign], level * sign[:, None].to(torch.int16) + (half if half < 128 else 0)
        columns: list[np.ndarray] = [head.half().numpy().view(np.uint8).reshape(-1, 2) for head in heads]
        whole = value.numpy()
        if kind == GGMLQuantizationType.Q8_0:
            columns.append(whole.astype(np.int8).view(np.uint8))
        else:
            if kind in (GGMLQuantizationType.Q5_0, GGMLQuantizationType.Q5_1):
                columns.append(np.packbits((whole >> 4).astype(bool), axis=1, bitorder="little"))
            low = (whole & 15).astype(np.uint8)
            columns.append(low[:, : BLOCK // 2] | low[:, BLOCK // 2 :] << 4)
        yield np.concatenate(columns, axis=1).tobytes()


def decode(kind: GGMLQuantizationType, data: np.ndarray) -> tuple[Tensor, Tensor]:
    """Codes uint8 [..., cols] and scales fp16 [..., cols / 32] of rows of Q4_0, Q5_0 or Q8_0 blocks [..., bytes]."""
    parts = data.reshape(*data.shape[:-1], -1, GGML_QUANT_SIZES[kind][1])
    scales = torch.from_numpy(parts[..., :2].copy()).view(torch.float16)[..., 0]
    if kind == GGMLQuantizationType.Q8_0:
        codes = parts[..., 2:] ^ 128  # two's complement -> from zero upward
    else:
        low = parts[..., -BLOCK // 2 :]
        codes = np.concatenate([low & 15, low >> 4], axis=-1)
        if kind == GGMLQuantizationType.Q5_0:
            codes |= np.unpackbits(parts[..., 2:6], axis=-1, bitorder="little") << 4
    return torch.from_numpy(codes.copy()).flatten(-2), scales


def float_type(weight: Tensor, wanted: torch.dtype | None) -> GGMLQuantizationType:
    """The type `wanted`, or without one the smallest, if it holds float32 `weight` exactly; else F32."""
    for kind, dtype in FLOATS.items():
        if wanted in (None, dtype) and _held(weight, dtype):
            return kind
    return GGMLQuantizationType.F32


def _held(weight: Tensor, dtype: torch.dtype) -> bool:
    return all(torch.equal(part.to(dtype).float(), part) for part in weight.reshape(-1).split(CHUNK))


def floats(kind: GGMLQuantizationType, weight: Tensor) -> Iterator[bytes]:
    """The bytes of a dense weight, a part at a time."""
    for part in weight.reshape(-1).split(CHUNK):
        yield part.to(FLOATS[kind]).contiguous().view(torch.uint8).numpy().tobytes()
