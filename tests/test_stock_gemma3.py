"""Gemma 3 text models in our blocks and back: same weights, same logits, same text."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from stocks import check_given_back, check_logits, check_said, check_text, shaken, tokens
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from shrew.blocks.attention import AttentionSpec
from shrew.blocks.mlp import MlpSpec
from shrew.blocks.model import ModelSpec, build
from shrew.blocks.stock import adopt, stock
from shrew.blocks.window import WindowSpec
from shrew.errors import UnsupportedError

HEADS: dict[str, Any] = {"heads": 4, "kv_heads": 2, "qk_norm": "head"}
SPEC = ModelSpec(
    pattern="LLG", layers=4, width=64, vocabulary=97, context=64, norms="sandwich", embedding_scale=8.0, softcap=20.0,
    mixers={"L": WindowSpec(**HEADS, window=5, rope_theta=1e4), "G": AttentionSpec(**HEADS, rope_theta=1e6)},
    ffn=MlpSpec(activation="gelu_tanh"),
)  # fmt: skip


def _config(**more: Any) -> Gemma3TextConfig:
    return Gemma3TextConfig(**{
        "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 5, "intermediate_size": 80, "head_dim": 12,
        "num_attention_heads": 4, "num_key_value_heads": 1, "query_pre_attn_scalar": 20, "sliding_window": 4,
        "max_position_embeddings": 64, "sliding_window_pattern": 3, "pad_token_id": 0, **more,
    })  # fmt: skip


def _theirs(config: Any) -> Any:
    model = shaken(AutoModelForCausalLM.from_config(config), middle=0)  # they add 1 to it
    return model.double()  # made in float32, so that 1 + weight is exact in float64


@torch.no_grad()
@pytest.mark.parametrize("scale", [None, 20**-0.5])
@pytest.mark.parametrize("pattern", ["LLG", "L", "G", "GL"])
def test_ours_is_a_gemma(pattern: str, scale: float | None) -> None:
    mixers = {letter: replace(mixer, scale=scale) for letter, mixer in SPEC.mixers.items()}
    ours = shaken(build(replace(SPEC, pattern=pattern, mixers=mixers))).double()
    check_said(ours, "gemma3_text", tokens(23), rtol=1e-6, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("more", [{}, {"final_logit_softcapping": 5.0}, {"tie_word_embeddings": False},
                                  {"query_pre_attn_scalar": 12}, {"sliding_window_pattern": 1}])  # fmt: skip
def test_a_gemma_is_ours(more: dict[str, Any]) -> None:
    theirs = _theirs(_config(**more))
    ours = adopt(theirs)
    check_logits(ours, theirs, tokens(23), rtol=1e-6, atol=1e-5)
    check_text(ours, theirs, tokens(23), 9)
    check_given_back(ours, theirs)


@torch.no_grad()
def test_the_scale_of_the_embeddings_is_rounded_as_theirs_is() -> None:
    theirs = _theirs(_config()).bfloat16()
    ours = adopt(theirs)
    scaled = ours.model.embed_tokens(tokens()) * torch.tensor(ours.spec.embedding_scale).bfloat16()
    assert torch.equal(scaled, theirs.model.embed_tokens(tokens()))


@pytest.mark.parametrize("more", [
    {"attention_bias": True}, {"use_bidirectional_attention": True}, {"hidden_activation": "silu"},
    {"attn_logit_softcapping": 10.0},
    {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}},
])  # fmt: skip
def test_an_odd_gemma_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="gemma3_text"):
        adopt(AutoModelForCausalLM.from_config(_config(**more)))


@pytest.mark.parametrize("other", [
    {"norms": "pre"}, {"embedding_scale": 8.5}, {"residual_scale": 0.5}, {"ffn": MlpSpec()},
    {"mixers": {**SPEC.mixers, "L": WindowSpec(**HEADS, window=5, sinks=True)}},
    {"mixers": {**SPEC.mixers, "L": WindowSpec(**HEADS, window=5, scale=0.2)}},
    {"mixers": {letter: replace(mixer, scale=0.3) for letter, mixer in SPEC.mixers.items()}},
    {"pattern": "LM", "mixers": {**SPEC.mixers, "M": WindowSpec(**HEADS, window=6)}},
])  # fmt: skip
def test_what_a_gemma_cannot_say_stays_ours(other: dict[str, Any]) -> None:
    model = build(replace(SPEC, **other))
    assert stock(model) is model
