"""GGUF's block types for weights that are packed: written bit for bit, and chosen only where blocks hold exactly the
values of the codes.

A weight on a grid of that name is its block type. One on an integer grid becomes blocks of 32 weights of a row with one
16-bit float scale d: Q4_0, Q5_0 and Q8_0 hold d * v for v from -8, -16 or -128 upward, Q4_1 and Q5_1 d * q + m with a
second 16-bit float. A group of 64 or 128 becomes blocks of the same scale. Where zero points make d * q + m inexact,
the level v = code - zero itself may fit a type one bit wider.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from shrew.folder.blocktypes import TYPES, Levels
from shrew.folder.grids import Grid, Steps, Uniform
from shrew.folder.packed import CHUNK

BLOCK = 32
LEVELS = {GGMLQuantizationType.Q4_0: 8, GGMLQuantizationType.Q5_0: 16, GGMLQuantizationType.Q8_0: 128}
OFFSETS = {GGMLQuantizationType.Q4_1: 16, GGMLQuantizationType.Q5_1: 32}
ORDER = sorted(LEVELS | OFFSETS, key=lambda kind: GGML_QUANT_SIZES[kind])  # smallest first
FLOATS = {GGMLQuantizationType.BF16: torch.bfloat16, GGMLQuantizationType.F16: torch.float16,
          GGMLQuantizationType.F32: torch.float32}  # fmt: skip


@dataclass(frozen=True)
class Plane:
    """Some bits of every code of a part of a block: those from `shift` on, `bits` of them.

    `width` codes lie in as many bytes, the next `width` in the next bits of the same bytes, until those are full.
    `flip` turns codes that count from zero into two's complement.
    """

    part: str
    bits: int
    width: int
    shift: int = 0
    flip: int = 0


# What a block is made of, in order; "d" and "m" are 16-bit floats.
LOW, SIGNED = Plane("codes", 4, 16), Plane("codes", 8, 1, flip=128)
SIXES = (Plane("heads", 8, 1), Plane("tails", 4, 4))  # 8 scales and 8 minima of 6 bits
FIELDS: dict[str, tuple[str | Plane, ...]] = {
    "q4_0": ("d", LOW),
    "q4_1": ("d", "m", LOW),
    "q5_0": ("d", Plane("codes", 1, 1, 4), LOW),
    "q5_1": ("d", "m", Plane("codes", 1, 1, 4), LOW),
    "q8_0": ("d", SIGNED),
    "iq4_nl": ("d", LOW),
    "mxfp4": (Plane("scales", 8, 1), LOW),
    "q2_k": (Plane("both", 4, 16), Plane("codes", 2, 32), "d", "m"),
    "q3_k": (Plane("codes", 1, 32, 2), Plane("codes", 2, 32), Plane("scales", 4, 8), Plane("scales", 2, 4, 4), "d"),
    "q4_k": ("d", "m", *SIXES, Plane("codes", 4, 32)),
    "q5_k": ("d", "m", *SIXES, Plane("codes", 1, 32, 4), Plane("codes", 4, 32)),
    "q6_k": (Plane("codes", 4, 64), Plane("codes", 2, 32, 4), Plane("scales", 8, 1, flip=128), "d"),
    "iq4_xs": ("d", Plane("scales", 2, 1, 4), Plane("scales", 4, 1), LOW),
    "ternary": (Plane("codes", 2, 32), "d"),
}
NAMES = {GGMLQuantizationType[kind.upper()]: kind for kind in FIELDS if kind != "ternary"}
NAMES |= {GGMLQuantizationType.TQ2_0: "ternary"}


def grid_for(kind: GGMLQuantizationType) -> Levels | None:
    """The grid of a block type; None for a type that is none here."""
    name = NAMES.get(kind)
    return Levels(name, TYPES[name].groups[-1]) if name else None


def choose(codes: Tensor, steps: Steps, grid: Grid) -> tuple[GGMLQuantizationType | None, str]:
    """The block type of a grid, or the smallest that holds codes [rows, cols] exactly; or None and the reason."""
    cols = codes.shape[1]
    if any(not _half(part) for part in steps.parts().values() if part.is_floating_point()):
        return None, "a scale lies outside of what 16-bit floats hold"
    for kind in NAMES:
        if grid == grid_for(kind) and cols % GGML_QUANT_SIZES[kind][0] == 0:
            return kind, ""
    if isinstance(grid, Levels) and grid.kind == "ternary":
        codes, grid = codes + 1, Uniform(2, grid.group)
    if not isinstance(grid, Uniform):
        return None, f"{grid.label()} is no block type of GGUF"
    if cols % BLOCK:
        return None, f"rows of {cols} weights are no whole blocks of {BLOCK}"
    if grid.group % BLOCK:
        return None, f"groups of {grid.group} are no whole blocks of {BLOCK}"
    fits = set(ORDER)
    for part in _parts(codes, steps, grid):
        level, code, scale, zero = part
        low, high = level.amin(1), level.amax(1)
        for kind, half in LEVELS.items():
            if not (_inside(low, high, half) | _inside(-high, -low, half)).all():
                fits.discard(kind)
        for kind, count in OFFSETS.items():
            if code.max() >= count or not _half(zero * scale):
                fits.discard(kind)
    if not fits:
        return None, f"{grid.label()} spans more levels than a block type has"
    return next(kind for kind in ORDER if kind in fits), ""


def _half(values: Tensor) -> bool:
    return torch.equal(values.half().float(), values.float())


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
    if grid == grid_for(kind):
        step = max(1, CHUNK // codes.shape[1])
        for at in range(0, len(codes), step):
            yield _to_bytes(NAMES[kind], _apart(grid, codes[at : at + step], steps.rows(slice(at, at + step))))
        return
    if isinstance(grid, Levels):  # ternary, in groups that its own type does not have
        codes, grid = codes + 1, Uniform(2, grid.group)
    for level, code, scale, zero in _parts(codes, steps, grid):
        if kind in OFFSETS:
            held = {"codes": code, "d": scale, "m": -zero * scale}
        else:
            half = LEVELS[kind]
            turned = ~_inside(level.amin(1), level.amax(1), half)  # these fit with the opposite scale
            sign = torch.where(turned, -1, 1)
            held = {"codes": level * sign[:, None].to(torch.int16) + half, "d": scale * sign}
        yield _to_bytes(NAMES[kind], {part: value.reshape(len(code), -1) for part, value in held.items()})


def _apart(grid: Levels, codes: Tensor, steps: Steps) -> dict[str, Tensor]:
    """The parts of every block, each [blocks, n], under the names of FIELDS."""
    table, found = grid.table, {"codes": codes.reshape(-1, grid.span)}
    if steps.supers is None:
        named = {"scales" if table.scale == "e8m0" else "d": steps.scales, "m": steps.zeros}
        return found | {name: value.reshape(-1, 1) for name, value in named.items() if value is not None}
    found["scales"] = steps.scales.reshape(-1, table.per)
    for name, value in zip("dm", steps.supers.flatten(0, 1).unbind(1), strict=False):
        found[name] = value[:, None]
    if steps.zeros is not None:
        first, second = found["scales"], steps.zeros.reshape(-1, table.per)
        found["both"] = torch.cat([first, second], 1)
        if table.scale_bits == 6:
            head, tail = (torch.cat([first[:, part], second[:, part]], 1) for part in (slice(4), slice(4, 8)))
            found |= {"heads": head | (tail >> 4) << 6, "tails": tail}
    return found


def _to_bytes(name: str, parts: dict[str, Tensor]) -> bytes:
    columns = []
    for field in FIELDS[name]:
        if isinstance(field, str):
            columns.append(parts[field].half().view(torch.uint8))
            continue
        codes = parts[field.part].to(torch.uint8) ^ field.flip
        lanes = (codes >> field.shift & 2**field.bits - 1).reshape(len(codes), -1, 8 // field.bits, field.width)
        places = torch.arange(0, 8, field.bits, dtype=torch.uint8)[:, None]
        columns.append((lanes << places).sum(2, dtype=torch.uint8).flatten(1))
    return torch.cat(columns, 1).numpy().tobytes()


def decode(kind: GGMLQuantizationType, data: np.ndarray) -> tuple[Tensor, Steps]:
    """Codes uint8 [..., cols] and steps, each part [..., n], of rows of blocks uint8 [..., bytes] of a type that has a
    grid. Supers are [..., blocks * n]."""
    grid = grid_for(kind)
    assert grid is not None
    table, lead = grid.table, data.shape[:-1]
    blocks = torch.from_numpy(data.reshape(-1, GGML_QUANT_SIZES[kind][1]).copy())
    counts = {"codes": grid.span, "scales": max(table.per, 1), "both": 2 * table.per, "heads": 8, "tails": 8}
    found: dict[str, Tensor] = {}
    at = 0
    for field in FIELDS[NAMES[kind]]:
        size = 2 if isinstance(field, str) else counts[field.part] * field.bits // 8
        raw = blocks[:, at : at + size].contiguous()
        at += size
        if isinstance(field, str):
            found[field] = raw.view(torch.float16)
            continue
        places = torch.arange(0, 8, field.bits, dtype=torch.uint8)[:, None]
        lanes = raw.reshape(len(raw), -1, 1, field.width) >> places & 2**field.bits - 1
        codes = lanes.flatten(1) << field.shift ^ field.flip
        found[field.part] = found[field.part] | codes if field.part in found else codes
    if "heads" in found:
        head, tail = found["heads"] & 63, found["tails"] | found["heads"] >> 6 << 4
        found["both"] = torch.cat([head[:, :4], tail[:, :4], head[:, 4:], tail[:, 4:]], 1)
    if "both" in found:
        found["scales"], found["zeros"] = found["both"].chunk(2, 1)
    supers = None
    if table.per:
        supers = torch.cat([found[name] for name in "dm" if name in found], 1).reshape(*lead, -1)
    elif "d" in found:
        found |= {"scales": found["d"]} | ({"zeros": found["m"]} if "m" in found else {})
    scales, zeros = (found[name].reshape(*lead, -1) if name in found else None for name in ("scales", "zeros"))
    assert scales is not None
    return found["codes"].reshape(*lead, -1), Steps(scales, zeros, supers)


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
