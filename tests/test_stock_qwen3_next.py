"""Qwen3-Next models in our blocks and back: same weights, same logits, same text."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from stocks import check_given_back, check_logits, check_text, shaken, tokens
from transformers import AutoModelForCausalLM, Qwen3NextConfig
from transformers.models.qwen3_next import modeling_qwen3_next

from shrew.blocks.attention import AttentionSpec
from shrew.blocks.delta import DeltaSpec
from shrew.blocks.layers import Place
from shrew.blocks.mlp import MlpSpec
from shrew.blocks.model import ModelSpec, build
from shrew.blocks.moe import MoeSpec
from shrew.blocks.stock import adopt, stock
from shrew.errors import UnsupportedError

HEADS: dict[str, Any] = {"heads": 4, "kv_heads": 2, "qk_norm": "head", "gate": True}
DELTA = DeltaSpec(heads=6, key_heads=2, key_width=8, value_width=5, chunk=8)
SPEC = ModelSpec(
    pattern="DDA", layers=4, width=32, vocabulary=97, context=64,
    mixers={"D": DELTA, "A": AttentionSpec(**HEADS, rotary_share=0.5)},
    ffn=MoeSpec(experts=4, hidden=12, shared=20, shared_gate=True),
)  # fmt: skip


def _config(**more: Any) -> Qwen3NextConfig:
    return Qwen3NextConfig(**{
        "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 5, "intermediate_size": 40, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "linear_key_head_dim": 6, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "pad_token_id": 0,
        "shared_expert_intermediate_size": 16, **more,
    })  # fmt: skip


def _eager(model: Any) -> Any:
    model.set_experts_implementation("eager")  # the default takes no float64
    return model


def _theirs(config: Any) -> Any:
    model = shaken(AutoModelForCausalLM.from_config(config), middle=0)  # they add 1 to it
    return _eager(model).double()  # made in float32, so that 1 + weight is exact in float64


class _Wide:
    """torch, but what asks for float32 gets float64."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their layers round to float32 inside, and what follows makes that a thousand times larger: let them not."""
    monkeypatch.setattr(modeling_qwen3_next, "torch", _Wide())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@torch.no_grad()
@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("ffn", [MlpSpec(), SPEC.ffn, replace(SPEC.ffn, every=2, normalise=False)],
                         ids=["dense", "experts", "half"])  # fmt: skip
def test_ours_is_a_qwen3_next(ffn: Any) -> None:
    ours = shaken(build(replace(SPEC, ffn=ffn))).double()
    same = _eager(stock(ours))
    assert same.config.model_type == "qwen3_next"
    check_logits(same, ours, tokens(70), rtol=1e-6, atol=1e-6)  # 70: more than one chunk
    torch.testing.assert_close(adopt(same)(tokens(70)).logits, ours(tokens(70)).logits)


@torch.no_grad()
@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("more", [
    {}, {"norm_topk_prob": False, "decoder_sparse_step": 2}, {"mlp_only_layers": [0, 1, 2, 3, 4]}, {"num_experts": 0},
    {"tie_word_embeddings": True, "linear_conv_kernel_dim": 3},
    {"layer_types": ["full_attention", "linear_attention"] * 2 + ["linear_attention"],
     "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}},
])  # fmt: skip
def test_a_qwen3_next_is_ours(more: dict[str, Any]) -> None:
    theirs = _theirs(_config(**more))
    ours = adopt(theirs)
    check_logits(ours, theirs, tokens(70), rtol=1e-6, atol=5e-5)
    check_text(ours, theirs, tokens(11), 9)
    check_given_back(ours, theirs)


def test_the_gradients_of_a_layer_are_theirs() -> None:
    theirs = _theirs(_config()).float()
    mine: Any = adopt(theirs).model.layers[0].mixer
    layer = theirs.model.layers[0].linear_attn
    assert isinstance(layer, modeling_qwen3_next.Qwen3NextGatedDeltaNet)
    x = torch.randn(2, 70, 32, requires_grad=True)
    positions = torch.arange(70).expand(2, 70)
    found, wanted = mine(x, Place(positions, positions)), layer(x)
    weight = torch.randn_like(found)
    grads = [torch.autograd.grad((y * weight).sum(), [x, *more]) for y, more in (
        (found, [mine.A_log, mine.dt_bias, mine.o_norm.weight, mine.o_proj.weight]),
        (wanted, [layer.A_log, layer.dt_bias, layer.norm.weight, layer.out_proj.weight]))]  # fmt: skip
    for one, other in zip(*grads, strict=True):
        assert (one - other).norm() < 1e-4 * other.norm()


@pytest.mark.parametrize("more", [
    {"attention_bias": True}, {"hidden_act": "gelu"}, {"mlp_only_layers": [2]}, {"linear_conv_kernel_dim": 1},
    {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6, "partial_rotary_factor": 0.25}},
])  # fmt: skip
def test_an_odd_qwen3_next_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="qwen3_next"):
        adopt(AutoModelForCausalLM.from_config(_config(**more)))


@pytest.mark.parametrize("other", [
    {"norms": "sandwich"}, {"residual_scale": 0.5}, {"pattern": "D"}, {"pattern": "A"},
    {"ffn": MlpSpec(activation="relu2")}, {"ffn": replace(SPEC.ffn, shared_gate=False)},
    {"ffn": replace(SPEC.ffn, router="sigmoid")}, {"ffn": replace(SPEC.ffn, every=9)},
    {"mixers": {**SPEC.mixers, "A": AttentionSpec(**HEADS, rotary_share=0.0)}},
    {"mixers": {**SPEC.mixers, "A": AttentionSpec(**{**HEADS, "gate": False})}},
    {"mixers": {**SPEC.mixers, "D": replace(DELTA, gate=False)}},
    {"mixers": {**SPEC.mixers, "D": replace(DELTA, decay=False)}},
    {"mixers": {**SPEC.mixers, "D": replace(DELTA, conv=0)}},
    {"pattern": "DEA", "mixers": {**SPEC.mixers, "E": replace(DELTA, key_width=4)}},
])  # fmt: skip
def test_what_a_qwen3_next_cannot_say_stays_ours(other: dict[str, Any]) -> None:
    model = build(replace(SPEC, **other))
    assert stock(model) is model
