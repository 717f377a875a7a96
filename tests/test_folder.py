"""Model folders: what is refused and how it is said, and that what was saved is what was chosen."""

import copy
import json
import math
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from shrew import folder
from shrew.errors import FolderError, ShrewError
from shrew.folder import Grid, Loaded, Packed, Steps, Uniform
from shrew.folder.grids import dequantize, groups
from shrew.folder.headers import read_header, read_headers
from shrew.folder.packed import from_parts, pack_bits, to_entry, to_parts, to_rows, unpack_bits

WORDS = 96
BASE = {
    "vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "initializer_range": 0.2,
}  # fmt: skip
GROUPED = BASE | {"num_key_value_heads": 1}
GPT2 = {"vocab_size": WORDS, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}
DISTIL = {"vocab_size": WORDS, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 2, "num_labels": 5}
MODERN = BASE | {"num_labels": 5, "cls_token_id": 2, "sep_token_id": 3}
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", GROUPED),
    "tied": ("LlamaForCausalLM", GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", GROUPED | {"head_dim": 32}),
    "gemma3": ("Gemma3ForCausalLM", GROUPED | {"head_dim": 32}),
    "gpt2": ("GPT2LMHeadModel", GPT2 | {"bos_token_id": 2, "eos_token_id": 3}),
    "olmoe": ("OlmoeForCausalLM", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "modernbert": ("ModernBertForSequenceClassification", MODERN),
    "distilbert": ("DistilBertForSequenceClassification", DISTIL | {"pad_token_id": 1}),
}


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w1")


def make_model(kind: str) -> Any:
    torch.manual_seed(0)
    name, settings = ZOO[kind]
    cls = getattr(transformers, name)
    return cls(cls.config_class(**settings)).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A bf16 folder of a kind in the zoo, made once."""
    root = tmp_path_factory.mktemp("zoo")

    def make(kind: str) -> Path:
        if not (root / kind).exists():
            folder.save(Loaded(make_model(kind), make_tokenizer()), root / kind)
        return root / kind

    return make


@pytest.fixture
def broken(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the llama folder to break."""
    for item in saved("llama").iterdir():
        (tmp_path / "m").mkdir(exist_ok=True)
        (tmp_path / "m" / item.name).write_bytes(item.read_bytes())
    return tmp_path / "m"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(4, 44)[None]).logits
    return found


