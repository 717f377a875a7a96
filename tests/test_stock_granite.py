"""granitemoehybrid without experts: the same weights, logits and texts in transformers' class and in ours."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from stocks import check_given_back, check_logits, check_said, check_text, shaken, tokens
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

from shrew.blocks.attention import AttentionSpec
from shrew.blocks.linear import MAMBA2
from shrew.blocks.mlp import MlpSpec, NothingSpec
from shrew.blocks.model import ModelSpec, build
from shrew.blocks.stock import adopt, stock
from shrew.errors import UnsupportedError

SSM = replace(MAMBA2, heads=4, state=6, head_width=16, chunk=8)
NOPE = AttentionSpec(heads=4, kv_heads=2, rotary_share=0, scale=0.3)
ROPE = AttentionSpec(heads=2, rope_theta=500.0)
SCALES: dict[str, Any] = {"embedding_scale": 3.0, "residual_scale": 0.5, "logit_scale": 0.25}
HYBRID = ["linear_attention", "full_attention", "linear_attention"]
TINY: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
                        "num_key_value_heads": 2, "shared_intermediate_size": 48, "num_local_experts": 0,
                        "num_experts_per_tok": 0, "layer_types": HYBRID, "mamba_n_heads": 4, "mamba_d_state": 6,
                        "mamba_n_groups": 2, "mamba_chunk_size": 8, "max_position_embeddings": 64, "bos_token_id": 1,
                        "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
MULTIPLIERS: dict[str, Any] = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0,
                               "attention_multiplier": 0.4, "tie_word_embeddings": True}  # fmt: skip
ROTARY = {"position_embedding_type": "rope", "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}


def _spec(**settings: Any) -> ModelSpec:
    return ModelSpec(**{"pattern": "LA", "layers": 3, "width": 32, "vocabulary": 97, "context": 64,
                        "mixers": {"L": SSM, "A": NOPE}, **settings})  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        SCALES,
        {"mixers": {"L": SSM, "A": ROPE}, "tied": False, "ffn": MlpSpec(hidden=40)},
        {"pattern": "A"},
        {"pattern": "LLA", "mixers": {"L": replace(SSM, groups=2, norm_groups=2, bias=True), "A": NOPE}},
    ],
)
def test_ours_is_said_as_granite(settings: dict[str, Any]) -> None:
    model = shaken(build(_spec(**settings), bos_token_id=1, eos_token_id=2, pad_token_id=0), std=0.2)
    check_said(model, "granitemoehybrid", tokens(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, MULTIPLIERS, ROTARY, {"mamba_proj_bias": True, "mamba_conv_bias": False}])
def test_theirs_is_adopted(settings: dict[str, Any]) -> None:
    theirs = shaken(GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**TINY, **settings)), std=0.2)
    ours = adopt(theirs)
    check_logits(ours, theirs, tokens(), rtol=1e-4, atol=1e-4)
    check_text(ours, theirs, tokens(6), 12)
    check_given_back(ours, theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_local_experts": 2, "num_experts_per_tok": 1},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"time_step_limit": (0.01, 0.1)},
        {**ROTARY, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    ],
)
def test_a_config_that_our_blocks_cannot_say_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="granitemoehybrid"):
        adopt(GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**{**TINY, **settings})))


@pytest.mark.parametrize(
    "settings",
    [
        {"ffn": NothingSpec()},
        {"norms": "sandwich"},
        {"softcap": 30.0},
        {"pattern": "L"},
        {"mixers": {"L": replace(SSM, gate="after"), "A": NOPE}},
        {"mixers": {"L": SSM, "A": replace(NOPE, head_width=16)}},
        {"pattern": "LAB", "mixers": {"L": SSM, "A": NOPE, "B": ROPE}},
    ],
)
def test_a_spec_that_granite_cannot_say_stays_ours(settings: dict[str, Any]) -> None:
    assert stock(build(_spec(**settings))).config.model_type == "shrew"
