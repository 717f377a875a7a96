"""Features that were built apart, together: every packed form under every move, packer and reader."""

import json
import shutil
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_folder import logits, plain

from shrew import audit, entropy, folder
from shrew.errors import FolderError, UnsupportedError
from shrew.folder import Loaded
from shrew.folder.packed import to_parts
from shrew.moves import Context, parse_moves
from shrew.moves.trim_vocab import with_rows
from shrew.packers import gguf, onnx
from shrew.packers.gguf.back import read

RTN = {"name": "quantize", "method": "rtn"}
PRUNE = {"name": "prune", "method": "magnitude"}
UP = "model.layers.{}.mlp.up_proj.weight"
FORMS: dict[str, list[dict[str, Any]]] = {
    "int": [RTN | {"bits": 4, "group": 32}],
    "coded rows": [RTN | {"bits": 5, "group": 0, "symmetric": False, "embeddings": True, "coded": True}],
    "rate": [{"name": "quantize", "rate": 4.0}],
    "low rank": [RTN | {"grid": "nf4", "low_rank": 3, "embeddings": True}],
    "ternary": [RTN | {"grid": "ternary", "coded": True, "low_rank": 2}],
    "blocks": [{"name": "quantize", "bits": 5, "group": 32, "coded": True,
                "tensors": {UP.format(0): "q4_k", UP.format(1): "q6_k", "model.embed_tokens.weight": "mxfp4"}}],
    "pruned": [PRUNE],
    "pruned and packed": [PRUNE, RTN | {"bits": 8, "tensors": {UP.format(0): 0}}],
}  # fmt: skip
PACKED = [name for name in FORMS if name != "pruned"]
MOVES: dict[str, dict[str, Any]] = {
    "distil": {"name": "distil", "steps": 2, "rows": 1, "scales": True, "lr": 1e-3},
    "lora": {"name": "distil", "steps": 2, "rows": 1, "lora": 2, "lr": 1e-3},
    "drop-layers": {"name": "drop-layers", "layers": [0]},
    "trim-vocab": {"name": "trim-vocab", "multiple": 8},
    "narrow": {"name": "narrow", "mlp": 0.5, "multiple": 8},
    "share": {"name": "share"},
    "factor": {"name": "factor", "keep": 0.6},
    "prune": PRUNE,
    "smooth": {"name": "smooth"},
    "rotate": {"name": "rotate"},
    "quantize": RTN,
}
REFUSED = {"narrow", "share", "factor", "prune", "smooth", "rotate", "quantize"}  # for codes: they would be off a grid


