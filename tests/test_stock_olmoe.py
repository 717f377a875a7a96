"""olmoe, qwen3_moe and mixtral against transformers: the same weights, the same logits, both ways."""

from dataclasses import replace
from typing import Any

import pytest
from stocks import check_given_back, check_logits, check_said, check_text, shaken, tokens
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from shrew.blocks.attention import AttentionSpec
from shrew.blocks.mlp import MlpSpec
from shrew.blocks.model import ModelSpec, build
from shrew.blocks.moe import MoeSpec
from shrew.blocks.stock import adopt, stock
from shrew.errors import UnsupportedError


def _spec(attention: AttentionSpec, ffn: MoeSpec, **more: Any) -> ModelSpec:
    return ModelSpec(layers=4, width=32, vocabulary=97, context=64, mixers={"A": attention}, ffn=ffn, **more)


SPECS = {
    "olmoe": _spec(AttentionSpec(heads=4, kv_heads=2, qk_norm="all"), MoeSpec(experts=4, normalise=False, hidden=24)),
    "qwen3_moe": _spec(AttentionSpec(heads=2, head_width=24, qk_norm="head"),
                       MoeSpec(experts=5, top_k=3, hidden=8, every=2, dense_hidden=40), tied=False),
    "mixtral": _spec(AttentionSpec(heads=4, rope_theta=500.0), MoeSpec(experts=3, top_k=1)),
}  # fmt: skip
BASE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
CONFIGS = {
    "olmoe": OlmoeConfig(**BASE, num_experts=4, norm_topk_prob=True),
    "qwen3_moe": Qwen3MoeConfig(**BASE, num_experts=4, moe_intermediate_size=16, head_dim=16, mlp_only_layers=[0, 2]),
    "mixtral": MixtralConfig(**BASE, num_local_experts=4, tie_word_embeddings=True),
}


@pytest.mark.parametrize("kind", SPECS)
def test_ours_as_theirs(kind: str) -> None:
    again = check_said(shaken(build(SPECS[kind])), kind, tokens(), atol=1e-5, rtol=1e-5)
    found, wanted = again.spec.ffn, SPECS[kind].ffn
    assert (found.experts, found.top_k, found.every, found.normalise, found.balance_weight) == (
        wanted.experts, wanted.top_k, wanted.every, wanted.normalise, wanted.balance_weight)  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_theirs_as_ours(kind: str) -> None:
    theirs = shaken(AutoModelForCausalLM.from_config(CONFIGS[kind]))
    ours = adopt(theirs)
    check_logits(ours, theirs, tokens(), atol=1e-5, rtol=1e-5)
    check_text(ours, theirs, tokens(), 12)
    check_given_back(ours, theirs)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("olmoe", {"clip_qkv": 8.0}),
        ("olmoe", {"attention_bias": True}),
        ("olmoe", {"hidden_act": "gelu"}),
        ("qwen3_moe", {"mlp_only_layers": [0]}),  # experts in layers 1 and 2: no rule of "every so many" says that
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}),
        ("mixtral", {"sliding_window": 8}),
    ],
)
def test_what_our_blocks_cannot_say_is_refused(kind: str, changes: dict[str, Any]) -> None:
    config = type(CONFIGS[kind])(**(CONFIGS[kind].to_dict() | changes))
    with pytest.raises(UnsupportedError, match=f"{kind}: this model cannot be said"):
        adopt(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    "spec",
    [
        replace(SPECS["olmoe"], ffn=MoeSpec(router="sigmoid")),
        replace(SPECS["olmoe"], ffn=MoeSpec(balance="bias")),
        replace(SPECS["olmoe"], ffn=MoeSpec(shared=8)),
        replace(SPECS["olmoe"], ffn=MoeSpec(activation="relu2")),
        replace(SPECS["olmoe"], ffn=MoeSpec(every=2)),
        replace(SPECS["qwen3_moe"], ffn=MoeSpec(every=5)),
        replace(SPECS["olmoe"], mixers={"A": AttentionSpec(heads=4, head_width=16, qk_norm="all")}),
        replace(SPECS["mixtral"], ffn=MoeSpec(normalise=False)),
        replace(SPECS["mixtral"], ffn=MlpSpec(activation="relu2")),
        replace(SPECS["mixtral"], ffn=MlpSpec(gated=False)),
    ],
)
def test_what_no_stock_type_can_say_stays_ours(spec: ModelSpec) -> None:
    model = build(spec)
    assert stock(model) is model
