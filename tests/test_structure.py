"""Cutting layers, channels and heads out of other people's architectures; plain transformers is the oracle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from shrew import spec
from shrew.errors import DataError, SpecError, UnsupportedError
from shrew.folder import Loaded
from shrew.moves.anatomy import Mlp, read_anatomy
from shrew.moves.context import Context
from shrew.moves.drop_layers import DropLayers, layer_scores
from shrew.moves.narrow import Narrow, channel_scores

LAYERS = 3
BASE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "initializer_range": 0.3, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
WIDE = BASE | {"intermediate_size": 64}
GROUPED = WIDE | {"num_key_value_heads": 2}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
MOE = {"num_experts": 4, "num_experts_per_tok": 2}
DISTIL = {"vocab_size": 64, "dim": 32, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 64, "initializer_range": 0.3,
              "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
MODERN = WIDE | {"local_attention": 8, "cls_token_id": 1, "sep_token_id": 2, "mlp_bias": True, "layer_types": MIXED}

CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", GROUPED | {"sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", GROUPED | {"head_dim": 16, "sliding_window": 8, "layer_types": MIXED}),
    "phi3": ("Phi3Config", GROUPED),
    "olmoe": ("OlmoeConfig", GROUPED | MOE),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        GROUPED | MOE | {"head_dim": 8, "moe_intermediate_size": 32, "mlp_only_layers": [1]},
    ),
    "gpt2": ("GPT2Config", BASE),
    "gpt_neox": ("GPTNeoXConfig", WIDE),
    "opt": ("OPTConfig", BASE | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
}
CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "modernbert": ("ModernBertConfig", MODERN),
    "bert": ("BertConfig", WIDE),
    "distilbert": ("DistilBertConfig", DISTIL),
    "gpt2-labels": ("GPT2Config", {key: value for key, value in BASE.items() if key != "pad_token_id"}),
}
ALL = [*CAUSAL, *CLASSIFIERS]
HEADS = ["llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "qwen3_moe"]


def make(kind: str, **changes: Any) -> Loaded:
    """A tiny model of random weights, biases included, in which every layer matters."""
    torch.manual_seed(1)
    config_class, settings = (CAUSAL | CLASSIFIERS)[kind]
    config = getattr(transformers, config_class)(**(settings | changes))
    model = (AutoModelForSequenceClassification if kind in CLASSIFIERS else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for module in model.modules():
            bias = None if isinstance(module, torch.nn.LayerNorm) else getattr(module, "bias", None)
            if isinstance(bias, torch.nn.Parameter):
                bias.normal_(std=0.1)
    return Loaded(model.eval(), None)


def reload(loaded: Loaded, folder: Path) -> Any:
    loaded.model.save_pretrained(folder)
    auto = AutoModelForSequenceClassification if loaded.is_classifier else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def answers(model: Any) -> torch.Tensor:
    ids = torch.from_numpy(np.random.default_rng(7).integers(3, 64, (1, 20)))
    result: torch.Tensor = model(input_ids=ids).logits
    return result


def check_folder(loaded: Loaded, folder: Path) -> None:
    """The folder loads in plain transformers, answers the same, and generates the same with the cache as without."""
    again = reload(loaded, folder)
    assert torch.equal(answers(again), answers(loaded.model))
    if not loaded.is_classifier:
        ids = torch.from_numpy(np.random.default_rng(7).integers(3, 64, (1, 12)))
        settings: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
        cached, plain = (again.generate(ids, use_cache=use, **settings) for use in (True, False))
        assert torch.equal(cached, plain)


@torch.no_grad()
def kill_layer(loaded: Loaded, dead: int) -> None:
    anatomy = read_anatomy(loaded.model)
    for part in [*anatomy.mlps, *anatomy.attentions]:
        if part.layer == dead:
            loaded.model.get_parameter(part.out).zero_()
            bias = loaded.model.state_dict().get(part.out.removesuffix("weight") + "bias")
            if bias is not None:
                bias.zero_()


@torch.no_grad()
def kill_channels(loaded: Loaded, mlp: Mlp, dead: list[int]) -> None:
    """Zero what these channels add to the output; of experts, other channels in each."""
    weight = loaded.model.get_parameter(mlp.out)
    if mlp.experts:
        for expert in range(mlp.experts):
            weight[expert, :, [(channel + expert) % mlp.width for channel in dead]] = 0
    elif weight.shape[1] == mlp.width and "c_proj" not in mlp.out:
        weight[:, dead] = 0
    else:
        weight[dead] = 0


# --- the same for every architecture


@pytest.mark.parametrize("kind", ALL)
def test_every_layer_has_its_parts(kind: str) -> None:
    anatomy = read_anatomy(make(kind).model)
    assert anatomy.count == LAYERS
    assert [mlp.layer for mlp in anatomy.mlps] == [0, 1, 2] == [part.layer for part in anatomy.attentions]
    assert all(mlp.key for mlp in anatomy.mlps)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("move", [DropLayers(count=0), Narrow(), Narrow(mlp=0.99)])
def test_null_settings_change_nothing(kind: str, move: Any, context: Context) -> None:
    loaded = make(kind)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    after = move.apply(loaded, context).model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("kind", "measure"),
    [*((kind, "kl") for kind in ALL), *((kind, "influence") for kind in ("llama", "gemma3", "gpt2", "modernbert"))],
)
def test_the_dead_layer_is_the_one_dropped(kind: str, measure: Any, context: Context, tmp_path: Path) -> None:
    loaded = make(kind)
    kill_layer(loaded, 1)
    scores = layer_scores(loaded, context, measure)
    assert len(scores) == LAYERS and int(np.argmin(scores)) == 1 and scores[1] < 1e-4 < min(scores[0], scores[2])
    smaller = DropLayers(count=1, measure=measure).apply(loaded, context)
    assert len(read_anatomy(smaller.model).attentions) == LAYERS - 1
    torch.testing.assert_close(answers(smaller.model), answers(loaded.model), rtol=1e-4, atol=1e-4)
    check_folder(smaller, tmp_path / "model")


@pytest.mark.parametrize("kind", ALL)
def test_a_dropped_layer_is_as_if_skipped(kind: str, context: Context, tmp_path: Path) -> None:
    loaded = make(kind)
    layers = loaded.model.get_submodule(read_anatomy(loaded.model).path)

    def skip(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = layers[1].register_forward_hook(skip, with_kwargs=True)
    expected = answers(loaded.model)
    handle.remove()
    smaller = DropLayers(layers=(1,)).apply(loaded, context)
    assert torch.equal(answers(smaller.model), expected)
    check_folder(smaller, tmp_path / "model")


@pytest.mark.parametrize("kind", ALL)
def test_dead_channels_are_the_ones_cut(kind: str, context: Context, tmp_path: Path) -> None:
    loaded = make(kind)
    anatomy = read_anatomy(loaded.model)
    for mlp in anatomy.mlps:
        kill_channels(loaded, mlp, [(5 * step + mlp.layer) % mlp.width for step in range(mlp.width // 4)])
    expected, size = answers(loaded.model), loaded.model.num_parameters()
    narrow = Narrow(mlp=0.75, multiple=8).apply(loaded, context)
    torch.testing.assert_close(answers(narrow.model), expected, rtol=1e-4, atol=1e-4)
    assert narrow.model.num_parameters() < size
    assert all(
        new.width * 4 == old.width * 3 for new, old in zip(read_anatomy(narrow.model).mlps, anatomy.mlps, strict=True)
    )
    check_folder(narrow, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())[anatomy.mlps[0].key] == (
        anatomy.mlps[0].width * 3 // 4
    )


@pytest.mark.parametrize("kind", HEADS)
def test_dead_heads_are_the_ones_cut(kind: str, context: Context, tmp_path: Path) -> None:
    loaded = make(kind)
    for part in read_anatomy(loaded.model).attentions:
        size = part.heads // part.kv_heads * part.head_dim
        start = (part.layer % 2) * size
        with torch.no_grad():
            loaded.model.get_parameter(part.out)[:, start : start + size] = 0
    narrow = Narrow(heads=0.5).apply(loaded, context)
    torch.testing.assert_close(answers(narrow.model), answers(loaded.model), rtol=1e-4, atol=1e-4)
    check_folder(narrow, tmp_path / "model")
    said = json.loads((tmp_path / "model" / "config.json").read_text())
    head_dim = {"qwen3": 16, "gemma3": 16}.get(kind, 8)
    assert (said["num_attention_heads"], said["num_key_value_heads"], said["head_dim"]) == (2, 1, head_dim)


@pytest.mark.parametrize("kind", sorted(set(ALL) - set(HEADS)))
def test_heads_that_cannot_be_cut_are_refused(kind: str, context: Context) -> None:
    loaded = make(kind)
    with pytest.raises(UnsupportedError, match="heads cannot be cut; leave heads at 1"):
        Narrow(heads=0.5).apply(loaded, context)


def test_a_share_that_rounds_to_all_heads_is_told(context: Context, said: list[str]) -> None:
    Narrow(mlp=0.5, heads=0.9).apply(make("qwen3"), context)
    assert "narrow: 90% of the groups of heads, rounded, are all of them; none is cut" in said


# --- one at a time


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "gpt2"])
def test_tied_embeddings_stay_tied(kind: str, context: Context) -> None:
    for move in (DropLayers(count=1), Narrow(mlp=0.5)):
        model = move.apply(make(kind), context).model
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_moves_compose(context: Context, tmp_path: Path) -> None:
    loaded = make("gemma3")
    for move in (DropLayers(count=1), Narrow(mlp=0.5, heads=0.5), Narrow(mlp=0.5, multiple=4), DropLayers(layers=(0,))):
        loaded = move.apply(loaded, context)
    assert read_anatomy(loaded.model).mlps[0].width == 16
    check_folder(loaded, tmp_path / "model")


def test_local_and_global_layers_keep_their_kind(context: Context) -> None:
    for kind in ("gemma3", "modernbert"):
        smaller = DropLayers(layers=(1,)).apply(make(kind), context).model
        assert smaller.config.layer_types == ["sliding_attention", "sliding_attention"]
    old = make("modernbert", layer_types=None, global_attn_every_n_layers=2)
    assert old.model.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    config = DropLayers(layers=(1,)).apply(old, context).model.config
    assert config.layer_types == ["full_attention"] * 2 and not hasattr(config, "global_attn_every_n_layers")


def test_a_first_layer_of_its_own_kind_stays(context: Context) -> None:
    loaded = make("modernbert")
    kill_layer(loaded, 0)
    assert len(read_anatomy(DropLayers(count=2).apply(loaded, context).model).mlps) == 1
    with pytest.raises(UnsupportedError, match=r"modernbert.*attn_norm"):
        DropLayers(layers=(0,)).apply(loaded, context)


def test_layers_named_by_number_follow(context: Context) -> None:
    assert DropLayers(layers=(0,)).apply(make("qwen3_moe"), context).model.config.mlp_only_layers == [0]
    assert DropLayers(layers=(1,)).apply(make("qwen3_moe"), context).model.config.mlp_only_layers == []


def test_a_layer_that_would_work_otherwise_in_its_new_place_is_refused(context: Context) -> None:
    loaded = make("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UnsupportedError, match=r"place 0 would get another attn\.scaling"):
        DropLayers(layers=(0,)).apply(loaded, context)
    assert DropLayers(layers=(2,)).apply(loaded, context).model.config.n_layer == 2


def test_importance_is_measured_again_after_each_drop(context: Context) -> None:
    """Two layers that undo each other: each matters alone, neither once the other is gone."""
    loaded = make("llama", attention_bias=False, mlp_bias=False)
    first, second = (loaded.model.model.layers[at] for at in (1, 2))
    kill_layer(loaded, 1)
    kill_layer(loaded, 2)
    with torch.no_grad():
        first.mlp.down_proj.weight.normal_(std=0.02)
        second.load_state_dict(first.state_dict())
        second.mlp.down_proj.weight.neg_()
    alone = layer_scores(loaded, context)
    after = layer_scores(loaded, context, without=[1])
    assert after[1] == 0.0 and after[2] < alone[0]
    assert len(read_anatomy(DropLayers(count=2).apply(loaded, context).model).mlps) == 1
    torch.testing.assert_close(
        DropLayers(count=2).apply(loaded, context).model.model.layers[0].state_dict(),
        loaded.model.model.layers[0].state_dict(),
    )


def test_packed_tensors_move_with_their_layer_and_are_not_cut(context: Context) -> None:
    loaded = make("llama")
    names = [f"model.layers.{at}.mlp.up_proj.weight" for at in range(LAYERS)]
    loaded.packed, loaded.untouched = dict.fromkeys(names[1:], "codes"), {names[0]: "small", "lm_head.weight": "head"}
    smaller = DropLayers(layers=(1,)).apply(loaded, context)
    assert smaller.packed == {names[1]: "codes"}
    assert smaller.untouched == {names[0]: "small", "lm_head.weight": "head"}
    with pytest.raises(UnsupportedError, match=r"layers\.1\.mlp\.up_proj\.weight.*narrow before quantize"):
        Narrow(mlp=0.5).apply(loaded, context)


def test_scores_are_measured_once(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = make("olmoe")
    channels, layers = channel_scores(loaded, context), layer_scores(loaded, context)
    monkeypatch.setattr(type(loaded.model), "forward", None)
    again = channel_scores(loaded, context)
    assert channels.keys() == again.keys() and all(torch.equal(channels[name], again[name]) for name in channels)
    assert layer_scores(loaded, context) == layers


def test_channel_scores_by_their_definition(context: Context) -> None:
    """gpt2 (weights stored [in, out]) and an expert that sees every token, against sums written out."""
    loaded = make("gpt2")
    name = "transformer.h.1.mlp.c_proj"
    seen: list[torch.Tensor] = []
    handle = loaded.model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        for text in context.calibration:
            loaded.model(input_ids=torch.from_numpy(text)[None])
    handle.remove()
    expected = torch.cat(seen).square().mean(0).sqrt() * loaded.model.get_parameter(name + ".weight").norm(dim=1)
    torch.testing.assert_close(channel_scores(loaded, context)[name + ".weight"], expected.detach())

    loaded = make("olmoe", num_experts=1, num_experts_per_tok=1, norm_topk_prob=True)
    block = loaded.model.model.layers[0].mlp
    seen = []
    handle = block.experts.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for text in context.calibration:
            loaded.model(input_ids=torch.from_numpy(text)[None])
        handle.remove()
        gate, up = (torch.cat(seen) @ block.experts.gate_up_proj[0].T).chunk(2, -1)
        expected = (torch.nn.functional.silu(gate) * up).square().mean(0).sqrt() * block.experts.down_proj[0].norm(
            dim=0
        )
    scores = channel_scores(loaded, context)["model.layers.0.mlp.experts.down_proj"]
    torch.testing.assert_close(scores, expected[None])


@pytest.mark.parametrize(("share", "multiple", "width"), [(0.5, 32, 32), (0.3, 32, 32), (0.9, 16, 64), (0.7, 1, 45),
                                                          (0.01, 8, 8), (0.5, 100, 64)])  # fmt: skip
def test_widths_are_multiples(share: float, multiple: int, width: int, context: Context) -> None:
    narrow = Narrow(mlp=share, multiple=multiple).apply(make("llama"), context)
    assert narrow.model.config.intermediate_size == width


def test_head_counts_an_architecture_refuses_are_named(context: Context) -> None:
    loaded = make("llama", num_attention_heads=8, num_key_value_heads=4)
    with pytest.raises(UnsupportedError, match=r"llama takes no num_attention_heads 6.*multiple of the number"):
        Narrow(heads=0.75).apply(loaded, context)


def test_what_no_pattern_fits_is_refused(context: Context) -> None:
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(UnsupportedError, match="bloom: no MLP whose width its config states"):
        Narrow(mlp=0.5).apply(Loaded(bloom.eval(), None), context)
    two = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )
    for move in (DropLayers(), Narrow(mlp=0.5)):
        with pytest.raises(UnsupportedError, match="t5: its layers cannot be told apart"):
            move.apply(Loaded(two.eval(), None), context)


def test_settings_that_cannot_be_are_plain_errors(context: Context, tmp_path: Path) -> None:
    loaded = make("llama")
    with pytest.raises(SpecError, match="leave at least one"):
        DropLayers(count=3).apply(loaded, context)
    with pytest.raises(SpecError, match="there is no layer 3; the layers are 0 to 2"):
        DropLayers(layers=(0, 3)).apply(loaded, context)
    for bad in ({"mlp": 0.0}, {"heads": 1.5}, {"multiple": 0}):
        with pytest.raises(SpecError):
            spec.parse(Narrow, bad, "moves")
    assert spec.parse(DropLayers, {"layers": [1]}, "moves") == DropLayers(layers=(1,))
    with pytest.raises(DataError, match="no calibration text"):
        DropLayers().apply(loaded, Context([], [], None, 0, tmp_path, lambda line: None))