@pytest.fixture(scope="module")
def base(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two llama layers of 256, so that blocks of 256 fit, and else as small as can be; tied, bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    ids = {key: getattr(tiny_tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(vocab_size=len(tiny_tokenizer), hidden_size=256, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
                         max_position_embeddings=64, initializer_range=0.05, **ids)  # fmt: skip
    path = tmp_path_factory.mktemp("combinations") / "base"
    folder.save(Loaded(LlamaForCausalLM(config).eval(), tiny_tokenizer), path)
    return path


@pytest.fixture(scope="module")
def around(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Context:
    """Text of all tokens but the last few, and the original as the teacher."""
    rows = list(np.random.default_rng(0).permutation(280)[:280].reshape(7, 40))
    return Context(rows[:4], rows[4:], folder.load(base), 0, tmp_path_factory.mktemp("cache"), lambda _: None)


@pytest.fixture(scope="module")
def forms(base: Path, around: Context, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a form, made once."""
    root = tmp_path_factory.mktemp("forms")

    def make(form: str) -> Path:
        if not (root / form).exists():
            path = base
            for number, move in enumerate(parse_moves(FORMS[form], form)):
                loaded = move.apply(folder.load(path), around)
                path = root / (form if number + 1 == len(FORMS[form]) else f"{form} {number}")
                folder.save(loaded, path)
        return root / form

    return make


def _same(loaded: Loaded, path: Path) -> None:
    """What is in the folder is what was in memory, for us and for transformers, in the bytes that were promised."""
    for name, weight in loaded.model.named_parameters():
        if name not in loaded.packed:
            weight.data.copy_(weight.data.to(loaded.stored.get(name, loaded.dtype)))
    again, listed = folder.load(path), {item.name: item for item in folder.tensors(path)}
    assert torch.equal(logits(again.model), logits(loaded.model))
    folder.register()
    assert torch.equal(logits(plain(path)), logits(loaded.model))
    assert again.packed.keys() == loaded.packed.keys()
    for name, item in loaded.packed.items():
        assert listed[name].effective == item.label()
        assert listed[name].bytes == pytest.approx(sum(part.nbytes for part in to_parts(name, item).values()), abs=64)
    stored = load_file(path / "model.safetensors")
    assert sum(item.bytes for item in listed.values()) == sum(value.nbytes for value in stored.values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("move", MOVES)
def test_a_move_keeps_a_form_or_refuses_it(
    form: str, move: str, forms: Any, base: Path, around: Context, tmp_path: Path
) -> None:
    loaded = folder.load(forms(form))
    before = {item.label() for item in loaded.packed.values()}
    (found,) = parse_moves([MOVES[move]], form)
    if (form in PACKED and move in REFUSED) or (form == "pruned" and move in ("factor", "rotate")):
        with pytest.raises(UnsupportedError, match=r"quantized already|goes before|is already"):
            found.apply(loaded, around)
        return
    made = found.apply(loaded, around)
    assert move == "quantize" or {item.label() for item in made.packed.values()} <= before
    folder.save(made, tmp_path / "m")
    _same(made, tmp_path / "m")


def test_trimmed_corrected_and_taught(forms: Any, around: Context, tmp_path: Path) -> None:
    """A chain of three that all touch the rows of one packed embedding."""
    trim, distil = parse_moves([MOVES["trim-vocab"], MOVES["distil"]], "chain")
    loaded = trim.apply(folder.load(forms("low rank")), around)
    rows = len(loaded.model.get_input_embeddings().weight)
    assert rows < 300
    own = [window % rows for window in around.healing]
    assert around.teacher is not None
    smaller = with_rows(around.teacher, range(rows), loaded.tokenizer)
    context = Context(own, own, smaller, 0, around.cache, lambda _: None)
    loaded = distil.apply(loaded, context)
    assert loaded.packed["model.embed_tokens.weight"].rank == 3
    folder.save(loaded, tmp_path / "m")
    _same(loaded, tmp_path / "m")


@pytest.mark.parametrize("form", FORMS)
def test_the_audit_reads_every_form(form: str, forms: Any) -> None:
    found = audit.audit(str(forms(form)), True)
    listed = {item.name: item for item in folder.tensors(forms(form))}
    assert {item.name: (item.bytes, item.effective) for item in found.held} == {
        name: (item.bytes, item.effective) for name, item in listed.items()
    }
    assert all(item.severity == "note" for item in found.findings), found.findings  # a coded stream wastes no levels
    one = audit.audit(str(forms(form) / "model.safetensors"))
    assert [item.name for item in one.held] == [item.name for item in found.held]


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_hold_the_same_or_refuse(form: str, forms: Any, tmp_path: Path) -> None:
    loaded = folder.load(forms(form))
    said: list[str] = []
    places = tmp_path / "m.gguf", tmp_path / "m"
    if any(item.rank for item in loaded.packed.values()):
        for packer, out in zip((gguf, onnx), places, strict=True):
            with pytest.raises(UnsupportedError, match="no low-rank corrections"):
                packer.pack(str(forms(form)), out, packer.Options(), said.append)
            assert not out.exists()
        return
    made = gguf.pack(str(forms(form)), places[0], gguf.Options(), said.append)
    assert torch.equal(logits(read(places[0])[0].model), logits(loaded.model))
    lost = {item["source"] for item in made["tensors"] if item["type"] in ("F32", "F16", "BF16")} & loaded.packed.keys()
    assert bool(lost) == any("packed weights fit no block type" in line for line in said)
    if form not in ("int", "rate", "pruned"):
        return
    found = onnx.pack(str(forms(form)), places[1], onnx.Options(), said.append)  # which compares the logits itself
    assert found["exact"]
    assert any("have no bitmaps" in line or "has no bitmaps" in line for line in said) == loaded.sparse


ODD: list[Any] = [None, True, -1, 0, 3, 1e300, 10**30, "x", [], [1], {}, [10**15, 10**15], [300, -256], [300, "256"],
                  [300.0, 256.0], [True, 256]]  # fmt: skip


@pytest.mark.parametrize("form", ["coded rows", "rate", "low rank", "ternary", "blocks", "pruned"])
def test_a_config_that_lies_gets_one_sentence(form: str, forms: Any, tmp_path: Path) -> None:
    out = tmp_path / "m"
    shutil.copytree(forms(form), out)
    config = json.loads((out / "config.json").read_text())
    stated = config["quantization_config"]
    entry = next(iter((stated["tensors"] or stated["sparse"]).values()))
    sound = dict(entry)
    for key in (*sound, "rank", "coded", "kind", "more"):
        for odd in ODD:
            if (sound.get(key) == odd and type(sound.get(key)) is type(odd)) or (key, odd) == ("group", 10**30):
                continue  # it is what it was; or a group longer than a row, which is the row
            entry.clear()
            entry.update(sound | {key: odd})
            (out / "config.json").write_text(json.dumps(config))
            with pytest.raises(FolderError) as caught:
                folder.load(out)
            assert len(str(caught.value)) < 600
            assert "\n" not in str(caught.value)
            with suppress(FolderError):  # codes that are coded are not read for a listing
                folder.tensors(out)
                audit.audit(str(out), True)


def test_coded_streams_claim_no_more_than_a_model_could_hold(forms: Any, tmp_path: Path) -> None:
    """A stream of zeros inflates a thousandfold: honest for one tensor, a bomb for a model."""
    out, name, rows = tmp_path / "m", UP.format(0), 1 << 18
    shutil.copytree(forms("coded rows"), out)
    config = json.loads((out / "config.json").read_text())
    cols = 256
    config["intermediate_size"] = rows
    config["quantization_config"]["tensors"][name]["shape"] = [rows, cols]
    (out / "config.json").write_text(json.dumps(config))
    state = load_file(out / "model.safetensors")
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    stream = b"\0" + packer.compress(bytes(rows * cols)) + packer.flush()
    state[f"{name}:codes"] = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
    state[f"{name}:scales"] = torch.ones(rows, 1, dtype=torch.bfloat16)
    state[f"{name}:zeros"] = torch.from_numpy(entropy.encode(np.zeros((rows, 1), np.uint8)))
    save_file(state, out / "model.safetensors")
    for reader in (folder.load, folder.tensors):
        with pytest.raises(FolderError, match="do not belong together"):
            reader(out)
