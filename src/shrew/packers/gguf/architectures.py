"""The architectures of llama.cpp that our models map to: what is said of each in a GGUF file, and what is read back.

A row of ARCHITECTURES serves the model types of transformers that it names. `values` are the keys under the
architecture's own prefix; `config` rebuilds the config of a type from them; `changes` are what is done to weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES
from torch import Tensor

from shrew.errors import FolderError, UnsupportedError
from shrew.packers.gguf.rows import (COLUMN, DECAY, DECAY_COLUMN, FLAT, PLUS_ONE, TAPS, TWICE, Change, by_heads,
                                     grouped, halves, renamed, rotated)  # fmt: skip

LONG = 2**20  # the context that is written for models without a limit
LLAMA3_DEFAULTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
RECURRENT = ("linear_attention", "mamba", "conv")


class Values(Mapping[str, Any]):
    """What a file says of its model, without the architecture's prefix; wrong types are refused."""

    def __init__(self, where: str, values: dict[str, Any], tensors: Mapping[str, Any]) -> None:
        self.where, self.values, self.tensors = where, values, tensors

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def __iter__(self) -> Any:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)

    def _one(self, key: str, kinds: tuple[type, ...], default: Any) -> Any:
        value = self.values.get(key, default)
        if value is None:
            raise FolderError(f"{self.where} does not say '{key}'; it is incomplete, fetch it again.")
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise FolderError(f"{self.where} says nothing usable of '{key}'; fetch it again.")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._one(key, (int,), default)
        if not 0 <= value < 2**31:
            raise FolderError(f"{self.where} says {value} for '{key}', which no model has.")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """The shortest decimal that is this 32-bit float: 1e-06, and not 9.99999997e-07."""
        value = float(str(np.float32(self._one(key, (int, float), default))))
        if not np.isfinite(value):
            raise FolderError(f"{self.where} says {value} for '{key}', which no model has.")
        return value

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._one(key, (bool,), default))

    def text(self, key: str, default: str = "") -> str:
        return str(self._one(key, (str,), default))

    def each(self, key: str, layers: int, default: int | None = None) -> list[int]:
        """A number for each layer, of a value that may be one for all."""
        value = self.values.get(key, default)
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "iub" or len(value) < layers:
                raise FolderError(f"{self.where} says nothing usable of '{key}'; fetch it again.")
            return [int(one) for one in value[:layers]]
        return [self.integer(key, default)] * layers


@dataclass(frozen=True)
class Architecture:
    arch: MODEL_ARCH
    types: tuple[str, ...]  # transformers' model types that are written so; the first is the one that is read back
    check: Callable[[Any], None]  # raises UnsupportedError for a config that llama.cpp cannot say
    values: Callable[[Any], dict[str, Any]]
    config: Callable[[Values], Any]
    changes: Callable[[Any], dict[str, Change]] = lambda config: {}
    extra: Callable[[Any], dict[str, Tensor]] = field(default=lambda config: {})  # tensors that are no weights

    @property
    def name(self) -> str:
        return MODEL_ARCH_NAMES[self.arch]


def refuse_unless(config: Any, **wanted: tuple[Any, ...]) -> None:
    """Refuse settings other than the `wanted` ones, of which the first is what a missing one means."""
    for key, allowed in wanted.items():
        value = getattr(config, key, allowed[0])
        if value not in allowed:
            raise UnsupportedError(f"llama.cpp's {config.model_type} knows {key} = "
                                   f"{' or '.join(map(str, allowed))}, and this model has {value}.")  # fmt: skip


def _width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _layers(config: Any) -> int:
    return int(config.num_hidden_layers)


def _recurrent(config: Any) -> list[bool]:
    return [kind in RECURRENT for kind in config.layer_types]


# --- rotary embeddings ------------------------------------------------------------------------------------------------


