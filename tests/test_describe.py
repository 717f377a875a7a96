"""`shrew describe`: what it counts against models that really exist, what it likens them to, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, Qwen3Config

from shrew import errors, folder, spec
from shrew.__main__ import main
from shrew.blocks import describe
from shrew.blocks.attention import AttentionSpec
from shrew.blocks.mlp import MlpSpec
from shrew.blocks.model import ModelSpec, build
from shrew.folder import Loaded
from shrew.moves.context import Context
from shrew.moves.quantize import Quantize

ROOT = Path(__file__).parents[1]
MIXED = ModelSpec(pattern="AAB", layers=7, width=160, vocabulary=300, context=64, tied=False,
                  mixers={"A": AttentionSpec(heads=4, kv_heads=1), "B": AttentionSpec(heads=2, head_width=14)},
                  ffn=MlpSpec(hidden=72))  # fmt: skip
SMOL = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                   num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)  # fmt: skip
ARMS = ("dense", "moe", "hybrid", "conv-hybrid")
RECIPE = """
[train]
data = ["a.txt"]
out = "a"
tokenizer = "bpe:512"
[model]
pattern = "AB"
layers = 3
width = 32
[model.mixers.A]
heads = 2
[model.mixers.B]
heads = 1
"""


def _described(path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main(["describe", str(path), "--json", *flags]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


# --- what it counts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_it_counts_what_a_built_model_has(tied: bool) -> None:
    item = replace(MIXED, tied=tied)
    model, found = build(item), describe.describe(item, (8, 100))
    total = sum(weight.numel() for weight in model.parameters())
    table = 300 * 160
    assert found["parameters"] == {"total": total, "active": total - (not tied) * table,
                                   "body": total - table * (2 - tied)}  # fmt: skip
    layers: list[Any] = list(model.model.layers)
    assert [line["parameters"] for line in found["layers"]] == [sum(p.numel() for p in x.parameters()) for x in layers]
    assert "".join(line["letter"] for line in found["layers"]) == "AABAABA"
    assert found["layers"][2]["mixer"]["head_width"] == 14
    assert [line["flops"] for line in found["sequence"]] == [model.flops(8), model.flops(100)]
    cache = model(torch.zeros(1, 8, dtype=torch.long), use_cache=True).past_key_values
    held = sum(state.keys.nbytes + state.values.nbytes for state in cache.layers)
    assert found["sequence"][0]["state_bytes"] == held // 2  # the model is float32
    assert found["bytes"]["bf16"] == 2 * total


def test_idle_parameters_are_not_active(monkeypatch: pytest.MonkeyPatch) -> None:
    from shrew.blocks.mlp import Mlp

    before = describe.describe(MIXED)["parameters"]
    monkeypatch.setattr(Mlp, "idle", lambda self: 1000)
    after = describe.describe(MIXED)
    assert after["parameters"] == {"total": before["total"], "active": before["active"] - 7000,
                                   "body": before["body"] - 7000}  # fmt: skip
    assert [line["idle"] for line in after["layers"]] == [1000] * 7


@pytest.mark.parametrize("tied", [False, True])
def test_four_bits_are_what_quantize_stores(tied: bool, tiny_tokenizer: Any, tmp_path: Path) -> None:
    item = replace(MIXED, tied=tied)
    loaded = Loaded(build(item), tiny_tokenizer, dtype=torch.bfloat16)
    move = Quantize(bits=describe.BITS, group=describe.GROUP, method="rtn", embeddings=True)
    context = Context([], [], None, 0, tmp_path / "cache", lambda text: None)
    folder.save(move.apply(loaded, context), tmp_path / "out")
    stored = {entry.name: entry.bytes for entry in folder.tensors(tmp_path / "out")}
    assert describe.describe(item)["bytes"]["int4"] == sum(stored.values())


def test_seven_billion_parameters_take_no_memory() -> None:
    item = ModelSpec(layers=32, width=4096, vocabulary=32000, tied=False, mixers={"A": AttentionSpec(heads=32)},
                     ffn=MlpSpec(hidden=11008))  # fmt: skip
    assert {weight.device.type for weight in describe.shell(item).parameters()} == {"meta"}
    found = describe.describe(item)
    assert found["parameters"]["total"] == 6_738_415_616
    assert found["nearest"] == {"name": "Llama-2-7B", "differs": []}


# --- what it is like -------------------------------------------------------------------------------------------------


def _like(mixers: str, ffns: str, width: int, total: int) -> str:
    kinds = {"A": "attention", "C": "conv", "L": "linear", "D": "delta", "M": "memory", "m": "mlp", "e": "moe",
             "n": "none"}  # fmt: skip
    pairs = zip(mixers, ffns, strict=True)
    blocks = [(SimpleNamespace(kind=kinds[mixer]), SimpleNamespace(kind=kinds[ffn])) for mixer, ffn in pairs]
    found = describe.nearest_model(blocks, width, total)
    return f"{found['name']}: {', '.join(found['differs'])}"


def test_the_mix_of_blocks_decides_and_then_the_size() -> None:
    assert _like("CCACCACA", "mmmmmmmm", 1024, 180_000_000) == (
        "LFM2-350M: 8 layers instead of 16, 180 M parameters instead of 354 M"
    )
    assert _like("CCCACCCA", "mmmmmmmm", 256, 7_000_000) == (
        "LFM2-350M: 8 layers instead of 16, 6 conv and 2 attention instead of 10 conv and 6 attention, "
        "width 256 instead of 1,024, 7 M parameters instead of 354 M"
    )
    assert _like("DDDADDDA", "eeeeeeee", 256, 7_000_000).startswith("Qwen3-Next-80B-A3B: 8 layers")
    assert _like("LLMLLLLLLLML", "memememememe", 512, 193_000_000).startswith("White-Basilisk: 193 M")
    assert _like("LLLLLL", "nnnnnn", 256, 7_000_000).startswith("Mamba2-130m: 6 layers")
    assert _like("L" * 64, "n" * 64, 2560, 2_700_000_000) == "Mamba2-2.7b: "
    assert _like("AAAAAA", "eeeeee", 256, 7_000_000).startswith("OLMoE-1B-7B: 6 layers")


def test_every_known_model_has_as_many_ffns_as_mixers() -> None:
    assert [known.name for known in describe.KNOWN if sum(known.mixers.values()) != sum(known.ffns.values())] == []
    assert len({known.name for known in describe.KNOWN}) == len(describe.KNOWN)


# --- recipes and folders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [path for path in sorted((ROOT / "recipes").rglob("*.toml")) if "[model]" in path.read_text("utf-8")],
    ids=lambda path: path.stem,
)
def test_every_recipe_can_be_described(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _described(path, capsys)["parameters"]["total"] > 0


@pytest.mark.parametrize("size", ["1m", "3m", "7m"])
def test_the_arms_of_a_contest_are_of_one_size_and_trained_alike(size: str) -> None:
    paths = {arm: ROOT / "recipes" / "contest" / f"{arm}-{size}.toml" for arm in ARMS}
    train = [{**spec.read_toml(path)["train"], "out": ""} for path in paths.values()]
    assert train == [train[0]] * len(ARMS)
    models = {arm: describe.shell(describe.read(path)) for arm, path in paths.items()}
    body = {arm: describe.parameters(model).body for arm, model in models.items()}
    assert all(abs(count / body["dense"] - 1) < 0.03 for count in body.values()), body
    assert abs(body["dense"] / int(size[0]) / 1e6 - 1) < 0.03


def test_a_recipe_as_a_table_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.toml"
    path.write_text(RECIPE)
    found = _described(path, capsys, "--sequence", "1k", "--sequence", "64", "--sequence", "2m")
    assert (found["model"], found["spec"]["vocabulary"]) == (str(path), 512)
    assert [line["tokens"] for line in found["sequence"]] == [1024, 64, 2 * 1024**2]
    path.write_text(RECIPE + "[model.ffn]\nhidden = 40\n")
    assert main(["describe", "--sequence", "1k", "--sequence", "4k", str(path)]) == 0
    told = capsys.readouterr().out
    assert "3 layers of width 32, 512 tokens, context 1,024\n" in told
    assert "1      B  attention, heads 1  mlp, hidden 40" in told
    assert "1,024 tokens  " in told
    assert "4,096 tokens *" in told
    assert "like stories260K, with 3 layers instead of 5, width 32 instead of 64 and " in told


def test_a_vocabulary_of_the_model_goes_before_the_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(RECIPE.replace("layers", "vocabulary = 700\nlayers"))
    assert describe.read(path).vocabulary == 700


def test_folders_of_stock_types_and_of_our_own(
    tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _described(tiny_llama_folder, capsys)
    assert found["parameters"]["total"] == sum(
        weight.numel() for weight in folder.load(tiny_llama_folder).model.parameters()
    )
    SMOL.save_pretrained(tmp_path / "smol")  # a config.json is enough
    assert _described(tmp_path / "smol", capsys)["nearest"] == {"name": "SmolLM2-135M", "differs": []}
    Qwen3Config(num_hidden_layers=2).save_pretrained(tmp_path / "qwen")
    assert _described(tmp_path / "qwen", capsys)["layers"][1]["mixer"]["qk_norm"]
    folder.save(Loaded(build(MIXED), tiny_tokenizer), tmp_path / "own")
    own = _described(tmp_path / "own", capsys)
    assert own == {"model": str(tmp_path / "own"), **describe.describe(MIXED)}


# --- what it refuses -------------------------------------------------------------------------------------------------


FRONT = RECIPE.replace("bpe:512", "bytes") + "[model.front]\nkind = 'patches'\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[model]\nlayers = 2", 'add vocabulary = 4096 (or what it is) to [model], or tokenizer = "bpe:4096" to'),
        (RECIPE.replace("bpe:512", "tokenizers/mine"), "nothing says how many tokens there are"),
        (RECIPE.replace("layers", "layer"), "model: unknown key 'layer'; did you mean 'layers'?"),
        (RECIPE.replace('"AB"', '"AX"'), "no mixer 'X'"),
        (RECIPE.replace("heads = 2", "heads = 3"), "width 32 is no multiple of 3 heads"),
        (RECIPE.replace("model", "modle"), "there is no table [model] in it, only train, modle; add it"),
        ("[train]\nout = 'x'", "only train; add it, or give a model folder."),
        ("[model", "is no readable TOML"),
        (RECIPE.replace("bpe:512", "bpe:100"), "bytes and marks are 257 tokens already"),
        (RECIPE.replace("width = 32", "width = 1000000000"), "width"),
        (RECIPE.replace("[model]", "[model]\nloops = 1000000000"), "loops make 3000000000 layers"),
        (RECIPE.replace("[model]", "[model]\nvocabulary = 10000000000000000"), "vocabulary"),
        (RECIPE + "[model.ffn]\nactivation = 'gelo'", "activation: 'gelo' is none of"),
        (FRONT + "hashes = { sizes = [] }", "names no length"),
        (FRONT + "hashes = { sizes = [3, 3] }", "two equal"),
        ("model = 3", "there is no table [model]"),
    ],
)
def test_a_recipe_that_is_wrong(text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text)
    assert main(["describe", str(path)]) == 2
    told = capsys.readouterr()
    assert words in told.err
    assert (told.out, told.err.count("\n")) == ("", 1)


def test_a_folder_that_is_wrong(tmp_path: Path, tiny_classifier_folder: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(errors.UsageError) as caught:
            describe.read(path)
        return str(caught.value)

    assert "no recipe and no model folder" in refused(tmp_path / "nowhere")
    assert "is no model folder: there is no config.json" in refused(tmp_path)
    assert "holds a DistilBertForSequenceClassification" in refused(tiny_classifier_folder)
    for text, words in (("{", "no readable JSON"), ("[]", "no model that"), ('{"model_type": "x1"}', "no model that"),
                        ('{"model_type": "shrew", "spec": {"layer": 2}}', "unknown key 'layer'")):  # fmt: skip
        (tmp_path / "config.json").write_text(text)
        assert words in refused(tmp_path)
    GPT2Config().save_pretrained(tmp_path)
    assert "gpt2: this model cannot be said in our blocks; known: llama, " in refused(tmp_path)
    replaced = LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    replaced.save_pretrained(tmp_path)
    assert "llama: this model cannot be said" in refused(tmp_path)
    LlamaConfig(attention_bias=True).save_pretrained(tmp_path)
    assert "biases" in refused(tmp_path)


@pytest.mark.parametrize("length", ["0", "-1", "8q", "1.5k", "many"])
def test_a_length_that_is_none(length: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", str(ROOT / "recipes" / "starter.toml"), "--sequence", length]) == 2
    assert "--sequence" in capsys.readouterr().err
