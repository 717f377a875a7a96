"""Experts pruned, merged and made out of dense models, through `shrew apply` and against weights taken by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from shrew import folder
from shrew.blocks.attention import AttentionSpec
from shrew.blocks.mlp import MlpSpec
from shrew.blocks.model import ModelSpec, build
from shrew.blocks.moe import MoeSpec
from shrew.errors import SpecError, UnsupportedError
from shrew.folder import Loaded
from shrew.moves.context import Context
from shrew.moves.experts import PruneExperts, expert_use
from shrew.moves.quantize import Quantize
from shrew.moves.upcycle import Upcycle

BASE = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 256, "initializer_range": 0.3,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}  # fmt: skip
STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("OlmoeConfig", {"num_experts": 5}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 5, "moe_intermediate_size": 16, "mlp_only_layers": [0]}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 5}),
}
OURS = ModelSpec(layers=2, width=32, vocabulary=300, context=256, mixers={"A": AttentionSpec(heads=4, kv_heads=2)},
                 ffn=MoeSpec(experts=5, hidden=16, router="sigmoid", balance="bias", shared=8, every=2))  # fmt: skip
KINDS = [*STOCK, "shrew"]
IDS = torch.randint(3, 300, (2, 31), generator=torch.Generator().manual_seed(0))


def make(kind: str, tokenizer: Any = None) -> Loaded:
    torch.manual_seed(0)
    if kind == "shrew":
        model = build(OURS, bos_token_id=0, eos_token_id=1, pad_token_id=2)
        for name, value in model.state_dict().items():
            if name.endswith("balance_bias"):
                value.uniform_(-0.1, 0.1)
            elif value.ndim > 1:
                value.normal_(std=0.3)
        return Loaded(model.eval(), tokenizer, dtype=torch.float32)
    config_class, settings = STOCK[kind]
    config = getattr(transformers, config_class)(**BASE, **settings)
    return Loaded(AutoModelForCausalLM.from_config(config).eval(), tokenizer, dtype=torch.float32)


def _stacks(model: Any) -> dict[str, Tensor]:
    return {name.removesuffix(".gate_up_proj"): value for name, value in model.state_dict().items()
            if name.endswith("experts.gate_up_proj")}  # fmt: skip


# --- prune-experts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_use_is_the_sum_of_routing_weights(kind: str, context: Context) -> None:
    loaded, seen = make(kind), []
    name = next(iter(_stacks(loaded.model)))
    experts = loaded.model.get_submodule(name)
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args[1:]))
    with torch.no_grad():
        for text in context.calibration:
            loaded.model(input_ids=torch.from_numpy(text)[None])
    handle.remove()
    wanted = torch.zeros(5, dtype=torch.float64)
    for index, weights in seen:
        for expert in range(5):
            wanted[expert] += weights[index == expert].double().sum()
    torch.testing.assert_close(expert_use(loaded, context)[f"{name}.down_proj"], wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_no_token_uses_go_without_a_trace(kind: str, context: Context, tmp_path: Path) -> None:
    loaded = make(kind)
    forbidden = _forbid(loaded, [1, 3])
    wanted = loaded.model(IDS).logits
    small = PruneExperts(keep=3).apply(loaded, context)
    for handle in forbidden:
        handle.remove()
    folder.save(small, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(again(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    assert {len(stack) for stack in _stacks(again).values()} == {3}
    before = {name: value for name, value in loaded.model.state_dict().items() if "experts" not in name}
    for name, value in again.state_dict().items():
        if name in before and before[name].shape == value.shape:
            assert torch.equal(value, before[name])


def _forbid(loaded: Loaded, experts: list[int]) -> list[Any]:
    """Routers never choose these experts: ours by their bias, others by the hooks given back."""
    for name, value in loaded.model.state_dict().items():
        if name.endswith("balance_bias"):
            value[experts] = -1e4

    def no_choice(module: Any, args: Any, output: Any) -> Any:
        logits = output[0]
        logits[..., experts] = -1e4
        weights, index = logits.float().softmax(-1).topk(2)
        normalise = getattr(module, "norm_topk_prob", True)
        return logits, weights / weights.sum(-1, keepdim=True) if normalise else weights, index

    return [part.register_forward_hook(no_choice) for name, part in loaded.model.named_modules()
            if name.endswith(".gate") and not isinstance(part, torch.nn.Linear)]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_an_expert_merge_into_it(kind: str, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts 2 and 4 begin as 0 and 1 with some noise: they are averaged into these, by use."""
    loaded = make(kind)
    state = loaded.model.state_dict()
    for name, value in state.items():
        if ".experts." in name:
            value[2], value[4] = value[0] + 0.01 * value[3], value[1] + 0.01 * value[3]
    before = {name: value.clone() for name, value in state.items()}
    use = torch.tensor([5.0, 4.0, 2.0, 3.0, 1.0], dtype=torch.float64)
    monkeypatch.setattr("shrew.moves.experts.expert_use", lambda *_: {f"{name}.down_proj": use
                                                                      for name in _stacks(loaded.model)})  # fmt: skip
    merged = PruneExperts(keep=3, merge=True).apply(loaded, context).model.state_dict()
    for name, value in merged.items():
        old = before[name]
        if ".experts." in name:
            wanted = torch.stack([(5 * old[0] + 2 * old[2]) / 7, (4 * old[1] + old[4]) / 5, old[3]])
            torch.testing.assert_close(value, wanted)
        elif len(value) != len(old):
            assert torch.equal(value, old[[0, 1, 3]])  # the router
        else:
            assert torch.equal(value, old)


