"""llama, qwen3 and qwen2: the same attention and gated MLP in every layer, qwen3 with QK-norm, qwen2 with biases of
queries, keys and values; and what others share."""

from typing import Any

from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from shrew.blocks.attention import AttentionSpec
from shrew.blocks.mlp import MlpSpec
from shrew.blocks.model import ModelSpec
from shrew.blocks.stock.adapter import Adapter

LLAMA_NAMES = {"mixer_norm": "input_layernorm", "mixer": "self_attn",
               "ffn_norm": "post_attention_layernorm", "ffn": "mlp"}  # fmt: skip
ROPE = {"rope_type", "rope_theta"}
YARN = ROPE | {"factor", "original_max_position_embeddings"}


def plain(spec: ModelSpec) -> bool:
    """No setting beside those of Llama."""
    return spec == ModelSpec(pattern=spec.pattern, layers=spec.layers, width=spec.width, vocabulary=spec.vocabulary,
                             context=spec.context, tied=spec.tied, eps=spec.eps, zero_init=spec.zero_init,
                             mixers=spec.mixers, ffn=spec.ffn)  # fmt: skip


def plain_attention(mixer: Any, **more: Any) -> bool:
    """Attention without an option beside `more` and those of Llama."""
    return mixer.kind in ("attention", "window") and mixer == type(mixer)(**{
        "heads": mixer.heads, "kv_heads": mixer.kv_heads, "head_width": mixer.head_width,
        "rope_theta": mixer.rope_theta, "yarn": mixer.yarn, "yarn_context": mixer.yarn_context, **more,
    })  # fmt: skip


def sizes(mixer: Any, width: int) -> dict[str, int]:
    return {"num_attention_heads": mixer.heads, "num_key_value_heads": mixer.kv_heads or mixer.heads,
            "head_dim": mixer.head_width or width // mixer.heads}  # fmt: skip


def rope_out(mixer: Any) -> dict[str, Any]:
    """A mixer's rotary settings as transformers' `rope_parameters`."""
    if mixer.yarn == 1:
        return {"rope_type": "default", "rope_theta": mixer.rope_theta}
    return {"rope_type": "yarn", "rope_theta": mixer.rope_theta, "factor": mixer.yarn,
            "original_max_position_embeddings": mixer.yarn_context}  # fmt: skip


def rope_back(rope: dict[str, Any]) -> dict[str, Any] | None:
    """transformers' `rope_parameters` as the settings of a mixer, None where they are of another kind."""
    given = {key for key, value in rope.items() if value is not None}
    if rope["rope_type"] == "default" and rope.get("partial_rotary_factor", 1.0) == 1:
        return {"rope_theta": rope["rope_theta"]}
    if rope["rope_type"] != "yarn" or given - YARN or rope["factor"] is None or rope["factor"] <= 1:
        return None
    return {"rope_theta": rope["rope_theta"], "yarn": rope["factor"],
            "yarn_context": rope["original_max_position_embeddings"]}  # fmt: skip


def _dense(spec: ModelSpec, config_class: Any, norm: str, bias: bool = False) -> Any:
    mixers = {spec.mixer(number) for number in range(spec.layers)}
    mixer = next(iter(mixers))
    wanted = len(mixers) == 1 and mixer.kind == "attention" and plain_attention(mixer, qk_norm=norm, bias=bias)
    if not wanted or spec.ffn != MlpSpec(hidden=getattr(spec.ffn, "hidden", None)) or not plain(spec):
        return None
    return config_class(
        vocab_size=spec.vocabulary, hidden_size=spec.width, num_hidden_layers=spec.layers,
        intermediate_size=spec.ffn.hidden or 3 * spec.width, **sizes(mixer, spec.width),
        max_position_embeddings=spec.context, rms_norm_eps=spec.eps, tie_word_embeddings=spec.tied,
        rope_parameters=rope_out(mixer),
    )  # fmt: skip


def _dense_spec(config: Any, norm: Any, bias: bool = False) -> ModelSpec | None:
    layers = getattr(config, "layer_types", None) or []
    rope = rope_back(config.rope_parameters)
    odd = (getattr(config, "attention_bias", False), getattr(config, "mlp_bias", False), config.hidden_act != "silu",
           set(layers) - {"full_attention"})  # fmt: skip
    if rope is None or any(odd):
        return None
    mixer = AttentionSpec(heads=config.num_attention_heads, kv_heads=config.num_key_value_heads,
                          head_width=getattr(config, "head_dim", None), qk_norm=norm, bias=bias, **rope)  # fmt: skip
    return ModelSpec(layers=config.num_hidden_layers, width=config.hidden_size, vocabulary=config.vocab_size,
                     context=config.max_position_embeddings, tied=config.tie_word_embeddings, eps=config.rms_norm_eps,
                     mixers={"A": mixer}, ffn=MlpSpec(hidden=config.intermediate_size))  # fmt: skip


def names(spec: ModelSpec, layer: int) -> dict[str, str]:
    return LLAMA_NAMES


LLAMA = Adapter(lambda spec: _dense(spec, LlamaConfig, "none"), lambda config: _dense_spec(config, "none"), names)
QWEN3 = Adapter(lambda spec: _dense(spec, Qwen3Config, "head"), lambda config: _dense_spec(config, "head"), names)
QWEN2 = Adapter(lambda spec: _dense(spec, Qwen2Config, "none", True), lambda config: _dense_spec(config, "none", True),
                names)  # fmt: skip
