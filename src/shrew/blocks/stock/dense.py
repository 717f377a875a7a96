"""llama and qwen3: the same attention and gated MLP in every layer, qwen3 with QK-norm."""

from typing import Any, Literal

from transformers import LlamaConfig, Qwen3Config

from shrew.blocks.attention import AttentionSpec
from shrew.blocks.mlp import MlpSpec
from shrew.blocks.model import ModelSpec
from shrew.blocks.stock.adapter import Adapter

Norm = Literal["none", "head"]

LLAMA_NAMES = {"mixer_norm": "input_layernorm", "mixer": "self_attn",
               "ffn_norm": "post_attention_layernorm", "ffn": "mlp"}  # fmt: skip


def plain(spec: ModelSpec) -> bool:
    """No setting beside those of Llama."""
    return spec == ModelSpec(pattern=spec.pattern, layers=spec.layers, width=spec.width, vocabulary=spec.vocabulary,
                             context=spec.context, tied=spec.tied, eps=spec.eps, zero_init=spec.zero_init,
                             mixers=spec.mixers, ffn=spec.ffn)  # fmt: skip


def _dense(spec: ModelSpec, config_class: Any, norm: Norm) -> Any:
    mixers = {spec.mixer(number) for number in range(spec.layers)}
    mixer = next(iter(mixers))
    wanted = len(mixers) == 1 and mixer.kind == "attention" and mixer.qk_norm == norm
    wanted = wanted and mixer.rotary_share == 1 and mixer.scale is None
    if not wanted or spec.ffn != MlpSpec(hidden=getattr(spec.ffn, "hidden", None)) or not plain(spec):
        return None
    return config_class(
        vocab_size=spec.vocabulary, hidden_size=spec.width, num_hidden_layers=spec.layers,
        intermediate_size=spec.ffn.hidden or 3 * spec.width, num_attention_heads=mixer.heads,
        num_key_value_heads=mixer.kv_heads or mixer.heads, head_dim=mixer.head_width or spec.width // mixer.heads,
        max_position_embeddings=spec.context, rms_norm_eps=spec.eps, tie_word_embeddings=spec.tied,
        rope_parameters={"rope_type": "default", "rope_theta": mixer.rope_theta},
    )  # fmt: skip


def _dense_spec(config: Any, norm: Norm) -> ModelSpec | None:
    layers = getattr(config, "layer_types", None) or []
    rope = config.rope_parameters
    odd = (config.attention_bias, getattr(config, "mlp_bias", False), config.hidden_act != "silu",
           rope["rope_type"] != "default", set(layers) - {"full_attention"})  # fmt: skip
    if any(odd):
        return None
    mixer = AttentionSpec(heads=config.num_attention_heads, kv_heads=config.num_key_value_heads,
                          head_width=config.head_dim, qk_norm=norm, rope_theta=rope["rope_theta"])  # fmt: skip
    return ModelSpec(layers=config.num_hidden_layers, width=config.hidden_size, vocabulary=config.vocab_size,
                     context=config.max_position_embeddings, tied=config.tie_word_embeddings, eps=config.rms_norm_eps,
                     mixers={"A": mixer}, ffn=MlpSpec(hidden=config.intermediate_size))  # fmt: skip


def names(spec: ModelSpec, layer: int) -> dict[str, str]:
    return LLAMA_NAMES


LLAMA = Adapter(lambda spec: _dense(spec, LlamaConfig, "none"), lambda config: _dense_spec(config, "none"), names)
QWEN3 = Adapter(lambda spec: _dense(spec, Qwen3Config, "head"), lambda config: _dense_spec(config, "head"), names)