@pytest.mark.parametrize("kind", ["olmoe", "shrew"])
def test_prune_experts_by_apply(kind: str, tiny_tokenizer: Any, stories: Path, apply: Any, tmp_path: Path) -> None:
    folder.save(make(kind, tiny_tokenizer), tmp_path / "model")
    code, said = apply(tmp_path / "model", "prune-experts", "--keep", 2, "--merge", "--text", stories,
                       "--out", tmp_path / "out")  # fmt: skip
    assert code == 0, said
    assert "prune-experts: layer 1 keeps" in said
    loaded = folder.load(tmp_path / "out")
    assert loaded.model.config.model_type == kind
    assert {len(stack) for stack in _stacks(loaded.model).values()} == {2}
    assert loaded.model(IDS).logits.isfinite().all()
    code, said = apply(tmp_path / "out", "quantize", "--bits", 4, "--text", stories, "--out", tmp_path / "four")
    assert code == 0, said  # and what is left of them can be packed
    assert any("experts" in name for name in folder.load(tmp_path / "four").packed)


def test_nothing_goes_when_all_are_kept(context: Context) -> None:
    loaded = make("olmoe")
    assert PruneExperts(keep=5).apply(loaded, context) is loaded


def test_what_prune_experts_refuses(tiny_llama_folder: Path, apply: Any, context: Context, tmp_path: Path) -> None:
    code, said = apply(tiny_llama_folder, "prune-experts", "--out", tmp_path / "out")
    assert (code, said.splitlines()[-1]) == (
        2, "shrew: prune-experts: the router of llama is not known; known: olmoe, qwen3_moe, mixtral, shrew.")
    dense = Loaded(build(ModelSpec(layers=1, width=16, vocabulary=300, ffn=MlpSpec(gated=False))), None)
    with pytest.raises(UnsupportedError, match="this shrew has no experts"):
        PruneExperts().apply(dense, context)
    with pytest.raises(SpecError, match="each token uses 2 experts; keep at least as many"):
        PruneExperts(keep=1).apply(make("olmoe"), context)
    with pytest.raises(SpecError, match="keep 6 is more than the 5 experts"):
        PruneExperts(keep=6).apply(make("shrew"), context)
    packed = Quantize(method="rtn", bits=4, group=0).apply(make("olmoe"), context)
    with pytest.raises(UnsupportedError, match="quantized already; put prune-experts before quantize"):
        PruneExperts(keep=3).apply(packed, context)


# --- upcycle ---------------------------------------------------------------------------------------------------------

DENSE = {key: value for key, value in BASE.items() if key != "num_experts_per_tok"} | {"intermediate_size": 48}


def dense(kind: str, tokenizer: Any = None) -> Loaded:
    torch.manual_seed(0)
    if kind == "shrew":
        model: Any = build(ModelSpec(layers=2, width=32, vocabulary=300, context=256, softcap=9.0,
                                     ffn=MlpSpec(activation="relu2", hidden=48)))  # fmt: skip
    else:
        configs = {"llama": transformers.LlamaConfig(**DENSE, tie_word_embeddings=True),
                   "qwen3": transformers.Qwen3Config(**DENSE, head_dim=16)}  # fmt: skip
        model = AutoModelForCausalLM.from_config(configs[kind])
    return Loaded(model.eval(), tokenizer, dtype=torch.float32)


