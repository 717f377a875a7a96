"""Gemma 3 text models in our blocks and back: same weights, same logits, same text."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
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
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():  # made in float32, so that 1 + weight is exact in float64
        nn.init.normal_(p, std=0.3)
    return model.double()


def _tokens(length: int = 23) -> torch.Tensor:
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("scale", [None, 20**-0.5])
@pytest.mark.parametrize("pattern", ["LLG", "L", "G", "GL"])
def test_ours_is_a_gemma(pattern: str, scale: float | None) -> None:
    torch.manual_seed(0)
    mixers = {letter: replace(mixer, scale=scale) for letter, mixer in SPEC.mixers.items()}
    ours = build(replace(SPEC, pattern=pattern, mixers=mixers)).eval()
    for p in ours.parameters():
        nn.init.normal_(p, std=0.3) if p.ndim > 1 else nn.init.uniform_(p, 0.5, 1.5)
    ours = ours.double()
    same = stock(ours)
    assert same.config.model_type == "gemma3_text"
    torch.testing.assert_close(same(_tokens()).logits, ours(_tokens()).logits, rtol=1e-6, atol=1e-5)
    assert torch.equal(adopt(same)(_tokens()).logits, ours(_tokens()).logits)


@torch.no_grad()
@pytest.mark.parametrize("more", [{}, {"final_logit_softcapping": 5.0}, {"tie_word_embeddings": False},
                                  {"query_pre_attn_scalar": 12}, {"sliding_window_pattern": 1}])  # fmt: skip
def test_a_gemma_is_ours(more: dict[str, Any]) -> None:
    theirs = _theirs(_config(**more))
    ours = adopt(theirs)
    torch.testing.assert_close(ours(_tokens()).logits, theirs(_tokens()).logits, rtol=1e-6, atol=1e-5)
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(_tokens())
    assert torch.equal(ours.generate(_tokens(), attention_mask=mask, **options),
                       theirs.generate(_tokens(), attention_mask=mask, **options))  # fmt: skip
    again = stock(ours).state_dict()
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in theirs.state_dict().items())


@torch.no_grad()
def test_the_scale_of_the_embeddings_is_rounded_as_theirs_is() -> None:
    theirs = _theirs(_config()).bfloat16()
    ours = adopt(theirs)
    tokens = _tokens()
    scaled = ours.model.embed_tokens(tokens) * torch.tensor(ours.spec.embedding_scale).bfloat16()
    assert torch.equal(scaled, theirs.model.embed_tokens(tokens))


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
