"""olmoe, qwen3_moe and mixtral: attention and softmax-routed experts. They differ in QK-norm, in whether the weights of
the chosen experts are divided by their sum, and in qwen3_moe's layers without experts."""

from dataclasses import replace
from typing import Any

from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from shrew.blocks.attention import AttentionSpec
from shrew.blocks.model import ModelSpec
from shrew.blocks.moe import MoeSpec
from shrew.blocks.stock.adapter import Adapter
from shrew.blocks.stock.dense import names, plain

NORMS: dict[str, Any] = {"olmoe": "all", "qwen3_moe": "head", "mixtral": "none"}
CONFIGS: dict[str, Any] = {"olmoe": OlmoeConfig, "qwen3_moe": Qwen3MoeConfig, "mixtral": MixtralConfig}


def _config(spec: ModelSpec, kind: str) -> Any:
    mixers, ffn = {spec.mixer(number) for number in range(spec.layers)}, spec.ffn
    mixer = next(iter(mixers))
    if len(mixers) > 1 or mixer.kind != "attention" or ffn.kind != "moe" or not plain(spec):
        return None
    head_width, hidden = mixer.head_width or spec.width // mixer.heads, ffn.width(spec.width)
    attention = AttentionSpec(heads=mixer.heads, kv_heads=mixer.kv_heads, head_width=mixer.head_width,
                              qk_norm=NORMS[kind], rope_theta=mixer.rope_theta)  # fmt: skip
    experts = MoeSpec(experts=ffn.experts, top_k=ffn.top_k, hidden=ffn.hidden, normalise=ffn.normalise,
                      balance_weight=ffn.balance_weight, z_weight=ffn.z_weight, every=ffn.every,
                      dense_hidden=ffn.dense_hidden)  # fmt: skip
    settings: dict[str, Any]
    if kind == "qwen3_moe":
        said = ffn.every <= spec.layers
        settings = {"head_dim": head_width, "num_experts": ffn.experts, "norm_topk_prob": ffn.normalise,
                    "moe_intermediate_size": hidden, "intermediate_size": ffn.dense(spec.width).hidden,
                    "decoder_sparse_step": ffn.every}  # fmt: skip
    elif kind == "olmoe":
        said = ffn.every == 1 and head_width * mixer.heads == spec.width
        settings = {"num_experts": ffn.experts, "norm_topk_prob": ffn.normalise, "intermediate_size": hidden}
    else:
        said = ffn.every == 1 and ffn.normalise
        settings = {"head_dim": head_width, "num_local_experts": ffn.experts, "intermediate_size": hidden}
    if not said or mixer != attention or ffn != experts:
        return None
    return CONFIGS[kind](
        vocab_size=spec.vocabulary, hidden_size=spec.width, num_hidden_layers=spec.layers,
        num_attention_heads=mixer.heads, num_key_value_heads=mixer.kv_heads or mixer.heads,
        num_experts_per_tok=ffn.top_k, router_aux_loss_coef=ffn.balance_weight,
        max_position_embeddings=spec.context, rms_norm_eps=spec.eps, tie_word_embeddings=spec.tied,
        rope_parameters={"rope_type": "default", "rope_theta": mixer.rope_theta}, eos_token_id=None, **settings,
    )  # fmt: skip


def _spec(config: Any, kind: str) -> ModelSpec | None:
    rope, layers = config.rope_parameters, config.num_hidden_layers
    odd = (getattr(config, "attention_bias", False), config.hidden_act != "silu", rope["rope_type"] != "default",
           getattr(config, "clip_qkv", None) is not None, getattr(config, "sliding_window", None) is not None,
           config.num_experts_per_tok > config.num_experts)  # fmt: skip
    if any(odd):
        return None
    mixer = AttentionSpec(heads=config.num_attention_heads, kv_heads=config.num_key_value_heads,
                          head_width=getattr(config, "head_dim", None), qk_norm=NORMS[kind],
                          rope_theta=rope["rope_theta"])  # fmt: skip
    ffn = MoeSpec(experts=config.num_experts, top_k=config.num_experts_per_tok, hidden=config.intermediate_size,
                  normalise=getattr(config, "norm_topk_prob", True),
                  balance_weight=config.router_aux_loss_coef)  # fmt: skip
    if kind == "qwen3_moe":
        step, without = config.decoder_sparse_step, set(config.mlp_only_layers or ())
        some = [layer for layer in range(layers) if (layer + 1) % step == 0 and layer not in without]
        every = [every for every in range(1, layers + 1) if some == [*range(every - 1, layers, every)]]
        if not every:
            return None
        ffn = replace(ffn, hidden=config.moe_intermediate_size, dense_hidden=config.intermediate_size, every=every[0])
    return ModelSpec(layers=layers, width=config.hidden_size, vocabulary=config.vocab_size,
                     context=config.max_position_embeddings, tied=config.tie_word_embeddings, eps=config.rms_norm_eps,
                     mixers={"A": mixer}, ffn=ffn)  # fmt: skip


OLMOE = Adapter(lambda spec: _config(spec, "olmoe"), lambda config: _spec(config, "olmoe"), names)
QWEN3_MOE = Adapter(lambda spec: _config(spec, "qwen3_moe"), lambda config: _spec(config, "qwen3_moe"), names)
MIXTRAL = Adapter(lambda spec: _config(spec, "mixtral"), lambda config: _spec(config, "mixtral"), names)
