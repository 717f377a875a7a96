"""GGUF files against gguf's own reader and arithmetic, and folder -> file -> folder."""

import json
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from shrew import folder
from shrew.__main__ import main
from shrew.blocks.attention import AttentionSpec
from shrew.blocks.linear import LinearSpec
from shrew.blocks.mlp import MlpSpec
from shrew.blocks.model import ModelSpec, build
from shrew.blocks.stock import adopt, stock
from shrew.blocks.window import WindowSpec
from shrew.errors import FolderError, UnsupportedError
from shrew.folder import Loaded, Packed
from shrew.folder.blocktypes import Levels
from shrew.folder.grids import Grid, Uniform
from shrew.folder.packed import to_rows
from shrew.moves import grids
from shrew.moves.quantize import quantizable
from shrew.packers.gguf import Options, back, blocks, tokens, write
from shrew.packers.gguf.architectures import for_config
from shrew.packers.gguf.common import Values

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import gguf_models
from gguf_models import CONFIGS, PLAIN, tiny


def quiet(line: str) -> None:
    raise AssertionError(f"said: {line}")


def put(model: Any, tokenizer: Any, out: Path, dtype: torch.dtype = torch.bfloat16, **packed: Packed) -> dict[str, Any]:
    said: list[str] = []
    return write(Loaded(model, tokenizer, dtype=dtype, packed=packed), out, Options(), said.append) | {"said": said}


def numbers(path: Path) -> dict[str, np.ndarray]:
    """Every tensor by gguf's own reader and arithmetic."""
    return {item.name: dequantize(item.data, item.tensor_type).reshape(item.shape[::-1])
            for item in GGUFReader(path).tensors}  # fmt: skip


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_comes_back_the_same(kind: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model, out = tiny(kind), tmp_path / "model.gguf"
    made = put(model, tiny_tokenizer, out)
    assert made["said"] == []
    file = numbers(out)
    assert sum(value.size for value in file.values()) >= sum(value.numel() for value in model.parameters())
    assert np.array_equal(file["token_embd.weight"], model.get_input_embeddings().weight.detach().numpy())
    listed = {item["name"]: item["type"] for item in made["tensors"]}
    assert listed == {item.name: item.tensor_type.name for item in GGUFReader(out).tensors}
    assert {kind for name, kind in listed.items() if name.endswith(("attn_v.weight", "ssm_out.weight"))} == {"BF16"}

    back.pack(str(out), tmp_path / "back", back.Options(), quiet)
    again = folder.load(tmp_path / "back")
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, again.model(input_ids=ids).logits)
    assert (again.dtype, set(again.stored.values())) in ((torch.bfloat16, set()), (torch.bfloat16, {torch.float32}))
    assert again.model.config.eos_token_id == 1


