"""LFM2 models in our blocks and back: same weights, same logits, same text."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from stocks import check_given_back, check_logits, check_said, check_text, shaken, tokens
from transformers import AutoModelForCausalLM, Lfm2Config

from shrew.blocks.attention import AttentionSpec
from shrew.blocks.conv import ConvSpec
from shrew.blocks.mlp import MlpSpec
from shrew.blocks.model import ModelSpec, build
from shrew.blocks.stock import adopt, stock
from shrew.errors import UnsupportedError

SPEC = ModelSpec(
    pattern="CCA", layers=5, width=32, vocabulary=97, context=64,
    mixers={"C": ConvSpec(), "A": AttentionSpec(heads=4, kv_heads=2, qk_norm="head", rope_theta=1e6)},
)  # fmt: skip


def _config(**more: Any) -> Lfm2Config:
    return Lfm2Config(**{
        "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 60, "block_multiple_of": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "full_attn_idxs": [1, 3],
        **more,
    })  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("conv", [ConvSpec(), ConvSpec(kernel=4, bias=True)])
@pytest.mark.parametrize("pattern", ["CCA", "ACCC"])
def test_ours_is_an_lfm2(pattern: str, conv: ConvSpec) -> None:
    ours = shaken(build(replace(SPEC, pattern=pattern, mixers={**SPEC.mixers, "C": conv}))).double()
    check_said(ours, "lfm2", tokens(23), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("more", [
    {}, {"conv_bias": True, "conv_L_cache": 5}, {"tie_word_embeddings": False}, {"block_auto_adjust_ff_dim": False},
    {"block_ffn_dim_multiplier": 1.3}, {"full_attn_idxs": [0, 1, 2, 3]},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                         "original_max_position_embeddings": 16}},
])  # fmt: skip
def test_an_lfm2_is_ours(more: dict[str, Any]) -> None:
    theirs = shaken(AutoModelForCausalLM.from_config(_config(**more))).double()
    ours = adopt(theirs)
    check_logits(ours, theirs, tokens(23), rtol=1e-5, atol=1e-5)
    check_text(ours, theirs, tokens(23), 9)
    if set(theirs.config.layer_types) != {"full_attention"}:  # which is a qwen3
        check_given_back(ours, theirs)


@pytest.mark.parametrize("more", [
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
])  # fmt: skip
def test_an_odd_lfm2_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="lfm2"):
        adopt(AutoModelForCausalLM.from_config(_config(**more)))


@pytest.mark.parametrize("other", [
    {"norms": "sandwich"}, {"pattern": "C"}, {"ffn": MlpSpec(activation="relu2")}, {"logit_scale": 0.5},
    {"mixers": {**SPEC.mixers, "A": AttentionSpec(heads=4)}},
    {"mixers": {**SPEC.mixers, "A": AttentionSpec(heads=4, head_width=16, qk_norm="head")}},
    {"pattern": "CDA", "mixers": {**SPEC.mixers, "D": ConvSpec(kernel=4)}},
])  # fmt: skip
def test_what_an_lfm2_cannot_say_stays_ours(other: dict[str, Any]) -> None:
    model = build(replace(SPEC, **other))
    assert stock(model) is model