@pytest.mark.parametrize(("kind", "becomes"), [("llama", "mixtral"), ("qwen3", "qwen3_moe"), ("shrew", "shrew")])
@pytest.mark.parametrize("top_k", [1, 3])
def test_copies_are_the_same_model(
    kind: str, becomes: str, top_k: int, tiny_tokenizer: Any, apply: Any, tmp_path: Path
) -> None:
    folder.save(dense(kind, tiny_tokenizer), tmp_path / "dense")
    code, said = apply(tmp_path / "dense", "upcycle", "--experts", 4, "--top-k", top_k, "--out", tmp_path / "out")
    assert code == 0, said
    assert f"upcycle: 4 experts a layer, saved as {becomes}" in said
    before, after = folder.load(tmp_path / "dense").model, AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32)  # fmt: skip
    assert after.config.model_type == becomes
    torch.testing.assert_close(after(IDS).logits, before(IDS).logits, rtol=1e-4, atol=1e-4)
    assert (after.config.bos_token_id, after.config.eos_token_id) == (before.config.bos_token_id,
                                                                       before.config.eos_token_id)  # fmt: skip
    gates = [value for name, value in after.state_dict().items() if name.endswith("gate.weight")]
    assert len(gates) == 2
    assert all(0.01 < gate.std() < 0.03 for gate in gates)


def test_a_split_that_uses_every_part_alike_is_the_same_model(context: Context) -> None:
    before = dense("qwen3")
    wanted = before.model(IDS).logits
    after = Upcycle(experts=4, top_k=4, how="split").apply(before, context).model
    assert after.config.moe_intermediate_size == 12
    assert sum(p.numel() for p in after.parameters()) - sum(p.numel() for p in before.model.parameters()) == 2 * 4 * 32
    with torch.no_grad():
        for name, value in after.state_dict().items():
            if name.endswith("gate.weight"):
                value.zero_()  # equal weights
    torch.testing.assert_close(after(IDS).logits, wanted, rtol=1e-4, atol=1e-4)


def test_experts_whose_rows_are_no_whole_blocks(tiny_tokenizer: Any, apply: Any, tmp_path: Path) -> None:
    """The product of groups that transformers takes by default refuses them."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**DENSE | {"intermediate_size": 33}, tie_word_embeddings=True)
    before = Loaded(AutoModelForCausalLM.from_config(config).eval(), tiny_tokenizer, dtype=torch.float32)
    folder.save(before, tmp_path / "dense")
    assert apply(tmp_path / "dense", "upcycle", "--experts", 3, "--out", tmp_path / "out")[0] == 0
    after = folder.load(tmp_path / "out").model
    torch.testing.assert_close(after(IDS).logits, before.model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_noise_tells_the_copies_apart_the_same_way_each_time(context: Context) -> None:
    first, second = (_stacks(Upcycle(experts=2, noise=0.1).apply(dense("llama"), context).model) for _ in range(2))
    plain = _stacks(Upcycle(experts=2).apply(dense("llama"), context).model)
    for name, stack in first.items():
        assert torch.equal(stack, second[name])
        assert not torch.equal(stack[0], stack[1])
        share = (stack - plain[name]).square().mean().sqrt() / plain[name].square().mean().sqrt()
        assert share == pytest.approx(0.1, rel=0.1)


def test_what_upcycle_refuses(context: Context, tiny_classifier_folder: Path) -> None:
    with pytest.raises(UnsupportedError, match="feed-forward layers of this olmoe are not gated MLPs"):
        Upcycle().apply(make("olmoe"), context)
    with pytest.raises(UnsupportedError, match="gpt2: this model cannot be said in our blocks"):
        config = transformers.GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2)
        Upcycle().apply(Loaded(AutoModelForCausalLM.from_config(config), None), context)
    with pytest.raises(UnsupportedError, match="only causal language models"):
        Upcycle().apply(folder.load(tiny_classifier_folder), context)
    with pytest.raises(UnsupportedError, match="put upcycle before factor"):
        shape = ModelSpec(layers=1, width=32, vocabulary=300, ranks={"layers.0.ffn.up_proj": 3})
        Upcycle().apply(Loaded(build(shape), None), context)
    with pytest.raises(SpecError, match="48 channels cannot be dealt out to 5 experts"):
        Upcycle(experts=5, how="split").apply(dense("llama"), context)
    with pytest.raises(SpecError, match="top_k 3 is more than the 2 experts"):
        Upcycle(experts=2, top_k=3)
    packed = Quantize(method="rtn", bits=4, group=0).apply(dense("llama"), context)
    with pytest.raises(UnsupportedError, match="quantized already"):
        Upcycle().apply(packed, context)
