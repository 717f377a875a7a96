"""`shrew audit` on files that are wrong: a sentence, never a traceback."""

import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import artefacts
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_audit import coded, gguf_file, graph_file, run

from shrew.audit import audit, claims, decode, layouts
from shrew.errors import FolderError
from shrew.folder.headers import read_header


def test_what_is_no_model_is_said_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60))
    (tmp_path / "b.gguf").write_bytes(b"nothing")
    (tmp_path / "c.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    (tmp_path / "d.onnx").write_bytes(b"\xff" * 100)
    (tmp_path / "e.bin").write_bytes(b"x")
    (tmp_path / "f.txt").write_bytes(b"x")
    (tmp_path / "g").mkdir()
    for name in ("a.gguf", "b.gguf", "c.safetensors", "d.onnx", "e.bin", "f.txt", "g", "missing"):
        code, out, err = run(capsys, tmp_path / name)
        assert (code, out, err.count("\n")) == (2, "", 1), name
    assert run(capsys, tmp_path / "c.safetensors", "--text", "x")[0] == 2
    assert run(capsys, tmp_path / "c.safetensors", "--against", "x")[0] == 2


STATE = ".weight.quant_state.bitsandbytes__nf4"
PARTS = st.dictionaries(
    st.sampled_from([".qweight", ".qzeros", ".scales", ".g_idx", ".weight", ".weight_packed", ".weight_scale",
                     ".weight_shape", ".SCB", ".weight.absmax", ".weight.quant_map", "_blocks", "_scales",
                     ".weight_scale_inv", STATE]),
    st.tuples(st.sampled_from([torch.int32, torch.uint8, torch.int8, torch.float16, torch.float32, torch.int64]),
              st.lists(st.integers(0, 9), max_size=3)),
    min_size=1,
)  # fmt: skip


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PARTS, st.integers(-3, 300))
@example({STATE: (torch.uint8, [])}, 0)
def test_any_parts_are_read_or_refused(tmp_path: Path, parts: dict[str, Any], fill: int) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {f"m{end}": torch.full(shape, fill % 100, dtype=dtype) for end, (dtype, shape) in parts.items()}
    if f"m{STATE}" in tensors:
        tensors[f"m{STATE}"] = torch.tensor(list(b'{"shape": [4, 4], "blocksize": 8}'), dtype=torch.uint8)
    save_file(tensors, path)
    try:
        found = audit(path, deep=True)
    except FolderError as error:
        assert "\n" not in str(error)
        return
    assert sum(item.bytes for item in found.held) == sum(value.nbytes for value in tensors.values())
    assert all(item.bits >= 0 for item in found.held)
    for item, weight in layouts.assemble(read_header(path))[0].values():
        with suppress(FolderError):
            assert decode.dense(item, weight, {}).shape == weight.shape


VALUES = st.recursive(
    st.sampled_from([None, True, -1, 0, 4, 1e308, "", "re:.*", "re:(", "Linear", "a", "nf4", "+:.*", "group"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "-:.*", "weights", "bits"]), inner)
    ),
    max_leaves=6,
)
KEYS = [
    *("bits", "group_size", "sym", "dynamic", "modules_to_not_convert", "modules_in_block_to_quantize", "extra_config"),
    *("block_name_to_quantize", "packing_format", "config_groups", "ignore", "format", "quant_config", "skip_modules"),
    *("bnb_4bit_quant_type", "llm_int8_skip_modules", "load_in_4bit", "quant_algo", "exclude_modules"),
]
METHOD = st.sampled_from([*claims.METHODS, "shrew", "unheard of"]) | VALUES


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(METHOD, st.dictionaries(st.sampled_from(KEYS), VALUES), st.lists(VALUES, min_size=2, max_size=2), st.booleans())
@example("shrew", {}, [None, None], True)
def test_any_settings_are_read_or_refused(
    tmp_path: Path, method: Any, stated: dict[str, Any], more: list[Any], beside: bool
) -> None:
    parts, _ = artefacts.gptq(torch.ones(32, 64))
    save_file({f"a.{end}": value for end, value in parts.items()}, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "dtype": more[0], "text_config": more[1], "vocab_size": more[0],
              "tie_word_embeddings": more[1]}  # fmt: skip
    said = {"quant_method": method, **stated}
    config |= {} if beside else {"quantization_config": said}
    (tmp_path / "quantize_config.json").write_text(json.dumps(said if beside else {}), "utf-8")
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    try:
        found = audit(tmp_path)
    except FolderError as error:
        assert "\n" not in str(error)
        return
    assert found.held[0].effective == "int4 g32"


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["m.gguf", "m.onnx", "m.safetensors"]))
    path = tmp_path / name
    if name == "m.gguf":
        gguf_file(path, {"blk.0.ffn_up.weight": ((2, 256), Kind.Q4_K)}, 14)
    elif name == "m.onnx":
        node, tensors = coded("w", np.zeros((8, 32), np.int64), 4, 32, "s")
        graph_file(path, [node], tensors)
    else:
        parts, _ = artefacts.gptq(torch.ones(32, 64))
        save_file({f"a.{end}": value for end, value in parts.items()}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    try:
        audit(path, deep=True)
    except FolderError as error:
        assert "\n" not in str(error)
