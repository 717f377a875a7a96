"""`model.coded`: the weights of a packed folder, each coded by its entropy, instead of `model.bin`.

Little-endian: u64 bytes of the file that it stands for; then, for each tensor in order, u64 rows, u64 bytes a row, u64
bytes of its stream, and the stream (`shrew.entropy`). Tensors begin at multiples of 64 bytes; between them are zeros.
Where the top bit of the bytes a row is set, what was coded are the halves of the bytes, the lower one first: codes of 4
bits stand two in a byte, and their likelihoods depend on their columns.
"""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shrew import entropy
from shrew.errors import FolderError

ALIGN = 64  # bytes: a cache line, and enough for every vector instruction
HALVES = 1 << 63
_HEAD = struct.Struct("<QQQ")


def store(plain: Path, out: Path, tensors: Sequence[tuple[int, int, int]]) -> None:
    """Write `out` for the file `plain`, whose tensors (offset, rows, bytes a row) stand in order, aligned."""
    held = np.memmap(plain, np.uint8, "r")
    with out.open("wb") as stream:
        stream.write(struct.pack("<Q", len(held)))
        for offset, rows, width in tensors:
            whole = held[offset : offset + rows * width].reshape(rows, width)
            halves = np.stack([whole & 15, whole >> 4], axis=2).reshape(rows, 2 * width)
            split = entropy.size(halves) < entropy.size(whole)
            coded = entropy.encode(halves if split else whole)
            stream.write(_HEAD.pack(rows, width | (HALVES if split else 0), len(coded)))
            stream.write(coded.data)


def restore(path: Path) -> bytearray:
    """The file that `path` stands for. Raises FolderError for what `store` did not write; takes memory for no more than
    a stream of its length can hold."""
    raw = np.fromfile(path, np.uint8)
    total = int.from_bytes(raw[:8].tobytes(), "little")
    if len(raw) < 8 or total > entropy.possible(len(raw)):
        raise _damaged(path)
    found, at, end = bytearray(total), 8, 0
    while at < len(raw):
        if len(raw) - at < _HEAD.size:
            raise _damaged(path)
        rows, width, length = _HEAD.unpack(raw[at : at + _HEAD.size].tobytes())
        split, width = bool(width & HALVES), width & ~HALVES
        at, begin = at + _HEAD.size, end + -end % ALIGN
        end = begin + rows * width
        if length > len(raw) - at or not begin < end <= total:  # one without rows or columns claims memory for nothing
            raise _damaged(path)
        codes = entropy.decode(raw[at : at + length], rows, width << split, str(path))
        if split and codes.max(initial=0) > 15:
            raise _damaged(path)
        found[begin:end] = (codes[:, ::2] | codes[:, 1::2] << 4 if split else codes).data
        at += length
    if end != total:
        raise _damaged(path)
    return found


def _damaged(path: Path) -> FolderError:
    return FolderError(f"{path} is damaged or truncated; copy the folder again, or pack the model again.")
