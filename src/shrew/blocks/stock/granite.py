"""granitemoehybrid without experts: layers of Mamba-2 or of attention, each with the same gated MLP (Granite 4).

transformers' class cannot run without an attention layer, so models without one are not saved as this type.
"""

from dataclasses import replace
from typing import Any

import torch
from transformers import GraniteMoeHybridConfig

from shrew.blocks.attention import AttentionSpec
from shrew.blocks.mlp import MlpSpec
from shrew.blocks.model import ModelSpec
from shrew.blocks.stock.adapter import Adapter, Weights
from shrew.blocks.stock.dense import plain
from shrew.blocks.stock.mamba2 import PARTS, conv_back, conv_out, ssm, ssm_spec

STACKED, GATE, UP = "shared_mlp.input_linear.weight", "shared_mlp.gate_proj.weight", "shared_mlp.up_proj.weight"


def _attention(mixer: Any, width: int) -> AttentionSpec | None:
    """The mixer with every default said, if Granite's attention can say it."""
    if mixer.kind != "attention" or (mixer.head_width or width // mixer.heads) * mixer.heads != width:
        return None
    found = replace(mixer, kv_heads=mixer.kv_heads or mixer.heads, head_width=width // mixer.heads,
                    scale=mixer.scale or (width // mixer.heads) ** -0.5)  # fmt: skip
    wanted = AttentionSpec(heads=found.heads, kv_heads=found.kv_heads, head_width=found.head_width, scale=found.scale,
                           rope_theta=found.rope_theta, rotary_share=found.rotary_share)  # fmt: skip
    return found if found == wanted and found.rotary_share in (0, 1) else None


def _config(spec: ModelSpec) -> GraniteMoeHybridConfig | None:
    each = [spec.mixer(number) for number in range(spec.layers)]
    linear = [mixer.kind == "linear" for mixer in each]
    found = [ssm(mixer, spec.width) or _attention(mixer, spec.width) for mixer in each]
    if None in found or all(linear) or len(set(found)) > len(set(linear)) or not isinstance(spec.ffn, MlpSpec):
        return None
    unscaled = replace(spec, embedding_scale=1.0, residual_scale=1.0, logit_scale=1.0)
    if spec.ffn != MlpSpec(hidden=spec.ffn.hidden) or not plain(unscaled) or not spec.logit_scale:
        return None
    unused = ssm_spec(1, 1, spec.width, 1, 4, True, False, 64)  # where no layer is linear: any that the config accepts
    mamba: Any = next((mixer for mixer in found if mixer and mixer.kind == "linear"), unused)
    attention: Any = next(mixer for mixer in found if mixer and mixer.kind == "attention")
    return GraniteMoeHybridConfig(
        vocab_size=spec.vocabulary, hidden_size=spec.width, num_hidden_layers=spec.layers, num_local_experts=0,
        num_experts_per_tok=0, shared_intermediate_size=spec.ffn.hidden or 3 * spec.width,
        num_attention_heads=attention.heads, num_key_value_heads=attention.kv_heads,
        attention_multiplier=attention.scale, position_embedding_type="rope" if attention.rotary_share else None,
        rope_parameters={"rope_type": "default", "rope_theta": attention.rope_theta},
        max_position_embeddings=spec.context, rms_norm_eps=spec.eps, tie_word_embeddings=spec.tied,
        embedding_multiplier=spec.embedding_scale, residual_multiplier=spec.residual_scale,
        logits_scaling=1 / spec.logit_scale,
        layer_types=["linear_attention" if it else "full_attention" for it in linear],
        mamba_n_heads=mamba.heads, mamba_d_head=mamba.head_width, mamba_d_state=mamba.state,
        mamba_expand=mamba.heads * mamba.head_width // spec.width, mamba_n_groups=mamba.groups,
        mamba_d_conv=mamba.conv, mamba_conv_bias=mamba.conv_bias, mamba_proj_bias=mamba.bias,
        mamba_chunk_size=mamba.chunk,
    )  # fmt: skip


def _spec(config: Any) -> ModelSpec | None:
    width, heads, rope = config.hidden_size, config.num_attention_heads, config.rope_parameters or {}
    odd = (config.num_local_experts, config.attention_bias, config.hidden_act != "silu", config.mamba_d_conv < 2,
           rope.get("rope_type", "default") != "default", width % heads,
           (getattr(config, "head_dim", None) or width // heads) != width // heads,
           tuple(config.time_step_limit or ()) != (0.0, float("inf")))  # fmt: skip
    if any(odd):
        return None
    attention = AttentionSpec(heads=heads, kv_heads=config.num_key_value_heads, head_width=width // heads,
                              rope_theta=rope.get("rope_theta", 10000.0), scale=config.attention_multiplier,
                              rotary_share=float(config.position_embedding_type == "rope"))  # fmt: skip
    mamba = ssm_spec(config.mamba_n_heads, config.mamba_d_state, config.mamba_d_head, config.mamba_n_groups,
                     config.mamba_d_conv, config.mamba_conv_bias, config.mamba_proj_bias,
                     config.mamba_chunk_size)  # fmt: skip
    pattern = "".join("L" if kind == "linear_attention" else "A" for kind in config.layer_types)
    mixers = {letter: {"A": attention, "L": mamba}[letter] for letter in sorted(set(pattern))}
    return ModelSpec(
        pattern=pattern, layers=config.num_hidden_layers, width=width, vocabulary=config.vocab_size,
        context=config.max_position_embeddings, tied=config.tie_word_embeddings, eps=config.rms_norm_eps,
        embedding_scale=config.embedding_multiplier, residual_scale=config.residual_multiplier,
        logit_scale=1 / config.logits_scaling, mixers=mixers, ffn=MlpSpec(hidden=config.shared_intermediate_size),
    )  # fmt: skip


def _names(spec: ModelSpec, layer: int) -> dict[str, str]:
    mixer = "mamba" if spec.mixer(layer).kind == "linear" else "self_attn"
    names = {"mixer_norm": "input_layernorm", "mixer": mixer, "ffn_norm": "post_attention_layernorm",
             "ffn": "shared_mlp", "ffn.down_proj": "shared_mlp.output_linear"}  # fmt: skip
    return names | ({f"mixer.{ours}": f"mamba.{theirs}" for ours, theirs in PARTS.items()} if mixer == "mamba" else {})


def _out(spec: ModelSpec, weights: Weights) -> Weights:
    """Gate and up stand in one matrix."""
    found = conv_out(weights)
    for layer in range(spec.layers):
        start = f"model.layers.{layer}."
        found[start + STACKED] = torch.cat([found.pop(start + GATE), found.pop(start + UP)])
    return found


def _back(spec: ModelSpec, weights: Weights) -> Weights:
    found = conv_back(weights)
    for layer in range(spec.layers):
        start = f"model.layers.{layer}."
        found[start + GATE], found[start + UP] = found.pop(start + STACKED).chunk(2)
    return found


GRANITE = Adapter(_config, _spec, _names, _out, _back)
