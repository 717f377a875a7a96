"""GGUF files against gguf's own reader and arithmetic, and folder -> file -> folder."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from shrew import folder
from shrew.__main__ import main
from shrew.blocks.attention import AttentionSpec
from shrew.blocks.linear import LinearSpec
from shrew.blocks.mlp import MlpSpec
from shrew.blocks.model import ModelSpec, build
from shrew.blocks.stock import adopt, stock
from shrew.blocks.window import WindowSpec
from shrew.errors import FolderError, UnsupportedError, UsageError
from shrew.folder import Loaded, Packed
from shrew.folder.packed import Grid, to_rows
from shrew.moves import grids
from shrew.packers.gguf import Options, back, blocks, tokens, write
from shrew.packers.gguf.header import read_header

SIZES: dict[str, Any] = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
                         "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 256,
                         "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
                         "initializer_range": 0.1}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 5000.0}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_state": 16,
                         "mamba_n_groups": 2, "mamba_d_conv": 4}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rope_parameters": PLAIN, "tie_word_embeddings": True}),
    "llama-wide": ("LlamaConfig", {"rope_parameters": PLAIN, "head_dim": 32, "attention_bias": True, "mlp_bias": True}),
    "llama-yarn": ("LlamaConfig", {"rope_parameters": YARN}),
    "llama-3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama-linear": ("LlamaConfig", {"rope_parameters": {**PLAIN, "rope_type": "linear", "factor": 2.0}}),
    "mistral": ("MistralConfig", {"rope_parameters": PLAIN, "sliding_window": None}),
    "mixtral": ("MixtralConfig", {"rope_parameters": PLAIN, "num_local_experts": 4, "num_experts_per_tok": 2,
                                  "sliding_window": None}),
    "qwen2": ("Qwen2Config", {"rope_parameters": PLAIN}),
    "qwen3": ("Qwen3Config", {"rope_parameters": PLAIN, "head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-yarn": ("Qwen3Config", {"rope_parameters": YARN, "head_dim": 16}),
    "qwen3-moe": ("Qwen3MoeConfig", {"rope_parameters": PLAIN, "head_dim": 16, **MOE}),
    "qwen3-next": ("Qwen3NextConfig", {
        "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}, "head_dim": 32, **MOE,
        "shared_expert_intermediate_size": 64, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"]}),
    "gemma3": ("Gemma3TextConfig", {
        "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "final_logit_softcapping": 30.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {"full_attention": {**PLAIN, "rope_type": "linear", "factor": 2.0},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}}),
    "lfm2": ("Lfm2Config", {"rope_parameters": PLAIN, "layer_types": ["conv", "full_attention", "conv"],
                            "block_multiple_of": 16}),
    "olmoe": ("OlmoeConfig", {"rope_parameters": PLAIN, "num_experts": 4, "num_experts_per_tok": 2,
                              "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "mamba2": ("Mamba2Config", {"num_heads": 8, "head_dim": 16, "expand": 2, "state_size": 16, "n_groups": 2,
                                "tie_word_embeddings": True}),
    "mamba2-no-bias": ("Mamba2Config", {"num_heads": 8, "head_dim": 16, "expand": 2, "state_size": 16, "n_groups": 1,
                                        "use_conv_bias": False, "tie_word_embeddings": False}),
    "granite-hybrid": ("GraniteMoeHybridConfig", {
        **MAMBA, "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 0, "num_experts_per_tok": 0,
        "shared_intermediate_size": 96, "position_embedding_type": None, "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 2.0}),
    "granite": ("GraniteMoeHybridConfig", {
        **MAMBA, "layer_types": ["attention"] * 3, "num_local_experts": 0, "num_experts_per_tok": 0,
        "shared_intermediate_size": 96, "position_embedding_type": "rope", "rope_parameters": PLAIN,
        "attention_multiplier": 0.25, "logits_scaling": 4.0}),
}  # fmt: skip


def tiny(kind: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Any:
    """A random model of a kind of CONFIGS whose weights `dtype` holds, every norm, bias and decay moved off its start."""
    name, more = CONFIGS[kind]
    common = {key: value for key, value in SIZES.items() if name != "Mamba2Config" or "heads" not in key}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**common | more), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or parameter.shape[1] == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            parameter.copy_(parameter.to(dtype).float())
    return model.eval()


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


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8), group=st.sampled_from([0, 32, 64, 128]), symmetric=st.booleans(),
    cols=st.sampled_from([32, 96, 160, 256]), seed=st.integers(0, 99), small=st.sampled_from([1.0, 1e-3, 1e-9]),
)  # fmt: skip
def test_blocks_hold_the_chosen_values_or_are_refused(
    bits: int, group: int, symmetric: bool, cols: int, seed: int, small: float
) -> None:
    rows = torch.randn(6, cols, generator=torch.Generator().manual_seed(seed)) * small
    grid = Grid(bits, group, symmetric)
    codes, scales, zeros = grids.nearest(rows, grid)
    kind, reason = blocks.choose(codes, scales, zeros, grid)
    assert (kind is None) == bool(reason)
    if small == 1e-9:
        assert "16-bit" in reason
        return
    # What must fit: symmetric grids always; others as levels one bit wider, up to 7 bits.
    assert kind is not None or (bits == 8 and not symmetric)
    if kind is None:
        return
    content = b"".join(blocks.encode(kind, codes, scales, zeros, grid))
    data = np.frombuffer(content, np.uint8).reshape(6, -1)
    packed = Packed(codes, scales, zeros, grid, (6, cols))
    assert np.array_equal(dequantize(data, kind), packed.dense().numpy())
    if symmetric:
        smallest = {2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 7: "Q8_0", 8: "Q8_0"}
        assert kind == GGMLQuantizationType[smallest[bits]] or bits > 4


def quantized(model: Any, grid: Grid) -> dict[str, Packed]:
    """Every matrix of a model but routers and convolutions, rounded in place."""
    packed = {}
    for name, weight in model.named_parameters():
        if weight.ndim < 2 or "conv" in name or "mlp.gate." in name or "shared_expert_gate" in name:
            continue
        item = Packed(*grids.nearest(to_rows(weight.detach(), False), grid), grid, tuple(weight.shape))
        packed[name] = item
        with torch.no_grad():
            weight.copy_(item.dense())
    return packed


@pytest.mark.parametrize("kind", ["llama", "qwen3-moe", "qwen3-next", "gemma3", "granite-hybrid", "lfm2", "olmoe"])
def test_packed_weights_are_blocks_of_the_same_values(kind: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model, out = tiny(kind), tmp_path / "model.gguf"
    packed = quantized(model, Grid(4, 32))
    made = put(model, tiny_tokenizer, out, **packed)
    assert made["said"] == []
    types = {item["source"]: item["type"] for item in made["tensors"]}
    assert {types[name] for name in packed} == {"Q4_0"}
    assert fields(out)["general.file_type"] == 2
    back.pack(str(out), tmp_path / "back", back.Options(), quiet)
    again = folder.load(tmp_path / "back").model
    for name, weight in model.named_parameters():
        assert torch.equal(weight, again.get_parameter(name)), name


def test_what_no_block_holds_is_said_and_written_exactly(tiny_tokenizer: Any, tmp_path: Path) -> None:
    model, out = tiny("llama"), tmp_path / "model.gguf"
    packed = quantized(model, Grid(4, 16))
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


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "lfm2", "granite-hybrid", "mamba2", "olmoe", "qwen3-next"])
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
    packed = quantized(ours, Grid(4, 32))
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
        ("qwen3-next", {"linear_value_head_dim": 16}, "linear_value_head_dim"),
    ],
)
def test_a_config_that_llama_cpp_cannot_say_is_refused(
    kind: str, changed: dict[str, Any], words: str, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIGS, kind, (CONFIGS[kind][0], CONFIGS[kind][1] | changed))
    with pytest.raises(UnsupportedError, match=words):
        put(tiny(kind), tiny_tokenizer, tmp_path / "a.gguf")


def test_other_models_are_refused(tiny_tokenizer: Any, tiny_classifier_folder: Path, tmp_path: Path) -> None:
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedError, match="type 'gpt2' are not written"):
        put(gpt2, tiny_tokenizer, tmp_path / "a.gguf")
    with pytest.raises(UnsupportedError, match="classifiers"):
        write(folder.load(tiny_classifier_folder), tmp_path / "a.gguf", Options(), quiet)
