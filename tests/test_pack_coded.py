"""Coded weights in packs: steps of rows and columns in the graph, and `model.coded` in place of `model.bin`."""

import gzip
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_runtime_packed import EVERYTHING, shaken

from shrew import entropy, files
from shrew.__main__ import main
from shrew.blocks.model import build
from shrew.errors import FolderError
from shrew.runtime import coded, load, pack
from shrew.runtime.coded import restore, store


@pytest.fixture(scope="module", params=["llama", "everything"])
def packs(
    request: Any, tiny_llama_folder: Path, tiny_tokenizer: Any, text: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A model of coded weights packed twice: plain and coded. Packing checks the graph against torch."""
    where = tmp_path_factory.mktemp("coded")
    (where / "text.txt").write_text(text, "utf-8")
    source, words = tiny_llama_folder, ["--text", str(where / "text.txt")]
    if request.param == "everything":
        source = where / "source"
        shaken(build(EVERYTHING, bos_token_id=0, eos_token_id=1, pad_token_id=2)).save_pretrained(source)
        tiny_tokenizer.save_pretrained(source)
    rated = ["quantize", "--rate", "5", "--embeddings", "--out", str(where / "model"), *words]
    assert main(["apply", str(source), *rated]) == 0
    for name, more in (("plain", []), ("coded", ["--coded"])):
        assert main(["pack", str(where / "model"), "--out", str(where / name), *words, *more]) == 0
    return where / "plain", where / "coded"


def test_the_graph_holds_the_codes(packs: tuple[Path, Path]) -> None:
    weights = json.loads((packs[0] / "pack.json").read_text("utf-8"))["weights"]
    held = [kind for name, kind in weights.items() if name.endswith(("q_proj.weight", "up_proj.weight"))]
    assert held and all("row x column" in kind and "values of" not in kind for kind in held)


def test_norms_do_the_scaling_of_what_reads_them(packs: tuple[Path, Path], request: Any) -> None:
    """In a llama no other scaling is left: inside its layers steps are those of rows."""
    graph = onnx.load(str(packs[0] / "model.onnx"), load_external_data=False).graph
    fixed = {item.name for item in graph.initializer}
    for node in graph.node:
        fixed.update(node.output if node.input and fixed.issuperset(node.input) else ())
    givers = {name: node for node in graph.node for name in node.output}
    reads = [name for node in graph.node for name in node.input] + [item.name for item in graph.output]
    read = [givers[node.input[0]] for node in graph.node if node.op_type == "MatMulNBits"]
    scaled = [givers[node.input[0]].op_type for node in read
              if node.op_type == "Mul" and node.input[1] in fixed and reads.count(node.input[0]) == 1]  # fmt: skip
    assert not any("LayerNormalization" in giver for giver in scaled)
    if "llama" in request.node.name:
        assert not scaled


def test_queries_are_scaled_by_their_steps(packs: tuple[Path, Path], request: Any) -> None:
    """The llama's heads are 16 wide: a quarter is a power of two, so nothing is left for attention to scale. Those of
    the other are 8 wide (and its `memory` computes otherwise)."""
    graph = onnx.load(str(packs[0] / "model.onnx"), load_external_data=False).graph
    scales = [onnx.helper.get_node_attr_value(node, "scale") for node in graph.node
              if node.op_type == "GroupQueryAttention"]  # fmt: skip
    assert set(scales) == ({1.0} if "llama" in request.node.name else {0.25, float(np.float32(8**-0.5))})


def test_coded_is_smaller_and_the_same(packs: tuple[Path, Path]) -> None:
    for name in ("model.bin", "tokenizer.json"):  # not of the coded pack, and so not read
        (packs[1] / name).write_bytes(bytes((packs[0] / "model.bin").stat().st_size))
    plain, small = (load(path, threads=1) for path in packs)
    for name in ("model.bin", "tokenizer.json"):
        (packs[1] / name).unlink()
    assert (packs[1] / "model.coded").stat().st_size < (packs[0] / "model.bin").stat().st_size
    assert restore(packs[1] / "model.coded") == (packs[0] / "model.bin").read_bytes()
    assert gzip.decompress((packs[1] / "tokenizer.json.gz").read_bytes()) == (packs[0] / "tokenizer.json").read_bytes()
    assert not (packs[1] / "tokenizer.json").exists()
    assert small.tokenizer.to_str() == plain.tokenizer.to_str()
    tokens = np.array([[5, 9, 200, 3]])
    feeds: dict[str, np.ndarray] = {"tokens": tokens, "start": np.zeros(1, np.int64), "wanted": np.arange(4)}
    for state in plain.manifest.states:
        feeds[f"past.{state.name}"] = np.zeros((1, *state.sized(8)), state.dtype)
    known = {item.name for item in plain.graph.get_inputs()}
    feeds = {name: value for name, value in feeds.items() if name in known}
    assert np.array_equal(plain.graph.run(["logits"], feeds)[0], small.graph.run(["logits"], feeds)[0])


def test_damage_is_told(packs: tuple[Path, Path], tmp_path: Path) -> None:
    files.copy_folder(packs[1], tmp_path / "p", "pack.json")
    whole = (tmp_path / "p/model.coded").read_bytes()
    for content in (whole[:-1], whole[:40], b"", struct.pack("<Q", 1 << 60) + whole[8:], whole + b"\0"):
        (tmp_path / "p/model.coded").write_bytes(content)
        with pytest.raises(FolderError):
            load(tmp_path / "p", threads=1)
        with pytest.raises(FolderError):  # a hash does not help against who made the folder
            coded.restore(tmp_path / "p/model.coded")


def test_a_damaged_tokenizer_is_told(
    packs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.copy_folder(packs[1], tmp_path / "p", "pack.json")
    place = tmp_path / "p" / "tokenizer.json.gz"
    whole, manifest = place.read_bytes(), json.loads((tmp_path / "p/pack.json").read_text("utf-8"))

    def refused(content: bytes, reason: str) -> None:
        place.write_bytes(content)
        manifest["files"][place.name] = {"bytes": len(content), "sha256": files.sha256(place)}
        (tmp_path / "p/pack.json").write_text(json.dumps(manifest), "utf-8")
        with pytest.raises(FolderError, match=reason):
            load(tmp_path / "p", threads=1)

    for content in (whole[:-9], whole[:5], b"", b"junk", whole[:40] + b"\xff" * 40 + whole[80:]):
        refused(content, "cannot be loaded")
    monkeypatch.setattr(pack, "LARGEST_TOKENIZER", 1000)
    refused(gzip.compress(b" " * 1001), "too large for a tokenizer")


@pytest.mark.parametrize("rows, width", [(1 << 34, 0), (0, 1 << 34), (0, 0)])
def test_a_tensor_of_nothing_takes_no_memory(rows: int, width: int, tmp_path: Path) -> None:
    """A stream of one code throughout, of as many rows or columns as are claimed, which hold nothing."""
    side = zlib.compressobj(9, zlib.DEFLATED, -15)
    tables = side.compress(bytes([1, 0, 0]) + bytes([1] * 256)) + side.flush()
    stream = b"\1" + struct.pack("<I", len(tables)) + tables + struct.pack("<I", 1 << 16)
    content = struct.pack("<QQQQ", 0, rows, width, len(stream)) + stream
    (tmp_path / "model.coded").write_bytes(content)
    with pytest.raises(FolderError, match=r"model\.coded is damaged or truncated"):
        restore(tmp_path / "model.coded")


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 600), st.integers(1, 255)), min_size=1, max_size=4))
def test_stored_and_restored(tmp_path_factory: pytest.TempPathFactory, tensors: list[tuple[int, int, int]]) -> None:
    where = tmp_path_factory.mktemp("files")
    content, places = b"", []
    for number, (rows, width, most) in enumerate(tensors):
        content += b"\0" * (-len(content) % coded.ALIGN)
        places.append((len(content), rows, width))
        content += np.random.default_rng(number).integers(0, most, rows * width, np.uint8).tobytes()
    (where / "plain").write_bytes(content)
    store(where / "plain", where / "coded", places)
    assert restore(where / "coded") == content


def test_two_codes_in_a_byte_are_coded_apart(tmp_path: Path) -> None:
    """As small as the codes one by one, whose likelihoods depend on their column; a stream of no halves is refused."""
    chance = np.random.default_rng(0)
    spread = chance.permutation(np.geomspace(0.2, 4, 256))
    codes = (8 + chance.normal(0, spread, (512, 256)).round()).clip(0, 15).astype(np.uint8)
    content = (codes[:, ::2] | codes[:, 1::2] << 4).tobytes()
    (tmp_path / "plain").write_bytes(content)
    store(tmp_path / "plain", tmp_path / "coded", [(0, 512, 128)])
    assert restore(tmp_path / "coded") == content
    assert (tmp_path / "coded").stat().st_size == len(entropy.encode(codes)) + 32
    stream = entropy.encode(codes + 8).tobytes()
    head = struct.pack("<QQQQ", 512 * 128, 512, 128 | coded.HALVES, len(stream))
    (tmp_path / "coded").write_bytes(head + stream)
    with pytest.raises(FolderError):
        restore(tmp_path / "coded")
