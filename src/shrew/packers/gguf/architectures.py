"""The architectures of llama.cpp that our models map to: what is said of each in a GGUF file, and what is read back.

A row of ARCHITECTURES serves the model types of transformers that it names. `values` are the keys under the
architecture's own prefix; `config` rebuilds the config of a type from them; `changes` are what is done to weights.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from gguf import MODEL_ARCH
from torch import Tensor

from shrew.errors import FolderError, UnsupportedError
from shrew.packers.gguf.common import (
    LLAMA3_DEFAULTS,
    LONG,
    Architecture,
    Values,
    check_full_attention,
    common_values,
    dense_values,
    eps_of,
    expert_changes,
    expert_values,
    head_width,
    head_width_of,
    layer_count,
    llama3_extra,
    llama3_factors,
    recurrent_layers,
    refuse_unless,
    rope_back,
    rope_out,
    rotations,
    shared_settings,
)
from shrew.packers.gguf.rows import (
    COLUMN,
    DECAY,
    DECAY_COLUMN,
    FLAT,
    PLUS_ONE,
    TAPS,
    TWICE,
    Change,
    by_heads,
    grouped,
    halves,
    renamed,
)

# --- llama, mistral, mixtral ------------------------------------------------------------------------------------------


def _llama_values(config: Any) -> dict[str, Any]:
    experts = getattr(config, "num_local_experts", 0) or 0
    return dense_values(config) | (expert_values(config, experts) if experts else {})


def _llama_config(values: Values) -> Any:
    settings: dict[str, Any] = shared_settings(values) | {
        "head_dim": head_width_of(values), "rms_norm_eps": eps_of(values), "rope_parameters": rope_back(values)}
    if experts := values.whole("expert_count", 0):
        return transformers.MixtralConfig(**settings, num_local_experts=experts, sliding_window=None,
                                          num_experts_per_tok=values.whole("expert_used_count"))  # fmt: skip
    if (entry := values.tensors.get("rope_freqs.weight")) is not None:
        factors = torch.from_numpy(np.array(entry)).float()
        rope = settings["rope_parameters"] | {"rope_type": "llama3", "factor": float(factors.max()), **LLAMA3_DEFAULTS}
        if not torch.allclose(llama3_factors(rope, settings["head_dim"]), factors, rtol=1e-5):
            raise FolderError(f"{values.where} scales its rotary frequencies in a way that Shrew does not read.")
        settings["rope_parameters"] = rope
    return transformers.LlamaConfig(**settings, attention_bias="blk.0.attn_q.bias" in values.tensors,
                                    mlp_bias="blk.0.ffn_up.bias" in values.tensors)  # fmt: skip


LLAMA = Architecture(MODEL_ARCH.LLAMA, ("llama", "mistral", "mixtral"), check_full_attention, _llama_values,
                     _llama_config, lambda config: rotations(config) | expert_changes(), llama3_extra)  # fmt: skip


# --- qwen -------------------------------------------------------------------------------------------------------------


def _qwen_config(kind: Any, **more: Any) -> Callable[[Values], Any]:
    def config(values: Values) -> Any:
        settings = shared_settings(values) | {"rms_norm_eps": eps_of(values), "rope_parameters": rope_back(values)}
        width = head_width_of(values)
        if kind is not transformers.Qwen2Config:
            settings["head_dim"] = width
        elif width * settings["num_attention_heads"] != settings["hidden_size"]:
            raise FolderError(f"{values.where} has heads of {width} channels, which qwen2 in transformers cannot say.")
        return kind(**settings, **more)

    return config


def _qwen3_check(config: Any) -> None:
    check_full_attention(config)
    refuse_unless(config, attention_bias=(False,))


def _qwen3_moe_check(config: Any) -> None:
    _qwen3_check(config)
    refuse_unless(config, norm_topk_prob=(True,), decoder_sparse_step=(1,), mlp_only_layers=([], None))


def _qwen3_moe_values(config: Any) -> dict[str, Any]:
    return dense_values(config) | expert_values(config, config.num_experts) | {
        "expert_feed_forward_length": config.moe_intermediate_size}  # fmt: skip


def _qwen3_moe_config(values: Values) -> Any:
    used = values.whole("expert_used_count")
    inner = values.each("expert_feed_forward_length", 1, values.each("feed_forward_length", 1)[0] // max(used, 1))[0]
    return _qwen_config(transformers.Qwen3MoeConfig, num_experts=values.whole("expert_count"), num_experts_per_tok=used,
                        moe_intermediate_size=inner, norm_topk_prob=True)(values)  # fmt: skip


QWEN2 = Architecture(MODEL_ARCH.QWEN2, ("qwen2",), check_full_attention, dense_values,
                     _qwen_config(transformers.Qwen2Config))  # fmt: skip
QWEN3 = Architecture(MODEL_ARCH.QWEN3, ("qwen3",), _qwen3_check, dense_values, _qwen_config(transformers.Qwen3Config))
QWEN3_MOE = Architecture(MODEL_ARCH.QWEN3MOE, ("qwen3_moe",), _qwen3_moe_check, _qwen3_moe_values, _qwen3_moe_config,
                         lambda config: expert_changes())  # fmt: skip


def _qwen3_next_check(config: Any) -> None:
    refuse_unless(config, hidden_act=("silu",), attention_bias=(False,), norm_topk_prob=(True,),
                  decoder_sparse_step=(1,), mlp_only_layers=([], None),
                  linear_value_head_dim=(config.linear_key_head_dim,))  # fmt: skip
    if not config.num_experts or not config.shared_expert_intermediate_size:
        raise UnsupportedError("llama.cpp's qwen3_next has experts and a shared one in every layer, and this model "
                               "has not.")  # fmt: skip
    _interval(config)


def _interval(config: Any) -> int:
    """Every so many layers one has attention; llama.cpp releases read no other pattern."""
    recurrent = recurrent_layers(config)
    every = recurrent.index(False) + 1 if False in recurrent else len(recurrent) + 1
    if recurrent != [(layer + 1) % every != 0 for layer in range(len(recurrent))]:
        raise UnsupportedError("llama.cpp's qwen3_next has attention in every n-th layer, and this model elsewhere.")
    return every


def _qwen3_next_values(config: Any) -> dict[str, Any]:
    rotary = int(head_width(config) * config.rope_parameters.get("partial_rotary_factor", 1.0))
    return _qwen3_moe_values(config) | {
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
        "ssm.conv_kernel": config.linear_conv_kernel_dim, "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads, "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_value_head_dim * config.linear_num_value_heads,
        "full_attention_interval": _interval(config), "rope.dimension_count": rotary,
    }  # fmt: skip


def _qwen3_next_config(values: Values) -> Any:
    layers, every = values.layers(), values.whole("full_attention_interval", 4)
    width = head_width_of(values)
    recurrent = values.each("attention.recurrent_layers", layers) if "attention.recurrent_layers" in values.found else [
        int((layer + 1) % max(every, 1) != 0) for layer in range(layers)]  # fmt: skip
    if values.whole("nextn_predict_layers", 0):
        raise FolderError(f"{values.where} holds layers that predict further tokens, which Shrew does not read.")
    rope = rope_back(values) | {"partial_rotary_factor": values.whole("rope.dimension_count", width) / width}
    state = values.whole("ssm.state_size")
    return transformers.Qwen3NextConfig(
        **shared_settings(values), head_dim=width, rms_norm_eps=eps_of(values), rope_parameters=rope,
        layer_types=["linear_attention" if one else "full_attention" for one in recurrent],
        num_experts=values.whole("expert_count"), num_experts_per_tok=values.whole("expert_used_count"),
        moe_intermediate_size=values.each("expert_feed_forward_length", 1)[0],
        shared_expert_intermediate_size=values.whole("expert_shared_feed_forward_length"), norm_topk_prob=True,
        linear_conv_kernel_dim=values.whole("ssm.conv_kernel"), linear_key_head_dim=state, linear_value_head_dim=state,
        linear_num_key_heads=values.whole("ssm.group_count"), linear_num_value_heads=values.whole("ssm.time_step_rank"),
    )  # fmt: skip


def _qwen3_next_changes(config: Any) -> dict[str, Change]:
    keys, key, value = config.linear_num_key_heads, config.linear_key_head_dim, config.linear_value_head_dim
    share = config.linear_num_value_heads // keys * value
    return expert_changes() | {
        "linear_attn.in_proj_qkvz.weight": by_heads(keys, [key, key, share, share], 3, "attn_qkv.weight",
                                                    "attn_gate.weight"),
        "linear_attn.A_log": DECAY, "linear_attn.conv1d.weight": TAPS,
        "linear_attn.norm.weight": renamed("ssm_norm.weight"), "norm.weight": PLUS_ONE, "layernorm.weight": PLUS_ONE,
        "shared_expert_gate.weight": FLAT,
    }  # fmt: skip


QWEN3_NEXT = Architecture(MODEL_ARCH.QWEN3NEXT, ("qwen3_next",), _qwen3_next_check, _qwen3_next_values,
                          _qwen3_next_config, _qwen3_next_changes)  # fmt: skip


# --- gemma3, lfm2, olmoe ----------------------------------------------------------------------------------------------


def _gemma3_check(config: Any) -> None:
    refuse_unless(config, hidden_activation=("gelu_pytorch_tanh",), attention_bias=(False,),
                  attn_logit_softcapping=(None,), use_bidirectional_attention=(False, None))  # fmt: skip
    scale = config.hidden_size // config.num_attention_heads if layer_count(config) == 62 else head_width(config)
    refuse_unless(config, query_pre_attn_scalar=(scale, float(scale)))
    local = config.rope_parameters.get("sliding_attention") or {}
    whole = config.rope_parameters.get("full_attention") or {}
    if "sliding_attention" in config.layer_types and local.get("rope_type", "default") != "default":
        raise UnsupportedError("llama.cpp's gemma3 does not scale the rotary embeddings of windows; this model does.")
    if whole.get("rope_type") == "yarn":
        raise UnsupportedError("llama.cpp's gemma3 would apply YaRN to windows too, and this model does not.")


def _gemma3_values(config: Any) -> dict[str, Any]:
    local = [kind == "sliding_attention" for kind in config.layer_types]
    rope, found = config.rope_parameters, common_values(config)
    found |= rope_out(rope["sliding_attention" if all(local) else "full_attention"])
    if any(local):
        found |= {"attention.sliding_window": config.sliding_window, "attention.sliding_window_pattern": local,
                  "rope.freq_base_swa": float(rope["sliding_attention"]["rope_theta"])}  # fmt: skip
    if config.final_logit_softcapping:
        found["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return found


def _gemma3_config(values: Values) -> Any:
    layers, settings = values.layers(), shared_settings(values) | {"head_dim": head_width_of(values)}
    window = values.whole("attention.sliding_window", 0)
    pattern = "attention.sliding_window_pattern"
    if isinstance(values.found.get(pattern), np.ndarray):
        local = values.each(pattern, layers)
    else:
        every = values.whole(pattern, 6)
        local = [int(window > 0 and (layer + 1) % max(every, 1) != 0) for layer in range(layers)]
    theta = values.number("rope.freq_base_swa", 10000.0)
    rope = {"full_attention": rope_back(values), "sliding_attention": {"rope_type": "default", "rope_theta": theta}}
    scale = settings["hidden_size"] // settings["num_attention_heads"] if layers == 62 else settings["head_dim"]
    return transformers.Gemma3TextConfig(
        **settings, rms_norm_eps=eps_of(values), rope_parameters=rope, query_pre_attn_scalar=scale,
        layer_types=["sliding_attention" if one else "full_attention" for one in local],
        final_logit_softcapping=values.number("final_logit_softcapping", 0.0) or None,
        **({"sliding_window": window} if window else {}),
    )  # fmt: skip


GEMMA3 = Architecture(MODEL_ARCH.GEMMA3, ("gemma3_text",), _gemma3_check, _gemma3_values, _gemma3_config,
                      lambda config: {"norm.weight": PLUS_ONE, "layernorm.weight": PLUS_ONE})  # fmt: skip


def _lfm2_check(config: Any) -> None:
    refuse_unless(config, conv_bias=(False,))
    if head_width(config) * config.num_attention_heads != config.hidden_size:
        raise UnsupportedError("llama.cpp's lfm2 has heads that add up to its width, and this model has not.")


def _lfm2_hidden(config: Any) -> int:
    hidden = config.intermediate_size
    if config.block_auto_adjust_ff_dim:
        hidden = int(2 * hidden / 3)
        hidden = int((config.block_ffn_dim_multiplier or 1.0) * hidden)
        hidden = -(-hidden // config.block_multiple_of) * config.block_multiple_of
    return int(hidden)


def _lfm2_values(config: Any) -> dict[str, Any]:
    heads = [0 if one else config.num_key_value_heads for one in recurrent_layers(config)]
    return common_values(config, heads) | rope_out(config.rope_parameters) | {
        "feed_forward_length": _lfm2_hidden(config), "shortconv.l_cache": config.conv_L_cache}  # fmt: skip


def _lfm2_config(values: Values) -> Any:
    heads = values.each("attention.head_count_kv", values.layers())
    if values.whole("attention.sliding_window", 0):
        raise FolderError(f"{values.where} has sliding windows, which Shrew does not read in lfm2.")
    return transformers.Lfm2Config(
        **shared_settings(values), norm_eps=eps_of(values), rope_parameters=rope_back(values), conv_bias=False,
        block_auto_adjust_ff_dim=False, conv_L_cache=values.whole("shortconv.l_cache"),
        layer_types=["full_attention" if one else "conv" for one in heads],
    )  # fmt: skip


LFM2 = Architecture(MODEL_ARCH.LFM2, ("lfm2",), _lfm2_check, _lfm2_values, _lfm2_config,
                    lambda config: {"conv.conv.weight": TAPS})  # fmt: skip


def _olmoe_check(config: Any) -> None:
    check_full_attention(config)
    refuse_unless(config, attention_bias=(False,), clip_qkv=(None,), norm_topk_prob=(False,),
                  num_key_value_heads=(config.num_attention_heads,))  # fmt: skip
    if head_width(config) * config.num_attention_heads != config.hidden_size:
        raise UnsupportedError("llama.cpp's olmoe has heads that add up to its width, and this model has not.")


def _olmoe_config(values: Values) -> Any:
    return transformers.OlmoeConfig(
        **shared_settings(values), rms_norm_eps=eps_of(values), rope_parameters=rope_back(values), norm_topk_prob=False,
        clip_qkv=None, num_experts=values.whole("expert_count"), num_experts_per_tok=values.whole("expert_used_count"),
    )  # fmt: skip


def _olmoe_changes(config: Any) -> dict[str, Change]:
    """Its output is always a tensor of its own."""
    return expert_changes() | ({"embed_tokens.weight": TWICE} if config.tie_word_embeddings else {})


OLMOE = Architecture(MODEL_ARCH.OLMOE, ("olmoe",), _olmoe_check,
                     lambda config: dense_values(config) | expert_values(config, config.num_experts), _olmoe_config,
                     _olmoe_changes)  # fmt: skip


# --- mamba2 and granite -----------------------------------------------------------------------------------------------


def _mamba_changes(groups: int, part: str) -> dict[str, Change]:
    return {f"{part}.conv1d.weight": TAPS, f"{part}.A_log": DECAY_COLUMN, f"{part}.D": COLUMN,
            f"{part}.norm.weight": grouped(groups)}  # fmt: skip


def _no_bias(config: Any, layers: list[int], channels: int, given: bool) -> dict[str, Tensor]:
    """llama.cpp adds a bias to every convolution: zeros where the model has none."""
    zeros = torch.zeros(channels)
    return {} if given else {f"blk.{layer}.ssm_conv1d.bias": zeros for layer in layers}


def _mamba2_check(config: Any) -> None:
    refuse_unless(config, hidden_act=("silu",), use_bias=(False,))
    if tuple(config.time_step_limit) != (0.0, float("inf")):
        raise UnsupportedError("llama.cpp's mamba2 does not limit its time steps, and this model does.")


def _mamba2_values(config: Any) -> dict[str, Any]:
    inner = config.num_heads * config.head_dim
    return {
        "vocab_size": config.vocab_size, "context_length": getattr(config, "max_position_embeddings", LONG),
        "embedding_length": config.hidden_size, "feed_forward_length": 0, "attention.head_count": 0,
        "block_count": layer_count(config), "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon,
        "ssm.conv_kernel": config.conv_kernel, "ssm.inner_size": inner, "ssm.state_size": config.state_size,
        "ssm.time_step_rank": config.num_heads, "ssm.group_count": config.n_groups,
    }  # fmt: skip


def _mamba2_config(values: Values) -> Any:
    heads, inner = values.whole("ssm.time_step_rank"), values.whole("ssm.inner_size")
    width = values.whole("embedding_length")
    if not heads or not width or inner % heads or inner % width:
        raise FolderError(f"{values.where} has sizes that Mamba-2 in transformers cannot have; fetch it again.")
    context = values.whole("context_length", LONG)
    return transformers.Mamba2Config(
        vocab_size=values.whole("vocab_size"), hidden_size=width, num_hidden_layers=values.layers(),
        num_heads=heads, head_dim=inner // heads, expand=inner // width, state_size=values.whole("ssm.state_size"),
        n_groups=values.whole("ssm.group_count", 1), conv_kernel=values.whole("ssm.conv_kernel"), use_conv_bias=True,
        layer_norm_epsilon=eps_of(values), tie_word_embeddings=values.flag("tied", False), residual_in_fp32=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
        **({"max_position_embeddings": context} if context != LONG else {}),
    )  # fmt: skip


def _mamba2_extra(config: Any) -> dict[str, Tensor]:
    channels = config.num_heads * config.head_dim + 2 * config.n_groups * config.state_size
    return _no_bias(config, [*range(layer_count(config))], channels, config.use_conv_bias)


MAMBA2 = Architecture(MODEL_ARCH.MAMBA2, ("mamba2",), _mamba2_check, _mamba2_values, _mamba2_config,
                      lambda config: _mamba_changes(config.n_groups, "mixer"), _mamba2_extra)  # fmt: skip


def _granite_check(config: Any) -> None:
    refuse_unless(config, hidden_act=("silu",), attention_bias=(False,), mamba_proj_bias=(False,),
                  position_embedding_type=(None, "rope", "nope"), num_local_experts=(0,))  # fmt: skip
    if (config.rope_parameters or {}).get("rope_type", "default") != "default":
        raise UnsupportedError("granitemoehybrid with scaled rotary embeddings is not written to GGUF.")
    if any(recurrent_layers(config)) and config.mamba_n_heads * config.mamba_d_head != 2 * config.hidden_size:
        raise UnsupportedError("llama.cpp's granitehybrid has Mamba layers of twice the model's width; this model "
                               f"has {config.mamba_n_heads * config.mamba_d_head} on {config.hidden_size}")  # fmt: skip
    if tuple(config.time_step_limit or (0.0, float("inf"))) != (0.0, float("inf")):
        raise UnsupportedError("llama.cpp's granitehybrid does not limit its time steps, and this model does.")
    if head_width(config) * config.num_attention_heads != config.hidden_size:
        raise UnsupportedError("llama.cpp's granitehybrid has heads that add up to its width; this model has not.")


def _granite_values(config: Any) -> dict[str, Any]:
    recurrent = recurrent_layers(config)
    heads = [0 if one else config.num_key_value_heads for one in recurrent]
    theta = float((config.rope_parameters or {}).get("rope_theta", 10000.0))
    found = common_values(config, heads) | {
        "feed_forward_length": config.shared_intermediate_size, "rope.freq_base": theta,
        "rope.scaling.finetuned": config.position_embedding_type == "rope",
        "attention.scale": float(config.attention_multiplier), "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier), "logit_scale": float(config.logits_scaling),
    }  # fmt: skip
    if any(recurrent):
        found |= {
            "ssm.conv_kernel": config.mamba_d_conv, "ssm.state_size": config.mamba_d_state,
            "ssm.group_count": config.mamba_n_groups, "ssm.time_step_rank": config.mamba_n_heads,
            "ssm.inner_size": config.mamba_n_heads * config.mamba_d_head,
        }  # fmt: skip
    return found


def _granite_config(values: Values) -> Any:
    layers, settings = values.layers(), shared_settings(values)
    if values.whole("expert_count", 0):
        raise FolderError(f"{values.where} is a Granite with experts, which Shrew does not read from GGUF.")
    heads = values.each("attention.head_count_kv", layers, settings["num_attention_heads"])
    if not all(heads):
        ssm, inner = values.whole("ssm.time_step_rank"), values.whole("ssm.inner_size")
        if not ssm or inner % ssm or inner % settings["hidden_size"]:
            raise FolderError(f"{values.where} has sizes that Mamba-2 layers cannot have; fetch it again.")
        settings |= {"mamba_n_heads": ssm, "mamba_d_head": inner // ssm, "mamba_conv_bias": True,
                     "mamba_expand": inner // settings["hidden_size"], "mamba_d_state": values.whole("ssm.state_size"),
                     "mamba_n_groups": values.whole("ssm.group_count"),
                     "mamba_d_conv": values.whole("ssm.conv_kernel")}  # fmt: skip
    else:  # no layer is of this kind: any sizes that the config accepts
        settings |= {"mamba_n_heads": 1, "mamba_d_head": settings["hidden_size"], "mamba_expand": 1}
    width = settings["hidden_size"] // settings["num_attention_heads"]
    rope = {"rope_type": "default", "rope_theta": values.number("rope.freq_base", 10000.0)}
    return transformers.GraniteMoeHybridConfig(
        **settings, shared_intermediate_size=settings["intermediate_size"], num_local_experts=0, num_experts_per_tok=0,
        rms_norm_eps=eps_of(values), layer_types=["full_attention" if one else "linear_attention" for one in heads],
        position_embedding_type="rope" if values.flag("rope.scaling.finetuned", True) else None, rope_parameters=rope,
        attention_multiplier=values.number("attention.scale", width**-0.5),
        embedding_multiplier=values.number("embedding_scale", 1.0),
        residual_multiplier=values.number("residual_scale", 1.0), logits_scaling=values.number("logit_scale", 1.0),
    )  # fmt: skip


def _granite_changes(config: Any) -> dict[str, Change]:
    return rotations(config) | _mamba_changes(config.mamba_n_groups, "mamba") | {
        "shared_mlp.input_linear.weight": halves("ffn_gate.weight", "ffn_up.weight"),
        "shared_mlp.output_linear.weight": renamed("ffn_down.weight")}  # fmt: skip


def _granite_extra(config: Any) -> dict[str, Tensor]:
    channels = config.mamba_n_heads * config.mamba_d_head + 2 * config.mamba_n_groups * config.mamba_d_state
    layers = [layer for layer, one in enumerate(recurrent_layers(config)) if one]
    return _no_bias(config, layers, channels, config.mamba_conv_bias)


GRANITE_HYBRID = Architecture(MODEL_ARCH.GRANITE_HYBRID, ("granitemoehybrid",), _granite_check, _granite_values,
                              _granite_config, _granite_changes, _granite_extra)  # fmt: skip
GRANITE = Architecture(MODEL_ARCH.GRANITE, (), _granite_check, _granite_values, _granite_config, _granite_changes)

ARCHITECTURES = (LLAMA, QWEN2, QWEN3, QWEN3_MOE, QWEN3_NEXT, GEMMA3, LFM2, OLMOE, MAMBA2, GRANITE_HYBRID, GRANITE)


def for_config(config: Any) -> Architecture:
    """The architecture that says a transformers config. Raises UnsupportedError."""
    found = next((one for one in ARCHITECTURES if config.model_type in one.types), None)
    if found is None:
        known = ", ".join(sorted(kind for one in ARCHITECTURES for kind in one.types))
        raise UnsupportedError(f"models of type '{config.model_type}' are not written to GGUF; known: {known}.")
    rope = config.rope_parameters if hasattr(config, "rope_parameters") else None
    for part in [rope or {}, *(one for one in (rope or {}).values() if isinstance(one, dict))]:
        if part.get("partial_rotary_factor", 1.0) != 1 and found is not QWEN3_NEXT:
            raise UnsupportedError(f"llama.cpp's {found.name} rotates whole heads, and this model a part of each.")
    if found is GRANITE_HYBRID and not any(recurrent_layers(config)):
        found = GRANITE
    found.check(config)
    return found
