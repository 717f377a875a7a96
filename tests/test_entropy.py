"""The entropy coder: every code comes back, streams are near the entropy, and what is no stream is refused politely."""

import struct
import zlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shrew import entropy
from shrew.errors import FolderError


def draw(seed: int, rows: int, cols: int, spread: float) -> np.ndarray:
    values = np.random.default_rng(seed).normal(128, spread, (rows, cols))
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def bits(codes: np.ndarray) -> float:
    """The definition: sum of -log2 of each code's share."""
    counts = np.unique(codes, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 150), st.integers(1, 300), st.sampled_from([0.0, 0.2, 1.5, 20.0, 1e4]))
@example(0, 17000, 1, 1.0)  # one column
@example(0, 1, 16384, 1.0)  # one row
@example(0, 197, 89, 3.0)  # no lane as long as the next
@example(0, 128, 128, 0.0)  # nothing but one code
def test_every_code_comes_back(seed: int, rows: int, cols: int, spread: float) -> None:
    codes = draw(seed, rows, cols, spread)
    stream = entropy.encode(codes)
    assert (stream.dtype, stream.ndim) == (np.uint8, 1)
    assert np.array_equal(entropy.decode(stream, rows, cols), codes)
    assert np.array_equal(entropy.encode(codes), stream)
    assert codes.size <= entropy.possible(len(stream))
    assert abs(entropy.size(codes) - len(stream)) <= 16 + 0.01 * len(stream)


@settings(max_examples=25)
@given(st.binary(max_size=3000), st.integers(1, 7))
def test_whatever_the_codes_are(raw: bytes, cols: int) -> None:
    codes = np.frombuffer(raw[: len(raw) // cols * cols], np.uint8).reshape(-1, cols)
    if codes.size:
        tall = np.tile(codes, (-(-20000 // codes.size), 1))  # long enough for tables
        for item in (codes, tall):
            assert np.array_equal(entropy.decode(entropy.encode(item), *item.shape), item)


@pytest.mark.parametrize("spread", [0.6, 1.0, 3.0, 30.0])
def test_streams_are_near_the_entropy(spread: float) -> None:
    codes = draw(1, 1500, 1024, spread)
    ours, least = 8 * len(entropy.encode(codes)), bits(codes)
    assert least < ours < 1.01 * least + 0.01 * codes.size * (least < codes.size)
    huffman = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    assert ours < 8 * len(huffman.compress(codes.tobytes()) + huffman.flush())


def test_rows_and_columns_of_other_spread_do_not_blur_each_other() -> None:
    rng = np.random.default_rng(0)
    spread = np.exp2(rng.uniform(-2, 3, (400, 1)) + rng.uniform(-1, 1, (1, 400)))
    codes = np.clip(np.round(rng.normal(128, spread)), 0, 255).astype(np.uint8)
    assert 8 * len(entropy.encode(codes)) < 0.9 * bits(codes)
    assert np.array_equal(entropy.decode(entropy.encode(codes), 400, 400), codes)


def test_a_stream_written_once_stays_readable() -> None:
    stream = bytes.fromhex("010a000000636460b0146718d10000d61406008ef04e09a6f3d1ee921fdc1a3289fee5")
    codes = entropy.decode(np.frombuffer(stream, np.uint8), 64, 64)
    assert np.array_equal(codes.ravel(), np.arange(4096) % 401 == 3)


def refused(raw: bytes, rows: int, cols: int) -> None:
    with pytest.raises(FolderError, match="damaged") as caught:
        entropy.decode(np.frombuffer(raw, np.uint8), rows, cols)
    assert "\n" not in str(caught.value)


def test_what_is_no_stream_is_refused() -> None:
    codes = draw(3, 160, 120, 2.0)
    raw = entropy.encode(codes).tobytes()
    for length in (0, 1, 4, 5, 30, len(raw) // 2, len(raw) - 2, len(raw) - 1):
        refused(raw[:length], 160, 120)
    refused(raw + b"\0\0", 160, 120)
    refused(raw, 160, 121)
    refused(raw, 10**6, 10**6)  # takes no memory first
    refused(b"\2" + raw[1:], 160, 120)
    refused(raw[:1] + struct.pack("<I", 2**31) + raw[5:], 160, 120)
    refused(raw[:-2] + bytes([raw[-2] ^ 1, raw[-1]]), 160, 120)
    small = entropy.encode(codes[:2]).tobytes()
    for length in range(len(small)):
        refused(small[:length], 2, 120)
    refused(small, 2, 121)


def side(raw: bytes, change: bytes) -> bytes:
    """The stream with other side information."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(change) + packer.flush()
    length = struct.unpack("<I", raw[1:5])[0]
    return raw[:1] + struct.pack("<I", len(packed)) + packed + raw[5 + length :]


def test_wrong_tables_are_refused() -> None:
    raw = entropy.encode(draw(3, 160, 120, 2.0)).tobytes()
    flat = bytes([1, 0, 0]) + bytes([0] * 120 + [40] * 16 + [0] * 120)
    for change in (
        b"", b"\1", flat[:-1], flat + b"\0", bytes([0, 0, 0]), bytes([33, 0, 0]) + flat[3:] * 33,
        bytes([1, 2, 0]) + flat[3:], bytes([1, 0, 0]) + bytes(256), bytes([1, 0, 0]) + b"\xff" * 256,
        bytes([1, 1, 0]) + b"\1" * 160 + flat[3:], bytes([2, 1, 0]) + b"\1" * 160 + flat[3:] + bytes(256),
        flat + bytes(10**6),
    ):  # fmt: skip
        refused(side(raw, change), 160, 120)
    refused(side(raw, flat), 160, 120)  # possible tables, but not of these codes


@settings(max_examples=25)
@given(st.binary(max_size=60), st.integers(0, 400), st.integers(0, 2**16))
def test_damage_is_refused_or_decodes_to_codes(noise: bytes, at: int, seed: int) -> None:
    raw = bytearray(entropy.encode(draw(seed, 130, 130, 1.0)).tobytes())
    raw[at : at + len(noise)] = noise
    try:
        codes = entropy.decode(np.frombuffer(bytes(raw), np.uint8), 130, 130)
    except FolderError as error:
        assert "\n" not in str(error)
    else:
        assert (codes.dtype, codes.shape) == (np.uint8, (130, 130))
