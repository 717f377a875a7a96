"""`shrew audit`: types and bits of artefacts in the exact layouts of their tools, planted lies, hostile files."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import artefacts
import gguf as ggml
import numpy as np
import onnx
import pytest
import torch
from artefacts import dense_of, quantized
from gguf import GGMLQuantizationType as Kind
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file

from shrew import folder
from shrew.__main__ import main
from shrew.audit import against, audit
from shrew.audit.held import Audit, role_of
from shrew.audit.show import together
from shrew.errors import FolderError

INT4 = {"bits": 4, "group_size": 32, "quant_method": "gptq", "sym": False, "desc_act": False}
AWQ = {"bits": 4, "group_size": 32, "quant_method": "awq", "version": "gemm", "zero_point": True}
ROUND = {"bits": 4, "group_size": 32, "quant_method": "auto-round", "sym": False}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
HQQ = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 32}}}
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}

# name: (how it is packed, what config.json says, the format, the type, bits a weight of a linear layer)
FOLDERS: dict[str, tuple[Any, dict[str, Any], str, str, float]] = {
    "gptq": (artefacts.gptq, INT4, "gptq (GPTQ)", "int4 g32", 4 + (16 + 4) / 32),
    "gptq-3": (partial(artefacts.gptq, bits=3), INT4 | {"bits": 3}, "gptq (GPTQ)", "int3 g32", 3 + (16 + 3) / 32),
    "gptq-v2": (partial(artefacts.gptq, v2=True, order=True), INT4 | {"checkpoint_format": "gptq_v2"}, "gptq (GPTQ)",
                "int4 g32", 4 + (16 + 4) / 32),
    "gptq-sym": (partial(artefacts.gptq, symmetric=True, v2=True), INT4 | {"sym": True}, "gptq (GPTQ)", "int4 g32",
                 4 + (16 + 4) / 32),
    "awq": (artefacts.awq, AWQ, "awq (AWQ)", "int4 g32", 4 + (16 + 4) / 32),
    "round": (artefacts.gptq, ROUND | {"packing_format": "auto_round:auto_gptq"}, "auto-round (GPTQ)", "int4 g32",
              4 + (16 + 4) / 32),
    "round-plain": (partial(artefacts.gptq, v2=True), ROUND | {"packing_format": "auto_round"}, "auto-round (GPTQ)",
                    "int4 g32", 4 + (16 + 4) / 32),
    "round-awq": (artefacts.awq, ROUND | {"packing_format": "auto_round:auto_awq"}, "auto-round (AWQ)", "int4 g32",
                  4 + (16 + 4) / 32),
    "nf4": (artefacts.bnb4, NF4, "bitsandbytes (bitsandbytes)", "nf4 g64", 4 + 32 / 64),
    "nf4-double": (partial(artefacts.bnb4, double=True), NF4, "bitsandbytes (bitsandbytes)", "nf4 g64 double",
                   4 + 8 / 64),
    "int8": (artefacts.bnb8, INT8, "bitsandbytes (bitsandbytes)", "int8 grow sym", 8.0),
    "hqq": (artefacts.hqq, HQQ, "hqq (HQQ)", "int4 g32 asym", 5.0),
    "fp8": (artefacts.fp8, FP8, "fp8 (scaled weights)", "fp8_e4m3 32x32", 8 + 32 / 1024),
}  # fmt: skip
FIXED = 1400  # bytes at most that order, tables and notes add to a layer


def severities(found: Audit) -> set[str]:
    return {item.severity for item in found.findings}


def said(found: Audit, severity: str) -> str:
    return "\n".join(f"{item.text} [{item.advice}]" for item in found.findings if item.severity == severity)


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["audit", *map(str, arguments)])
    heard = capsys.readouterr()
    return code, heard.out, heard.err


# --- folders of other tools ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_a_quantized_folder_is_read_and_decoded_exactly(tmp_path: Path, tiny_llama_folder: Path, name: str) -> None:
    pack, config, form, effective, bits = FOLDERS[name]
    torch.manual_seed(0)
    out = quantized(tiny_llama_folder, tmp_path / "artefact", pack, config)
    found = audit(out)
    assert found.format == form
    layers = found.role("linear")
    assert len(layers) == 14 and {item.effective for item in layers} == {effective}
    assert {item.shape for item in layers} == {(64, 64), (32, 64), (128, 64), (64, 128)}
    assert all(bits <= item.bits <= bits + 8 * FIXED / item.weights for item in layers)
    assert sum(item.bytes for item in found.held) + 8 <= found.size == (out / "model.safetensors").stat().st_size
    assert not severities(found) - {"note"}, found.findings
    model = against.deployed(found).model
    for key, value in load_file(dense_of(out) / "model.safetensors").items():
        torch.testing.assert_close(model.state_dict()[key], value.float(), atol=0, rtol=3e-7)


def test_a_lossless_artefact_loses_nothing_and_a_damaged_one_does(
    tmp_path: Path, tiny_llama_folder: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(text[:9000], "utf-8")
    rows = [{"question": f"{a} + {b} =", "options": [str(a + b), str(a * b + 1)], "answer": 0}
            for a in range(6) for b in range(6)]  # fmt: skip
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    out = quantized(tiny_llama_folder, tmp_path / "artefact", artefacts.awq, AWQ)
    common = ("--text", tmp_path / "text.txt", "--task", tmp_path / "sums.jsonl", "--split", "all", "--json")
    found = []
    for original in (dense_of(out), tiny_llama_folder):
        code, printed, _ = run(capsys, out, "--against", original, *common)
        assert code == 0
        records = json.loads(printed)["records"]
        last = {item["metric"]: item for item in records if item["model"] == out.name}
        found.append([last[key]["value"] for key in ("kl", "top1_agreement", "retention", "flipped_answers")])
        assert {"low", "high"} <= last["kl"].keys() and last["flipped_answers"]["n"] == 36
        assert last["flipped_answers"]["detail"].keys() >= {"lost", "won"}
    same, other = found
    assert same[0] == pytest.approx(0, abs=1e-9) and same[1:] == [1, 1, 0]
    assert other[0] > 1e-3 and other[1] < 1
    code, printed, _ = run(capsys, out, "--against", dense_of(out), "--text", tmp_path / "text.txt", "--split", "all")
    assert code == 0 and "top1 agreement" in printed and "artefact-dense" in printed


@pytest.mark.parametrize("scheme", ["int4", "int4-asym", "int3", "int8", "nvfp4", "mxfp4"])
def test_compressed_tensors_by_its_own_compressor(tmp_path: Path, tiny_llama_folder: Path, scheme: str) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    bits = 8 if scheme == "int8" else 3 if scheme == "int3" else 4
    floats, group = scheme.endswith("fp4"), {"nvfp4": 16, "int8": None}.get(scheme, 32)
    strategy = "tensor_group" if scheme == "nvfp4" else "group" if group else "channel"
    form = {"nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized", "int8": "int-quantized"}.get(
        scheme, "pack-quantized")  # fmt: skip
    args = QuantizationArgs(num_bits=bits, type="float" if floats else "int", group_size=group, strategy=strategy,
                            symmetric=scheme != "int4-asym")  # fmt: skip
    plan = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    compressor = BaseCompressor.get_value_from_registry(form)

    def pack(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rows = weight.float().unflatten(1, (-1, group or weight.shape[1]))
        given = {"weight": weight.float()}
        if scheme == "nvfp4":
            given["weight_global_scale"] = (448 * 6 / weight.abs().max()).reshape(1).float()
            scale = rows.abs().amax(2) / 6 * given["weight_global_scale"]
            given["weight_scale"] = scale.to(torch.float8_e4m3fn).float()
        elif scheme == "mxfp4":
            given["weight_scale"] = torch.exp2(torch.ceil(torch.log2(rows.abs().amax(2) / 6)))
        else:
            scale, zero = calculate_qparams(rows.amin(2), rows.amax(2), args)
            given |= {"weight_scale": scale, "weight_zero_point": zero}
        packed = compressor.compress(dict(given), plan)
        back = compressor.decompress(dict(packed), plan)["weight"]
        return packed, back.float()

    targets = {"targets": ["Linear"], "weights": {"num_bits": bits, "type": "float" if floats else "int",
               "strategy": strategy, "group_size": group, "symmetric": args.symmetric}}  # fmt: skip
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": targets},
              "ignore": ["re:.*lm_head"]}  # fmt: skip
    out = quantized(tiny_llama_folder, tmp_path / "artefact", pack, config)
    found = audit(out)
    kind = {"int4": "int4 g32 sym", "int4-asym": "int4 g32 asym", "int3": "int3 g32 sym", "int8": "int8 grow",
            "nvfp4": "nvfp4 g16", "mxfp4": "mxfp4 g32"}[scheme]  # fmt: skip
    assert {item.effective for item in found.role("linear")} == {kind}
    assert {item.code for item in found.role("linear")} == {bits}
    assert not severities(found) - {"note"}, found.findings
    model = against.deployed(found).model
    for key, value in load_file(dense_of(out) / "model.safetensors").items():
        rounded = 2**-7 if scheme == "nvfp4" else 1e-5  # its own reader multiplies in bf16
        torch.testing.assert_close(model.state_dict()[key], value.float(), atol=1e-6, rtol=rounded)


def test_lies_of_a_folder_are_found(tmp_path: Path, tiny_llama_folder: Path) -> None:
    torch.manual_seed(0)
    make = partial(quantized, tiny_llama_folder)
    found = audit(make(tmp_path / "skipped", artefacts.gptq, INT4, skip=("layers.1.mlp",)))
    assert "3 of 14 linear layers are fp32: model.layers.1.mlp.down_proj.weight" in said(found, "fallback")
    found = audit(make(tmp_path / "excepted", artefacts.gptq, INT4 | {"dynamic": {r"-:.*layers\.1\.mlp.*": {}}},
                       skip=("layers.1.mlp",)))  # fmt: skip
    assert not severities(found) - {"note"}
    head = {"lm_head.weight": torch.randn(300, 64)}
    found = audit(make(tmp_path / "head", artefacts.gptq, INT4 | {"lm_head": True}, more=head))
    told = "lm_head.weight is listed as quantized (4 bits in groups of 32), stored dense (fp32)"
    assert told in said(found, "fallback")
    assert "The embedding is stored twice" in said(found, "waste")
    found = audit(make(tmp_path / "bits", partial(artefacts.gptq, bits=8), INT4))
    assert "claims 4 bits in groups of 32, and 14 of 14 linear layers have other bits (int8" in said(found, "claim")
    found = audit(make(tmp_path / "groups", artefacts.gptq, INT4 | {"group_size": 64}))
    assert "have other groups" in said(found, "claim")
    found = audit(make(tmp_path / "nothing", artefacts.gptq, INT4, skip=("proj",)))
    assert "nothing in the file is quantized" in said(found, "claim")
    found = audit(make(tmp_path / "model-w8a16", artefacts.awq, AWQ))
    assert "The name says 8 bits, and the linear layers are int4 g32: 4.62 bits" in said(found, "claim")
    out = make(tmp_path / "two", artefacts.gptq, INT4)
    (out / "quantize_config.json").write_text(json.dumps({"bits": 8, "group_size": 32}), "utf-8")
    assert "config.json says bits = 4 and quantize_config.json says 8" in said(audit(out), "claim")
    config = json.loads((out / "config.json").read_text("utf-8"))
    config.pop("quantization_config")
    (out / "quantize_config.json").unlink()
    (out / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}), "utf-8")
    found = audit(out)
    assert "14 weights are quantized and no config.json says so" in said(found, "claim")
    assert "config.json says bfloat16" in said(found, "waste") or "config.json says bf16" in said(found, "waste")


def test_scales_that_nothing_uses_are_found(tmp_path: Path, tiny_llama_folder: Path) -> None:
    config = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {
        "targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}}}  # fmt: skip
    fake = lambda weight: ({"weight": weight, "weight_scale": torch.ones(len(weight), 1)}, weight)  # noqa: E731
    found = audit(quantized(tiny_llama_folder, tmp_path / "fake", fake, config))
    assert "14 weights have scales beside them and are stored dense" in said(found, "claim")
    assert found.bits["linear"] >= 32


def test_rules_of_a_stranger_cannot_hang_the_audit(tmp_path: Path, tiny_llama_folder: Path) -> None:
    slow = "re:(.*a)*b" + "(.*)+" * 20
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": [slow, 7],
              "config_groups": {"group_0": {"targets": ["re:.*_proj$"], "weights": {"num_bits": 4}}}}  # fmt: skip
    found = audit(quantized(tiny_llama_folder, tmp_path / "slow", artefacts.gptq, config))
    assert "2 rules of quantization_config were not tried" in said(found, "note")


def test_our_own_folders(tmp_path: Path, tiny_llama_folder: Path, apply: Any, text: str) -> None:
    out = tmp_path / "packed"
    assert apply(tiny_llama_folder, "quantize", "--bits", 3, "--group", 32, "--method", "rtn", "--out", out)[0] == 0
    found = audit(out, deep=True)
    assert found.format == "shrew"
    assert {item.effective for item in found.role("linear")} == {"int3 g32 sym"}
    assert found.bits["linear"] == pytest.approx(3.5)
    assert not severities(found) - {"note"}, found.findings
    plain = audit(tiny_llama_folder)
    assert plain.format == "safetensors" and plain.bits["linear"] == 32 and not severities(plain) - {"note"}
    assert audit(tiny_llama_folder / "model.safetensors").bits == plain.bits


def test_shards_and_files_without_a_folder(tmp_path: Path) -> None:
    both = {"a.weight": torch.ones(4, 8), "b.weight": torch.ones(4, 8, dtype=torch.bfloat16)}
    save_file(both, tmp_path / "x.safetensors")
    save_file({"c.weight": torch.ones(4, 8, dtype=torch.float16)}, tmp_path / "y.safetensors")
    assert {item.name: item.bits for item in audit(tmp_path).held} == {"a.weight": 32, "b.weight": 16, "c.weight": 16}
    assert [item.name for item in audit(tmp_path / "y.safetensors").held] == ["c.weight"]


# --- GGUF ------------------------------------------------------------------------------------------------------------


def gguf_file(path: Path, tensors: dict[str, tuple[tuple[int, int], Kind]], file_type: int | None = None) -> Path:
    """Tensors of random bytes, written by gguf itself: shapes in torch's order."""
    writer = ggml.GGUFWriter(path, "llama")
    if file_type is not None:
        writer.add_file_type(file_type)
    chance = np.random.default_rng(0)
    for name, (shape, kind) in tensors.items():
        block, size = ggml.GGML_QUANT_SIZES[kind]
        data = chance.integers(0, 60, (*shape[:-1], shape[-1] // block * size), dtype=np.uint8)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", [kind for kind in ggml.GGML_QUANT_SIZES if ggml.GGML_QUANT_SIZES[kind][0] > 1])
def test_every_block_type_has_its_bits(tmp_path: Path, kind: Kind) -> None:
    found = audit(gguf_file(tmp_path / "a.gguf", {"blk.0.attn_q.weight": ((4, 512), kind)}), deep=True)
    block, size = ggml.GGML_QUANT_SIZES[kind]
    assert found.held[0].effective == kind.name and found.held[0].bits == 8 * size / block
    assert found.held[0].role == "linear"


def test_fallbacks_of_llama_cpp_are_named(tmp_path: Path) -> None:
    tensors = {f"blk.{n}.ffn_down.weight": ((320, 1024), Kind.Q4_K) for n in range(2)}
    tensors |= {f"blk.{n}.ffn_up.weight": ((1024, 320), Kind.Q5_0) for n in range(2)}
    tensors |= {f"blk.{n}.attn_v.weight": ((320, 320), Kind.Q8_0) for n in range(2)}
    tensors |= {"token_embd.weight": ((512, 320), Kind.Q5_0), "output.weight": ((512, 320), Kind.Q8_0)}
    found = audit(gguf_file(tmp_path / "tiny-Q4_K_M.gguf", tensors, 15))
    assert found.claims == ["general.file_type: Q4_K_M", "file name: Q4_K_M"]
    fallback = said(found, "fallback")
    assert "The label says Q4_K_M, but 6 of 8 matrices are Q5_0, Q8_0 because rows of 320 are no" in fallback
    weights = {"down": 2 * 320 * 1024, "v": 2 * 320 * 320, "table": 512 * 320}
    now = weights["down"] * (4.5 + 5.5) + weights["v"] * 8.5 + weights["table"] * (5.5 + 8.5)
    meant = weights["down"] * 9 + weights["v"] * 6.5625 + weights["table"] * (4.5 + 6.5625)
    total = 2 * weights["down"] + weights["v"] + 2 * weights["table"]
    assert f"{now / total:.2f} bits a weight, not {meant / total:.2f}." in fallback
    assert "narrow 320 to 256 first" in fallback
    sound = {"blk.0.attn_q.weight": ((8, 512), Kind.Q4_K), "blk.0.attn_v.weight": ((8, 512), Kind.Q6_K)}
    assert not severities(audit(gguf_file(tmp_path / "sound-Q4_K_M.gguf", sound, 15)))


def test_labels_of_gguf_files_that_lie(tmp_path: Path) -> None:
    layers = {f"blk.{n}.ffn_up.weight": ((64, 512), Kind.Q4_K) for n in range(4)}
    assert "no linear layer is Q8_0: they are Q4_K, 4.50 bits" in said(
        audit(gguf_file(tmp_path / "model-q8_0.gguf", layers, 7)), "claim")  # fmt: skip
    assert "name says Q8_0 and its general.file_type says Q4_K_S" in said(
        audit(gguf_file(tmp_path / "model.Q8_0.gguf", layers, 14)), "claim")  # fmt: skip
    assert "4 of 4 matrices are quantized" in said(audit(gguf_file(tmp_path / "m-f16.gguf", layers, 1)), "claim")
    found = audit(gguf_file(tmp_path / "m.gguf", layers | {"token_embd.weight": ((64, 512), Kind.F16)}, 14))
    told = "1 of 5 matrices, with 32,768 weights, are not quantized (fp16): token_embd.weight"
    assert told in said(found, "fallback")
    assert "Neither the name" in said(audit(gguf_file(tmp_path / "n.gguf", layers)), "note")
    twice = dict.fromkeys(("token_embd.weight", "output.weight"), ((64, 512), Kind.Q8_0))
    path = gguf_file(tmp_path / "t-Q8_0.gguf", twice)
    data = bytearray(path.read_bytes())
    size = 64 * 512 // 32 * 34
    data[-size:] = data[-2 * size : -size]
    path.write_bytes(data)
    assert "The embedding is stored twice" in said(audit(path, deep=True), "waste")
    assert not severities(audit(path)) - {"note"}


def test_a_gguf_of_ours_is_run_and_compared(
    tmp_path: Path, tiny_llama_folder: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(text[:9000], "utf-8")
    assert main(["pack", str(tiny_llama_folder), "--to", "gguf", "--out", str(tmp_path / "m.gguf")]) == 0
    code, printed, _ = run(capsys, tmp_path / "m.gguf", "--against", tiny_llama_folder, "--text", tmp_path / "text.txt",
                           "--split", "all", "--json")  # fmt: skip
    kl = [item for item in json.loads(printed)["records"] if item["metric"] == "kl"]
    assert code == 0 and kl[0]["value"] == pytest.approx(0, abs=1e-9)


# --- ONNX ------------------------------------------------------------------------------------------------------------


def graph_file(path: Path, nodes: list[Any], initializers: list[Any], outside: bool = False) -> Path:
    floats = partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT, shape=None)
    graph = helper.make_graph(nodes, "g", [floats("x")], [floats("y")], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    onnx.save_model(model, path, save_as_external_data=outside, size_threshold=0, location=path.name + ".data")
    return path


def coded(name: str, codes: np.ndarray, bits: int, block: int, scales: str) -> tuple[Any, list[Any]]:
    """A MatMulNBits node of codes [outputs, inputs], and its initializers."""
    outputs, inputs = codes.shape
    stream = artefacts.words(codes.reshape(-1, block), bits).view(np.uint8)
    data = numpy_helper.from_array(stream.reshape(outputs, inputs // block, -1), name)
    steps = numpy_helper.from_array(np.ones((outputs, inputs // block), np.float16), scales)
    node = helper.make_node("MatMulNBits", ["x", name, scales], ["h"], K=inputs, N=outputs, bits=bits, block_size=block,
                            accuracy_level=4, domain="com.microsoft")  # fmt: skip
    return node, [data, steps]


@pytest.mark.parametrize("outside", [False, True])
def test_an_onnx_graph(tmp_path: Path, outside: bool) -> None:
    chance = np.random.default_rng(0)
    first, tensors = coded("layers.0.up.weight", chance.integers(0, 16, (64, 256)), 4, 32, "s0")
    second, more = coded("layers.1.up.weight", chance.integers(120, 136, (64, 256)), 8, 128, "s1")
    table = helper.make_tensor("model.embed_tokens.weight", TensorProto.INT8, [50, 64], bytes(3200), raw=True)
    scale = numpy_helper.from_array(np.ones(50, np.float32), "s2")
    dense = numpy_helper.from_array(np.ones((256, 64), np.float32), "layers.2.up.weight")
    nodes = [first, second, helper.make_node("DequantizeLinear", ["model.embed_tokens.weight", "s2"], ["w"], axis=0),
             helper.make_node("MatMul", ["h", "layers.2.up.weight"], ["z"]),
             helper.make_node("Add", ["z", "w"], ["y"])]  # fmt: skip
    path = graph_file(tmp_path / "model.onnx", nodes, [*tensors, *more, table, scale, dense], outside)
    found = audit(tmp_path, deep=True)
    kinds = {item.name: (item.effective, item.bits, item.role) for item in found.held}
    assert kinds == {
        "layers.0.up.weight": ("int4 g32 sym", 4.5, "linear"), "layers.1.up.weight": ("int8 g128 sym", 8.125, "linear"),
        "model.embed_tokens.weight": ("int8 grow", 8.5, "embedding"), "layers.2.up.weight": ("fp32", 32, "linear"),
    }  # fmt: skip
    assert found.size == sum(item.stat().st_size for item in tmp_path.iterdir())
    assert "1 weight of 8 bits with only 16 of 256 levels in use" in said(found, "waste")
    assert "1 of 4 matrices are not quantized" in said(found, "fallback")
    assert "accuracy_level 4" in said(found, "note")
    if outside:
        data = path.with_name("model.onnx.data")
        data.write_bytes(data.read_bytes()[:-70])
        with pytest.raises(FolderError, match="truncated"):
            audit(tmp_path)
        data.unlink()
        with pytest.raises(FolderError, match="missing"):
            audit(path)


def test_an_onnx_graph_points_nowhere_else(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((4, 8), np.float32), "w")
    for place in ("../secret", "/etc/passwd", "a\\b", ""):
        outside = onnx.TensorProto.FromString(weight.SerializeToString())
        outside.ClearField("raw_data")
        outside.data_location = TensorProto.EXTERNAL
        outside.external_data.add(key="location", value=place)
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        model = helper.make_model(helper.make_graph([node], "g", [], [], [outside]))
        (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(FolderError, match="no file beside the graph"):
            audit(tmp_path / "m.onnx")


def test_a_pack_of_ours_is_run_as_it_is_deployed(
    tmp_path: Path, tiny_llama_folder: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(text[:9000], "utf-8")
    rows = [{"prompt": f"def f{n}(", "completion": "x"} for n in range(6)]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (tmp_path / "calibration.txt").write_text(text, "utf-8")
    assert main(["pack", str(tiny_llama_folder), "--out", str(tmp_path / "pack"), "--text",
                 str(tmp_path / "calibration.txt")]) == 0  # fmt: skip
    (tmp_path / "pack" / "added_tokens.json").write_text("[")  # not of the pack, and so not read
    (tmp_path / "pack" / "special_tokens_map.json").write_text("[")
    code, printed, err = run(capsys, tmp_path / "pack", "--against", tiny_llama_folder, "--text", tmp_path / "text.txt",
                             "--task", tmp_path / "task.jsonl", "--split", "all", "--json")  # fmt: skip
    assert code == 0, err
    last = {item["metric"]: item["value"] for item in json.loads(printed)["records"] if item["model"] != "llama"}
    assert last["kl"] == pytest.approx(0, abs=1e-6) and last["top1_agreement"] == 1 and last["flipped_answers"] == 0


# --- deep ------------------------------------------------------------------------------------------------------------


def test_what_only_numbers_tell(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rounded = (torch.randn(64, 256) * 2).round().clamp(-7, 7).bfloat16() / 8
    sparse = torch.randn(64, 256).bfloat16() * (torch.rand(64, 256) > 0.6)
    short = torch.randn(64, 256).bfloat16().float()
    broken = torch.randn(64, 256)
    broken[3, 5] = float("inf")
    names = {"rounded": rounded, "sparse": sparse, "short": short, "broken": broken, "copy": broken.clone(),
             "sound": torch.randn(64, 256), "alike": torch.randn(64, 256)}  # fmt: skip
    save_file({f"{name}.weight": value for name, value in names.items()}, tmp_path / "model.safetensors")
    assert not severities(audit(tmp_path))
    found = audit(tmp_path, deep=True)
    told = {item.severity + " " + ", ".join(item.tensors) for item in found.findings}
    assert told == {"claim rounded.weight", "waste sparse.weight", "waste short.weight",
                    "broken broken.weight, copy.weight", "waste broken.weight, copy.weight"}  # fmt: skip


def test_codes_that_say_little(tmp_path: Path, tiny_llama_folder: Path) -> None:
    torch.manual_seed(0)
    few = lambda weight: artefacts.bnb8((weight * 8).round().clamp(-7, 7))  # noqa: E731
    found = audit(quantized(tiny_llama_folder, tmp_path / "few", few, INT8), deep=True)
    assert not said(audit(tmp_path / "few"), "waste")
    assert "of 256 levels" in said(found, "waste")
    flat = lambda weight: artefacts.gptq(torch.where(torch.arange(weight.shape[1]) < 32, 0.5, weight))  # noqa: E731
    found = audit(quantized(tiny_llama_folder, tmp_path / "flat", flat, INT4), deep=True)
    assert "groups hold one value throughout" in said(found, "waste")
    assert "50% of them" in said(found, "waste")
    sound = audit(quantized(tiny_llama_folder, tmp_path / "sound", artefacts.awq, AWQ), deep=True)
    assert not severities(sound) - {"note"} and "bits of information in 4.00" in said(sound, "note")


# --- the verb --------------------------------------------------------------------------------------------------------


def test_the_table_and_the_exit_codes(
    tmp_path: Path, tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = quantized(tiny_llama_folder, tmp_path / "artefact", artefacts.gptq, INT4, skip=("layers.1.mlp",))
    code, printed, _ = run(capsys, out)
    assert code == 0
    assert "fallback: quantization_config claims gptq, 4 bits in groups of 32, and 3 of 14" in " ".join(printed.split())
    assert "model.layers.{0-1}.self_attn.q_proj × 2" in " ".join(printed.split())
    for level, expected in (("note", 1), ("fallback", 1), ("claim", 0)):
        assert run(capsys, out, "--fail-on", level)[0] == expected
    code, printed, _ = run(capsys, out, "--json")
    found = json.loads(printed)
    assert found["bits_per_weight"].keys() == {"whole file", "linear", "embedding", "other"}
    assert found["bytes"] == (out / "model.safetensors").stat().st_size and found["records"] == []
    assert {item["severity"] for item in found["findings"]} == {"fallback", "note"}
    total = sum(item["bytes"] for item in found["tensors"] if item["role"] == "linear")
    weights = sum(int(np.prod(item["shape"])) for item in found["tensors"] if item["role"] == "linear")
    assert found["bits_per_weight"]["linear"] == pytest.approx(8 * total / weights)


def test_what_cannot_be_run_is_said_and_the_rest_stands(
    tmp_path: Path, tiny_llama_folder: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(text[:9000], "utf-8")
    path = gguf_file(tmp_path / "a-Q4_K_M.gguf", {"blk.0.attn_q.weight": ((4, 512), Kind.Q4_K)}, 15)
    against = ("--against", tiny_llama_folder, "--text", tmp_path / "text.txt", "--split", "all")
    code, printed, err = run(capsys, path, *against)
    assert code == 0 and "not measured:" in err and "Q4_K" in printed


def test_names_and_roles() -> None:
    names = [f"model.layers.{n}.mlp.up" for n in (0, 1, 2, 5)]
    assert together(names) == "model.layers.{0-2,5}.mlp.up"
    assert together(["a.1.b2"]) == "a.1.b2"
    shown = {"model.embed_tokens.weight": "embedding", "token_embd.weight": "embedding", "transformer.wte.weight":
             "embedding", "bert.embeddings.word_embeddings.weight": "embedding", "lm_head.weight": "head",
             "output.weight": "head", "model.layers.0.attention.output.dense.weight": "linear",
             "blk.0.attn_output.weight": "linear", "model.layers.0.self_attn.q_proj.weight": "linear"}  # fmt: skip
    assert {name: role_of(name, (4, 4)) for name in shown} == shown
    assert role_of("model.norm.weight", (4,)) == "other"


def test_a_folder_of_several_things(tmp_path: Path, tiny_llama_folder: Path) -> None:
    layer = {"blk.0.attn_q.weight": ((4, 512), Kind.Q4_K)}
    gguf_file(tmp_path / "a-Q4_K_M.gguf", layer)
    assert audit(tmp_path).format == "GGUF"
    gguf_file(tmp_path / "b-Q4_K_M.gguf", layer)
    with pytest.raises(FolderError, match="name one of them"):
        audit(tmp_path)
    shutil.copy(tiny_llama_folder / "model.safetensors", tmp_path)
    assert audit(tmp_path).format == "safetensors"
    assert folder.load(tiny_llama_folder).path == tiny_llama_folder