def rope_out(rope: dict[str, Any]) -> dict[str, Any]:
    """transformers' `rope_parameters` of one kind of layer as GGUF says them."""
    given = {key for key, value in rope.items() if value is not None} - {"rope_type", "rope_theta"}
    given -= {"partial_rotary_factor"}
    kind, found = rope["rope_type"], {"rope.freq_base": float(rope["rope_theta"])}
    known = {"default": set(), "linear": {"factor"}, "llama3": {"factor", *LLAMA3_DEFAULTS},
             "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}}  # fmt: skip
    odd = sorted(given - known.get(kind, set())) if kind != "default" else []
    if kind not in known or odd:
        raise UnsupportedError(f"rotary embeddings of type '{kind}'{' with ' + ', '.join(odd) if odd else ''} are not "
                               f"written to GGUF; known: {', '.join(known)}.")  # fmt: skip
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        for key in ("beta_fast", "beta_slow"):
            if rope.get(key) is not None:
                found[f"rope.scaling.yarn_{key}"] = float(rope[key])
    return found


def rope_back(values: Values) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": values.number("rope.freq_base", 10000.0)}
    kind = values.text("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise FolderError(f"{values.where} has rotary embeddings of type '{kind[:40]}', which Shrew does not read.")
    if kind != "none":
        rope |= {"rope_type": kind, "factor": values.number("rope.scaling.factor")}
    if kind == "yarn":
        odd = {"rope.scaling.attn_factor", "rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_attn_factor",
               "rope.scaling.yarn_ext_factor"} & set(values)  # fmt: skip
        if odd:
            raise FolderError(f"{values.where} sets '{min(odd)}', which Shrew does not read.")
        rope["original_max_position_embeddings"] = values.integer("rope.scaling.original_context_length")
        for key in ("beta_fast", "beta_slow"):
            if f"rope.scaling.yarn_{key}" in values:
                rope[key] = values.number(f"rope.scaling.yarn_{key}")
    return rope


def llama3_factors(rope: dict[str, Any], width: int) -> Tensor:
    """What Llama 3 divides each rotary frequency by: float32 [width / 2]."""
    wave = 2 * torch.pi * rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    context, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (context / wave - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    slow = torch.where(wave > context / low, torch.full_like(wave, factor), between)
    return torch.where(wave < context / high, torch.ones_like(wave), slow)


def _llama3(config: Any) -> dict[str, Tensor]:
    rope = config.rope_parameters
    return {"rope_freqs.weight": llama3_factors(rope, _width(config))} if rope["rope_type"] == "llama3" else {}


# --- what all have ----------------------------------------------------------------------------------------------------


def _common(config: Any, kv_heads: Any = None) -> dict[str, Any]:
    width = _width(config)
    return {
        "vocab_size": config.vocab_size, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "block_count": _layers(config),
        "feed_forward_length": config.intermediate_size, "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": kv_heads or config.num_key_value_heads,
        "attention.key_length": width, "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(getattr(config, "rms_norm_eps", None) or config.norm_eps),
        "rope.dimension_count": width,
    }  # fmt: skip


def _dense(config: Any) -> dict[str, Any]:
    return _common(config) | rope_out(config.rope_parameters)


def _shared(values: Values) -> dict[str, Any]:
    """The settings that every config class has."""
    heads = values.integer("attention.head_count")
    layers = values.integer("block_count")
    if layers > len(values.tensors):
        raise FolderError(f"{values.where} asks for {layers} layers and holds {len(values.tensors)} tensors.")
    kv_heads = max(values.each("attention.head_count_kv", layers, heads), default=0)
    width = values.integer("embedding_length")
    if not heads or not width or not layers or not kv_heads:
        raise FolderError(f"{values.where} describes a model without heads, width or layers; fetch it again.")
    return {
        "vocab_size": values.integer("vocab_size"), "hidden_size": width, "num_hidden_layers": layers,
        "max_position_embeddings": values.integer("context_length"), "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": values.each("feed_forward_length", 1)[0],
        "tie_word_embeddings": values.flag("tied", False), "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": None,
    }  # fmt: skip


def _head_dim(values: Values) -> int:
    width = values.integer("attention.key_length", values.integer("embedding_length") // values.integer("attention.head_count"))
    if width != values.integer("attention.value_length", width) or width % 2 or not width:
        raise FolderError(f"{values.where} has heads of odd or unequal widths, which Shrew does not read.")
    return width


def _eps(values: Values) -> float:
    return values.number("attention.layer_norm_rms_epsilon")


def _experts(config: Any, count: int) -> dict[str, Any]:
    return {"expert_count": count, "expert_used_count": config.num_experts_per_tok}


def _expert_changes() -> dict[str, Change]:
    return {"experts.gate_up_proj": halves("ffn_gate_exps.weight", "ffn_up_exps.weight"),
            "experts.down_proj": renamed("ffn_down_exps.weight")}  # fmt: skip


def _rotations(config: Any) -> dict[str, Change]:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return {f"self_attn.{part}_proj.{what}": rotated(count) for part, count in (("q", heads), ("k", kv_heads))
            for what in ("weight", "bias")}  # fmt: skip


def _full_attention(config: Any) -> None:
    """Refuse windows, where llama.cpp's architecture has none."""
    refuse_unless(config, hidden_act=("silu",))
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if layers or (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)):
        raise UnsupportedError(f"llama.cpp's {config.model_type} has no sliding window, and this model has one.")


# --- llama, mistral, mixtral ------------------------------------------------------------------------------------------


def _llama_values(config: Any) -> dict[str, Any]:
    experts = getattr(config, "num_local_experts", 0) or 0
    return _dense(config) | (_experts(config, experts) if experts else {})


def _llama_config(values: Values) -> Any:
    settings: dict[str, Any] = _shared(values) | {
        "head_dim": _head_dim(values), "rms_norm_eps": _eps(values), "rope_parameters": rope_back(values)}
    if experts := values.integer("expert_count", 0):
        return transformers.MixtralConfig(**settings, num_local_experts=experts, sliding_window=None,
                                          num_experts_per_tok=values.integer("expert_used_count"))  # fmt: skip
    if (entry := values.tensors.get("rope_freqs.weight")) is not None:
        factors = torch.from_numpy(np.array(entry)).float()
        rope = settings["rope_parameters"] | {"rope_type": "llama3", "factor": float(factors.max()), **LLAMA3_DEFAULTS}
        if not torch.allclose(llama3_factors(rope, settings["head_dim"]), factors, rtol=1e-5):
            raise FolderError(f"{values.where} scales its rotary frequencies in a way that Shrew does not read.")
        settings["rope_parameters"] = rope
    return transformers.LlamaConfig(**settings, attention_bias="blk.0.attn_q.bias" in values.tensors,
                                    mlp_bias="blk.0.ffn_up.bias" in values.tensors)  # fmt: skip


LLAMA = Architecture(MODEL_ARCH.LLAMA, ("llama", "mistral", "mixtral"), _full_attention, _llama_values, _llama_config,
                     lambda config: _rotations(config) | _expert_changes(), _llama3)  # fmt: skip


# --- qwen -------------------------------------------------------------------------------------------------------------


def _qwen_config(kind: Any, **more: Any) -> Callable[[Values], Any]:
    def config(values: Values) -> Any:
        settings = _shared(values) | {"rms_norm_eps": _eps(values), "rope_parameters": rope_back(values)}
        width = _head_dim(values)
        if kind is not transformers.Qwen2Config:
            settings["head_dim"] = width
        elif width * settings["num_attention_heads"] != settings["hidden_size"]:
            raise FolderError(f"{values.where} has heads of {width} channels, which qwen2 in transformers cannot say.")
        return kind(**settings, **more)

    return config


def _qwen3_check(config: Any) -> None:
    _full_attention(config)
    refuse_unless(config, attention_bias=(False,))


def _qwen3_moe_check(config: Any) -> None:
    _qwen3_check(config)
    refuse_unless(config, norm_topk_prob=(True,), decoder_sparse_step=(1,), mlp_only_layers=([], None))


def _qwen3_moe_values(config: Any) -> dict[str, Any]:
    return _dense(config) | _experts(config, config.num_experts) | {
        "expert_feed_forward_length": config.moe_intermediate_size}  # fmt: skip


def _qwen3_moe_config(values: Values) -> Any:
    used = values.integer("expert_used_count")
    inner = values.each("expert_feed_forward_length", 1, values.each("feed_forward_length", 1)[0] // max(used, 1))[0]
    return _qwen_config(transformers.Qwen3MoeConfig, num_experts=values.integer("expert_count"), num_experts_per_tok=used,
                        moe_intermediate_size=inner, norm_topk_prob=True)(values)  # fmt: skip


QWEN2 = Architecture(MODEL_ARCH.QWEN2, ("qwen2",), _full_attention, _dense, _qwen_config(transformers.Qwen2Config))
QWEN3 = Architecture(MODEL_ARCH.QWEN3, ("qwen3",), _qwen3_check, _dense, _qwen_config(transformers.Qwen3Config))
QWEN3_MOE = Architecture(MODEL_ARCH.QWEN3MOE, ("qwen3_moe",), _qwen3_moe_check, _qwen3_moe_values, _qwen3_moe_config,
                         lambda config: _expert_changes())  # fmt: skip


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
    recurrent = _recurrent(config)
    every = recurrent.index(False) + 1 if False in recurrent else len(recurrent) + 1
    if recurrent != [(layer + 1) % every != 0 for layer in range(len(recurrent))]:
        raise UnsupportedError("llama.cpp's qwen3_next has attention in every n-th layer, and this model elsewhere.")
    return every


def _qwen3_next_values(config: Any) -> dict[str, Any]:
    rotary = int(_width(config) * config.rope_parameters.get("partial_rotary_factor", 1.0))
    return _qwen3_moe_values(config) | {
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
        "ssm.conv_kernel": config.linear_conv_kernel_dim, "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads, "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_value_head_dim * config.linear_num_value_heads,
        "full_attention_interval": _interval(config), "rope.dimension_count": rotary,
    }  # fmt: skip


def _qwen3_next_config(values: Values) -> Any:
    layers, every, width = values.integer("block_count"), values.integer("full_attention_interval", 4), _head_dim(values)
    recurrent = values.each("attention.recurrent_layers", layers) if "attention.recurrent_layers" in values else [
        int((layer + 1) % max(every, 1) != 0) for layer in range(layers)]  # fmt: skip
    if values.integer("nextn_predict_layers", 0):
        raise FolderError(f"{values.where} holds layers that predict further tokens, which Shrew does not read.")
    rope = rope_back(values) | {"partial_rotary_factor": values.integer("rope.dimension_count", width) / width}
    state = values.integer("ssm.state_size")
    return transformers.Qwen3NextConfig(
        **_shared(values), head_dim=width, rms_norm_eps=_eps(values), rope_parameters=rope,
        layer_types=["linear_attention" if one else "full_attention" for one in recurrent],
        num_experts=values.integer("expert_count"), num_experts_per_tok=values.integer("expert_used_count"),
        moe_intermediate_size=values.each("expert_feed_forward_length", 1)[0],
        shared_expert_intermediate_size=values.integer("expert_shared_feed_forward_length"), norm_topk_prob=True,
        linear_conv_kernel_dim=values.integer("ssm.conv_kernel"), linear_key_head_dim=state, linear_value_head_dim=state,
        linear_num_key_heads=values.integer("ssm.group_count"), linear_num_value_heads=values.integer("ssm.time_step_rank"),
    )  # fmt: skip


def _qwen3_next_changes(config: Any) -> dict[str, Change]:
    keys, key, value = config.linear_num_key_heads, config.linear_key_head_dim, config.linear_value_head_dim
    share = config.linear_num_value_heads // keys * value
    return _expert_changes() | {
        "linear_attn.in_proj_qkvz.weight": by_heads(keys, [key, key, share, share], 3, "attn_qkv.weight",
                                                    "attn_gate.weight"),
        "linear_attn.A_log": DECAY, "linear_attn.conv1d.weight": TAPS, "linear_attn.norm.weight": renamed(
            "ssm_norm.weight"), "norm.weight": PLUS_ONE, "layernorm.weight": PLUS_ONE, "shared_expert_gate.weight": FLAT,
    }  # fmt: skip


QWEN3_NEXT = Architecture(MODEL_ARCH.QWEN3NEXT, ("qwen3_next",), _qwen3_next_check, _qwen3_next_values,
                          _qwen3_next_config, _qwen3_next_changes)  # fmt: skip


# --- gemma3, lfm2, olmoe ----------------------------------------------------------------------------------------------


def _gemma3_check(config: Any) -> None:
    refuse_unless(config, hidden_activation=("gelu_pytorch_tanh",), attention_bias=(False,),
                  attn_logit_softcapping=(None,), use_bidirectional_attention=(False, None))  # fmt: skip
    scale = config.hidden_size // config.num_attention_heads if _layers(config) == 62 else _width(config)
    refuse_unless(config, query_pre_attn_scalar=(scale, float(scale)))
    local = config.rope_parameters.get("sliding_attention") or {}
    whole = config.rope_parameters.get("full_attention") or {}
    if "sliding_attention" in config.layer_types and local.get("rope_type", "default") != "default":
        raise UnsupportedError("llama.cpp's gemma3 does not scale the rotary embeddings of windows; this model does.")
    if whole.get("rope_type") == "yarn":
        raise UnsupportedError("llama.cpp's gemma3 would apply YaRN to windows too, and this model does not.")


def _gemma3_values(config: Any) -> dict[str, Any]:
    local = [kind == "sliding_attention" for kind in config.layer_types]
    rope, found = config.rope_parameters, _common(config)
    found |= rope_out(rope["sliding_attention" if all(local) else "full_attention"])
    if any(local):
        found |= {"attention.sliding_window": config.sliding_window, "attention.sliding_window_pattern": local,
                  "rope.freq_base_swa": float(rope["sliding_attention"]["rope_theta"])}  # fmt: skip
    if config.final_logit_softcapping:
        found["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return found


def _gemma3_config(values: Values) -> Any:
    layers, settings = values.integer("block_count"), _shared(values) | {"head_dim": _head_dim(values)}
    window = values.integer("attention.sliding_window", 0)
    if "attention.sliding_window_pattern" in values and isinstance(values["attention.sliding_window_pattern"], np.ndarray):
        local = values.each("attention.sliding_window_pattern", layers)
    else:
        every = values.integer("attention.sliding_window_pattern", 6)
        local = [int(window > 0 and (layer + 1) % max(every, 1) != 0) for layer in range(layers)]
    theta = values.number("rope.freq_base_swa", 10000.0)
    rope = {"full_attention": rope_back(values), "sliding_attention": {"rope_type": "default", "rope_theta": theta}}
    scale = settings["hidden_size"] // settings["num_attention_heads"] if layers == 62 else settings["head_dim"]
    return transformers.Gemma3TextConfig(
        **settings, rms_norm_eps=_eps(values), rope_parameters=rope, query_pre_attn_scalar=scale,
        layer_types=["sliding_attention" if one else "full_attention" for one in local],
        final_logit_softcapping=values.number("final_logit_softcapping", 0.0) or None,
        **({"sliding_window": window} if window else {}),
    )  # fmt: skip


GEMMA3 = Architecture(MODEL_ARCH.GEMMA3, ("gemma3_text",), _gemma3_check, _gemma3_values, _gemma3_config,
                      lambda config: {"norm.weight": PLUS_ONE, "layernorm.weight": PLUS_ONE})  # fmt: skip


def _lfm2_check(config: Any) -> None:
    refuse_unless(config, conv_bias=(False,))
    if _width(config) * config.num_attention_heads != config.hidden_size:
        raise UnsupportedError("llama.cpp's lfm2 has heads that add up to its width, and this model has not.")


def _lfm2_hidden(config: Any) -> int:
    hidden = config.intermediate_size
    if config.block_auto_adjust_ff_dim:
        hidden = int(2 * hidden / 3)
        hidden = int((config.block_ffn_dim_multiplier or 1.0) * hidden)
        hidden = -(-hidden // config.block_multiple_of) * config.block_multiple_of
    return int(hidden)


def _lfm2_values(config: Any) -> dict[str, Any]:
    heads = [0 if one else config.num_key_value_heads for one in _recurrent(config)]
    return _common(config, heads) | rope_out(config.rope_parameters) | {
        "feed_forward_length": _lfm2_hidden(config), "shortconv.l_cache": config.conv_L_cache}  # fmt: skip


def _lfm2_config(values: Values) -> Any:
    heads = values.each("attention.head_count_kv", values.integer("block_count"))
    if values.integer("attention.sliding_window", 0):
        raise FolderError(f"{values.where} has sliding windows, which Shrew does not read in lfm2.")
    return transformers.Lfm2Config(
        **_shared(values), norm_eps=_eps(values), rope_parameters=rope_back(values), conv_bias=False,
        block_auto_adjust_ff_dim=False, conv_L_cache=values.integer("shortconv.l_cache"),
        layer_types=["full_attention" if one else "conv" for one in heads],
    )  # fmt: skip


LFM2 = Architecture(MODEL_ARCH.LFM2, ("lfm2",), _lfm2_check, _lfm2_values, _lfm2_config,
                    lambda config: {"conv.conv.weight": TAPS})  # fmt: skip


def _olmoe_check(config: Any) -> None:
    _full_attention(config)
    refuse_unless(config, attention_bias=(False,), clip_qkv=(None,), norm_topk_prob=(False,),
                  num_key_value_heads=(config.num_attention_heads,))  # fmt: skip
    if _width(config) * config.num_attention_heads != config.hidden_size:
        raise UnsupportedError("llama.cpp's olmoe has heads that add up to its width, and this model has not.")


def _olmoe_config(values: Values) -> Any:
    return transformers.OlmoeConfig(**_shared(values), rms_norm_eps=_eps(values), rope_parameters=rope_back(values),
                                    num_experts=values.integer("expert_count"), norm_topk_prob=False, clip_qkv=None,
                                    num_experts_per_tok=values.integer("expert_used_count"))  # fmt: skip


def _olmoe_changes(config: Any) -> dict[str, Change]:
    """Its output is always a tensor of its own."""
    return _expert_changes() | ({"embed_tokens.weight": TWICE} if config.tie_word_embeddings else {})


OLMOE = Architecture(MODEL_ARCH.OLMOE, ("olmoe",), _olmoe_check,
                     lambda config: _dense(config) | _experts(config, config.num_experts), _olmoe_config,
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
        "block_count": _layers(config), "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon,
        "ssm.conv_kernel": config.conv_kernel, "ssm.inner_size": inner, "ssm.state_size": config.state_size,
        "ssm.time_step_rank": config.num_heads, "ssm.group_count": config.n_groups,
    }  # fmt: skip


def _mamba2_config(values: Values) -> Any:
    heads, inner, width = values.integer("ssm.time_step_rank"), values.integer("ssm.inner_size"), values.integer("embedding_length")
    if not heads or not width or inner % heads or inner % width or values.integer("block_count") > len(values.tensors):
        raise FolderError(f"{values.where} has sizes that Mamba-2 in transformers cannot have; fetch it again.")
    context = values.integer("context_length", LONG)
    return transformers.Mamba2Config(
        vocab_size=values.integer("vocab_size"), hidden_size=width, num_hidden_layers=values.integer("block_count"),
        num_heads=heads, head_dim=inner // heads, expand=inner // width, state_size=values.integer("ssm.state_size"),
        n_groups=values.integer("ssm.group_count", 1), conv_kernel=values.integer("ssm.conv_kernel"), use_conv_bias=True,
        layer_norm_epsilon=_eps(values), tie_word_embeddings=values.flag("tied", False), residual_in_fp32=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
        **({"max_position_embeddings": context} if context != LONG else {}),
    )  # fmt: skip


def _mamba2_extra(config: Any) -> dict[str, Tensor]:
    channels = config.num_heads * config.head_dim + 2 * config.n_groups * config.state_size
    return _no_bias(config, [*range(_layers(config))], channels, config.use_conv_bias)


MAMBA2 = Architecture(MODEL_ARCH.MAMBA2, ("mamba2",), _mamba2_check, _mamba2_values, _mamba2_config,
                      lambda config: _mamba_changes(config.n_groups, "mixer"), _mamba2_extra)  # fmt: skip


def _granite_check(config: Any) -> None:
    refuse_unless(config, hidden_act=("silu",), attention_bias=(False,), mamba_proj_bias=(False,),
                  position_embedding_type=(None, "rope", "nope"), num_local_experts=(0,))  # fmt: skip
    if (config.rope_parameters or {}).get("rope_type", "default") != "default":
        raise UnsupportedError("granitemoehybrid with scaled rotary embeddings is not written to GGUF.")
    if any(_recurrent(config)) and config.mamba_n_heads * config.mamba_d_head != 2 * config.hidden_size:
        raise UnsupportedError("llama.cpp's granitehybrid has Mamba layers of twice the model's width, and this model "
                               f"has {config.mamba_n_heads * config.mamba_d_head} on {config.hidden_size}.")  # fmt: skip
    if tuple(config.time_step_limit or (0.0, float("inf"))) != (0.0, float("inf")):
        raise UnsupportedError("llama.cpp's granitehybrid does not limit its time steps, and this model does.")
    if _width(config) * config.num_attention_heads != config.hidden_size:
        raise UnsupportedError("llama.cpp's granitehybrid has heads that add up to its width; this model has not.")


def _granite_values(config: Any) -> dict[str, Any]:
    recurrent = _recurrent(config)
    heads = [0 if one else config.num_key_value_heads for one in recurrent]
    theta = float((config.rope_parameters or {}).get("rope_theta", 10000.0))
    found = _common(config, heads) | {
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
    layers, settings = values.integer("block_count"), _shared(values)
    if values.integer("expert_count", 0):
        raise FolderError(f"{values.where} is a Granite with experts, which Shrew does not read from GGUF.")
    heads = values.each("attention.head_count_kv", layers, settings["num_attention_heads"])
    if not all(heads):
        ssm, inner = values.integer("ssm.time_step_rank"), values.integer("ssm.inner_size")
        if not ssm or inner % ssm or inner % settings["hidden_size"]:
            raise FolderError(f"{values.where} has sizes that Mamba-2 layers cannot have; fetch it again.")
        settings |= {"mamba_n_heads": ssm, "mamba_d_head": inner // ssm, "mamba_conv_bias": True,
                     "mamba_expand": inner // settings["hidden_size"], "mamba_d_state": values.integer("ssm.state_size"),
                     "mamba_n_groups": values.integer("ssm.group_count"),
                     "mamba_d_conv": values.integer("ssm.conv_kernel")}  # fmt: skip
    else:  # no layer is of this kind: any sizes that the config accepts
        settings |= {"mamba_n_heads": 1, "mamba_d_head": settings["hidden_size"], "mamba_expand": 1}
    width = settings["hidden_size"] // settings["num_attention_heads"]
    rope = {"rope_type": "default", "rope_theta": values.number("rope.freq_base", 10000.0)}
    return transformers.GraniteMoeHybridConfig(
        **settings, shared_intermediate_size=settings["intermediate_size"], num_local_experts=0, num_experts_per_tok=0,
        rms_norm_eps=_eps(values), layer_types=["full_attention" if one else "linear_attention" for one in heads],
        position_embedding_type="rope" if values.flag("rope.scaling.finetuned", True) else None, rope_parameters=rope,
        attention_multiplier=values.number("attention.scale", width**-0.5),
        embedding_multiplier=values.number("embedding_scale", 1.0),
        residual_multiplier=values.number("residual_scale", 1.0), logits_scaling=values.number("logit_scale", 1.0),
    )  # fmt: skip


def _granite_changes(config: Any) -> dict[str, Change]:
    return _rotations(config) | _mamba_changes(config.mamba_n_groups, "mamba") | {
        "shared_mlp.input_linear.weight": halves("ffn_gate.weight", "ffn_up.weight"),
        "shared_mlp.output_linear.weight": renamed("ffn_down.weight")}  # fmt: skip


def _granite_extra(config: Any) -> dict[str, Tensor]:
    channels = config.mamba_n_heads * config.mamba_d_head + 2 * config.mamba_n_groups * config.mamba_d_state
    layers = [layer for layer, one in enumerate(_recurrent(config)) if one]
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
    if found is GRANITE_HYBRID and not any(_recurrent(config)):
        found = GRANITE
    found.check(config)
    return found