def test_a_llama_is_written_as_llama_cpp_wants_it(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Names, keys and the order of rotated rows, said by hand."""
    model, out = tiny("llama-yarn"), tmp_path / "model.gguf"
    tiny_tokenizer.chat_template = "{{ messages }}"
    try:
        put(model, tiny_tokenizer, out)
    finally:
        tiny_tokenizer.chat_template = None
    values, file = fields(out), numbers(out)
    said = {"general.architecture": "llama", "llama.block_count": 3, "llama.embedding_length": 64,
            "llama.context_length": 256, "llama.feed_forward_length": 96, "llama.attention.head_count": 4,
            "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 16, "llama.rope.freq_base": 5000.0,
            "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 64, "llama.vocab_size": 300, "general.file_type": 32,
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.padding_token_id": 2,
            "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": "{{ messages }}"}  # fmt: skip
    assert {key: values[key] for key in said} == said
    assert values["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    q = model.model.layers[1].self_attn.q_proj.weight.detach().numpy()
    halves = [row for head in range(4) for pair in range(8) for row in (16 * head + pair, 16 * head + 8 + pair)]
    assert np.array_equal(file["blk.1.attn_q.weight"], q[halves])
    assert np.array_equal(file["blk.2.ffn_down.weight"], model.model.layers[2].mlp.down_proj.weight.detach().numpy())
    assert np.array_equal(file["output.weight"], model.lm_head.weight.detach().numpy())
    assert values["tokenizer.ggml.tokens"][:3] == ["<bos>", "<eos>", "<pad>"]
    assert values["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]


def test_states_norms_and_experts_are_stored_as_llama_cpp_computes_them(tiny_tokenizer: Any, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    model = tiny("mamba2")
    put(model, tiny_tokenizer, out)
    file, mixer = numbers(out), model.backbone.layers[0].mixer
    assert np.array_equal(file["blk.0.ssm_a"], (-mixer.A_log.detach().exp()[:, None]).numpy())
    assert file["blk.0.ssm_conv1d.weight"].shape == (2 * 64 + 2 * 2 * 16, 4)
    assert file["blk.0.ssm_norm.weight"].shape == (2, 64)
    assert "output.weight" not in file
    model = tiny("gemma3")
    put(model, tiny_tokenizer, out)
    norm = model.model.layers[0].self_attn.q_norm.weight.detach()
    assert np.array_equal(numbers(out)["blk.0.attn_q_norm.weight"], (1 + norm).numpy())
    assert fields(out)["gemma3.attention.sliding_window_pattern"] == [True, False, True]
    model = tiny("olmoe")
    put(model, tiny_tokenizer, out)
    file, experts = numbers(out), model.model.layers[2].mlp.experts
    assert np.array_equal(file["blk.2.ffn_up_exps.weight"], experts.gate_up_proj.detach()[:, 96:].numpy())
    assert np.array_equal(file["output.weight"], file["token_embd.weight"])
    put(tiny("granite-hybrid"), tiny_tokenizer, out)
    assert fields(out)["granitehybrid.attention.head_count_kv"] == [0, 2, 0]
    put(tiny("lfm2"), tiny_tokenizer, out)
    assert fields(out)["lfm2.attention.head_count_kv"] == [0, 2, 0]


# --- packed weights ---------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    bits=st.integers(2, 8), group=st.sampled_from([0, 32, 64, 128]), symmetric=st.booleans(),
    cols=st.sampled_from([32, 96, 160, 256]), seed=st.integers(0, 99), small=st.sampled_from([1.0, 1e-3, 1e-9]),
)  # fmt: skip
def test_blocks_hold_the_chosen_values_or_are_refused(
    bits: int, group: int, symmetric: bool, cols: int, seed: int, small: float
) -> None:
    rows = torch.randn(6, cols, generator=torch.Generator().manual_seed(seed)) * small
    grid = Uniform(bits, group, symmetric)
    codes, steps = grids.nearest(rows, grid)
    kind, reason = blocks.choose(codes, steps, grid)
    assert (kind is None) == bool(reason)
    if small == 1e-9:
        assert "16-bit" in reason
        return
    # What must fit: symmetric grids always; others as levels one bit wider, up to 7 bits.
    assert kind is not None or (bits == 8 and not symmetric)
    if kind is None:
        return
    content = b"".join(blocks.encode(kind, codes, steps, grid))
    data = np.frombuffer(content, np.uint8).reshape(6, -1)
    packed = Packed(codes, steps, grid, (6, cols))
    assert np.array_equal(dequantize(data, kind), packed.dense().numpy())
    if symmetric:
        smallest = {2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 7: "Q8_0", 8: "Q8_0"}
        assert kind == GGMLQuantizationType[smallest[bits]] or bits > 4


def quantized(model: Any, grid: Grid) -> dict[str, Packed]:
    """Every matrix that the move of that name takes, rounded in place."""
    packed = {}
    for name, target in quantizable(model)[0].items():
        weight = target.weight
        item = Packed(*grids.nearest(to_rows(weight.detach(), False), grid), grid, tuple(weight.shape))
        packed[name] = item
        with torch.no_grad():
            weight.copy_(item.dense())
    return packed


@pytest.mark.parametrize("kind", ["llama", "qwen3-moe", "qwen3-next", "gemma3", "granite-hybrid", "lfm2", "olmoe"])
def test_packed_weights_are_blocks_of_the_same_values(kind: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model, out = tiny(kind), tmp_path / "model.gguf"
    packed = quantized(model, Uniform(4, 32))
    made = put(model, tiny_tokenizer, out, **packed)
    assert made["said"] == []
    types = {item["source"]: item["type"] for item in made["tensors"]}
    assert {types[name] for name in packed} == {"Q4_0"}
    assert fields(out)["general.file_type"] == 2

    back.pack(str(out), tmp_path / "back", back.Options(), quiet)
    again = folder.load(tmp_path / "back")
    assert again.packed.keys() == packed.keys()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, again.model.get_parameter(name)), name
    second = tmp_path / "second.gguf"
    write(again, second, Options(), quiet)
    first, second_data = numbers(out), numbers(second)
    assert first.keys() == second_data.keys()
    assert all(np.array_equal(first[name], second_data[name]) for name in first)


@pytest.mark.parametrize("kind", ["qwen3-moe", "granite-hybrid", "qwen3-next"])
@pytest.mark.parametrize("own", [False, True])
def test_super_blocks_follow_rows_that_are_split_and_turned(
    kind: str, own: bool, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Heads rotate, and gate and up of experts part, with the codes of scales and minima and their floats."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 3 if kind == "qwen3-next" else 2, "mamba_n_heads": 32}
    theirs = tiny(kind, **sizes | ({"layer_types": ["mamba", "attention"]} if kind == "granite-hybrid" else {}))
    model = adopt(theirs) if own else theirs
    packed = {}
    for number, (name, target) in enumerate(quantizable(model)[0].items()):
        rows = to_rows(target.weight.detach(), False)
        wide = (Levels("q2_k", 16), Levels("q4_k", 32), Levels("q3_k", 16))[number % 3]
        grid = wide if rows.shape[1] % 256 == 0 else Levels("iq4_nl", 32)
        packed[name] = Packed(*grids.nearest(rows, grid, search=False), grid, tuple(target.weight.shape))
        target.weight.data.copy_(packed[name].dense())
    made = put(model, tiny_tokenizer, tmp_path / "a.gguf", torch.float32, **packed)
    put(stock(model) if own else model, tiny_tokenizer, tmp_path / "dense.gguf", torch.float32)
    dense, blocky = numbers(tmp_path / "dense.gguf"), numbers(tmp_path / "a.gguf")
    assert dense.keys() == blocky.keys()
    assert all(np.array_equal(dense[name], blocky[name]) for name in dense)
    if not own:  # adapters may join rows of unlike grids
        assert made["said"] == []
    types = {item["type"] for item in made["tensors"]}
    assert {"Q2_K", "Q3_K", "Q4_K", "IQ4_NL"} <= types
    back.pack(str(tmp_path / "a.gguf"), tmp_path / "back", back.Options(), quiet)
    put_again = write(folder.load(tmp_path / "back"), tmp_path / "b.gguf", Options(), quiet)
    again = numbers(tmp_path / "b.gguf")
    assert all(np.array_equal(again[name], blocky[name]) for name in again)
    assert {item["name"]: item["type"] for item in put_again["tensors"] if "_K" in item["type"]} == {
        item["name"]: item["type"] for item in made["tensors"] if "_K" in item["type"]}  # fmt: skip


def test_what_no_block_holds_is_said_and_written_exactly(tiny_tokenizer: Any, tmp_path: Path) -> None:
    model, out = tiny("llama"), tmp_path / "model.gguf"
    packed = quantized(model, Uniform(4, 16))
    made = put(model, tiny_tokenizer, out, **packed)
    assert len(made["said"]) == 1 and made["notes"] == made["said"]
    assert "groups of 16 are no whole blocks of 32" in made["said"][0] and "--bits 4 --group 32" in made["said"][0]
    assert "model.embed_tokens.weight" in made["said"][0]
    down = model.model.layers[0].mlp.down_proj.weight.detach().numpy()
    assert np.array_equal(numbers(out)["blk.0.ffn_down.weight"], down)
    assert {item["type"] for item in made["tensors"]} <= {"F32", "F16", "BF16"}


def test_dense_weights_can_be_asked_for_in_another_type(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """--dense f16 where that is exact, f32 where it is not."""
    loaded = folder.load(tiny_llama_folder)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.copy_(parameter.bfloat16().half().float())
        loaded.model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e-12
    made = write(loaded, tmp_path / "a.gguf", Options(dense="f16"), quiet)
    types = {item["name"]: item["type"] for item in made["tensors"]}
    assert (types["blk.0.ffn_up.weight"], types["blk.1.ffn_up.weight"]) == ("F32", "F16")
    up = loaded.model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    assert np.array_equal(numbers(tmp_path / "a.gguf")["blk.0.ffn_up.weight"], up)


# --- our own models ---------------------------------------------------------------------------------------------------


OURS = ["llama", "qwen3", "gemma3", "lfm2", "granite-hybrid", "mamba2", "olmoe", "qwen3-moe", "qwen3-next", "mixtral"]


@pytest.mark.parametrize("kind", OURS)
def test_our_own_models_go_through_the_stock_type(kind: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """The same file as the stock model gives, packed or not."""
    theirs = tiny(kind)
    if kind == "gemma3":
        theirs.config.rope_parameters["full_attention"] = PLAIN
        theirs = type(theirs)(theirs.config).eval()
        for parameter in theirs.parameters():
            parameter.data = parameter.data.bfloat16().float()
    ours = adopt(theirs)
    theirs = stock(ours)
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    put(theirs, tiny_tokenizer, first)
    put(ours, tiny_tokenizer, second)
    assert first.read_bytes() == second.read_bytes()
    packed = quantized(ours, Uniform(4, 32))
    made = put(ours, tiny_tokenizer, second, **packed)
    put(stock(ours), tiny_tokenizer, first, torch.float32)
    dense, blocky = numbers(first), numbers(second)
    assert made["said"] == []
    assert all(np.array_equal(dense[name], blocky[name]) for name in dense)
    types = {item["type"] for item in made["tensors"] if item["name"].endswith(("ffn_up.weight", "ssm_out.weight"))}
    assert types <= {"Q4_0"}


def test_what_no_architecture_says_is_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    common: dict[str, Any] = {"layers": 2, "width": 64, "vocabulary": 300, "context": 64}
    window = ModelSpec(**common, mixers={"A": WindowSpec(heads=4, window=16)}, ffn=MlpSpec(hidden=96))
    with pytest.raises(UnsupportedError, match="mixes by window, with a feed-forward of kind mlp"):
        put(build(window), tiny_tokenizer, tmp_path / "a.gguf")
    capped = ModelSpec(**common, mixers={"A": AttentionSpec(heads=4)}, ffn=MlpSpec(hidden=96), softcap=5.0)
    with pytest.raises(UnsupportedError, match=r"architecture for this model: softcap = 5\.0\."):
        put(build(capped), tiny_tokenizer, tmp_path / "a.gguf")
    linear = ModelSpec(**common, mixers={"A": LinearSpec(heads=4)}, ffn=MlpSpec(hidden=96))
    with pytest.raises(UnsupportedError, match="linear"):
        put(build(linear), tiny_tokenizer, tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "changed", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act = silu, and this model has gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "type 'dynamic'"),
        ("mistral", {"sliding_window": 16}, "no sliding window"),
        ("qwen3-moe", {"norm_topk_prob": False}, "norm_topk_prob = True"),
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob = False"),
        ("gemma3", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar"),
        ("lfm2", {"conv_bias": True}, "conv_bias"),
        ("mamba2", {"use_bias": True}, "use_bias"),
        ("granite-hybrid", {"mamba_n_heads": 4, "mamba_expand": 1}, "twice the model's width"),
        ("llama", {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}, "rotates whole heads"),
        ("llama", {"max_position_embeddings": 2**50}, "no room for llama.context_length"),
        ("llama", {"rope_parameters": {**PLAIN, "rope_theta": 1e300}}, "no room for llama.rope.freq_base"),
        ("qwen3-next", {"linear_value_head_dim": 16}, "linear_value_head_dim"),
    ],
)
def test_a_config_that_llama_cpp_cannot_say_is_refused(
    kind: str, changed: dict[str, Any], words: str, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIGS, kind, (CONFIGS[kind][0], CONFIGS[kind][1] | changed))
    with pytest.raises(UnsupportedError, match=words):
        put(tiny(kind), tiny_tokenizer, tmp_path / "a.gguf")


def test_an_epsilon_of_zero_comes_back(tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGS, "llama", (CONFIGS["llama"][0], CONFIGS["llama"][1] | {"rms_norm_eps": 0.0}))
    put(tiny("llama"), tiny_tokenizer, tmp_path / "a.gguf")
    assert back.read(tmp_path / "a.gguf")[0].model.config.rms_norm_eps == 0


def test_other_models_are_refused(tiny_tokenizer: Any, tiny_classifier_folder: Path, tmp_path: Path) -> None:
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedError, match="type 'gpt2' are not written"):
        put(gpt2, tiny_tokenizer, tmp_path / "a.gguf")
    with pytest.raises(UnsupportedError, match="classifiers"):
        write(folder.load(tiny_classifier_folder), tmp_path / "a.gguf", Options(), quiet)


# --- tokenizers -------------------------------------------------------------------------------------------------------

WORDS = {name: (rules, bool(ignore)) for rules, pair in tokens.WORDS.items()
         for ignore, name in enumerate(pair) if name}  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_a_byte_level_tokenizer_comes_back(name: str, text: str) -> None:
    rules, ignore = WORDS[name]
    original = gguf_models.byte_level(rules, text, ignore_merges=ignore)
    original.chat_template = {"default": "{{ 1 }}", "tools": "{{ 2 }}"}
    values, notes = tokens.describe(original, 310, {})
    assert notes == []
    assert values["tokenizer.ggml.pre"] == name
    assert values["tokenizer.chat_template.tools"] == "{{ 2 }}"
    assert values["tokenizer.ggml.token_type"][:3] + values["tokenizer.ggml.token_type"][299:301] == [3, 3, 3, 4, 5]
    again = tokens.rebuild("file", values)
    assert again.chat_template == "{{ 1 }}"
    assert again.backend_tokenizer.get_vocab() == original.backend_tokenizer.get_vocab()

    @settings(max_examples=150)
    @given(st.text() | st.lists(st.sampled_from(["It's", " x", "  ", "\n", "12", "<tool>", "<eos>", "é"])).map("".join))
    def same(line: str) -> None:
        ids = original(line)["input_ids"]
        assert again(line)["input_ids"] == ids
        assert again.decode(ids) == original.decode(ids)

    same()


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer_comes_back(prefix: bool, text: str) -> None:
    original = gguf_models.sentencepiece(text, 700, prefix)
    values, notes = tokens.describe(original, 700, {})
    assert notes == []
    assert values["tokenizer.ggml.model"] == "llama"
    assert values["tokenizer.ggml.add_space_prefix"] is prefix
    assert (values["tokenizer.ggml.add_bos_token"], values["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert values["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    again = tokens.rebuild("file", values)

    @settings(max_examples=150)
    @given(st.text() | st.lists(st.sampled_from(["return", " self", "  ", "def ", "\n", "é", "😀"])).map("".join))
    def same(line: str) -> None:
        ids = original(line)["input_ids"]
        assert again(line)["input_ids"] == ids
        assert again.decode(ids) == original.decode(ids)

    same()


def test_tokenizers_that_llama_cpp_would_cut_otherwise_are_refused(text: str) -> None:
    def refused(words: str, change: Any, size: int = 310, **made: Any) -> None:
        tokenizer = gguf_models.byte_level((tokens.GPT2,), text, **made)
        stated = json.loads(tokenizer.backend_tokenizer.to_str())
        change(stated)
        core = type(tokenizer.backend_tokenizer).from_str(json.dumps(stated))
        with pytest.raises(UnsupportedError, match=words):
            tokens.describe(type(tokenizer)(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>"), size, {})

    refused("needs a row for each token", lambda stated: None, size=200)
    refused("adds a space", lambda stated: stated["pre_tokenizer"].update(add_prefix_space=True))
    refused("cuts text by", lambda stated: stated.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Punctuation", "behavior": "Isolated"}, stated["pre_tokenizer"]]}))  # fmt: skip
    refused("normalise text by Lowercase", lambda stated: stated.update(normalizer={"type": "Lowercase"}))
    refused("byte_fallback", lambda stated: stated.update(pre_tokenizer=None))
    refused("puts other tokens around", lambda stated: stated.update(post_processor={
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<pad>", "type_id": 0}},
                                                 {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
        "special_tokens": {"<pad>": {"id": "<pad>", "ids": [2], "tokens": ["<pad>"]}}}))  # fmt: skip

    def unreached(stated: dict[str, Any]) -> None:
        stated["model"]["ignore_merges"] = True
        stated["model"]["merges"].pop()

    refused("take whole words first", unreached)

    tokenizer = gguf_models.sentencepiece(text, 700)
    stated = json.loads(tokenizer.backend_tokenizer.to_str())
    stated["model"]["merges"].pop(3)
    core = type(tokenizer.backend_tokenizer).from_str(json.dumps(stated))
    with pytest.raises(UnsupportedError, match="follow no scores"):
        tokens.describe(type(tokenizer)(tokenizer_object=core), 700, {})


def test_what_llama_cpp_does_otherwise_is_noted(text: str) -> None:
    tokenizer = gguf_models.byte_level((tokens.QWEN2,), text)
    stated = json.loads(tokenizer.backend_tokenizer.to_str()) | {"normalizer": {"type": "NFC"}}
    stated["added_tokens"][-1]["lstrip"] = True
    core = type(tokenizer.backend_tokenizer).from_str(json.dumps(stated))
    notes = tokens.describe(type(tokenizer)(tokenizer_object=core), 300, {})[1]
    assert [words in note for words, note in zip(("NFC", "end-of-text", "strip"), notes, strict=True)] == [True] * 3


# --- hostile files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("sound") / "model.gguf"
    put(tiny("llama"), tiny_tokenizer, out)
    return out.read_bytes()


def refused(content: bytes, place: Path) -> str:
    """The sentence with which a file is refused."""
    file = place / "bad.gguf"
    file.write_bytes(content)
    with pytest.raises(FolderError) as caught:
        back.read(file)
    assert str(file) in str(caught.value)
    return str(caught.value)


def changed(content: bytes, at: int, code: str, *values: int) -> bytes:
    return content[:at] + struct.pack("<" + code, *values) + content[at + struct.calcsize("<" + code) :]


def test_hostile_headers_are_refused_in_a_sentence(sound: bytes, tmp_path: Path) -> None:
    assert "is no GGUF file" in refused(b"GGML" + sound[4:], tmp_path)
    assert "is no GGUF file" in refused(b"", tmp_path)
    assert "truncated" in refused(sound[:12], tmp_path)
    assert "truncated" in refused(sound[:-4000], tmp_path)
    assert "big-endian" in refused(sound[:4] + sound[4:8][::-1] + sound[8:], tmp_path)
    assert "version 9" in refused(changed(sound, 4, "I", 9), tmp_path)
    assert "claims 1152921504606846976 tensors" in refused(changed(sound, 8, "Q", 2**60), tmp_path)
    assert "claims 1152921504606846976 values" in refused(changed(sound, 16, "Q", 2**60), tmp_path)
    assert "truncated" in refused(changed(sound, 24, "Q", 2**60), tmp_path)  # the length of the first name
    tokens_at = sound.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 4
    assert "claims 1152921504606846976 items" in refused(changed(sound, tokens_at + 4, "Q", 2**60), tmp_path)
    assert "list of lists" in refused(changed(sound, tokens_at, "I", 9), tmp_path)
    types_at = sound.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 4
    assert "truncated" in refused(changed(sound, types_at + 4, "Q", 2**61), tmp_path)
    assert "unknown type 77" in refused(changed(sound, tokens_at - 4, "I", 77), tmp_path)
    entry = sound.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight")
    assert "77 dimensions" in refused(changed(sound, entry, "I", 77), tmp_path)
    assert "unknown type 77" in refused(changed(sound, entry + 20, "I", 77), tmp_path)
    assert "cannot be Q4_K" in refused(changed(sound, entry + 20, "I", 12), tmp_path)
    assert "off the alignment" in refused(changed(sound, entry + 24, "Q", 7), tmp_path)
    assert "truncated" in refused(changed(sound, entry + 24, "Q", 2**40), tmp_path)
    assert "begins inside another" in refused(changed(sound, entry + 24, "Q", 0), tmp_path)
    assert "truncated" in refused(changed(sound, entry + 4, "QQ", 2**31, 2**31), tmp_path)
    assert "has the shape [64, 96]" in refused(changed(sound, entry + 4, "QQ", 96, 64), tmp_path)
    assert "lacks tensor 'blk.0.ffn_up.weight'" in refused(sound.replace(b"blk.0.ffn_up", b"blk.9.ffn_up"), tmp_path)
    assert "architecture 'llamx'" in refused(sound.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0llamx"),
                                             tmp_path)  # fmt: skip
    layers = sound.index(b"llama.block_count") + len(b"llama.block_count") + 4
    assert "asks for 2000000000 layers" in refused(changed(sound, layers, "I", 2_000_000_000), tmp_path)
    width = sound.index(b"llama.embedding_length") + len(b"llama.embedding_length") + 4
    assert "do not belong together" in refused(changed(sound, width, "I", 2**30), tmp_path)
    value = sound.index(b"llama.attention.value_length")
    assert "Shrew does not read" in refused(sound.replace(b"llama.vocab_size", b"llama.rope_scale"), tmp_path)
    assert "widths" in refused(changed(sound, value + len(b"llama.attention.value_length") + 4, "I", 8), tmp_path)
    rotated = sound.index(b"llama.rope.dimension_count") + len(b"llama.rope.dimension_count") + 4
    assert "Shrew reads only 16 there" in refused(changed(sound, rotated, "I", 8), tmp_path)
    assert "by the rule 'gpt-9'" in refused(sound.replace(b"gpt-2", b"gpt-9"), tmp_path)
    weights = len(sound) - 64
    assert "NaN or infinite" in refused(sound[:weights] + b"\xff" * 64, tmp_path)


@settings(max_examples=150)
@given(data=st.data())
def test_damage_anywhere_in_the_header_gives_a_sentence_or_a_model(
    sound: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    header = sound.index(b"blk.2.ffn_down.weight")
    damaged = bytearray(sound)
    for at in data.draw(st.lists(st.integers(4, header), min_size=1, max_size=3)):
        damaged[at] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "damaged.gguf"
    file.write_bytes(bytes(damaged[: data.draw(st.sampled_from([len(sound), len(sound) // 2, header]))]))
    try:
        back.read(file)
    except FolderError as error:
        assert str(error).endswith(".") and "\n" not in str(error)


def test_a_hostile_file_takes_no_memory(sound: bytes, tmp_path: Path) -> None:
    """A model of 2^30 channels is refused by a process that may not have 2^32 bytes more."""
    width = sound.index(b"llama.embedding_length") + len(b"llama.embedding_length") + 4
    (tmp_path / "bad.gguf").write_bytes(changed(sound, width, "I", 2**30))
    script = ("import resource, sys, pathlib\nfrom shrew.packers.gguf import back\n"
              "size = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
              "resource.setrlimit(resource.RLIMIT_AS, (size + 2**30, size + 2**30))\n"
              "back.read(pathlib.Path(sys.argv[1]))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "bad.gguf")], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert "FolderError" in done.stderr and "do not belong together" in done.stderr


@pytest.mark.parametrize(
    ("key", "value"),
    [("token_type", ["a", "b", "c"]), ("token_type", 5), ("token_type", np.full(3, np.nan, np.float32)),
     ("scores", 5), ("scores", ["a", "b", "c"]), ("pre", ["gpt-2"]), ("pre", np.array([1, 2])),
     ("add_bos_token", np.array([1, 2])), ("add_eos_token", "yes"), ("add_space_prefix", np.array([1, 2]))],
)  # fmt: skip
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_settings_of_a_tokenizer_of_another_type_are_refused(model: str, key: str, value: Any) -> None:
    sound = {"model": model, "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"],
             "scores": np.zeros(3, np.float32)}  # fmt: skip
    tokens.rebuild("x.gguf", {tokens.PREFIX + name: item for name, item in sound.items()})
    with pytest.raises(FolderError, match=f"'tokenizer.ggml.{key}' that is no"):
        tokens.rebuild("x.gguf", {tokens.PREFIX + name: item for name, item in {**sound, key: value}.items()})


def test_lists_where_one_value_should_be_are_refused(sound: bytes, tmp_path: Path) -> None:
    """The name of the architecture, or the number of parts, as a list of two numbers."""

    def listed(count: int) -> bytes:  # so many that the tensors stay aligned
        return struct.pack("<IIQ", 9, 0, count) + bytes(count)

    name = struct.pack("<Q", len("general.architecture")) + b"general.architecture"
    at = sound.index(name) + len(name)
    bad = sound[:at] + listed(33) + sound[at + 4 + 8 + len("llama") :]
    assert "holds a model of the architecture" in refused(bad, tmp_path)
    split = struct.pack("<Q", len("split.count")) + b"split.count"
    more = changed(sound, 16, "Q", struct.unpack_from("<Q", sound, 16)[0] + 1)
    assert "one part of a split model" in refused(more[:24] + split + listed(29) + more[24:], tmp_path)


@pytest.mark.parametrize("kind", CONFIGS)
def test_layers_are_counted_before_anything_is_made_for_them(kind: str) -> None:
    config = tiny(kind).config
    architecture = for_config(config)
    values = architecture.values(config) | {"block_count": 3_000_000, "tied": False}
    values = {key: value for key, value in values.items() if not isinstance(value, list)}
    tracemalloc.start()
    try:
        with pytest.raises(FolderError, match="asks for 3000000 layers"):
            architecture.config(Values("x.gguf", values | {"attention.head_count_kv": 1}, {}))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_packs_and_reads_back(
    tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, again = tmp_path / "model.gguf", tmp_path / "again"
    assert main(["pack", str(tiny_llama_folder), "--to", "gguf", "--out", str(out), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["architecture"], made["bytes"]) == ("llama", out.stat().st_size)
    assert {"name": "blk.0.attn_norm.weight", "source": "model.layers.0.input_layernorm.weight", "type": "F32",
            "shape": [64], "bytes": 256} in made["tensors"]  # fmt: skip
    assert main(["pack", str(out), "--to", "folder", "--out", str(again)]) == 0
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        first, second = (folder.load(path).model(input_ids=ids).logits for path in (tiny_llama_folder, again))
    assert torch.equal(first, second)
    lineage = json.loads((again / "shrew.json").read_text("utf-8"))
    assert lineage["parent"]["name"] == "model.gguf"