def plain(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers itself loads it."""
    architecture = json.loads((path / "config.json").read_text())["architectures"][0]
    classifier = architecture.endswith("ForSequenceClassification")
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    return auto.from_pretrained(path, dtype=dtype)


def pack_all(loaded: Loaded, grid: Grid, keep: Callable[[str], bool] = lambda name: True) -> None:
    """Put random codes on every matrix: here only the storage is of interest, not how codes are chosen."""
    draw = torch.Generator().manual_seed(1)
    for name, weight in loaded.model.named_parameters():
        if weight.ndim < 2 or not keep(name):
            continue
        transposed = "Conv1D" in type(loaded.model.get_submodule(name.rpartition(".")[0])).__name__
        rows = to_rows(weight.detach(), transposed)
        extent = grid.shapes(*rows.shape)
        codes = torch.randint(0, 2**grid.bits, rows.shape, dtype=torch.uint8, generator=draw)
        scales = (torch.rand(extent["scales"], generator=draw) * 0.05 + 0.01).bfloat16()
        zeros = None
        if "zeros" in extent:
            zeros = torch.randint(0, 2**grid.bits, extent["zeros"], dtype=torch.uint8, generator=draw)
        loaded.packed[name] = Packed(codes, Steps(scales, zeros), grid, tuple(weight.shape), transposed)
        weight.data.copy_(loaded.packed[name].dense())


# Bits


@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 70), st.sampled_from([1, 4]), st.integers(0, 2**32))
def test_bits_come_back_and_none_is_wasted(bits: int, rows: int, cols: int, align: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, cols), dtype=torch.uint8, generator=draw)
    packed = pack_bits(codes, bits, align)
    assert packed.shape == (rows, math.ceil(cols * bits / 8 / align) * align)
    assert torch.equal(unpack_bits(packed, bits, cols), codes)


def test_bits_lie_in_a_little_endian_stream() -> None:
    assert pack_bits(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 3).tolist() == [[0b11_010_001, 0b0]]


@given(st.integers(2, 8), st.integers(0, 20), st.booleans(), st.booleans(), st.integers(1, 40), st.integers(0, 2**32))
def test_parts_come_back(bits: int, group: int, symmetric: bool, transposed: bool, cols: int, seed: int) -> None:
    grid, draw = Uniform(bits, group, symmetric), torch.Generator().manual_seed(seed)
    shape = (2, cols, 3) if transposed else (2, 3, cols)
    codes = torch.randint(0, 2**bits, (6, cols), dtype=torch.uint8, generator=draw)
    zeros = torch.randint(0, 2**bits, (6, groups(cols, group)), dtype=torch.uint8, generator=draw)
    scales = torch.rand(6, groups(cols, group), generator=draw).bfloat16()
    packed = Packed(codes, Steps(scales, None if symmetric else zeros), grid, shape, transposed)
    parts = {name.removeprefix("w"): part for name, part in to_parts("w", packed).items()}
    again = from_parts(parts, json.loads(json.dumps(to_entry(packed))))
    assert again.dense().shape == shape
    assert torch.equal(again.dense(), packed.dense())


def test_dequantization_with_eight_numbers() -> None:
    codes = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=torch.uint8)
    scales = torch.tensor([[0.5, 2.0], [1.0, -1.0]]).bfloat16()
    assert dequantize(codes, Steps(scales), Uniform(2, 3)).tolist() == [[-1, -0.5, 0, 2], [1, 0, -1, 2]]
    zeros = torch.tensor([[0, 3], [1, 0]], dtype=torch.uint8)
    assert dequantize(codes, Steps(scales, zeros), Uniform(2, 3, False)).tolist() == [[0, 0.5, 1, 0], [2, 1, 0, 0]]


# Round trips


@pytest.mark.parametrize("kind", ZOO)
def test_dense_folder_is_read_by_transformers_as_by_us(kind: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    first = folder.load(saved(kind))
    assert torch.equal(logits(first.model), logits(plain(saved(kind))))
    assert first.dtype == torch.bfloat16
    assert next(first.model.parameters()).dtype == torch.float32
    assert folder.save(first, tmp_path / "again") == "dense"
    assert folder.identity(tmp_path / "again") == folder.identity(saved(kind))


GRIDS = [Uniform(3, 32), Uniform(4, 32), Uniform(8, 0), Uniform(5, 48, False)]


@pytest.mark.parametrize("kind", ZOO)
@pytest.mark.parametrize("grid", GRIDS, ids=Uniform.label)
def test_packed_folder_gives_the_same_logits(
    kind: str, grid: Grid, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    loaded = folder.load(saved(kind))
    pack_all(loaded, grid)
    before = logits(loaded.model)
    layout = folder.save(loaded, tmp_path / "p")
    assert layout.startswith("shrew (")
    assert torch.equal(logits(loaded.model), before)  # saving changes nothing
    again = folder.load(tmp_path / "p")
    assert torch.equal(logits(again.model), before)
    assert again.packed.keys() == loaded.packed.keys()
    folder.register()
    assert torch.equal(logits(plain(tmp_path / "p")), before)
    folder.save(again, tmp_path / "q")
    assert folder.identity(tmp_path / "q") == folder.identity(tmp_path / "p")
    for info in folder.tensors(tmp_path / "p"):
        if info.name not in loaded.packed:
            assert (info.effective, info.bits_per_weight) == ("bf16", 16)
            continue
        rows, cols = loaded.packed[info.name].codes.shape
        count = groups(cols, grid.group)
        zeros = 0 if grid.symmetric else math.ceil(count * grid.bits / 8)
        assert info.effective == grid.label()
        assert info.bytes == rows * (math.ceil(cols * grid.bits / 8) + 2 * count + zeros)
    total = sum(info.bytes for info in folder.tensors(tmp_path / "p"))
    size = (tmp_path / "p" / "model.safetensors").stat().st_size
    header = struct.unpack("<Q", (tmp_path / "p" / "model.safetensors").read_bytes()[:8])[0]
    assert total == size - 8 - header


@pytest.mark.parametrize("kind", ["tied", "gpt2", "gemma3"])
def test_tied_weights_are_stored_once_and_stay_tied(kind: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    loaded = folder.load(saved(kind))
    pack_all(loaded, Uniform(4, 32))
    folder.save(loaded, tmp_path / "p")
    for model in (folder.load(tmp_path / "p").model, plain(tmp_path / "p")):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not any("lm_head" in info.name for info in folder.tensors(tmp_path / "p"))


def is_linear(loaded: Loaded) -> Callable[[str], bool]:
    def check(name: str) -> bool:
        return type(loaded.model.get_submodule(name.rpartition(".")[0])) is torch.nn.Linear

    return check


@pytest.mark.parametrize("kind", ["llama", "tied", "qwen3", "gemma3", "distilbert"])
@pytest.mark.parametrize("grid", [Uniform(4, 32), Uniform(8, 32), Uniform(4, 0)], ids=Uniform.label)
def test_compressed_tensors_reads_the_same_numbers(
    kind: str, grid: Grid, saved: Callable[[str], Path], warm: Path, tmp_path: Path
) -> None:
    loaded = folder.load(saved(kind))
    pack_all(loaded, grid, is_linear(loaded))
    assert folder.save(loaded, tmp_path / "p") == "compressed-tensors"
    code = ("import sys, torch, transformers\n"
            "assert not any('shrew' in name for name in sys.modules)\n"
            "cls = getattr(transformers, sys.argv[2])\n"
            "model = cls.from_pretrained(sys.argv[1], dtype=torch.float32).eval()\n"
            "torch.save(model(input_ids=torch.arange(4, 44)[None]).logits.detach(), sys.argv[3])")  # fmt: skip
    if grid == Uniform(4, 32) and kind == "llama":  # once in a process that never heard of Shrew
        command = [warm / "python", "-c", code, tmp_path / "p", type(loaded.model).__name__, tmp_path / "logits"]
        subprocess.run(command, check=True, capture_output=True)
        assert torch.equal(torch.load(tmp_path / "logits"), logits(loaded.model))
    assert torch.equal(logits(plain(tmp_path / "p").eval()), logits(loaded.model))
    again = folder.load(tmp_path / "p")
    assert torch.equal(logits(again.model), logits(loaded.model))
    folder.save(again, tmp_path / "q")
    assert folder.identity(tmp_path / "q") == folder.identity(tmp_path / "p")
    labels = {info.effective for info in folder.tensors(tmp_path / "p") if info.name in loaded.packed}
    assert labels == {grid.label()}


def test_compressed_tensors_with_two_widths(saved: Callable[[str], Path], tmp_path: Path) -> None:
    loaded = folder.load(saved("llama"))
    pack_all(loaded, Uniform(8, 32), lambda name: "mlp" in name)
    pack_all(loaded, Uniform(4, 32), lambda name: "attn" in name)
    assert folder.save(loaded, tmp_path / "p") == "compressed-tensors"
    assert torch.equal(logits(plain(tmp_path / "p").eval()), logits(loaded.model))
    assert torch.equal(logits(folder.load(tmp_path / "p").model), logits(loaded.model))


@pytest.mark.parametrize("kind", ["llama", "modernbert"])
def test_packed_folder_in_bf16_is_the_rounded_float32(kind: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    loaded = folder.load(saved(kind))
    pack_all(loaded, Uniform(6, 32))
    folder.save(loaded, tmp_path / "p")
    model = plain(tmp_path / "p", torch.bfloat16)
    for name, packed in loaded.packed.items():
        assert torch.equal(model.get_parameter(name), packed.dense().bfloat16())
    model.save_pretrained(tmp_path / "dense")  # what was packed is an ordinary model now
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(logits(plain(tmp_path / "dense")), logits(model.float()))


def test_dtypes_of_the_original_are_kept(broken: Path, tmp_path: Path) -> None:
    weights = load_file(broken / "model.safetensors")
    weights = {name: tensor.half() for name, tensor in weights.items()}
    weights["model.norm.weight"] = weights["model.norm.weight"].float() + 1e-6
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    folder.save(folder.load(broken), tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == weights.keys()
    for name, tensor in weights.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "float16"


def test_sharded_folders_are_read_and_written(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = folder.load(saved("llama"))
    pack_all(loaded, Uniform(3, 32), lambda name: "mlp" in name)
    monkeypatch.setattr(folder, "SHARD", 20_000)
    folder.save(loaded, tmp_path / "p")
    assert len(list((tmp_path / "p").glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(folder.load(tmp_path / "p").model), logits(loaded.model))
    assert torch.equal(logits(plain(tmp_path / "p")), logits(loaded.model))
    assert len(folder.identity(tmp_path / "p")) == 64


def test_lineage_is_kept_and_versions_are_added(saved: Callable[[str], Path], tmp_path: Path) -> None:
    loaded = folder.load(saved("llama"))
    loaded.lineage["moves"] = [{"name": "nothing"}]
    loaded.untouched["model.norm.weight"] = "a norm"
    folder.save(loaded, tmp_path / "p")
    again = folder.load(tmp_path / "p")
    assert again.untouched == loaded.untouched
    lineage = again.lineage
    assert lineage["moves"] == [{"name": "nothing"}]
    assert lineage["format"] == 1
    assert {"shrew", "torch", "transformers", "python"} == lineage["versions"].keys()
    for item in (tmp_path / "p").glob("*.json"):
        assert str(tmp_path.parent) not in item.read_text()


def test_a_weight_changed_after_packing_is_not_lost_silently(saved: Callable[[str], Path], tmp_path: Path) -> None:
    loaded = folder.load(saved("llama"))
    pack_all(loaded, Uniform(4, 32))
    loaded.model.get_parameter("model.layers.0.mlp.up_proj.weight").data[0, 0] += 1
    with pytest.raises(ShrewError, match=r"layers\.0\.mlp\.up_proj\.weight.*changed after it was quantized"):
        folder.save(loaded, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_failed_save_leaves_the_old_folder(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = folder.load(saved("llama"))
    folder.save(loaded, tmp_path / "p")
    before = folder.identity(tmp_path / "p")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "save_file", fail)
    with torch.no_grad():
        loaded.model.get_parameter("model.norm.weight").add_(1)
    with pytest.raises(ShrewError, match=r"could not be written.*No space"):
        folder.save(loaded, tmp_path / "p")
    assert folder.identity(tmp_path / "p") == before
    assert [item.name for item in tmp_path.iterdir()] == ["p"]


def test_loading_makes_no_noise(saved: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    level = transformers.utils.logging.get_verbosity()
    folder.load(saved("gpt2"))
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.get_verbosity() == level


# Bad folders


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def cut(path: Path, end: int) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:end])


def make_pipe(path: Path) -> None:
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")


def make_pickle(path: Path) -> None:
    (path / "model.safetensors").unlink()
    torch.save({}, path / "pytorch_model.bin")


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = path / "model.safetensors"
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def climb(path: Path) -> None:
    (path / "model.safetensors").rename(path.parent / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def stretch(path: Path) -> None:
    with (path / "model.safetensors").open("ab") as stream:
        stream.write(b"\0" * 9)


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), r"config\.json is missing"),
    "config no JSON": (lambda p: (p / "config.json").write_text("{"), r"config\.json is no readable JSON"),
    "config no object": (lambda p: (p / "config.json").write_text("[]"), "no JSON object"),
    "config not UTF-8": (lambda p: (p / "config.json").write_bytes(b"\xff\xfe{"), "no readable JSON"),
    "no model_type": (lambda p: edit_config(p, model_type=None), "names no model_type"),
    "unknown model_type": (lambda p: edit_config(p, model_type="lama"), "describes no model"),
    "wrong value": (lambda p: edit_config(p, hidden_size="big"), "describes no model"),
    "own code": (lambda p: edit_config(p, auto_map={"AutoConfig": "evil.Config"}), "its own Python code"),
    "redirect": (lambda p: edit_config(p, transformers_weights="x.bin"), "redirects the weights"),
    "masked model": (lambda p: edit_config(p, architectures=["BertForMaskedLM"]), "causal language models"),
    "foreign quantization": (lambda p: edit_config(p, quantization_config={"quant_method": "awq"}), "'awq'"),
    "adapter": (lambda p: (p / "adapter_config.json").write_text("{}"), "an adapter"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "has no weights"),
    "pickle": (make_pickle, r"pickle weights \(pytorch_model\.bin\).*python -c .*AutoModelForCausalLM"),
    "empty file": (lambda p: cut(p, 0), "truncated"),
    "cut in the header": (lambda p: cut(p, 100), "truncated"),
    "cut in the data": (lambda p: cut(p, -1), "truncated"),
    "too long": (stretch, "oversized"),
    "a pipe": (make_pipe, "no plain file"),
    "a lineage of numbers": (lambda p: (p / "shrew.json").write_text('{"moves": 3}'), "'moves' is not what"),
    "a lineage of texts": (lambda p: (p / "shrew.json").write_text('{"twins": ["x"]}'), "'twins' is not what"),
    "a recipe that is none": (lambda p: (p / "shrew.json").write_text('{"recipe": {"train": 3}}'), "'recipe.train' is"),
    "huge header": (lambda p: (p / "model.safetensors").write_bytes(b"\xff" * 80), "claims a header"),
    "unknown dtype": (lambda p: rewrite_header(p, lambda h: h[NORM].update(dtype="F7")), f"{NORM}.*unknown dtype"),
    "wrong size": (lambda p: rewrite_header(p, lambda h: h[NORM].update(shape=[65])), f"{NORM}.*not its shape"),
    "negative shape": (lambda p: rewrite_header(p, lambda h: h[NORM].update(shape=[-64])), f"{NORM}.*of counts"),
    "overlap": (lambda p: rewrite_header(p, lambda h: h[NORM].update(data_offsets=[0, 128])), "overlaps|hole"),
    "hole": (lambda p: rewrite_header(p, lambda h: h.pop(NORM)), "hole|oversized"),
    "climbing shard": (climb, r"points at '\.\./model\.safetensors'"),
    "missing tensor": (lambda p: edit_weights(p, lambda w: w.pop(UP)), f"{UP}.*is missing from the weights"),
    "extra tensor": (lambda p: edit_weights(p, lambda w: w.update(extra=torch.ones(2))), "'extra'.*no place"),
    "wrong shape": (lambda p: edit_weights(p, lambda w: w.update({UP: w[UP][:5].clone()})), f"{UP}.*shape"),
    "wrong width": (lambda p: edit_config(p, hidden_size=32), "shape"),
    "absurd width": (lambda p: edit_config(p, intermediate_size=10**9), "shape"),
    "absurd depth": (lambda p: edit_config(p, num_hidden_layers=10**9), "layers"),
    "too deep": (lambda p: edit_config(p, num_hidden_layers=3), r"layers\.2\..*missing"),
    "NaN": (lambda p: edit_weights(p, lambda w: w[UP].view(-1)[7].fill_(float("nan"))), f"{UP}.*NaN"),
    "infinite": (lambda p: edit_weights(p, lambda w: w[NORM][3].fill_(float("inf"))), f"{NORM}.*infinite"),
    "no tokenizer": (lambda p: [item.unlink() for item in p.glob("tokenizer*")], "no tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_refused_in_one_sentence(case: str, broken: Path) -> None:
    damage, words = BAD[case]
    damage(broken)
    with pytest.raises(FolderError, match=words) as caught:
        folder.load(broken)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", "", "no-such-model-anywhere", "..."])
def test_a_name_that_is_nothing_gets_a_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FolderError) as caught:
        folder.load(name)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_folder(broken: Path) -> None:
    with pytest.raises(FolderError, match="is a file"):
        folder.load(broken / "config.json")
    file = broken / "model.gguf"
    file.touch()
    with pytest.raises(FolderError, match=r"model\.gguf --to folder. makes"):
        folder.load(file)


def test_a_packed_folder_is_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "pack.json").touch()
    with pytest.raises(FolderError, match="is packed already"):
        folder.load(tmp_path)


def test_weights_can_be_read_by_all(tiny_llama_folder: Path, tmp_path: Path) -> None:
    folder.save(folder.load(tiny_llama_folder), tmp_path / "saved")
    assert {item.stat().st_mode & 0o777 for item in (tmp_path / "saved").iterdir()} == {0o644}


PACKED_LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "bits": lambda q: q["tensors"][UP].update(bits=4),
    "group": lambda q: q["tensors"][UP].update(group=16),
    "symmetric": lambda q: q["tensors"][UP].update(symmetric=False),
    "shape": lambda q: q["tensors"][UP].update(shape=[64, 96]),
    "no bits": lambda q: q["tensors"][UP].pop("bits"),
    "wild bits": lambda q: q["tensors"][UP].update(bits=10**6),
    "unmentioned": lambda q: q["tensors"].pop(UP),
    "no table": lambda q: q.pop("tensors"),
    "another name": lambda q: q["tensors"].update({"x": q["tensors"][UP]}),
}


@pytest.mark.parametrize("lie", PACKED_LIES)
def test_a_label_that_lies_is_refused(lie: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    loaded = folder.load(saved("llama"))
    pack_all(loaded, Uniform(3, 32))
    folder.save(loaded, tmp_path / "p")
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    PACKED_LIES[lie](config["quantization_config"])
    edit_config(tmp_path / "p", quantization_config=config["quantization_config"])
    for read in (folder.load, folder.tensors):
        with pytest.raises(FolderError) as caught:
            read(tmp_path / "p")
        assert "\n" not in str(caught.value)


def test_a_compressed_label_that_lies_is_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    loaded = folder.load(saved("llama"))
    pack_all(loaded, Uniform(4, 32), is_linear(loaded))
    folder.save(loaded, tmp_path / "p")
    config = json.loads((tmp_path / "p" / "config.json").read_text())["quantization_config"]
    for path, value in (("num_bits", 8), ("type", "float")):
        lying = copy.deepcopy(config)
        lying["config_groups"]["group_0"]["weights"][path] = value
        edit_config(tmp_path / "p", quantization_config=lying)
        with pytest.raises(FolderError):
            folder.load(tmp_path / "p")


@settings(max_examples=200)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_are_refused_politely(tmp_path_factory: Any, raw: bytes, framed: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw if framed else raw)
    if raw.strip() in (b"{}",) and framed:
        return
    with pytest.raises(FolderError) as caught:
        read_header(path)
    assert "\n" not in str(caught.value)


JSON = st.recursive(st.none() | st.booleans() | st.integers(-2, 2**70) | st.sampled_from(["F32", "U8", "x"]),
                    lambda inner: st.lists(inner, max_size=3), max_leaves=6)  # fmt: skip
ENTRY = st.fixed_dictionaries({"dtype": JSON, "shape": JSON | st.just([1]), "data_offsets": JSON | st.just([0, 4])})


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(["a", "b\n", "__metadata__"]), ENTRY | JSON, min_size=1), st.integers(0, 8))
def test_hostile_headers_are_refused_politely(tmp_path_factory: Any, header: dict[str, Any], data: int) -> None:
    path = tmp_path_factory.getbasetemp() / "hostile.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * data)
    try:
        entries = read_header(path)
    except FolderError as error:
        assert "\n" not in str(error)
    else:  # what we accept, the safetensors library accepts too
        assert load_file(path).keys() == entries.keys()


def test_deep_nesting_and_repeated_names_are_refused(tmp_path: Path) -> None:
    entry = '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    for text in ("[" * 100_000, "{" + entry + "," + entry + "}"):
        file = tmp_path / "model.safetensors"
        file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + b"\0")
        with pytest.raises(FolderError):
            read_headers(tmp_path)
